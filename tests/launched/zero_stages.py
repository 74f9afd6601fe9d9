"""Launched by test_zero.py and test_compilation.py: one run in several ways, each in its own folder.

$CASES: a comma list of a ZeRO stage and, after plus signs, options that are switched on.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from softmask_fast import train
from softmask_fast.training import launch as launching
from softmask_fast.training.options import parse_arguments

config, launch = parse_arguments(sys.argv[1:])
launching.start_distributed(launch)
root = Path(config.train.output_dir)
stop = launching.StopRequest()
for case in os.environ["CASES"].split(","):
    stage, *options = case.split("+")
    config, _ = parse_arguments(sys.argv[1:] + [text for name in options for text in (f"--{name}", "true")])
    config = replace(config, train=replace(config.train, output_dir=str(root / case)))
    config, deepspeed_config, output = launching.prepare_run(config, launch)
    # no parameter is small enough to stay whole on every rank under stage 3
    deepspeed_config["zero_optimization"] = {"stage": int(stage), "stage3_param_persistence_threshold": 0}
    assert train.build_trainer(config, deepspeed_config, output, stop).train()
    dist.barrier()

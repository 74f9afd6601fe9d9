"""Launched by test_zero.py and test_compilation.py: one run in several ways, each in its own folder.

$CASES, in JSON: name of the folder -> its ZeRO `stage`, and options of its own.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from softmask_fast import train
from softmask_fast.training import launch as launching
from softmask_fast.training.options import parse_arguments

config, launch = parse_arguments(sys.argv[1:])
launching.start_distributed(launch)
root = Path(config.train.output_dir)
stop = launching.StopRequest()
for name, own in json.loads(os.environ["CASES"]).items():
    stage = own.pop("stage")
    flags = [text for option, value in own.items() for text in (f"--{option}", str(value))]
    config, _ = parse_arguments(sys.argv[1:] + flags)
    config = replace(config, train=replace(config.train, output_dir=str(root / name)))
    config, deepspeed_config, output = launching.prepare_run(config, launch)
    # no parameter is small enough to stay whole on every rank under stage 3
    deepspeed_config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    torch.compiler.reset()  # each compiles for itself
    assert train.build_trainer(config, deepspeed_config, output, stop).train()
    dist.barrier()

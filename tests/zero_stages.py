"""Launched by test_zero.py: one run in several ways, each in a folder of its own. $CASES: a comma list of a ZeRO stage
and, behind plus signs, options that are switched on."""

import os
import sys
from pathlib import Path

import torch.distributed as dist

from softmask_fast import train
from softmask_fast.options import parse_arguments
from softmask_fast.training import deepspeed_engine
from softmask_fast.training import launch as launching

config, launch = parse_arguments(sys.argv[1:])
launching.start_distributed(launch)
root = Path(config.train.output_dir)
stop = launching.StopRequest()
for case in os.environ["CASES"].split(","):
    stage, *options = case.split("+")
    config, _ = parse_arguments(sys.argv[1:] + [text for name in options for text in (f"--{name}", "true")])
    config.train.output_dir = str(root / case)
    train_config = deepspeed_engine.with_precision(config.train)
    deepspeed_config = deepspeed_engine.read_deepspeed_config(launch.deepspeed, train_config)
    # no parameter is small enough to stay whole on every rank under stage 3
    deepspeed_config["zero_optimization"] = {"stage": int(stage), "stage3_param_persistence_threshold": 0}
    assert train.pretrain(config, deepspeed_config, launching.output_directory(config), stop)
    dist.barrier()

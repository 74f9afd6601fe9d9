"""Launched by test_train.py: the same run under ZeRO 0, 1, 2 and 3, each in a folder of its own."""

import sys
from pathlib import Path

from softmask_fast import engine, loop, train
from softmask_fast.config import parse_arguments

config, launch = parse_arguments(sys.argv[1:])
engine.start_distributed(launch)
root = Path(config.train.output_dir)
stop = loop.StopRequest()
for stage in range(4):
    config, _ = parse_arguments(sys.argv[1:])
    config.train.output_dir = str(root / f"stage-{stage}")
    deepspeed_config = engine.read_deepspeed_config(launch.deepspeed, engine.with_precision(config.train))
    # no parameter is small enough to stay whole on every rank under stage 3
    deepspeed_config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    assert train.pretrain(config, deepspeed_config, engine.output_directory(config), stop)

"""What DeepSpeed needs: process group, configuration, engine, the full weights under every ZeRO stage, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from softmask_fast.config import TrainConfig
from softmask_fast.model.packing import choose_attention


def with_precision(train: TrainConfig) -> TrainConfig:
    """bf16 decided where it was left open: on a GPU that has it."""
    if train.bf16 is None:
        train.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return train


def check_execution(train: TrainConfig, deepspeed_config: dict) -> None:
    """Raises ValueError when the layers cannot run as asked for."""
    device = torch.device(get_accelerator().current_device_name())
    choose_attention(train.attention, device, torch.bfloat16 if train.bf16 else torch.float32)
    if train.compile and deepspeed_config.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ValueError("compile: expected false with ZeRO stage 3, which gathers weights block by block, got true")


def read_deepspeed_config(path: str, train: TrainConfig) -> dict[str, Any]:
    """The DeepSpeed configuration with every "auto" filled in from ours.

    Raises ValueError when the file contradicts a field of ours: each number has one place.
    """
    if not Path(path).is_file():
        raise ValueError(f"--deepspeed: expected a JSON file, got {path!r}, which is no file")
    try:
        config = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"--deepspeed: {path} is not valid JSON: {error}") from error
    ours = {
        "train_micro_batch_size_per_gpu": ("batch_size", train.batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", train.gradient_accumulation_steps),
        "gradient_clipping": ("gradient_clipping", train.gradient_clipping),
    }
    for name, (option, value) in ours.items():
        if config.setdefault(name, "auto") not in ("auto", value):
            raise ValueError(f'{path}: {name} is {config[name]}, but --{option} is {value}; write "auto" in the file')
        config[name] = value
    if config.get("bf16", {}).get("enabled") and not train.bf16:
        raise ValueError(f"{path}: bf16 is enabled, so --bf16 true is expected too")
    return config


def create_engine(step: nn.Module, config: dict[str, Any], train: TrainConfig) -> deepspeed.DeepSpeedEngine:
    """Wrap the step. The optimiser is AdamW, unless the DeepSpeed configuration names one (for offloading, say)."""
    decayed = [p for p in step.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in step.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = None if "optimizer" in config else torch.optim.AdamW(groups, lr=train.learning_rate)
    engine, *_ = deepspeed.initialize(model=step, model_parameters=groups, optimizer=optimiser, config=config)
    return engine



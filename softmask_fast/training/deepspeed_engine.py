"""DeepSpeed's configuration and engine."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler
from torch import nn

from softmask_fast.config import TrainConfig
from softmask_fast.errors import UsageError
from softmask_fast.model.packing import choose_attention
from softmask_fast.utils import read_json


def this_device() -> torch.device:
    """The device of this rank."""
    return torch.device(get_accelerator().current_device_name())


def check_execution(train: TrainConfig, deepspeed_config: dict[str, Any]) -> None:
    """Raise UsageError if this device cannot run the layers as the options ask."""
    choose_attention(train.attention, this_device(), torch.bfloat16 if train.bf16 else torch.float32)
    if train.compile and deepspeed_config.get("zero_optimization", {}).get("stage", 0) == 3:
        raise UsageError("compile: expected false with ZeRO stage 3, which gathers weights block by block, got true")


def read_deepspeed_config(given: str | dict[str, Any], train: TrainConfig) -> dict[str, Any]:
    """Read a DeepSpeed configuration and fill in batch size, gradient accumulation and clipping from our options.

    Args:
        given: path of a JSON file, or the built-in configuration, whose own values of these three are ignored.
        train: our options.

    Raises:
        UsageError: when the file cannot be read, or contradicts one of our options.
    """
    if isinstance(given, str) and not Path(given).is_file():
        raise UsageError(f"--deepspeed: expected a JSON file, got {given!r}, which does not exist")
    config = read_json(given, "--deepspeed") if isinstance(given, str) else dict(given)
    ours = {
        "train_micro_batch_size_per_gpu": ("batch_size", train.batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", train.gradient_accumulation_steps),
        "gradient_clipping": ("gradient_clipping", train.gradient_clipping),
    }
    for name, (option, value) in ours.items():
        if isinstance(given, str) and config.get(name, "auto") not in ("auto", value):
            raise UsageError(f'{given}: {name}: expected "auto" or {value}, as --{option}, got {config[name]}')
        config[name] = value
    if config.get("bf16", {}).get("enabled") and not train.bf16:
        raise UsageError(
            f"{given if isinstance(given, str) else '--deepspeed'}: bf16 is enabled; pass --bf16 true as well"
        )
    return config


def parameter_groups(step: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """The trained parameters as an optimizer takes them. Only matrices have weight decay."""
    decayed = [p for p in step.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in step.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]


def create_optimizer(step: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW, for a run whose DeepSpeed configuration names no optimizer."""
    return torch.optim.AdamW(parameter_groups(step, train), lr=train.learning_rate, fused=True)


def import_muon() -> None:
    """Import DeepSpeed's Muon without its call of torch.compile, which takes 0.7 s. DeepSpeed imports Muon in every
    run, only to find that the optimizer is another one."""
    with mock.patch.object(compiler, "compile", lambda *_, **__: lambda function: function):
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def create_engine(step: nn.Module, config: dict[str, Any], train: TrainConfig) -> deepspeed.DeepSpeedEngine:
    """Wrap the step in DeepSpeed's engine. The optimizer is ours unless the DeepSpeed configuration names one."""
    groups = parameter_groups(step, train)
    optimizer = None if "optimizer" in config else create_optimizer(step, train)
    if optimizer is not None:
        import_muon()
    engine, *_ = deepspeed.initialize(model=step, model_parameters=groups, optimizer=optimizer, config=config)
    return engine

"""What changes from step to step: the learning rate, and the settings of the training step."""

from __future__ import annotations

import functools
import math

import torch

from softmask_fast.config import MomentumConfig, RunConfig, TrainConfig
from softmask_fast.model.momentum import StepSettings


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate` at the last of `steps`."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, steps - train.warmup_steps)
    swing = (train.learning_rate - train.final_learning_rate) / 2
    return train.final_learning_rate + swing * (1 + math.cos(math.pi * min(1.0, progress)))


def distillation_alpha(step: int, steps_per_epoch: int, momentum: MomentumConfig) -> float:
    """Weight of the teacher's soft targets, ramped up linearly (ALBEF: over the first epoch)."""
    ramp = momentum.distill_ramp_steps if momentum.distill_ramp_steps is not None else steps_per_epoch
    return momentum.distill_alpha * min(1.0, step / max(1, ramp))


def step_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """A seed for each (run, step, micro step, rank), far from its neighbors'."""
    return (_mixed(seed) + 1_000_003 * step + 10_007 * micro_step + rank) % 2**31


@functools.cache
def _mixed(seed: int) -> int:
    return int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed)))


def step_settings(config: RunConfig, step: int, micro_step: int, rank: int, steps_per_epoch: int) -> StepSettings:
    """The settings of one micro step of optimizer step `step`, counted from 0."""
    return StepSettings(
        alpha=distillation_alpha(step, steps_per_epoch, config.objectives),
        seed=step_seed(config.train.seed, step, micro_step, rank),
        use_queue=step >= config.objectives.queue_warmup_steps,
    )

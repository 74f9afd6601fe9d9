"""What changes from step to step: the learning rate, and the settings of the training step."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from softmask_fast.config import RunConfig, TrainConfig
from softmask_fast.model.momentum import StepSettings


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run of `steps` optimizer steps, counted from 0."""

    steps: int
    train: TrainConfig
    warmup: int  # steps until the learning rate peaks
    queue_warmup: int  # steps before queued features become keys
    ramp: int  # steps until alpha reaches `distill_alpha`
    distill_alpha: float
    uniform: int  # steps before negatives become hard

    @classmethod
    def of(cls, config: RunConfig, steps: int, steps_per_epoch: int) -> Schedule:
        """The schedule of a configuration, whose lengths below 1 are fractions of `steps`."""
        momentum = config.objectives
        ramp = steps_per_epoch if momentum.distill_ramp_steps is None else momentum.distill_ramp_steps
        lengths = (config.train.warmup_steps, momentum.queue_warmup_steps if momentum.queue_size else 0, ramp)
        uniform = round(momentum.hard_negatives_start * steps) if momentum.hard_negatives else 0
        return cls(steps, config.train, *(steps_of(n, steps) for n in lengths), momentum.distill_alpha, uniform)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate` at the last step."""
        train = self.train
        if step < self.warmup:
            return train.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        swing = (train.learning_rate - train.final_learning_rate) / 2
        return train.final_learning_rate + swing * (1 + math.cos(math.pi * min(1.0, progress)))

    def alpha(self, step: int) -> float:
        """Weight of the teacher's soft targets, ramped up linearly (ALBEF: over the first epoch)."""
        return self.distill_alpha * min(1.0, step / max(1, self.ramp))

    def settings(self, step: int, micro_step: int, rank: int) -> StepSettings:
        """The settings of one micro step of an optimizer step."""
        seed = step_seed(self.train.seed, step, micro_step, rank)
        return StepSettings(self.alpha(step), seed, step >= self.queue_warmup, step >= self.uniform)

    def events(self) -> dict[str, int]:
        """event -> the step at which it happens, for those that happen during the run."""
        found = {"queue enters": self.queue_warmup, "negatives turn hard": self.uniform}
        if self.distill_alpha:
            found["soft targets at full weight"] = self.ramp
        return {name: step for name, step in found.items() if 0 < step < self.steps}

    def unfinished(self) -> str | None:
        """One line about the warm-ups that the run is too short for; None if it is long enough."""
        options = {"warmup_steps": self.warmup, "queue_warmup_steps": self.queue_warmup}
        if self.distill_alpha:
            options["distill_ramp_steps"] = self.ramp
        if not (longer := [f"{name} is {length}" for name, length in options.items() if length >= self.steps]):
            return None
        return f"the run ends at step {self.steps}, inside a warm-up: {', '.join(longer)} (0.1: a tenth of the run)"


def steps_of(length: float, steps: int) -> int:
    """A length in steps. Below 1 it is a fraction of all `steps`."""
    return round(length * steps) if length < 1 else int(length)


def step_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """A seed below 2^31 for each (run, step, micro step, rank), far from those of its neighbors."""
    return (_mixed(seed) + 1_000_003 * step + 10_007 * micro_step + rank) % 2**31


@functools.cache
def _mixed(seed: int) -> int:
    return int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed)))

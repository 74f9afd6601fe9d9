"""Forward pass, backward pass and update: through DeepSpeed's engine, or on one rank without its hooks."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from softmask_fast.model.momentum import MomentumCopy, StepSettings
from softmask_fast.training.checkpoint import full_weights
from softmask_fast.training.meters import HostCopy
from softmask_fast.training.step_times import StepTimes

# The settings of a DeepSpeed configuration that `DirectUpdates` can compute; anything else goes through the engine.
_NUMBERS = {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "steps_per_print"}
_COMMUNICATION = {
    "allgather_partitions", "allgather_bucket_size", "reduce_scatter", "reduce_bucket_size", "overlap_comm",
    "contiguous_gradients",
}  # fmt: skip
_CLIPPING_EPSILON = 1e-6  # DeepSpeed's and PyTorch's


@dataclass
class _Watched:
    """A number on its way to the host, and its origin."""

    copy: HostCopy
    name: str
    step: int
    metrics: dict[str, Tensor]
    keys: list[str]


class FiniteWatch:
    """Checks numbers that the device computes, once they have arrived on the host.

    Attributes:
        saved_step: that of the last checkpoint.
    """

    def __init__(self) -> None:
        self.saved_step = 0
        self._watched: deque[_Watched] = deque()

    def add(self, number: Tensor, name: str, step: int, metrics: dict[str, Tensor], keys: list[str]) -> None:
        """Copy a number to the host.

        Args:
            number: () floating point.
            name: what it is.
            step: the optimizer step.
            metrics: what an error shows as well.
            keys: of the samples that it was computed from.
        """
        self._watched.append(_Watched(HostCopy(number), name, step, metrics, keys))

    def check(self, before_step: float = math.inf) -> None:
        """Raise FloatingPointError for the first number that is not finite, among those of steps below
        `before_step`."""
        while self._watched and self._watched[0].step < before_step:
            one = self._watched.popleft()
            if not math.isfinite(one.copy.value):
                values = ", ".join(f"{name} {x.item():.6g}" for name, x in one.metrics.items() if x.ndim == 0)
                raise FloatingPointError(
                    f"step {one.step}: the {one.name} is not finite ({values}). Samples: {', '.join(one.keys)}. "
                    f"The last checkpoint is from step {self.saved_step}."
                )


class EngineUpdates:
    """Updates through DeepSpeed's engine: any number of ranks, any configuration."""

    name = "DeepSpeed's engine"

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, teacher: MomentumCopy, watch: FiniteWatch, times: StepTimes
    ) -> None:
        self.engine, self.teacher, self.watch, self.times = engine, teacher, watch, times

    def step(self, batch: Any, settings: StepSettings, step: int, rate: float) -> dict[str, Tensor]:
        """Add the gradients of a batch. The last batch of an optimizer step also updates the weights, then the teacher.

        Args:
            batch: of this rank.
            settings: of this micro step.
            step: the optimizer step, counted from 1.
            rate: the learning rate.

        Returns:
            The metrics of the batch.

        Raises:
            FloatingPointError: for a loss that is not finite. The weights are untouched.
        """
        loss, metrics = self.engine(batch, self.teacher, settings)
        self.watch.add(loss, "loss", step, metrics, batch.keys)
        self.engine.backward(loss)
        self.times.end("forward and backward")
        self.watch.check()  # after the backward pass is queued, so that a GPU does not run dry
        self.times.end("waiting for the GPU")
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        last = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        self.times.end("optimizer")
        if last:
            self.teacher.update(full_weights(self.engine.module.model))
            self.times.end("momentum copy")
        return metrics

    def before_saving(self) -> None:
        """Do nothing: the engine's state is complete."""

    def after_loading(self) -> None:
        """Do nothing: the engine uses what it has loaded."""


class DirectUpdates:
    """The same updates on one rank, without the engine's hooks and without waiting for the device.

    Weights and AdamW's state are the engine's own tensors, or under ZeRO views of its flat ones, so checkpoints keep
    DeepSpeed's format. Clipping, AdamW and the momentum copy are a few multi-tensor calls.

    A loss or gradient that is not finite switches all further updates off on the device, so that the weights stay those
    of the step before. The host notices when it checks `watch`.
    """

    name = "direct"

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, teacher: MomentumCopy, watch: FiniteWatch, times: StepTimes
    ) -> None:
        self.engine, self.teacher, self.watch, self.times = engine, teacher, watch, times
        self.module, self.device = engine.module, engine.device
        self.accumulation, self.clipping = engine.gradient_accumulation_steps(), engine.gradient_clipping()
        self.batches = 0  # since the last update
        self.poison = torch.zeros((), device=self.device)  # 0; NaN once a loss or gradient was not finite
        for hook in getattr(engine.optimizer, "_grad_acc_hooks", []):
            hook.remove()
        self.after_loading()

    @staticmethod
    def refusal(deepspeed_config: dict[str, Any]) -> str | None:
        """Why a run needs the engine; None if it does not."""
        if (ranks := dist.get_world_size()) > 1:
            return f"{ranks} ranks"
        zero = deepspeed_config.get("zero_optimization", {})
        if zero.get("stage", 0) == 3:
            return "ZeRO stage 3"
        others = sorted(deepspeed_config.keys() - _NUMBERS - {"zero_optimization"})
        others += sorted(zero.keys() - _COMMUNICATION - {"stage"})
        return f"the DeepSpeed configuration has {', '.join(others)}" if others else None

    def after_loading(self) -> None:
        """Find the engine's tensors, which loading may have replaced."""
        self.groups = [_Group(self.engine, index) for index in range(len(self.engine.basic_optimizer.param_groups))]
        self.averages, self.weights = self.teacher.pairs(full_weights(self.module.model))

    def step(self, batch: Any, settings: StepSettings, step: int, rate: float) -> dict[str, Tensor]:
        """As in `EngineUpdates`, but errors surface only when `watch` is checked."""
        loss, metrics = self.accumulate(batch, settings)
        self.watch.add(loss, "loss", step, metrics, batch.keys)
        self.times.end("forward and backward")
        self.batches += 1
        if self.batches == self.accumulation:
            self.batches = 0
            self.watch.add(self.update(rate), "gradient", step, metrics, batch.keys)
            self.count(rate)
            self.times.end("optimizer and momentum copy")
        return metrics

    def accumulate(self, batch: Any, settings: StepSettings) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of a batch; returns its loss and metrics."""
        loss, metrics = self.module.forward(batch, self.teacher, settings)
        (loss / self.accumulation if self.accumulation > 1 else loss).backward()
        loss = loss.detach()
        self.poison += loss - loss
        return loss, metrics

    @torch.no_grad()
    def update(self, rate: float | Tensor) -> Tensor:
        """Update the weights and the teacher, unless a loss or gradient was not finite; returns the gradient norm,
        ()."""
        gradients = [group.take_gradients() for group in self.groups]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(sum(gradients, []))))
        self.poison += norm - norm
        stopped = self.poison.isnan().float()
        divisor = ((norm + _CLIPPING_EPSILON) / self.clipping).clamp_(min=1) if self.clipping else None
        for group, gradient in zip(self.groups, gradients, strict=True):
            group.adamw(gradient, rate, divisor, stopped)
        self.teacher.move(self.averages, self.weights)
        return norm

    def count(self, rate: float) -> None:
        """Record an optimizer step and its learning rate in the engine, whose checkpoints hold them."""
        for group in self.groups:
            group.options["lr"] = rate
        self.engine.global_steps += 1
        self.engine.global_samples += self.engine.train_batch_size()

    def before_saving(self) -> None:
        """Bring the engine's own copy of the weights up to date."""
        for group in self.groups:
            group.refresh_copy()


class _Group:
    """One parameter group of the engine's AdamW: weights, gradients and state, tensor by tensor."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, index: int) -> None:
        optimizer = engine.basic_optimizer
        self.options = optimizer.param_groups[index]
        owned = self.options["params"]  # under ZeRO a single flat copy of the group's weights
        for weight in owned:
            if not optimizer.state[weight]:
                moments = {name: torch.zeros_like(weight.detach()) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[weight] = {"step": torch.zeros((), device=weight.device)} | moments
        states = [optimizer.state[weight] for weight in owned]
        self.own_steps = self.steps = [state["step"] for state in states]
        self.means, self.squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        self.parameters, self.flat, self.copy = owned, None, None
        if engine.zero_optimization():
            self.flat, self.copy = engine.optimizer.bit16_groups_flat[index], owned[0].detach()
            self.parameters = engine.optimizer.bit16_groups[index]
            self.means, self.squares = map(self._slices, (self.means[0], self.squares[0]))
            self.steps = self.own_steps * len(self.parameters)
        self.weights = [parameter.detach() for parameter in self.parameters]

    def _slices(self, whole: Tensor) -> list[Tensor]:
        """The parts of a flat tensor that belong to the parameters, which are views of the flat weights."""
        first = self.flat.storage_offset()
        return [whole.narrow(0, p.storage_offset() - first, p.numel()).view_as(p) for p in self.parameters]

    def take_gradients(self) -> list[Tensor]:
        """Return the gradients, zeros for parameters without one (as under ZeRO), and clear them."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def adamw(self, gradients: list[Tensor], rate: float | Tensor, divisor: Tensor | None, stopped: Tensor) -> None:
        """Apply AdamW to the gradients / divisor, unless `stopped` is 1."""
        torch._foreach_add_(self.own_steps, [1 - stopped] * len(self.own_steps))  # one tensor would be read on the host
        beta1, beta2 = self.options["betas"]
        torch._fused_adamw_(
            self.weights, gradients, self.means, self.squares, [], self.steps, lr=rate, beta1=beta1, beta2=beta2,
            weight_decay=self.options["weight_decay"], eps=self.options["eps"], amsgrad=False, maximize=False,
            grad_scale=divisor, found_inf=stopped,
        )  # fmt: skip

    def refresh_copy(self) -> None:
        """Bring ZeRO's copy of the weights up to date."""
        if self.copy is not None:
            self.copy.copy_(self.flat)

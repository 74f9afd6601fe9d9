"""The momentum copy of the model and the queue of its features (MoCo, He et al., CVPR 2020; as used by ALBEF).

The copy is not part of the module that DeepSpeed owns: under ZeRO-3 it would silently never be updated there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softmask_fast.config import MomentumConfig
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.ops import FeatureQueue


@dataclass(frozen=True)
class StepSettings:
    """What changes from step to step. Tensors are 0-dim, on the model's device; the host never reads them."""

    alpha: float | Tensor  # weight of the teacher's soft targets
    seed: int | Tensor  # of the negatives drawn in the step
    use_queue: bool = True  # whether queued features are contrastive keys, in addition to those of the batch
    hard_negatives: bool = True  # where the objectives have them


def distills(alpha: float | Tensor) -> bool:
    """Whether soft targets of weight alpha are computed. For a tensor they always are."""
    return isinstance(alpha, Tensor) or alpha > 0


class MomentumCopy(nn.Module):
    """An exponential moving average of a model with decay `momentum`. It is the same on every rank."""

    def __init__(self, model: nn.Module, momentum: float) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.momentum = momentum

    def train(self, mode: bool = True) -> MomentumCopy:
        """Keeps the copy in eval mode, as soft targets are computed without dropout."""
        super().train(mode)
        self.model.eval()
        return self

    def pairs(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """The averages, and in the same order the weights.

        Args:
            weights: (name, whole float32 tensor) of all parameters of the model.
        """
        averages = self._averages.copy()
        pairs = [(averages.pop(name), weight) for name, weight in weights]
        if averages:
            raise ValueError(f"weights: expected every parameter of the model, missing {sorted(averages)}")
        return [average for average, _ in pairs], [weight for _, weight in pairs]

    @torch.no_grad()
    def move(self, averages: list[Tensor], weights: list[Tensor]) -> None:
        """Moves the averages towards the weights, both from `pairs`."""
        torch._foreach_lerp_(averages, weights, 1 - self.momentum)

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Moves the averages towards the weights, which are those of `pairs`."""
        self.move(*self.pairs(weights))

    @functools.cached_property
    def _averages(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())


class MomentumTeacher(MomentumCopy):
    """The momentum copy of a vision-language model, and the queue of its features. `seed` fills the queue at first."""

    def __init__(self, model: VisionLanguageModel, objectives: MomentumConfig, seed: int = 0) -> None:
        super().__init__(model, objectives.momentum)
        self.queue = FeatureQueue(model.config.embed_dim, objectives.queue_size, seed)

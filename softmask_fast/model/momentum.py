"""The momentum copy of the model and the queue of its features (MoCo, He et al., CVPR 2020; as used by ALBEF).

The copy is not part of the module that DeepSpeed owns: there it would silently never be updated under ZeRO-3.
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
    """What changes from step to step."""

    alpha: float  # weight of the teacher's soft targets
    seed: int  # of the negatives drawn in the step
    use_queue: bool = True  # whether the queued features are contrastive keys beside those of the batch


class MomentumCopy(nn.Module):
    """An exponential moving average of a model with decay `momentum`; every rank holds the same one."""

    def __init__(self, model: nn.Module, momentum: float):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.momentum = momentum

    def train(self, mode: bool = True) -> MomentumCopy:
        """The copy stays in eval mode: its soft targets come without dropout."""
        super().train(mode)
        self.model.eval()
        return self

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Moves the average towards the weights, (name, full fp32 tensor) of all parameters of the model."""
        averages = self._averages.copy()
        pairs = [(averages.pop(name), weight) for name, weight in weights]
        if averages:
            raise ValueError(f"weights: expected every parameter of the model, missing {sorted(averages)}")
        ours, theirs = [average for average, _ in pairs], [weight.to(average.dtype) for average, weight in pairs]
        torch._foreach_lerp_(ours, theirs, 1 - self.momentum)

    @functools.cached_property
    def _averages(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())


class MomentumTeacher(MomentumCopy):
    """The momentum copy of a vision-language model and the queue of its features, whose first content has the seed."""

    def __init__(self, model: VisionLanguageModel, objectives: MomentumConfig, seed: int = 0):
        super().__init__(model, objectives.momentum)
        self.queue = FeatureQueue(model.config.embed_dim, objectives.queue_size, seed)

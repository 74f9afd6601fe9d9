"""The momentum copy of the model and the queues of its features (MoCo, He et al., CVPR 2020; as used by ALBEF).

The copy stands outside the module that DeepSpeed owns: inside it would silently never be updated under ZeRO-3.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_fast.model.vision_language import VisionLanguageModel


class MomentumTeacher(nn.Module):
    """An exponential moving average of the model, and the last `queue_size` features that it gave of each modality.

    Every rank holds the same copy and the same queues: features are gathered before they are enqueued.
    """

    def __init__(self, model: VisionLanguageModel, queue_size: int, momentum: float, seed: int = 0):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.momentum = momentum
        generator = torch.Generator().manual_seed(seed)
        for name in ("image_queue", "text_queue"):  # random directions until real features have replaced them
            directions = torch.randn(queue_size, model.config.embed_dim, generator=generator)
            self.register_buffer(name, F.normalize(directions, dim=-1))
        self.register_buffer("queue_ids", -1 - torch.arange(queue_size))  # of no image: ids of images are not negative
        self.register_buffer("queue_position", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> MomentumTeacher:
        """The copy never trains: its soft targets come without dropout."""
        return super().train(False)

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Move the copy towards the model: weights are its (name, full fp32 tensor) pairs, all of them."""
        averages = dict(self.model.named_parameters())
        pairs = [(averages.pop(name), weight) for name, weight in weights]
        if averages:
            raise ValueError(f"weights: expected every parameter of the model, {sorted(averages)} did not come")
        ours, theirs = [average for average, _ in pairs], [weight.to(average.dtype) for average, weight in pairs]
        torch._foreach_lerp_(ours, theirs, 1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, image_features: Tensor, text_features: Tensor, ids: Tensor) -> None:
        """Replace the oldest entries by the features (M, d) of the images with these ids (M,), M of any size."""
        size = len(self.queue_ids)
        if size == 0:
            return
        image_features, text_features, ids = image_features[-size:], text_features[-size:], ids[-size:]
        slots = (self.queue_position + torch.arange(len(ids), device=ids.device)) % size
        self.image_queue[slots] = image_features.to(self.image_queue.dtype)
        self.text_queue[slots] = text_features.to(self.text_queue.dtype)
        self.queue_ids[slots] = ids
        self.queue_position.copy_((self.queue_position + len(ids)) % size)


def gather_ranks(x: Tensor) -> Tensor:
    """Concatenate x (B, ...) of all ranks in rank order, without gradient: (B * world_size, ...)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)

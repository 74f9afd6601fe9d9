"""FeatureQueue: image and text features of earlier batches, the extra keys of a contrastive loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NO_IMAGE = torch.iinfo(torch.int64).min  # ids from here on, one per slot of the queue, belong to no image


class Features(NamedTuple):
    """Image and text features of M pairs, and the ids of their images, if any."""

    image: Tensor  # (M, d)
    text: Tensor  # (M, d)
    ids: Tensor | None  # (M,) int64


class FeatureQueue(nn.Module):
    """The newest image and text features of a run, with the ids of their images (MoCo, He et al., CVPR 2020).

    At first it holds random directions that belong to no image.

    Args:
        width: d, the number of columns of a feature.
        size: number of entries.
        seed: seed of the initial entries.

    Attributes:
        image_queue, text_queue: (size, width) features, float32 at first.
        queue_ids: (size,) int64 ids of their images.
        queue_position: 0-dim int64, the slot of the oldest entry.
    """

    def __init__(self, width: int, size: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(size, width, generator=generator), dim=-1))
        self.register_buffer("queue_ids", _NO_IMAGE + torch.arange(size))
        self.register_buffer("queue_position", torch.zeros((), dtype=torch.int64))

    @property
    def size(self) -> int:
        """The number of entries."""
        return len(self.queue_ids)

    @property
    def width(self) -> int:
        """The width of a feature."""
        return self.image_queue.shape[1]

    def extra_repr(self) -> str:
        return f"{self.width}, {self.size}"

    def keys(self, like: Tensor, copy: bool = False) -> Features:
        """All entries, in the dtype and on the device of `like`. With `copy`, later updates do not change them."""
        images, texts = (queue.to(like, copy=copy) for queue in (self.image_queue, self.text_queue))
        return Features(images, texts, self.queue_ids.to(self.queue_ids, copy=copy))

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, ids: Tensor | None = None) -> None:
        """Replaces the oldest entries. Pass the same features on every rank.

        Args:
            image, text: (B, d), for any B; of more than `size` only the last ones are kept.
            ids: (B,) int64 ids of the images; None: the features belong to no image.
        """
        if self.size == 0:
            return
        newest = slice(max(len(image) - self.size, 0), None)
        slots = torch.arange(min(len(image), self.size), device=image.device)
        slots = (self.queue_position + slots) % self.size
        self.image_queue[slots] = image[newest].to(self.image_queue.dtype)
        self.text_queue[slots] = text[newest].to(self.text_queue.dtype)
        self.queue_ids[slots] = _NO_IMAGE + slots if ids is None else ids[newest]
        self.queue_position.copy_((self.queue_position + len(slots)) % self.size)

"""Word maps of this library's own models, which know how to make them: `VisionLanguageModel.word_relevance`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from softmask_fast.errors import UsageError
from softmask_fast.model.vision_language import VisionLanguageModel


class OwnRelevance:
    """The pair that `match_logits` last saw, and the maps of its words."""

    def __init__(self, model: VisionLanguageModel, layer: int | None):
        self.model, self.layer = model, layer
        self.inputs: tuple[Tensor, Tensor, Tensor] | None = None

    def maps(self, word_index: Tensor | None = None) -> Tensor:
        """Grad-CAM of "matched", the one score of these maps, over the patches.

        word_index: (B,) or (B, W) int64; None: all tokens. Returns float32 (B, N), (B, W, N) or (B, L, N).
        """
        if self.inputs is None:
            raise UsageError("maps: expected a call of `model.match_logits` inside the `with` block first, got none")
        maps = self.model.word_relevance(*self.inputs, self.layer)[:, :, self.model.prefix_tokens :]
        if word_index is None:
            return maps
        rows = torch.arange(len(maps), device=maps.device)
        return maps[rows, word_index] if word_index.ndim == 1 else maps[rows[:, None], word_index]

    @torch.no_grad()
    def image_features(self) -> Tensor:
        """The image encoder's patches, (B, N, C) like `maps`."""
        return self.model.vision(self.inputs[0])[:, self.model.prefix_tokens :]

    def pictures(self, maps: Tensor) -> list[Tensor]:
        """Maps (B, ..., N) on the patches' grid: for each image (..., rows, columns)."""
        return list(maps.unflatten(-1, self.model.grid_size))


@contextmanager
def own_relevance(model: VisionLanguageModel, layer: int | None) -> Iterator[OwnRelevance]:
    """`word_relevance` of an own model: `layer` is a fusion layer, None that of the soft masks."""
    cam, match = OwnRelevance(model, layer), model.match_logits

    def match_logits(pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        cam.inputs = (pixels, input_ids, attention_mask)
        return match(pixels, input_ids, attention_mask)

    with mock.patch.object(model, "match_logits", match_logits):
        yield cam

"""Word maps of this library's own models, which compute them themselves: `VisionLanguageModel.word_relevance`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from softmask_fast.errors import UsageError
from softmask_fast.model.vision_language import VisionLanguageModel


class OwnRelevance:
    """Word maps of the pairs that `match_logits` saw last."""

    def __init__(self, model: VisionLanguageModel, layer: int | None) -> None:
        self.model, self.layer = model, layer
        self.inputs: tuple[Tensor, Tensor, Tensor] | None = None

    def maps(self, word_index: Tensor | None = None) -> Tensor:
        """Grad-CAM of the logit of "matched", the only score of these maps, over the patches.

        Args:
            word_index: (B,) or (B, W) int64, tokens of the texts; None: all L tokens.

        Returns:
            float32, at least 0: (B, N), (B, W, N) or (B, L, N).

        Raises:
            UsageError: if `match_logits` was not called inside the `with` block.
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
        """The image encoder's patches (B, N, C), in the order of `maps`."""
        return self.model.vision(self.inputs[0])[:, self.model.prefix_tokens :]

    def pictures(self, maps: Tensor) -> list[Tensor]:
        """Lays maps (B, ..., N) on the grid of patches: one (..., rows, columns) per image."""
        return list(maps.unflatten(-1, self.model.grid_size))


@contextmanager
def own_relevance(model: VisionLanguageModel, layer: int | None) -> Iterator[OwnRelevance]:
    """`word_relevance` of this library's models. `layer` is a fusion layer; None: that of the soft masks."""
    cam, match = OwnRelevance(model, layer), model.match_logits

    def match_logits(pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        cam.inputs = (pixels, input_ids, attention_mask)
        return match(pixels, input_ids, attention_mask)

    with mock.patch.object(model, "match_logits", match_logits):
        yield cam

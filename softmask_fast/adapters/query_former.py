"""Word maps of BLIP-2 and InstructBLIP, whose language model sees an image as a few query tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softmask_fast.adapters.attention_record import AttentionRecord
from softmask_fast.adapters.decoders import DecoderRelevance
from softmask_fast.adapters.image_layouts import square_grid


class QueryFormerRelevance(DecoderRelevance):
    """`DecoderRelevance` with the maps carried through the Q-Former to the image.

    map(word, image token) is the sum over query tokens of rel(word, query token) * rel(query token, image token). Both
    factors are Grad-CAMs of the same score, the second in a cross-attention layer of the Q-Former. The language model
    has a graph from its first layer on."""

    def __init__(
        self, model: nn.Module, score: Callable | None, image_tokens: Any, answer: Any, former: nn.Module
    ) -> None:
        super().__init__(model, score, image_tokens, answer)
        self.former, self.image_record = former, None

    def keep(self, module: nn.Module, record: AttentionRecord) -> None:
        if module is self.former:
            self.image_record = record
        else:
            self.record = record

    def maps(self, score: Tensor | None = None, word_index: Tensor | None = None) -> Tensor:
        """`DecoderRelevance.maps` over the image encoder's tokens, of which the first is [CLS]."""
        self._check_pass()
        score = self._score() if score is None else score
        words = super().maps(score, word_index)
        record = self.image_record
        batch, queries, tokens = len(record.output), words.shape[-1], record.key.shape[2]
        rows = torch.arange(queries, device=words.device).expand(batch, -1)
        columns = torch.arange(tokens, device=words.device).expand(batch, -1)
        seen, _ = record.maps(record.gradient(score), rows, columns, torch.ones_like(columns, dtype=torch.bool))
        return (words if words.ndim == 3 else words[:, None]).matmul(seen).reshape(*words.shape[:-1], tokens)

    def image_features(self) -> Tensor:
        return self.image_record.value.transpose(1, 2).flatten(2)

    def pictures(self, maps: Tensor, picture_sizes: Any = None) -> list[list[Tensor]]:
        """Lays maps (B, W, N) on the square grid of patches, without [CLS]: for each sample, a list of one picture."""
        return [[picture] for picture in square_grid(maps)]


def former_attention(model: nn.Module) -> list[nn.Module]:
    """The cross-attention of a Q-Former's layers, in order; empty if there is none."""
    return [
        module.attention
        for name, module in model.named_modules()
        if re.search(r"qformer\.encoder\.layer\.\d+\.crossattention$", name)
    ]

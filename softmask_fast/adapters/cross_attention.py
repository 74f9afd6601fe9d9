"""Word maps of cross-attention with BERT's projections `query`, `key` and `value`: BLIP, BridgeTower, ALBEF, and the
captioners of transformers' VisionEncoderDecoder.

Hooks record the projections of one layer and cut the graph at its output. Grad-CAM needs no more: the attention map is
never stored, and any attention backend works.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softmask_fast.adapters.attention_record import MASKED, lower_part_without_graph
from softmask_fast.adapters.image_layouts import square_grid
from softmask_fast.adapters.scores import UNREAD, notes, output_gradient
from softmask_fast.errors import UsageError
from softmask_fast.ops import word_gradcam, word_soft_mask


class WordRelevance:
    """Word maps of one cross-attention layer, from what it computed in the model's last forward pass.

    Attributes:
        notes: after `maps`, one line for each reason why some words have no map.
    """

    def __init__(self, attention: nn.Module, score: Callable[[Any], Tensor] | None = None) -> None:
        self.score = score
        self.outputs: Any = None  # of the model
        self.zero: list[tuple[Tensor, str]] = []  # (B, L) bool, and why these words have no map
        self.notes: list[str] = []  # what `maps` found to be zero by construction
        self.heads: int = attention.num_attention_heads
        self.projected: dict[str, Tensor] = {}  # query (B, L, C), key and value (B, N, C)
        self.mask: Tensor | None = None
        self.output: Tensor | None = None  # (B, L, C), the leaf of the graph

    def maps(self, score: Tensor | None = None, word_index: Tensor | None = None) -> Tensor:
        """Grad-CAM of a score of the last forward pass.

        Args:
            score: (B,) or a scalar, computed inside the `with` block; None: the `score` passed to `word_relevance`, or
                else the model's logit of "matched".
            word_index: (B,) int64, the token of one word per text; None: all tokens.

        Returns:
            The relevance of each of N image tokens, float32, at least 0: (B, L, N), or (B, N) with `word_index`.

        Raises:
            UsageError: if there was no forward pass, or the score does not depend on the layer.
        """
        query, key, value, gradient = self._inputs(score)
        unread = gradient.abs().amax((1, 3)) == 0
        self.zero = [(unread.cpu(), UNREAD)]
        self.notes = notes(torch.arange(unread.shape[1]).expand_as(unread), self.zero)
        return word_gradcam(query, key, value, gradient, word_index, key_mask=self._key_mask())

    def soft_mask(
        self, score: Tensor | None, word_index: Tensor, features: Tensor | None = None, *, prefix_tokens: int = 1
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The soft mask of one word per text; see `softmask_fast.ops.word_soft_mask`.

        Args:
            score, word_index: as for `maps`.
            features: (B, N, C) image features to mask; None: return keep alone.
            prefix_tokens: number of image tokens before the patches.

        Returns:
            keep (B, N) float32, the fraction of each image token that stays; with `features`, (masked features
            (B, N, C), keep).

        Raises:
            UsageError: as for `maps`.
        """
        inputs = self._inputs(score)
        return word_soft_mask(*inputs, word_index, features, prefix_tokens=prefix_tokens, key_mask=self._key_mask())

    def image_features(self) -> Tensor:
        """What words can read from each image token in this layer: its values (B, N, C), in the order of `maps`."""
        return self.projected["value"]

    def pictures(self, maps: Tensor) -> list[Tensor]:
        """Lays maps (B, ..., N) on the square grid of patches, without [CLS]: one (..., rows, columns) per image."""
        return square_grid(maps)

    def _inputs(self, score: Tensor | None) -> list[Tensor]:
        """Query, key, value and the gradient of the attention output, each (B, H, T, D)."""
        if self.output is None:
            raise UsageError("score: expected a forward pass inside the `with` block first, the layer has not run yet")
        if score is None:
            with torch.enable_grad():
                score = (self.score or _matched)(self.outputs)
        gradient = output_gradient(score, self.output)
        parts = [*(self.projected[name] for name in ("query", "key", "value")), gradient]
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]

    def _key_mask(self) -> Tensor | None:
        """The layer's mask (B or 1, 1, L or 1, N), bool or additive, as (B, N) bool, True = attend."""
        if self.mask is None:
            return None
        attended = self.mask if self.mask.dtype == torch.bool else self.mask == 0
        hidden = ~self.mask if self.mask.dtype == torch.bool else self.mask <= MASKED
        rows = attended[:, 0]
        if attended.shape[1] != 1 or not (attended | hidden).all() or not (rows == rows[:, :1]).all():
            raise UsageError("attention_mask: expected the same hidden image tokens for all words and heads")
        return rows[:, 0].expand(len(self.output), -1)


@contextmanager
def cross_attention_relevance(
    model: nn.Module, attention: nn.Module, score: Callable[[Any], Tensor] | None
) -> Iterator[WordRelevance]:
    """`word_relevance` of one attention module with `query`, `key`, `value` and `num_attention_heads`."""
    missing = [name for name in ("query", "key", "value", "num_attention_heads") if not hasattr(attention, name)]
    if missing:
        raise UsageError(
            f"layer: expected an attention module with query, key and value projections, got one without {missing}"
        )
    signature = inspect.signature(attention.forward)
    mask_name = "encoder_attention_mask" if "encoder_attention_mask" in signature.parameters else "attention_mask"
    cam = WordRelevance(attention, score)

    def record_mask(_: nn.Module, args: tuple, kwargs: dict) -> None:
        cam.mask = signature.bind(*args, **kwargs).arguments.get(mask_name)

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple, projected: Tensor) -> None:
            cam.projected[name] = projected.detach()

        return hook

    def cut(_: nn.Module, inputs: tuple, outputs: tuple) -> tuple:
        torch.set_grad_enabled(True)
        cam.output = outputs[0].detach().requires_grad_()
        return cam.output, *outputs[1:]

    def end(_: nn.Module, args: tuple, outputs: Any) -> None:
        cam.outputs = outputs

    grad_enabled = torch.is_grad_enabled()
    handles = [
        model.register_forward_hook(end),
        attention.register_forward_pre_hook(record_mask, with_kwargs=True),
        *(getattr(attention, name).register_forward_hook(record(name)) for name in ("query", "key", "value")),
        attention.register_forward_hook(cut),
    ]
    try:
        with lower_part_without_graph(model, attention):
            yield cam
    finally:
        torch.set_grad_enabled(grad_enabled)
        for handle in handles:
            handle.remove()


def matching_logits(outputs: Any) -> Tensor:
    """The logits (B, 2) of BLIP, BridgeTower and alike: not matched, matched."""
    logits = getattr(outputs, "itm_score", None)
    logits = getattr(outputs, "logits", None) if logits is None else logits
    if logits is None or logits.shape[1:] != (2,):
        raise UsageError("score: expected a callable or a tensor, as the output has no matching logits; got None")
    return logits


def _matched(outputs: Any) -> Tensor:
    return matching_logits(outputs)[:, 1]


def bert_cross_attention(model: nn.Module) -> list[nn.Module]:
    """The attention modules of the layers with cross-attention, in order; where several stacks have it, of the text's.
    Empty if none has."""
    stacks: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if found := re.fullmatch(r"(.*)\.\d+\.crossattention\.self", name):
            stacks.setdefault(found[1], []).append(module)
    of_text = {name: layers for name, layers in stacks.items() if "text" in name.rsplit(".", 1)[-1]}
    return next(iter((of_text or stacks).values()), [])

"""Word heat maps and soft masks for cross-attention models of Hugging Face transformers.

They work for BLIP's image-text retrieval, image captioners with a BERT-like decoder, and any other cross-attention with
projections `query`, `key` and `value`, with every attention backend: no attention map is needed. Hooks record the
projections of one layer and cut the graph at its output, which is all that the Grad-CAM needs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softmask_fast.ops import word_gradcam, word_soft_mask

MASKED = -1e4  # additive masks have at most this value at hidden keys


class WordRelevance:
    """What one cross-attention layer computed in the model's last forward pass, and the maps of its words."""

    def __init__(self, attention: nn.Module):
        self.heads: int = attention.num_attention_heads
        self.projected: dict[str, Tensor] = {}  # query (B, L, C), key and value (B, N, C)
        self.mask: Tensor | None = None
        self.output: Tensor | None = None  # (B, L, C), the leaf of the graph

    def maps(self, score: Tensor, word_index: Tensor | None = None) -> Tensor:
        """Grad-CAM of a score of the last forward pass.

        Args:
            score: (B,) or a scalar.
            word_index: (B,) int64, one word per text; None: all words.

        Returns:
            The relevance of each image token, float32: (B, L, N) for all words, (B, N) with `word_index`.

        Raises:
            ValueError: if there was no forward pass, or the score does not depend on the layer.
        """
        return word_gradcam(*self._inputs(score), word_index, key_mask=self._key_mask())

    def soft_mask(
        self, score: Tensor, word_index: Tensor, features: Tensor | None = None, *, prefix_tokens: int = 1
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The soft mask of one word per text; see `softmask_fast.ops.word_soft_mask`.

        Args:
            score, word_index: as for `maps`, which also says what is raised.
            features: (B, N, C), to be masked.
            prefix_tokens: number of image tokens before the patches.

        Returns:
            keep (B, N), how much of each image token is kept; with features (masked features (B, N, C), keep).
        """
        inputs = self._inputs(score)
        return word_soft_mask(*inputs, word_index, features, prefix_tokens=prefix_tokens, key_mask=self._key_mask())

    def _inputs(self, score: Tensor) -> list[Tensor]:
        """Query, key, value and the gradient of the attention output, each (B, H, T, D)."""
        if self.output is None:
            raise ValueError("score: expected a forward pass inside the `with` block first, the layer has not run yet")
        gradient = None
        if score.requires_grad:
            (gradient,) = torch.autograd.grad(score.sum(), self.output, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "score: expected one computed inside the `with` block from the layer's output, got one that does not "
                "depend on it"
            )
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
            raise ValueError("attention_mask: expected the same hidden image tokens for all words and heads")
        return rows[:, 0].expand(len(self.output), -1)


@contextmanager
def word_relevance(model: nn.Module, layer: int | nn.Module) -> Iterator[WordRelevance]:
    """Context manager for word heat maps of a model in eval mode:

    ```python
    with word_relevance(model, layer=8) as cam:
        score = model(**inputs).itm_score[:, 1]
        maps = cam.maps(score)  # (B, L, N)
    ```

    Inside the block the model runs without a graph up to that layer and with one from there on, even under no_grad:
    gradients do not reach its lower part. Afterwards the model is as before.

    Args:
        model: the model.
        layer: number of the cross-attention layer, 0 is the first; or, if the model has several stacks with
            cross-attention, the attention module itself, with `query`, `key`, `value` and `num_attention_heads`.

    Raises:
        ValueError: if there is no such layer, or the model is in training mode, where dropout would affect the maps.
    """
    if model.training:
        raise ValueError("model: expected eval mode, got training mode")
    if torch.is_inference_mode_enabled():
        raise ValueError("word_relevance: expected no_grad instead of inference_mode, which allows no gradients")
    attention = layer if isinstance(layer, nn.Module) else _cross_attention(model, layer)
    missing = [name for name in ("query", "key", "value", "num_attention_heads") if not hasattr(attention, name)]
    if missing:
        raise ValueError(f"layer: expected an attention with query, key and value projections, {missing} missing")
    signature = inspect.signature(attention.forward)
    mask_name = "encoder_attention_mask" if "encoder_attention_mask" in signature.parameters else "attention_mask"
    cam = WordRelevance(attention)

    def start(*_: Any) -> None:
        torch.set_grad_enabled(False)

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

    grad_enabled = torch.is_grad_enabled()
    handles = [
        model.register_forward_pre_hook(start),
        attention.register_forward_pre_hook(record_mask, with_kwargs=True),
        *(getattr(attention, name).register_forward_hook(record(name)) for name in ("query", "key", "value")),
        attention.register_forward_hook(cut),
    ]
    try:
        yield cam
    finally:
        torch.set_grad_enabled(grad_enabled)
        for handle in handles:
            handle.remove()


def _cross_attention(model: nn.Module, layer: int) -> nn.Module:
    """The attention module of a cross-attention layer."""
    stacks: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if found := re.fullmatch(r"(.*)\.\d+\.crossattention\.self", name):
            stacks.setdefault(found[1], []).append(module)
    if len(stacks) != 1:
        raise ValueError(f"layer: expected an attention module, as the model has cross-attention in {sorted(stacks)}")
    [(stack, layers)] = stacks.items()
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer: expected a number from 0 to {len(layers) - 1} of {stack}, got {layer}")
    return layers[layer]

"""Word heat maps and soft masks for cross-attention models of Hugging Face transformers.

For BLIP's image-text retrieval, for image captioners with a BERT-like decoder, and for every other cross-attention that
projects with `query`, `key` and `value`. Any attention backend will do: no attention map is asked for. Hooks note the
projections of one layer and cut the graph at its output, which is all that the Grad-CAM needs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from softmask_fast.ops import word_gradcam, word_soft_mask

MASKED = -1e4  # an additive mask is at most this where a key is hidden


class WordRelevance:
    """One cross-attention layer's part in the last forward pass of the model, and the maps of its words."""

    def __init__(self, attention: nn.Module):
        self.heads: int = attention.num_attention_heads
        self.projected: dict[str, Tensor] = {}  # query (B, L, C), key and value (B, N, C)
        self.mask: Tensor | None = None
        self.output: Tensor | None = None  # (B, L, C), the leaf of the graph

    def maps(self, score: Tensor, word_index: Tensor | None = None) -> Tensor:
        """Grad-CAM of a score, (B,) or a scalar, of the last forward pass.

        Returns float32 (B, L, N), the relevance of each image token for each word; (B, N) with word_index (B,) int64.
        Raises ValueError when there was no forward pass, or the score does not depend on the layer.
        """
        return word_gradcam(*self._inputs(score), word_index, key_mask=self._key_mask())

    def soft_mask(
        self, score: Tensor, word_index: Tensor, features: Tensor | None = None, *, prefix_tokens: int = 1
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What the soft mask of a word (B,) keeps of each image token, as `softmask_fast.ops.word_soft_mask` returns:
        keep (B, N), or (masked features, keep) of features (B, N, C)."""
        inputs = self._inputs(score)
        return word_soft_mask(*inputs, word_index, features, prefix_tokens=prefix_tokens, key_mask=self._key_mask())

    def _inputs(self, score: Tensor) -> list[Tensor]:
        """Query, key, value and the gradient of the attention output, each (B, H, T, D)."""
        if self.output is None:
            raise ValueError("score: expected one of a forward pass inside the `with` block, the layer has not run yet")
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
        """(B, N) bool, from the mask (B or 1, 1, L or 1, N) that the layer was given: bool, or added to the logits."""
        if self.mask is None:
            return None
        attended = self.mask if self.mask.dtype == torch.bool else self.mask == 0
        hidden = ~self.mask if self.mask.dtype == torch.bool else self.mask <= MASKED
        rows = attended[:, 0]
        if attended.shape[1] != 1 or not (attended | hidden).all() or not (rows == rows[:, :1]).all():
            raise ValueError("attention_mask: expected one that hides image tokens, the same for all words and heads")
        return rows[:, 0].expand(len(self.output), -1)


@contextmanager
def word_relevance(model: nn.Module, layer: int | nn.Module) -> Iterator[WordRelevance]:
    """Word heat maps of a model in eval mode::

        with word_relevance(model, layer=8) as cam:
            score = model(**inputs).itm_score[:, 1]
            maps = cam.maps(score)  # (B, L, N)

    layer: which of the model's cross-attention layers, 0 is the first; or the attention module itself, with projections
    `query`, `key`, `value` and `num_attention_heads`, where a model attends across in more than one stack.
    Inside the block the model runs without a graph up to that layer and with one from there, under no_grad too:
    gradients do not reach its lower part. Nothing stays on the model. Raises ValueError for a layer that is not there,
    and for a model in training mode, whose dropout would be in the maps.
    """
    if model.training:
        raise ValueError("model: expected one in eval mode, got one in training mode")
    if torch.is_inference_mode_enabled():
        raise ValueError("word_relevance: expected no inference_mode around it, which rules out gradients; use no_grad")
    attention = layer if isinstance(layer, nn.Module) else _cross_attention(model, layer)
    missing = [name for name in ("query", "key", "value", "num_attention_heads") if not hasattr(attention, name)]
    if missing:
        raise ValueError(f"layer: expected an attention with query, key and value projections, it lacks {missing}")
    signature = inspect.signature(attention.forward)
    mask_name = "encoder_attention_mask" if "encoder_attention_mask" in signature.parameters else "attention_mask"
    cam = WordRelevance(attention)

    def start(*_) -> None:
        torch.set_grad_enabled(False)

    def note_mask(_, args: tuple, kwargs: dict) -> None:
        cam.mask = signature.bind(*args, **kwargs).arguments.get(mask_name)

    def note(name: str):
        def hook(_, inputs: tuple, projected: Tensor) -> None:
            cam.projected[name] = projected.detach()

        return hook

    def cut(_, inputs: tuple, outputs: tuple) -> tuple:
        torch.set_grad_enabled(True)
        cam.output = outputs[0].detach().requires_grad_()
        return cam.output, *outputs[1:]

    grad_enabled = torch.is_grad_enabled()
    handles = [
        model.register_forward_pre_hook(start),
        attention.register_forward_pre_hook(note_mask, with_kwargs=True),
        *(getattr(attention, name).register_forward_hook(note(name)) for name in ("query", "key", "value")),
        attention.register_forward_hook(cut),
    ]
    try:
        yield cam
    finally:
        torch.set_grad_enabled(grad_enabled)
        for handle in handles:
            handle.remove()


def _cross_attention(model: nn.Module, layer: int) -> nn.Module:
    """The attention module of the cross-attention layer with this number."""
    stacks: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if found := re.fullmatch(r"(.*)\.\d+\.crossattention\.self", name):
            stacks.setdefault(found[1], []).append(module)
    if len(stacks) != 1:
        raise ValueError(f"layer: expected the attention module, as the model has cross-attention in {sorted(stacks)}")
    [(stack, layers)] = stacks.items()
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer: expected one from 0 to {len(layers) - 1} of {stack}, got {layer}")
    return layers[layer]

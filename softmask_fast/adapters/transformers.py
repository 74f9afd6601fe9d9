"""Word maps for vision-language models that others trained: one context manager for all of them.

It serves models of transformers (decoders that read image tokens, encoder-decoders, fusion models, dual encoders), of
open_clip and of this library, with any attention backend. docs/word_maps.md says which, how, and what the maps mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softmask_fast.adapters.attention_record import observed_model
from softmask_fast.adapters.cross_attention import WordRelevance, bert_cross_attention, cross_attention_relevance
from softmask_fast.adapters.decoders import (
    DecoderRelevance,
    decoder_attention,
    image_token_id,
)
from softmask_fast.adapters.dual_encoders import DualEncoderRelevance, dual_encoder_relevance, is_dual_encoder
from softmask_fast.adapters.encoder_decoders import EncoderDecoderRelevance, cross_attention
from softmask_fast.adapters.query_former import QueryFormerRelevance, former_attention
from softmask_fast.errors import UsageError

Relevance = WordRelevance | DecoderRelevance | DualEncoderRelevance


@contextmanager
def word_relevance(
    model: nn.Module,
    layer: int | nn.Module | None = None,
    *,
    score: Callable[[Any], Tensor] | None = None,
    image_tokens: Tensor | None = None,
    answer: int | Tensor | None = None,
) -> Iterator[Relevance]:
    """Context manager for word maps of a model in eval mode:

    ```python
    with torch.no_grad(), word_relevance(model, layer=8) as cam:
        model(**inputs)
    maps = cam.maps()
    ```

    Inside the block, the model runs without a graph up to the layer and with one from there on, even under no_grad, so
    gradients do not reach its lower part. Afterwards the model is as before.

    Args:
        model: a model of transformers, of open_clip, or of this library.
        layer: number of the layer to map; 0 is the first. Layers are counted in the cross-attention to the image, if
            the model has one; in a dual encoder, in the image encoder; otherwise in the decoder that reads the image as
            tokens. None: two thirds up the cross-attention, the middle of a decoder, or the last layer of a dual
            encoder whose output counts. Or pass the attention module itself, if it is cross-attention with `query`,
            `key` and `value`.
        score: a function from the model's outputs to the score that the maps explain, (B,) or a scalar; None: the
            default that the `maps` of the family names.
        image_tokens: for decoders, (B, L) bool, True where a token stands for the image; None: found by the id in the
            model's configuration.
        answer: for decoders, the position of the answer's first token, a number or (B,) int64; None: that of the first
            label, if the model is called with `labels`.

    Yields:
        An object with `maps()`, `image_features()` and `pictures()`: `WordRelevance`, `DecoderRelevance`,
        `DualEncoderRelevance` or another of this package, by the kind of model.

    Raises:
        UsageError: if there is no such layer, if the model is compiled or in training mode (dropout would change the
            maps), or if no maps exist for its kind.
    """
    if model.training:
        raise UsageError("model: expected eval mode, got training mode")
    if torch.is_inference_mode_enabled():
        raise UsageError("word_relevance: expected torch.no_grad, got torch.inference_mode, which allows no gradients")
    name = type(model).__name__
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
        raise UsageError(f"model: expected {name} before torch.compile, whose graphs hide the layer, got it compiled")
    with _of_family(model, name, layer, score, image_tokens, answer) as cam:
        yield cam


def _of_family(
    model: nn.Module, name: str, layer: Any, score: Callable | None, image_tokens: Tensor | None, answer: Any
) -> Any:
    """The context manager of the model's family."""
    if isinstance(layer, nn.Module):
        return cross_attention_relevance(model, layer, score)
    if name == "VisionLanguageModel":  # by name first, so that no other model loads ours
        from softmask_fast.adapters.own_models import own_relevance

        return own_relevance(model, layer)
    if is_dual_encoder(model):
        return dual_encoder_relevance(model, layer, score)
    if layers := bert_cross_attention(model):
        return cross_attention_relevance(model, _chosen(layer, layers, 2 / 3, name), score)
    if not hasattr(model, "config"):
        raise UsageError(f"model: expected one of transformers, open_clip or softmask_fast, got {name}")
    layers = decoder_attention(model)
    if former := former_attention(model):
        cam = QueryFormerRelevance(model, score, image_tokens, answer, former[-1])
        return observed_model(model, cam, [former[-1], _chosen(layer, layers, 1 / 2, name)])
    if across := cross_attention(model):
        cam = EncoderDecoderRelevance(model, score, image_tokens, answer)
        return observed_model(model, cam, [_chosen(layer, across, 2 / 3, name)])
    if not layers or (image_tokens is None and image_token_id(model) is None):
        reason = "has no layers of attention" if not layers else "does not say which tokens are the image's"
        raise UsageError(f"model: expected one that reads an image, got {name}, which {reason}: see docs/word_maps.md")
    cam = DecoderRelevance(model, score, image_tokens, answer)
    return observed_model(model, cam, [_chosen(layer, layers, 1 / 2, name)])


def _chosen(layer: int | None, layers: list[nn.Module], depth: float, name: str) -> nn.Module:
    layer = min(int(len(layers) * depth), max(0, len(layers) - 2)) if layer is None else layer
    if not 0 <= layer < len(layers):
        raise UsageError(f"layer: expected a number from 0 to {len(layers) - 1} of {name}, got {layer}")
    return layers[layer]

"""The vision-language model: image encoder, text encoder, fusion encoder and their heads.

It is the model of ALBEF (Li et al., NeurIPS 2021), on which SoftMask++ (Park & Han, CVPR 2023) builds.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_fast.config import ModelConfig
from softmask_fast.errors import UsageError
from softmask_fast.model.fusion import FusionEncoder, KeyValue, first_tokens
from softmask_fast.model.packing import Packing
from softmask_fast.model.text import MaskedLanguageHead, TextEncoder, initial_std
from softmask_fast.model.vision import VisionEncoder
from softmask_fast.model.weights import HeldWeights, weighted_layers
from softmask_fast.ops import word_gradcam

TEMPERATURE_RANGE = (0.001, 0.5)


class VisionLanguageModel(nn.Module):
    """Encoders, heads and the contrastive temperature, with random weights. `load_pretrained` loads others."""

    def __init__(self, config: ModelConfig, temperature: float = 0.07) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config)
        self.text = TextEncoder(config)
        self.fusion = FusionEncoder(config, self.vision.width)
        self.image_projection = nn.Linear(self.vision.width, config.embed_dim)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim)
        self.match_head = nn.Linear(config.text_width, 2)
        self.language_head = MaskedLanguageHead(config, self.text.word_embeddings)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))  # DeepSpeed takes no 0-dim parameter
        for module in (self.fusion, self.image_projection, self.text_projection, self.match_head):
            module.apply(_initialize)
        _initialize(self.language_head.transform.dense)
        hold_key_biases(self)
        self._held: HeldWeights | None = None

    def set_execution(self, attention: str = "auto", checkpointing: bool = False, compile: bool = False) -> None:
        """Sets how the layers run. Results stay the same up to rounding.

        Args:
            attention: of the text, see packing.py.
            checkpointing: recompute the intermediates of every layer in the backward pass.
            compile: compile the functions of layers.py at their first calls.
        """
        for encoder in (self.text, self.fusion):
            encoder.attention, encoder.checkpointing = attention, checkpointing
        self.vision.checkpointing = checkpointing
        for layer in weighted_layers(self):
            layer.compiled = compile

    def holding_weights(self, dtype: torch.dtype | None = None) -> AbstractContextManager[None]:
        """A context for the length of a step, in which the layers' weights are joined and cast to `dtype` only once;
        see weights.py."""
        if self._held is None:
            self._held = HeldWeights(self)
        return self._held.hold(dtype)

    def _apply(self, *arguments: Any, **options: Any) -> VisionLanguageModel:
        self._held = None  # a move between devices may replace the parameters
        return super()._apply(*arguments, **options)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.vision.grid_size

    @property
    def prefix_tokens(self) -> int:
        """Number of image tokens before the patches; the first one is [CLS]."""
        return self.vision.prefix_tokens

    @property
    def temperature(self) -> Tensor:
        """The contrastive temperature, 0-dim, within ALBEF's range."""
        low, high = TEMPERATURE_RANGE
        return clamped(self.log_temperature, math.log(low), math.log(high)).exp()[0]

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, image_size, image_size) -> tokens (B, N, Cv) and unit features (B, d)."""
        tokens, summary = self.vision.encode(pixels)
        return tokens, F.normalize(self.image_projection(summary), dim=-1)

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        """Texts -> tokens (B, L, C), 0 at padding, and unit features (B, d).

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L) bool, or 0 and 1 as tokenizers return it.
            packing: of the mask; default: computed.
        """
        tokens, summary = self.text.encode(input_ids, attention_mask.bool(), packing)
        return tokens, F.normalize(self.text_projection(summary), dim=-1)

    def match_tokens(
        self, image_tokens: Tensor, text_tokens: Tensor, attention_mask: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        """Encoded images and texts -> logits (S, 2), [:, 1] for "matched".

        Args:
            image_tokens: (B, N, Cv).
            text_tokens: (S, L, C).
            attention_mask: (S, L) bool.
            image_index: (S,) int64, the image of each text; default: image i for text i.
        """
        keys_values = self.fusion.keys_values(image_tokens)
        positions = first_tokens(text_tokens)
        mask = attention_mask.bool()
        return self.match_head(self.fusion(text_tokens, mask, keys_values, image_index, positions=positions))

    def match_logits(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """pixels (B, 3, image_size, image_size), input_ids (B, L) int64, attention_mask (B, L) bool -> logits (B, 2),
        [:, 1] for "matched"."""
        text_tokens, _ = self.encode_text(input_ids, attention_mask)
        return self.match_tokens(self.vision(pixels), text_tokens, attention_mask)

    def mlm_logits(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The arguments of `match_logits` -> logits (B, L, V) over the vocabulary at every token, given the image."""
        text_tokens, _ = self.encode_text(input_ids, attention_mask)
        keys_values = self.fusion.keys_values(self.vision(pixels))
        return self.language_head(self.fusion(text_tokens, attention_mask.bool(), keys_values))

    def matched_score(self, fused: Tensor) -> Tensor:
        """Fused [CLS] (S, C) -> the logit of "matched" (S,). Its Grad-CAM is the word map."""
        return self.match_head(fused)[:, 1]

    def relevance_inputs(
        self, text_tokens: Tensor, attention_mask: Tensor, keys_values: list[KeyValue], layer: int,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """`FusionEncoder.relevance_inputs` of the "matched" logit, without dropout."""
        return self.fusion.relevance_inputs(
            text_tokens, attention_mask, keys_values, layer, self.matched_score, packing
        )

    def word_relevance(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, layer: int | None = None
    ) -> Tensor:
        """Grad-CAM of "matched" over the image tokens for every token of the captions.

        Args:
            pixels: (B, 3, image_size, image_size).
            input_ids: (B, L) int64.
            attention_mask: (B, L) bool.
            layer: fusion layer, counted from 0; default: the one whose maps are the soft masks in training.

        Returns:
            float32 (B, L, N): `prefix_tokens` tokens, then the patches of `grid_size`, row by row.

        Raises:
            UsageError: for a layer out of range.
        """
        layer = self.config.soft_mask_layer if layer is None else layer
        last = self.config.fusion_layers - 1
        if self.config.match_through_words:
            last -= 1  # only [CLS] is read after the last layer, and it has no map
        if not 0 <= layer <= last:
            raise UsageError(f"layer: expected a fusion layer from 0 to {last}, got {layer}")
        with torch.no_grad():
            text_tokens, _ = self.encode_text(input_ids, attention_mask)
            keys_values = self.fusion.keys_values(self.vision(pixels))
        return word_gradcam(*self.relevance_inputs(text_tokens, attention_mask.bool(), keys_values, layer))


def clamped(parameter: Tensor, low: float, high: float) -> Tensor:
    """The parameter within [low, high]. Its gradient can move it back into the range, but not farther out.

    A plain clamp has no gradient outside the range, so a parameter that left it would be stuck. Clamping the parameter
    itself, as ALBEF does, has no effect under ZeRO, whose optimizer owns the weights.
    """
    inside = parameter + (parameter.clamp(low, high) - parameter).detach()
    if inside.requires_grad:
        value = parameter.detach().clone()
        below, above = value <= low, value >= high
        inside.register_hook(lambda gradient: gradient.masked_fill(below & (gradient > 0) | above & (gradient < 0), 0))
    return inside


def hold_key_biases(module: nn.Module) -> None:
    """Zeroes the gradients of key biases in self-attentions outside of a `WeightedLayer`, which zeroes its own."""
    ours = {parameter for layer in weighted_layers(module) for parameter in layer.parameters()}
    for name, parameter in module.named_parameters():
        if parameter in ours:
            continue
        if name.endswith("self.key.bias"):
            parameter.register_hook(torch.zeros_like)
        elif name.endswith("attn.qkv.bias"):
            parameter.register_hook(_without_key_part)


def _without_key_part(gradient: Tensor) -> Tensor:
    query, key, value = gradient.chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=initial_std(module.in_features))
        if module.bias is not None:
            nn.init.zeros_(module.bias)

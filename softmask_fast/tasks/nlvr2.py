"""Natural language for visual reasoning (NLVR2, Suhr et al., ACL 2019): is a statement true of a pair of images?

Entries of ALBEF's JSON files: {"sentence": text, "label": "True" or "False", "images": [left path, right path]}. The
metric is accuracy.

Every fusion layer becomes two, the first looks at the left image, the second at the right one; both start from the
pretrained layer and share the projections of keys and values (ALBEF, section 5). Text assignment prepares the doubled
layers on image-caption pairs: does a caption belong to the left image, to the right one, or to neither?
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_fast.data.types import Batch
from softmask_fast.model.fusion import FusionEncoder
from softmask_fast.model.text import initial_std
from softmask_fast.model.vision_language import VisionLanguageModel, hold_key_biases
from softmask_fast.tasks.base import ClassifierModel, TaskModel, first_tokens
from softmask_fast.tasks.datasets import EntryFormat, choice_field, text_field

LABELS = ("False", "True")
LEFT, RIGHT, NEITHER = range(3)
NEITHER_SHARE = 1 / 3


def _images(entry: dict[str, Any]) -> list[str]:
    images = entry.get("images")
    if not isinstance(images, list) or len(images) != 2:
        raise ValueError(f'"images": expected two paths, got {images!r}')
    return [text_field({"images": image}, "images") for image in images]


class PairFusion(FusionEncoder):
    """A fusion encoder of twice the layers, in pairs with common projections of keys and values."""

    def __init__(self, fusion: FusionEncoder, config, image_width: int):
        """fusion: the pretrained one, whose layers both layers of a pair start from."""
        super().__init__(replace(config, fusion_layers=2 * config.fusion_layers), image_width)
        self.attention, self.checkpointing = fusion.attention, fusion.checkpointing
        for number, layer in enumerate(self.layers):
            layer.load_state_dict(fusion.layers[number // 2].state_dict())
        for left, right in zip(self.layers[::2], self.layers[1::2], strict=True):
            for name in ("key", "value", "value_bias"):
                setattr(right.cross_attention, name, getattr(left.cross_attention, name))
        hold_key_biases(self)

    def keys_values(self, image_tokens: tuple[Tensor, Tensor]):
        """image_tokens: of the left and the right images, each (B, N, Cv)."""
        return [
            layer.cross_attention.keys_values(image_tokens[number % 2]) for number, layer in enumerate(self.layers)
        ]


class PairModel:
    """What the two models of pairs have in common."""

    base: VisionLanguageModel

    def double(self) -> None:
        self.base.fusion = PairFusion(self.base.fusion, self.base.config, self.base.vision.width)

    def fuse(self, left: Tensor, right: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Image tokens left, right (B, N, Cv) and texts (B, L) -> the fused [CLS] (B, C)."""
        text, _ = self.base.encode_text(input_ids, attention_mask)
        keys_values = self.base.fusion.keys_values((left, right))
        return self.base.fusion(text, attention_mask, keys_values, positions=first_tokens(text))


class NLVR2Model(PairModel, ClassifierModel):
    """True or false, from the fused [CLS]."""

    name = "nlvr2"
    images_per_example = 2
    classes = LABELS
    form = EntryFormat("sentence", lambda entry: choice_field(entry, "label", LABELS), _images, "label")

    def __init__(self, base: VisionLanguageModel, tokenizer):
        super().__init__(base, tokenizer)
        self.double()

    def fused(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """pixels (2 * B, 3, size, size), left and right of each pair in turn."""
        tokens = self.base.vision(pixels)
        return self.fuse(tokens[::2], tokens[1::2], input_ids, attention_mask)


class TextAssignmentModel(PairModel, TaskModel):
    """The pretraining of pairs: left, right or neither, from the fused [CLS]. Its batches are images and captions."""

    name = "text_assignment"

    def __init__(self, base: VisionLanguageModel, tokenizer):
        super().__init__(base, tokenizer)
        self.double()
        self.head = nn.Linear(base.config.text_width, 3)
        nn.init.normal_(self.head.weight, std=initial_std(base.config.text_width))
        nn.init.zeros_(self.head.bias)

    def loss(self, batch: Batch, taught: TextAssignmentModel | None, alpha: float):
        """There is no momentum copy in this objective."""
        tokens, features = self.base.encode_image(batch.pixels)
        left, right, target = assign(features.detach(), batch.ids, self.base.temperature.detach())
        logits = self.head(self.fuse(tokens[left], tokens[right], batch.input_ids, batch.attention_mask)).float()
        return F.cross_entropy(logits, target), {"accuracy": (logits.argmax(-1) == target).float().mean()}


def assign(features: Tensor, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each caption of a batch a left image, a right image (B,) and which of them is its own (B,).

    features (B, d), ids (B,) of the images. The other images are drawn the more often the more alike they are.
    """
    batch = len(ids)
    weights = (features.float() @ features.float().T / temperature).softmax(1)
    weights = weights.clamp(min=torch.finfo(weights.dtype).tiny).masked_fill(ids[:, None] == ids, 0)
    if not (weights.sum(1) > 0).all():
        raise ValueError("batch: expected at least two different images, to draw another one for every caption")
    first, second = weights.multinomial(2, replacement=True).T
    own = torch.arange(batch, device=ids.device)
    draw = torch.rand(batch, device=ids.device)
    target = torch.where(draw < NEITHER_SHARE, NEITHER, torch.where(draw < (1 + NEITHER_SHARE) / 2, LEFT, RIGHT))
    return torch.where(target == LEFT, own, first), torch.where(target == RIGHT, own, second), target

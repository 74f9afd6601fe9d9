"""Natural language for visual reasoning (NLVR2, Suhr et al., ACL 2019): is a statement true of a pair of images?

Entries of ALBEF's JSON files: {"sentence": text, "label": "True" or "False", "images": [left path, right path]}. The
metric is accuracy.

Every fusion layer becomes two: the first attends to the left image, the second to the right one. Both start from the
pretrained layer and share the projections of keys and values (ALBEF, section 5). Text assignment pretrains these layers
on image-caption pairs: does a caption belong to the left image, to the right one, or to neither?
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast as Tokenizer

from softmask_fast.data.types import Batch
from softmask_fast.errors import UsageError
from softmask_fast.model.fusion import first_tokens
from softmask_fast.model.pair_fusion import PairFusion
from softmask_fast.model.text import initial_std
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.tasks.base import ClassifierModel, Loss, TaskModel
from softmask_fast.tasks.datasets import EntryFormat, choice_field, text_field

LABELS = ("False", "True")
LEFT, RIGHT, NEITHER = range(3)
NEITHER_FRACTION = 1 / 3  # of the captions, in text assignment


def _images(entry: dict[str, Any]) -> list[str]:
    """The paths of the left and the right image."""
    images = entry.get("images")
    if not isinstance(images, list) or len(images) != 2:
        raise UsageError(f'"images": expected two paths, got {images!r}')
    return [text_field({"images": image}, "images") for image in images]


class PairModel(TaskModel):
    """A task on pairs of images. It replaces the fusion encoder of the pretrained model by a `PairFusion`."""

    def __init__(self, base: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        super().__init__(base, tokenizer)
        base.fusion = PairFusion(base.fusion, base.config, base.vision.width)

    def fuse(self, left: Tensor, right: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The fused [CLS], (B, C), of texts (B, L) and the tokens of their left and right images, each (B, N, Cv)."""
        text, _ = self.base.encode_text(input_ids, attention_mask)
        keys_values = self.base.fusion.keys_values((left, right))
        return self.base.fusion(text, attention_mask, keys_values, positions=first_tokens(text))


class NLVR2Model(PairModel, ClassifierModel):
    """Classifies the fused [CLS] of a statement and its two images as true or false."""

    name = "nlvr2"
    images_per_example = 2
    classes = LABELS
    form = EntryFormat("sentence", partial(choice_field, name="label", choices=LABELS), _images, "label")

    def fused(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The fused [CLS], (B, C). pixels: (2 * B, 3, size, size), the left and the right image of each pair."""
        tokens = self.base.vision(pixels)
        return self.fuse(tokens[::2], tokens[1::2], input_ids, attention_mask)


class TextAssignmentModel(PairModel):
    """Classifies the fused [CLS] of a caption and two images: left, right or neither. Its batches are image-caption
    pairs."""

    name = "text_assignment"

    def __init__(self, base: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        super().__init__(base, tokenizer)
        self.head = nn.Linear(base.config.text_width, 3)
        nn.init.normal_(self.head.weight, std=initial_std(base.config.text_width))
        nn.init.zeros_(self.head.bias)

    def loss(self, batch: Batch, teacher: TextAssignmentModel | None, alpha: float) -> Loss:
        """The cross entropy of the assignment, and its "accuracy". The teacher is unused, as in ALBEF."""
        tokens, features = self.base.encode_image(batch.pixels)
        left, right, target = assign(features.detach(), batch.ids, self.base.temperature.detach())
        logits = self.head(self.fuse(tokens[left], tokens[right], batch.input_ids, batch.attention_mask)).float()
        return F.cross_entropy(logits, target), {"accuracy": (logits.argmax(-1) == target).float().mean()}


def assign(features: Tensor, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a left and a right image for each caption of a batch. More similar images are drawn more often.

    Args:
        features: (B, d), of the captions' images.
        ids: (B,) int64, of the captions' images.
        temperature: () of the softmax over similarities.

    Returns:
        The indices of the left images, those of the right images, and which one is the caption's own (LEFT, RIGHT or
        NEITHER), each (B,) int64. The two images of NEITHER differ, as in ALBEF.

    Raises:
        UsageError: For fewer than three different images.
    """
    own = torch.arange(len(ids), device=ids.device)
    weights = (features.float() @ features.float().T / temperature).softmax(1)
    weights = weights.clamp(min=torch.finfo(weights.dtype).tiny).masked_fill(ids[:, None] == ids, 0)
    if len(ids.unique()) < 3:
        raise UsageError("batch: expected at least three different images, as a caption needs two others")
    first = weights.multinomial(1)[:, 0]
    second = weights.masked_fill(ids[first][:, None] == ids, 0).multinomial(1)[:, 0]
    draw = torch.rand(len(ids), device=ids.device)
    target = torch.where(draw < NEITHER_FRACTION, NEITHER, torch.where(draw < (1 + NEITHER_FRACTION) / 2, LEFT, RIGHT))
    right = torch.where(target == NEITHER, second, torch.where(target == LEFT, first, own))
    return torch.where(target == LEFT, own, first), right, target

"""Visual entailment (SNLI-VE, Xie et al., 2019): does an image entail a statement, contradict it, or neither?

Entries of ALBEF's JSON files: {"image": "4705552913", "sentence": "Two women are ...", "label": "entailment"}. An image
without a suffix is a .jpg, as in ALBEF. The metric is accuracy over the three classes.
"""

from __future__ import annotations

from functools import partial
from pathlib import PurePath
from typing import Any

from softmask_fast.tasks.base import ClassifierModel
from softmask_fast.tasks.datasets import EntryFormat, choice_field, one_image

CLASSES = ("contradiction", "neutral", "entailment")


def _image(entry: dict[str, Any]) -> list[str]:
    """The image's path, with its suffix."""
    (name,) = one_image(entry)
    return [name if PurePath(name).suffix else f"{name}.jpg"]


class EntailmentModel(ClassifierModel):
    """Classifies the fused [CLS] as contradiction, neutral or entailment."""

    name = "entailment"
    classes = CLASSES
    form = EntryFormat("sentence", partial(choice_field, name="label", choices=CLASSES), _image, "label")

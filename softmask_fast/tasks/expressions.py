"""Referring expressions (RefCOCO+, Yu et al., ECCV 2016), for grounding that is learned without boxes.

Entries of ALBEF's JSON files: {"image": path, "text": expression}. For the evaluation they have boxes (x, y, width,
height) in pixels, which ALBEF reads from other files: "box" of what is named, and "proposals", a list to choose from.
"""

from __future__ import annotations

from typing import Any

from softmask_fast.data.captions import Phrase, Sample
from softmask_fast.data.images import image_size
from softmask_fast.tasks.examples import EntryFormat, ExampleSource, one_image, open_examples


class ExpressionSource:
    """Referring expressions as captions, with the box of what they name as the box of a phrase."""

    def __init__(self, examples: ExampleSource):
        self._examples = examples
        self.keys, self.image_ids, self.encoded = examples.keys, examples.image_ids, examples.encoded

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, index: int) -> Sample:
        """Raises BadSample when the image cannot be used."""
        example = self._examples.read(index)
        image, text = example.images[0], example.text
        box, proposals = example.target
        if box is None:
            return Sample(example.key, image, [text])
        width, height = image_size(image)
        boxes, others = (
            [(x / width, y / height, (x + w) / width, (y + h) / height) for x, y, w, h in given]
            for given in ([box], proposals)
        )
        return Sample(example.key, image, [text], [Phrase(text, text, 0, len(text.split()), boxes, others, whole=True)])


def open_expressions(data: str, **options) -> ExpressionSource:
    """The expressions in JSON files, or of "shapes"; options as for `open_examples`."""
    return ExpressionSource(open_examples(data, "grounding", EntryFormat("text", _boxes, one_image), **options))


def _boxes(entry: dict[str, Any]) -> tuple[list[float] | None, list[list[float]]]:
    box, proposals = entry.get("box"), entry.get("proposals", [])
    for name, given in [("box", box)] * (box is not None) + [("proposals", one) for one in proposals]:
        numbers = isinstance(given, list) and len(given) == 4 and all(isinstance(n, int | float) for n in given)
        if not numbers or given[2] <= 0 or given[3] <= 0:
            raise ValueError(f'"{name}": expected x, y, width and height in pixels, got {given!r}')
    return box, proposals

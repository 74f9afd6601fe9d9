"""Examples of the tasks that learn from labels: read from ALBEF's JSON files or made of `shapes`, and their batches."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softmask_fast.data.images import image_size
from softmask_fast.data.loader import SampleLoader
from softmask_fast.data.parsing import distinct_keys, relative_names
from softmask_fast.data.seeding import image_ids
from softmask_fast.data.sources import expand_names, expand_paths
from softmask_fast.data.types import BadSample, Phrase, Sample
from softmask_fast.tasks.synthetic import ShapesTask


@dataclass(frozen=True)
class Example:
    """One example; its images are not decoded."""

    key: str
    images: list[bytes | np.ndarray]  # encoded files, or (H, W, 3) uint8
    text: str
    target: Any  # what the task's model predicts; None where the source is not labelled
    record: dict[str, Any]  # the entry as the file has it
    skipped_captions: int = 0


@dataclass
class TaskBatch:
    """One batch, tensors on the loader's device. L is the length of the longest text in the batch."""

    pixels: torch.Tensor  # (B * images, 3, size, size) float32, normalised, example after example
    input_ids: torch.Tensor  # (B, L) int64
    attention_mask: torch.Tensor  # (B, L) bool, True = token
    targets: list[Any]
    keys: list[str]
    token_count: int | None = None  # of attention_mask, so that nobody has to ask the device for it


@dataclass(frozen=True)
class EntryFormat:
    """How a task reads an entry of its JSON file."""

    text: str  # the field of the text
    target: Callable[[dict[str, Any]], Any]  # raises ValueError for a wrong one
    images: Callable[[dict[str, Any]], list[str]]  # the paths that it names; raises ValueError
    label: str | None = None  # the field of the target, where test files leave it out

    def parse(self, entry: Any, labelled: bool = True) -> tuple[str, Any, list[str]]:
        """labelled: False where no entry has a label; the target is None then. Raises ValueError that names the field,
        what was expected and what came."""
        if not isinstance(entry, dict):
            raise ValueError(f"expected an object, got {type(entry).__name__}")
        text = text_field(entry, self.text)
        if not labelled and not self.lacks_label(entry):
            raise ValueError(f'"{self.label}": expected none, as the first entry has none, got {entry[self.label]!r}')
        return text, self.target(entry) if labelled else None, self.images(entry)

    def lacks_label(self, entry: Any) -> bool:
        return self.label is not None and isinstance(entry, dict) and entry.get(self.label) is None


def text_field(entry: dict[str, Any], name: str) -> str:
    text = entry.get(name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"{name}": expected a text, got {text!r}')
    return text.strip()


def choice_field(entry: dict[str, Any], name: str, choices: Sequence[str]) -> int:
    """The place of a field's value among the choices."""
    if entry.get(name) not in choices:
        raise ValueError(f'"{name}": expected one of {list(choices)}, got {entry.get(name)!r}')
    return choices.index(entry[name])


def one_image(entry: dict[str, Any]) -> list[str]:
    return [text_field(entry, "image")]


class ExampleSource:
    """The examples of one task, by index. Reading is thread-safe and deterministic."""

    keys: Sequence[str]  # unique
    image_ids: np.ndarray  # (n,) int64: equal ids are the same (first) image
    encoded: bool  # True: images are encoded files; False: uint8 arrays
    labelled = True  # False: of a test split whose labels are not public

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> Example:
        """Raises BadSample when an image cannot be read."""
        raise NotImplementedError


class JsonExamples(ExampleSource):
    """Entries of JSON files, each a list of objects. All are checked when the files are opened.

    Image paths are absolute, or relative to image_root (default: the JSON's folder).
    """

    encoded = True

    def __init__(self, paths: Sequence[Path], form: EntryFormat, image_root: str | None = None, learned: bool = True):
        """learned: every entry needs its label; else all may lack it."""
        self._parsed: list[tuple[str, Any, list[str]]] = []
        self._entries: list[dict[str, Any]] = []
        names = []
        for path in paths:
            try:
                entries = json.loads(Path(path).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"data: {path} is not valid JSON: {error}") from error
            if not isinstance(entries, list) or not entries:
                raise ValueError(f"data: {path}: expected a list of objects, got {str(entries)[:60]}")
            for number, entry in enumerate(entries):
                if not names and not learned:
                    self.labelled = not form.lacks_label(entry)
                try:
                    text, target, images = form.parse(entry, self.labelled)
                except ValueError as error:
                    raise ValueError(f"data: {path}: entry {number}: {error}") from error
                root = Path(image_root) if image_root else Path(path).parent
                self._parsed.append((text, target, [os.path.abspath(root / image) for image in images]))
                self._entries.append(entry)
                names.append(f"{Path(path).stem}-{number:06d}")
        self.keys = distinct_keys(names)
        self.image_ids = image_ids(relative_names([images[0] for _, _, images in self._parsed]))

    def read(self, index: int) -> Example:
        text, target, paths = self._parsed[index]
        try:
            images = [Path(path).read_bytes() for path in paths]
        except (OSError, ValueError) as error:  # ValueError: a path that no file can have
            raise BadSample(f"image cannot be read: {error}") from error
        return Example(self.keys[index], images, text, target, self._entries[index])


class ShapesExamples(ExampleSource):
    """Entries about `shapes` scenes, drawn on the fly."""

    encoded = False

    def __init__(self, entries: ShapesTask, form: EntryFormat):
        self._entries, self._form = entries, form
        self.keys = entries.keys
        self.image_ids = image_ids(self.keys)

    def read(self, index: int) -> Example:
        entry, images = self._entries.entry(index)
        text, target, _ = self._form.parse(entry)
        return Example(self.keys[index], list(images), text, target, entry)


def open_examples(
    data: str, task: str, form: EntryFormat, *, split: str, seed: int, image_size: int, image_root: str | None = None
) -> ExampleSource:
    """data: "shapes", "shapes:num=4096,names=color" (see ShapesTask), or JSON files by commas or a pattern.

    Raises ValueError or OSError that names what is missing or wrong.
    """
    if data.split(":")[0] == "shapes":
        options = data[len("shapes:") :]
        return ShapesExamples(
            ShapesTask.from_options(options, task, split=split, seed=seed, image_size=image_size), form
        )
    paths = expand_paths(expand_names(data))
    if other := [path for path in paths if path.suffix != ".json"]:
        raise ValueError(f"data: expected .json files or shapes for {task}, got {other[0]}")
    return JsonExamples(paths, form, image_root, learned=split == "train")


class ExampleLoader(SampleLoader[TaskBatch]):
    """Training batches of examples."""

    def _choose(self, sample: Example, epoch: int) -> tuple[str, Any]:
        return sample.text, sample.target

    def _collate(self, selection, pixels: torch.Tensor) -> TaskBatch:
        rows = self._tokenize(selection, [sample.content[0] for sample in selection.samples])
        input_ids, attention_mask = self._padded(rows)
        return TaskBatch(
            pixels=pixels,
            input_ids=input_ids,
            attention_mask=attention_mask,
            targets=[sample.content[1] for sample in selection.samples],
            keys=[sample.key for sample in selection.samples],
            token_count=sum(map(len, rows)),
        )


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

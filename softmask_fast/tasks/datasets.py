"""Examples of the tasks, read from ALBEF's JSON files or drawn by `shapes`. Like `data.preparing`, without torch.

Labels and answers become `Example`s. Referring expressions become `Sample`s, as pretraining and grounding read them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softmask_fast.data.folders import check_existence, image_folder
from softmask_fast.data.images import image_size, read_image
from softmask_fast.data.parsing import distinct_keys, is_box, is_numbers, limited, relative_names
from softmask_fast.data.preparing import Column, Preparer, Ragged
from softmask_fast.data.seeding import image_ids
from softmask_fast.data.sources import expand_names, expand_paths
from softmask_fast.data.synthetic import ShapesSource
from softmask_fast.data.types import BadSample, Phrase, Sample
from softmask_fast.errors import UsageError, short
from softmask_fast.tasks.synthetic import ShapesTask
from softmask_fast.utils import read_json

if TYPE_CHECKING:
    import torch

_DEPTH = 4  # nested lists and objects of an entry that are kept


@dataclass(frozen=True)
class Example:
    """One example; its images are not decoded."""

    key: str
    images: list[bytes | np.ndarray]  # encoded files, or (H, W, 3) uint8
    text: str
    target: Any  # what the task's model predicts; None without labels
    record: dict[str, Any]  # the entry of the file
    skipped_captions: int = 0


@dataclass
class TaskBatch:
    """One batch, tensors on the loader's device. L is the length of the longest text in the batch."""

    pixels: torch.Tensor  # (B * images_per_example, 3, size, size) float32, normalized, example after example
    input_ids: torch.Tensor  # (B, L) int64
    attention_mask: torch.Tensor  # (B, L) bool, True = token
    targets: list[Any]
    keys: list[str]
    token_count: int | None = None  # tokens in attention_mask, known without a device synchronization


@dataclass(frozen=True)
class EntryFormat:
    """How a task reads an entry of its JSON file. Its functions raise a UsageError that names the wrong field."""

    text: str  # name of the text field
    target: Callable[[dict[str, Any]], Any]
    images: Callable[[dict[str, Any]], list[str]]  # the image paths
    label: str | None = None  # name of the label field, if test files may omit it

    def parse(self, entry: Any, labeled: bool = True) -> tuple[str, Any, list[str]]:
        """The text, the target and the image paths. If not `labeled`, the entry must not have a label; its target is
        None."""
        if not isinstance(entry, dict):
            raise UsageError(f"expected an object, got {type(entry).__name__}")
        text = text_field(entry, self.text)
        if labeled:
            target = self.target(entry)
        elif self.lacks_label(entry):
            target = None
        else:
            raise UsageError(f'"{self.label}": expected none, as in the first entry, got {short(entry[self.label])}')
        return text, target, self.images(entry)

    def lacks_label(self, entry: Any) -> bool:
        """Whether an entry has no label although the task has labels."""
        return self.label is not None and isinstance(entry, dict) and entry.get(self.label) is None


def text_field(entry: dict[str, Any], name: str) -> str:
    """The stripped text of a field. Raises UsageError for anything else."""
    text = entry.get(name)
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f'"{name}": expected a string, got {short(text)}')
    return text.strip()


def choice_field(entry: dict[str, Any], name: str, choices: Sequence[str]) -> int:
    """The index of a field's value in `choices`. Raises UsageError for any other value."""
    if entry.get(name) not in choices:
        raise UsageError(f'"{name}": expected one of {list(choices)}, got {short(entry.get(name))}')
    return choices.index(entry[name])


def one_image(entry: dict[str, Any]) -> list[str]:
    """The path in the field "image"."""
    return [text_field(entry, "image")]


class ExampleSource:
    """The examples of one task, by index. Reading is thread-safe and deterministic."""

    keys: Sequence[str]  # unique
    image_ids: np.ndarray  # (n,) int64: equal ids are the same (first) image
    encoded: bool  # True: images are encoded files; False: uint8 arrays
    labeled = True  # False: the labels are not public, as in a test split

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> Example:
        """The example at an index. Raises BadSample if an image cannot be read."""
        return self.load(self.locate(index))

    def locate(self, index: int) -> Any:
        """All that `load` needs to read an example; see `CaptionSource`."""
        return index

    def load(self, located: Any) -> Example:
        """Reads a located example. Raises as `read` does."""
        raise NotImplementedError


class JsonExamples(ExampleSource):
    """Entries of JSON files, each a list of objects. All entries are checked when the files are opened."""

    encoded = True

    def __init__(
        self, paths: Sequence[Path], form: EntryFormat, image_root: str | None = None, training: bool = True
    ) -> None:
        """Reads and checks the files.

        Args:
            paths: Of the files.
            form: How the task reads an entry.
            image_root: Where relative image paths start, see `image_folder`; default: the folder of the JSON file.
            training: Whether every entry needs its label. Otherwise all may lack it.

        Raises:
            UsageError: For a wrong entry; the message names file, entry and field. Also if none of a file's images
                exists.
        """
        self._parsed: list[tuple[str, Any, list[str]]] = []
        self._entries: list[dict[str, Any]] = []
        names = []
        for path in paths:
            parsed, before = [], len(self._parsed)
            for number, entry in enumerate(_entries(path)):
                if not names and not training:
                    self.labeled = not form.lacks_label(entry)
                try:
                    text, target, images = form.parse(entry, self.labeled)
                except UsageError as error:
                    raise UsageError(f"data: {path}: entry {number}: {error}") from error
                parsed.append((text, target, images))
                self._entries.append(limited(entry, _DEPTH))
                names.append(f"{path.stem}-{number:06d}")
            root = image_folder(image_root, [image for _, _, images in parsed for image in images]) or path.parent
            for text, target, images in parsed:
                self._parsed.append((text, target, [os.path.abspath(os.path.join(root, image)) for image in images]))
            listed = [image for _, _, images in self._parsed[before:] for image in images]
            check_existence(listed, 1.0, f"data: {path}", "--image_root")
        self.keys = distinct_keys(names)
        self.image_ids = image_ids(relative_names([images[0] for _, _, images in self._parsed]))

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def locate(self, index: int) -> tuple[str, tuple[str, Any, list[str]], dict[str, Any]]:
        return self.keys[index], self._parsed[index], self._entries[index]

    def load(self, located: tuple[str, tuple[str, Any, list[str]], dict[str, Any]]) -> Example:
        key, (text, target, paths), entry = located
        return Example(key, [*map(read_image, paths)], text, target, entry)


def _entries(path: Path) -> list[Any]:
    entries = read_json(path, "data")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"data: {path}: expected a list of objects, got {short(entries)}")
    return entries


class ShapesExamples(ExampleSource):
    """Entries about `shapes` scenes, drawn on the fly."""

    encoded = False

    def __init__(self, entries: ShapesTask, form: EntryFormat) -> None:
        self._entries, self._form = entries, form
        self.keys = entries.keys
        self.image_ids = image_ids(self.keys)

    def load(self, index: int) -> Example:
        entry, images = self._entries.entry(index)
        text, target, _ = self._form.parse(entry)
        return Example(self.keys[index], list(images), text, target, entry)


def open_examples(
    data: str, task: str, form: EntryFormat, *, split: str, seed: int, image_size: int, image_root: str | None = None
) -> ExampleSource:
    """Opens the examples of a task.

    Args:
        data: "shapes", "shapes:num=4096,names=color" (see `ShapesSource.from_options`), or JSON files, separated by
            commas or as a pattern.
        task: Its name.
        form: How the task reads an entry.
        split: "train": every entry needs its label. "val": all entries may lack it.
        seed: Of `shapes`.
        image_size: Of `shapes`, in pixels.
        image_root: Folder of relative image paths, or several, see `image_folder`; default: that of the file.

    Raises:
        UsageError, OSError: For data that cannot be read. The message names what is wrong.
    """
    if data.split(":")[0] == "shapes":
        scenes = ShapesSource.from_options(data[len("shapes:") :], split=split, seed=seed, image_size=image_size)
        return ShapesExamples(ShapesTask(task, scenes), form)
    paths = expand_paths(expand_names(data))
    if other := [path for path in paths if path.suffix != ".json"]:
        raise UsageError(f"data: expected .json files or shapes for {task}, got {other[0]}")
    return JsonExamples(paths, form, image_root, training=split == "train")


class ExamplePreparer(Preparer):
    """Tokenizes the text of each example."""

    def columns(self, samples: Sequence[Example], visits: Sequence[tuple[int, str]]) -> dict[str, Column]:
        rows, tokens = self.tokenize([example.text for example in samples])
        return {"tokens": tokens, "input_ids": Ragged.of(rows), "targets": [example.target for example in samples]}


class ExpressionSource:
    """Referring expressions as captions, each a phrase with the box of the object it names."""

    def __init__(self, examples: ExampleSource) -> None:
        self._examples = examples
        self.keys, self.image_ids, self.encoded = examples.keys, examples.image_ids, examples.encoded

    def __len__(self) -> int:
        return len(self._examples)

    def __getstate__(self) -> dict[str, Any]:
        return {"_examples": self._examples}

    def read(self, index: int) -> Sample:
        """The expression at an index, with its image. Raises BadSample if the image cannot be used."""
        return self.load(self.locate(index))

    def locate(self, index: int) -> Any:
        """All that `load` needs to read an expression."""
        return self._examples.locate(index)

    def load(self, located: Any) -> Sample:
        """Reads a located expression. Raises as `read` does."""
        example = self._examples.load(located)
        image, text = example.images[0], example.text
        box, proposals = example.target
        if box is None:
            return Sample(example.key, image, [text])
        width, height = image_size(image)
        fractions = [(x / width, y / height, (x + w) / width, (y + h) / height) for x, y, w, h in [box, *proposals]]
        for given, fraction in zip([box, *proposals], fractions, strict=True):
            if not is_box(fraction):
                raise BadSample(f"box {given} lies outside the image of {width} x {height} pixels")
        box, *proposals = fractions
        phrase = Phrase(text, text, 0, len(text.split()), [box], proposals, whole=True)
        return Sample(example.key, image, [text], [phrase])


def open_expressions(data: str, **options: Any) -> ExpressionSource:
    """Opens expressions from JSON files or "shapes". The options and errors are those of `open_examples`."""
    return ExpressionSource(open_examples(data, "grounding", EntryFormat("text", _boxes, one_image), **options))


def _boxes(entry: dict[str, Any]) -> tuple[list[float] | None, list[list[float]]]:
    """The box and the proposals of an expression, each [x, y, width, height] in pixels. Training needs no box."""
    box, proposals = entry.get("box"), entry.get("proposals", [])
    if not isinstance(proposals, list):
        raise UsageError(f'"proposals": expected a list of boxes, got {short(proposals)}')
    if box is not None:
        _check_box("box", box)
    for proposal in proposals:
        _check_box("proposals", proposal)
    return box, proposals


def _check_box(name: str, box: Any) -> None:
    if not is_numbers(box) or box[2] <= 0 or box[3] <= 0:
        raise UsageError(f'"{name}": expected x, y, width and height in pixels, got {short(box)}')

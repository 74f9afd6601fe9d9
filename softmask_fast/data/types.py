"""Samples and batches: what sources give and loaders return."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Phrase:
    """Words of a caption that name something in the image."""

    caption: str
    text: str
    first_word: int  # counted in whitespace-separated words of the caption
    n_words: int
    boxes: list[tuple[float, float, float, float]]  # x1 y1 x2 y2, as fractions of width and height
    proposals: list[tuple[float, float, float, float]] = field(default_factory=list)  # to choose from, where there are
    whole: bool = False  # the caption as a whole: [CLS] and [SEP] belong to it, too


@dataclass(frozen=True)
class Sample:
    """One image and its captions, not decoded."""

    key: str
    image: bytes | np.ndarray  # an encoded file, or (H, W, 3) uint8
    captions: list[str]  # at least one, each with at least one letter or digit
    phrases: list[Phrase] = field(default_factory=list)
    skipped_captions: int = 0  # captions left out because there is no word in them

    @property
    def images(self) -> list[bytes | np.ndarray]:
        return [self.image]


class CaptionSource(Protocol):
    """Samples by index. Reading is thread-safe and deterministic.

    A source may have an `order` of its own (data/sampler.py); else the loader shuffles all of it.
    """

    keys: Sequence[str]  # unique
    image_ids: np.ndarray  # (n,) int64: equal ids are the same image
    encoded: bool  # True: images are encoded files; False: uint8 arrays

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Raises BadSample when this sample cannot be used."""
        ...


def relative_names(paths: Sequence[str]) -> list[str]:
    """Absolute paths as seen from the deepest folder that holds them all: names that survive moving the data."""
    common = os.path.commonpath({os.path.dirname(path) for path in paths})
    return [path[len(common) :].lstrip("/") for path in paths]


def distinct_keys(names: Sequence[str]) -> list[str]:
    """Names made unique: the second "a" becomes "a#2"."""
    if len(set(names)) == len(names):
        return list(names)
    seen: dict[str, int] = {}
    keys: list[str] = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        keys.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return keys if len(set(keys)) == len(keys) else distinct_keys(keys)


def usable_captions(raw: Any, what: str) -> tuple[list[str], int]:
    """The captions in `raw` (a string or a list) that have a letter or digit, and how many have none.

    Halves of characters (lone surrogates, which JSON can hold and no tokeniser takes) become "?".
    Raises BadSample, naming `what`, when `raw` is of another kind or no caption is left.
    """
    entries = [raw] if isinstance(raw, str) else raw
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise BadSample(f"{what} must be a string or a list of strings, got {str(raw)[:60]!r}")
    captions = [_clean(entry) for entry in entries if any(letter.isalnum() for letter in entry)]
    if not captions:
        raise BadSample(f"no usable caption: {what} is {str(raw)[:60]!r}")
    return captions, len(entries) - len(captions)


def _clean(caption: str) -> str:
    return caption.strip().encode("utf-8", "replace").decode("utf-8")


def parse_phrases(raw: Any) -> list[Phrase]:
    """Phrases as they stand in a sample's JSON. Raises BadSample when one of them is malformed."""
    try:
        return [
            Phrase(
                caption=_clean(str(phrase["caption"])),
                text=str(phrase["text"]),
                first_word=int(phrase["first_word"]),
                n_words=int(phrase["n_words"]),
                boxes=[(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in phrase["boxes"]],
            )
            for phrase in raw
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadSample(f'malformed "phrases": {error!r}') from error


@dataclass
class Batch:
    """One batch, all tensors on the loader's device. L is the length of the longest caption in the batch."""

    pixels: torch.Tensor  # (B, 3, size, size) float32, normalised
    input_ids: torch.Tensor  # (B, L) int64, the clean caption: [CLS] ... [SEP] [PAD]
    masked_ids: torch.Tensor  # (B, L) int64, the caption after masking
    attention_mask: torch.Tensor  # (B, L) bool, True = token
    mlm_positions: torch.Tensor  # (P,) int64, flat positions in (B * L) of the masked tokens
    mlm_labels: torch.Tensor  # (P,) int64, the original ids there
    word_index: torch.Tensor  # (B,) int64, token position of one random word
    ids: torch.Tensor  # (B,) int64, identity of the image
    keys: list[str]
    token_count: int | None = None  # of attention_mask, so that nobody has to ask the device for it


class BadSample(ValueError):
    """A sample that cannot be used; the message says why."""

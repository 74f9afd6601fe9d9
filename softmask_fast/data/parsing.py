"""What all sources share: keys made from file names, captions and phrases read from JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from softmask_fast.data.types import BadSample, Phrase


def relative_names(paths: Sequence[str]) -> list[str]:
    """Absolute paths relative to their deepest common folder: names that survive moving the data."""
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
    """The captions in `raw` (a string or a list) that contain a letter or digit, and how many do not.

    Lone surrogates, which JSON can hold but no tokenizer accepts, become "?". Raises BadSample, naming `what`, if `raw`
    has another type or no caption is left.
    """
    entries = [raw] if isinstance(raw, str) else raw
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise BadSample(f"{what} must be a string or a list of strings, got {str(raw)[:60]!r}")
    captions = [_clean(entry) for entry in entries if any(letter.isalnum() for letter in entry)]
    if not captions:
        raise BadSample(f"no usable caption: {what} is {str(raw)[:60]!r}")
    return captions, len(entries) - len(captions)


def parse_phrases(raw: Any) -> list[Phrase]:
    """The phrases of a sample's JSON. Raises BadSample if one is malformed."""
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


def _clean(caption: str) -> str:
    return caption.strip().encode("utf-8", "replace").decode("utf-8")

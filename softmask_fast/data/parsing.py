"""What all sources share: keys from file names, and captions and phrases from JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from softmask_fast.data.types import BadSample, Phrase
from softmask_fast.errors import short


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


def limited(value: Any, depth: int) -> Any:
    """A JSON value without what is nested deeper than `depth` lists and objects. No sample needs it, and deep nesting
    cannot be sent to another process."""
    if isinstance(value, list):
        return [limited(part, depth - 1) for part in value] if depth else None
    if isinstance(value, dict):
        return {name: limited(part, depth - 1) for name, part in value.items()} if depth else None
    return value


def check_captions(raw: Any, what: str) -> list[str]:
    """`raw` as a list of captions. Raises BadSample, naming `what`, if it is neither a string nor a list of strings."""
    entries = [raw] if isinstance(raw, str) else raw
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise BadSample(f"{what} must be a string or a list of strings, got {short(raw)}")
    return entries


def usable_captions(raw: Any, what: str) -> tuple[list[str], int]:
    """The captions in `raw` (a string or a list) that contain a letter or digit, and the number of those that do not.

    Byte order marks and NUL characters are dropped. Lone surrogates, which JSON can hold but no tokenizer accepts,
    become "?".

    Raises:
        BadSample: As in `check_captions`, and if no caption is left.
    """
    entries = check_captions(raw, what)
    captions = [_clean(entry) for entry in entries if any(letter.isalnum() for letter in entry)]
    if not captions:
        raise BadSample(f"no usable caption: {what} is {short(raw)}")
    return captions, len(entries) - len(captions)


def text_lines(content: bytes) -> list[str]:
    """The lines of a UTF-8 text that are not blank. Only CR and LF end a line, not U+2028, NEL or a form feed.

    Raises:
        BadSample: For another encoding, or NUL characters (typical of UTF-16).
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f".txt is not UTF-8: {error.reason} at byte {error.start}") from error
    if "\0" in text:
        raise BadSample(f".txt is not UTF-8 text: it has a NUL at byte {content.index(0)}")
    return [line for line in text.replace("\r", "\n").split("\n") if line.strip()]


def parse_phrases(raw: Any) -> list[Phrase]:
    """The phrases of a sample's JSON.

    Raises:
        BadSample: If one is malformed, has a box without area inside the image, or lies outside its caption.
    """
    if not isinstance(raw, list):
        raise BadSample(f'"phrases" must be a list of objects, got {short(raw)}')
    return [_phrase(number, phrase) for number, phrase in enumerate(raw)]


def _phrase(number: int, raw: Any) -> Phrase:
    def require(good: bool, field: str, expected: str) -> None:
        if not good:
            raise BadSample(f'"phrases", entry {number}: "{field}": expected {expected}, got {short(raw.get(field))}')

    if not isinstance(raw, dict):
        raise BadSample(f'"phrases", entry {number}: expected an object, got {short(raw)}')
    for name in ("caption", "text"):
        require(isinstance(raw.get(name), str), name, "a string")
    caption, first, count, boxes = _clean(raw["caption"]), raw.get("first_word"), raw.get("n_words"), raw.get("boxes")
    words = len(caption.split())
    require(type(first) is int and 0 <= first < words, "first_word", f"a word of the caption's, 0 to {words - 1}")
    require(type(count) is int and 1 <= count <= words - first, "n_words", f"1 to {words - first}")
    require(isinstance(boxes, list) and all(map(is_box, boxes)), "boxes", BOX)
    return Phrase(caption, _clean(raw["text"]), first, count, [tuple(map(float, box)) for box in boxes])


BOX = "x1 < x2 and y1 < y2 as fractions of the image, with area inside it"


def is_box(box: Any) -> bool:
    """Whether this is (x1, y1, x2, y2) in fractions of an image, with area inside it."""
    if not is_numbers(box):
        return False
    x1, y1, x2, y2 = box
    return max(x1, 0) < min(x2, 1) and max(y1, 0) < min(y2, 1)


def is_numbers(box: Any) -> bool:
    """Whether this is a list or tuple of four finite numbers."""
    is_four = isinstance(box, list | tuple) and len(box) == 4
    return is_four and all(type(number) in (int, float) and abs(number) < 1e9 for number in box)


def _clean(caption: str) -> str:
    caption = caption.replace("\0", "").replace("\ufeff", "")
    return caption.strip().encode("utf-8", "replace").decode("utf-8")

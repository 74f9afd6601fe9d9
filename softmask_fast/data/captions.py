"""Where images and captions come from: the `Sample`, the protocol of a source, and `open_source`."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand

from softmask_fast.data.images import BadSample
from softmask_fast.data.randomness import identities

if TYPE_CHECKING:
    from softmask_fast.data.remote_options import RemoteOptions


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

    A source may have an `order` of its own (data/order.py); else the loader shuffles all of it.
    """

    keys: Sequence[str]  # unique
    image_ids: np.ndarray  # (n,) int64: equal ids are the same image
    encoded: bool  # True: images are encoded files; False: uint8 arrays

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Raises BadSample when this sample cannot be used."""
        ...


def open_source(
    data: str | Sequence[str],
    *,
    split: str = "train",
    seed: int = 0,
    image_size: int = 64,
    remote: RemoteOptions | None = None,
    image_root: str | None = None,
) -> CaptionSource:
    """Opens `data` and lists its samples.

    data: "shapes" or "shapes:num=4096,objects=3" (drawn on the fly; `split`, `seed`, `image_size` matter here only);
        WebDataset shards: a tar file, a brace pattern ("cc3m-{000..331}.tar"), a glob pattern, a folder of tar files;
        ALBEF's JSON lists ([{"image": path, "caption": str or list}]); or several of these, as a list or by commas;
        or shards by URL alone (https://, s3://, gs://, ...), brace patterns too, which `remote` says how to keep.
    image_root: where relative image paths in JSON lists start, default the list's folder.
    Raises ValueError or OSError that names what is missing, damaged or unreachable.
    """
    from softmask_fast.data.remote_shards import RemoteShardSource, expand_urls
    from softmask_fast.data.shapes import ShapesSource
    from softmask_fast.data.shards import ShardSource

    if isinstance(data, str) and (data == "shapes" or data.startswith("shapes:")):
        return ShapesSource.from_options(data[len("shapes:") :], split=split, seed=seed, image_size=image_size)
    names = expand_names(data)
    if urls := [name for name in names if "://" in name]:
        if len(urls) < len(names):
            local = next(name for name in names if "://" not in name)
            raise ValueError(f"data: {local} is local, {urls[0]} a URL: together, write local shards as file:///...")
        return RemoteShardSource(expand_urls(urls), remote)
    paths = expand_paths(names)
    shards = [path for path in paths if path.suffix == ".tar"]
    lists = [path for path in paths if path.suffix == ".json"]
    if unknown := sorted(set(paths) - set(shards) - set(lists)):
        raise ValueError(f"data: {unknown[0]} is neither a .tar shard nor a .json list (nor a folder of shards)")
    sources = ([ShardSource(shards)] if shards else []) + ([JsonListSource(lists, image_root)] if lists else [])
    return sources[0] if len(sources) == 1 else JoinedSource(sources)


def expand_names(data: str | Sequence[str]) -> list[str]:
    """The names in `data`, lists by commas and brace patterns taken apart."""
    names: list[str] = []
    for item in [data] if isinstance(data, str) else data:
        if item.startswith("pipe:"):
            raise ValueError(f"data: {item}: commands are not run; expected files or URLs")
        # a list by commas is a brace pattern without its outer braces; the last, empty name makes sure of a comma
        try:
            found = list(braceexpand("{" + item + ",}"))[:-1]
        except UnbalancedBracesError as error:
            raise ValueError(f"data: {item}: {error}") from error
        if "" in found:
            raise ValueError(f"data: an empty name in {item!r}; expected 'shapes', shards or .json lists")
        names += found
    if not names:
        raise ValueError("data: names no files; expected 'shapes', shards or .json lists")
    return names


def expand_paths(names: Sequence[str]) -> list[Path]:
    """The local files that `names` (files, folders, glob patterns) name, in a fixed order."""
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
        elif any(letter in name for letter in "*?["):
            found = sorted(map(Path, glob.glob(str(path))))
        else:
            found = [path]
        if not found:
            raise FileNotFoundError(
                f"data: no .tar files in {name}" if path.is_dir() else f"data: nothing matches {name}"
            )
        paths += found
    if missing := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(f"data: {len(missing)} of {len(paths)} files do not exist: {', '.join(missing[:10])}")
    return paths


class JsonListSource:
    """ALBEF's pre-training lists: JSON files of [{"image": path, "caption": str or list of str}].

    Image paths are absolute or relative to image_root (default: the JSON's folder). Entries with the same image share
    one image id.
    """

    encoded = True

    def __init__(self, paths: Sequence[Path], image_root: str | None = None):
        self._images: list[str] = []
        self._captions: list[Any] = []
        for path in paths:
            try:
                entries = json.loads(Path(path).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"data: {path} is not valid JSON: {error}") from error
            if not isinstance(entries, list):
                raise ValueError(f"data: {path} must be a JSON list of objects, got {type(entries).__name__}")
            for number, entry in enumerate(entries):
                if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
                    raise ValueError(f'data: {path}: entry {number} has no "image" path: {str(entry)[:100]}')
                self._images.append(os.path.abspath(os.path.join(image_root or path.parent, entry["image"])))
                self._captions.append(entry.get("caption"))
        if not self._images:
            raise ValueError(f"data: no samples in {', '.join(map(str, paths))}")
        names = relative_names(self._images)
        self.keys = distinct_keys(names)
        self.image_ids = identities(names)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Sample:
        captions, skipped = usable_captions(self._captions[index], '"caption"')
        try:
            image = Path(self._images[index]).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path that no file can have
            raise BadSample(f"image cannot be read: {error}") from error
        return Sample(self.keys[index], image, captions, skipped_captions=skipped)


class JoinedSource:
    """Several sources one after the other."""

    encoded = True

    def __init__(self, sources: Sequence[CaptionSource]):
        self._sources = sources
        self._starts = np.cumsum([0] + [len(source) for source in sources])
        self.keys = distinct_keys([key for source in sources for key in source.keys])
        self.image_ids = np.concatenate([source.image_ids for source in sources])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> Sample:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        sample = self._sources[which].read(index - int(self._starts[which]))
        return Sample(self.keys[index], sample.image, sample.captions, sample.phrases, sample.skipped_captions)


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

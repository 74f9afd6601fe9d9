"""Where images and captions come from: the `Sample`, the protocol of a source, and `open_source`."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand

from softmask_fast.data.seeding import image_ids
from softmask_fast.data.types import BadSample, CaptionSource, Sample, distinct_keys, relative_names, usable_captions

if TYPE_CHECKING:
    from softmask_fast.data.remote.options import RemoteOptions


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
    from softmask_fast.data.remote.source import RemoteShardSource, expand_urls
    from softmask_fast.data.shards import ShardSource
    from softmask_fast.data.synthetic import ShapesSource

    if isinstance(data, str) and (data == "shapes" or data.startswith("shapes:")):
        return ShapesSource.from_options(data[len("shapes:") :], split=split, seed=seed, image_size=image_size)
    names = expand_names(data)
    if urls := [name for name in names if "://" in name]:
        if len(urls) < len(names):
            local = next(name for name in names if "://" not in name)
            raise ValueError(f"data: {local} is local, {urls[0]} a URL: run_on_all_ranks, write local shards as file:///...")
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
        self.image_ids = image_ids(names)

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



"""Opens data: shards, JSON lists and `shapes` as sources of samples."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softmask_fast.config import DataConfig
from softmask_fast.data.images import read_image
from softmask_fast.data.parsing import check_captions, distinct_keys, relative_names, usable_captions
from softmask_fast.data.remote.options import RemoteOptions
from softmask_fast.data.seeding import image_ids
from softmask_fast.data.shards import ShardSource
from softmask_fast.data.synthetic import ShapesSource
from softmask_fast.data.types import BadSample, CaptionSource, Sample
from softmask_fast.errors import UsageError, short
from softmask_fast.utils import read_json


def open_source(
    data: str | Sequence[str], *, split: str = "train", seed: int = 0, image_size: int = 64,
    remote: RemoteOptions | None = None, image_root: str | None = None,
) -> CaptionSource:  # fmt: skip
    """Opens `data` and lists its samples.

    Args:
        data: `"shapes"` or `"shapes:num=4096,objects=3"`, drawn on the fly; WebDataset shards, as a tar file, a brace
            pattern (`"cc3m-{000..331}.tar"`), a glob pattern or a folder; ALBEF's JSON lists,
            `[{"image": path, "caption": str or list}]`; several of these as a list or separated by commas; or shards by
            URL (`https://`, `s3://`, `gs://`, ...), also as patterns, but not mixed with local paths.
        split: `"train"` or `"val"`; for shapes only, like `seed` and `image_size` (pixels).
        remote: How shards by URL are cached and mixed.
        image_root: Folder of relative image paths in JSON lists; default: the folder of the list.

    Raises:
        UsageError: If data are missing, damaged or unreachable; the message names them.
    """
    if isinstance(data, str) and (data == "shapes" or data.startswith("shapes:")):
        return ShapesSource.from_options(data[len("shapes:") :], split=split, seed=seed, image_size=image_size)
    names = expand_names(data)
    if urls := [name for name in names if "://" in name]:
        if len(urls) < len(names):
            local = next(name for name in names if "://" not in name)
            raise UsageError(f"data: {local} is local, {urls[0]} a URL; to mix them, write local shards as file:///...")
        from softmask_fast.data.remote.source import RemoteShardSource, expand_urls  # imports fsspec

        return RemoteShardSource(expand_urls(urls), remote)
    paths = expand_paths(names)
    shards = [path for path in paths if path.suffix == ".tar"]
    lists = [path for path in paths if path.suffix == ".json"]
    if unknown := sorted(set(paths) - set(shards) - set(lists)):
        raise UsageError(f"data: expected .tar shards, .json lists or folders of shards, got {unknown[0]}")
    sources: list[ShardSource | JsonListSource] = []
    if shards:
        sources.append(ShardSource(shards))
    if lists:
        sources.append(JsonListSource(lists, image_root))
    return sources[0] if len(sources) == 1 else JoinedSource(sources)


def open_as_configured(data: str, options: DataConfig, *, split: str, seed: int, image_size: int) -> CaptionSource:
    """`open_source` with the other options of a run's configuration."""
    remote = RemoteOptions.of(options)
    return open_source(
        data, split=split, seed=seed, image_size=image_size, remote=remote, image_root=options.image_root
    )


def shared_files(first: str, second: str) -> list[str]:
    """The files and URLs that are part of both data; none of drawn ones, whose held-out scenes are others."""
    if "shapes" in (first.split(":")[0], second.split(":")[0]):
        return []
    files = []
    for names in map(expand_names, (first, second)):
        urls = {name for name in names if "://" in name}
        files.append(urls | {str(path.resolve()) for path in expand_paths([n for n in names if n not in urls])})
    return sorted(files[0] & files[1])


def expand_names(data: str | Sequence[str]) -> list[str]:
    """The names in `data`, with comma-separated lists and brace patterns expanded."""
    from braceexpand import UnbalancedBracesError, braceexpand  # of the training extra, which scenes do not need

    names: list[str] = []
    for item in [data] if isinstance(data, str) else data:
        if item.startswith("pipe:"):
            raise UsageError(f"data: expected files or URLs, got the command {item!r}")
        # a comma-separated list is a brace pattern without its outer braces; the empty last name guarantees a comma
        try:
            expanded = list(braceexpand("{" + item + ",}"))[:-1]
        except UnbalancedBracesError as error:
            raise UsageError(f"data: {item}: {error}") from error
        if "" in expanded:
            raise UsageError(f"data: expected 'shapes', shards or .json lists, got an empty name in {item!r}")
        names += expanded
    if not names:
        raise UsageError("data: expected 'shapes', shards or .json lists, got no names")
    return names


def expand_paths(names: Sequence[str]) -> list[Path]:
    """The local files that `names` (files, folders of shards, glob patterns) stand for, in a fixed order."""
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            if not (found := sorted(path.glob("*.tar"))):
                raise UsageError(f"data: no .tar files in {name}")
        elif any(letter in name for letter in "*?["):
            if not (found := sorted(map(Path, glob.glob(str(path))))):
                raise UsageError(f"data: nothing matches {name}")
        else:
            found = [path]
        paths += found
    if missing := [str(path) for path in paths if not path.exists()]:
        raise UsageError(f"data: {len(missing)} of {len(paths)} files do not exist: {', '.join(missing[:10])}")
    if other := [path for path in paths if not path.is_file()]:
        raise UsageError(f"data: expected files, {other[0]} is none")
    return paths


class JsonListSource:
    """ALBEF's pretraining lists: JSON files of [{"image": path, "caption": str or list of str}].

    Entries with the same image share one image id.
    """

    encoded = True

    def __init__(self, paths: Sequence[Path], image_root: str | None = None):
        """image_root: folder of relative image paths; default: the folder of the JSON file."""
        self._images: list[str] = []
        self._captions: list[str | list[str] | BadSample] = []
        for path in paths:
            entries = read_json(path, "data")
            if not isinstance(entries, list):
                raise UsageError(f"data: {path} must be a JSON list of objects, got {type(entries).__name__}")
            for number, entry in enumerate(entries):
                if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
                    raise UsageError(f'data: {path}: entry {number} has no "image" path: {short(entry)}')
                self._images.append(os.path.abspath(os.path.join(image_root or path.parent, entry["image"])))
                captions = entry.get("caption")
                try:
                    check_captions(captions, '"caption"')
                except BadSample as error:  # raised when the sample is read
                    captions = BadSample(str(error))
                self._captions.append(captions)
        if not self._images:
            raise UsageError(f"data: no samples in {', '.join(map(str, paths))}")
        names = relative_names(self._images)
        self.keys = distinct_keys(names)
        self.image_ids = image_ids(names)

    def __len__(self) -> int:
        return len(self._images)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def read(self, index: int) -> Sample:
        return self.load(self.locate(index))

    def locate(self, index: int) -> tuple[str, str, Any]:
        return self.keys[index], self._images[index], self._captions[index]

    def load(self, located: tuple[str, str, Any]) -> Sample:
        key, image, raw = located
        if isinstance(raw, BadSample):
            raise BadSample(str(raw))
        captions, skipped = usable_captions(raw, '"caption"')
        return Sample(key, read_image(image), captions, skipped_captions=skipped)


class JoinedSource:
    """Several sources one after the other."""

    encoded = True

    def __init__(self, sources: Sequence[ShardSource | JsonListSource]):
        self._sources = sources
        self._starts = np.cumsum([0] + [len(source) for source in sources])
        self.keys = distinct_keys([key for source in sources for key in source.keys])
        self.image_ids = np.concatenate([source.image_ids for source in sources])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_sources": self._sources}

    def read(self, index: int) -> Sample:
        return self.load(self.locate(index))

    def locate(self, index: int) -> tuple[str, int, Any]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.keys[index], number, self._sources[number].locate(index - int(self._starts[number]))

    def load(self, located: tuple[str, int, Any]) -> Sample:
        key, number, place = located
        return replace(self._sources[number].load(place), key=key)

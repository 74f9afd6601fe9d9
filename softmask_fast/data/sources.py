"""Opens data: shards, tables and `shapes` as sources of samples."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from softmask_fast.config import DataConfig
from softmask_fast.data.columnar import CACHE_BYTES, read_stored
from softmask_fast.data.folders import check_existence, folder_files, image_folder
from softmask_fast.data.images import read_image
from softmask_fast.data.parsing import distinct_keys, parse_phrases, relative_names, usable_captions
from softmask_fast.data.remote.options import RemoteOptions
from softmask_fast.data.sampler import WindowedSampler
from softmask_fast.data.seeding import image_ids
from softmask_fast.data.shards import ShardSource
from softmask_fast.data.synthetic import ShapesSource
from softmask_fast.data.tables import TABLE_FORMATS, TableEntry, read_tables
from softmask_fast.data.types import BadSample, CaptionSource, Sample
from softmask_fast.errors import UsageError


def open_source(
    data: str | Sequence[str], *, split: str = "train", seed: int = 0, image_size: int = 64,
    remote: RemoteOptions | None = None, image_root: str | None = None, image_column: str | None = None,
    caption_column: str | None = None, max_missing: float = 1.0,
) -> CaptionSource:  # fmt: skip
    """Opens `data` and lists its samples.

    Args:
        data: One of these: (1) `"shapes"` or `"shapes:num=4096,objects=3"`, drawn on the fly. (2) WebDataset shards, as
            a tar file, a brace pattern (`"cc3m-{000..331}.tar"`), a glob pattern or a folder; tables
            (`tables.TABLE_FORMATS`, with a split as in `"dataset_coco.json:val"`); folders of Hugging Face's
            `datasets`; or several of these, as a list or separated by commas. (3) Shards by URL (`https://`, `s3://`,
            `gs://`, ...), also as patterns.
        split: `"train"` or `"val"`. Only shapes have it, like `seed` and `image_size` (pixels).
        seed: Of the scenes.
        image_size: Side of the scenes, in pixels.
        remote: How shards by URL are cached and mixed.
        image_root: Folder of relative image paths in tables; default: that of the table. Of several folders, separated
            by commas, a table takes the one that holds its images.
        image_column, caption_column: Of tables, see `read_tables`; refused if `data` has none.
        max_missing: Largest fraction of a table's images that may be missing. If all are missing, it is an error
            anyway.

    Raises:
        UsageError: If data are missing, damaged or cannot be listed. The message names them.
        UnreachableFile: If a download fails.
    """
    columns = {"image_column": image_column, "caption_column": caption_column}
    if any(columns.values()) and not has_tables(data):
        refuse_columns(data, **columns)
    if _is_drawn(data):
        return ShapesSource.from_options(data[len("shapes:") :], split=split, seed=seed, image_size=image_size)
    names = expand_names(data)
    if urls := [name for name in names if "://" in name]:
        if len(urls) < len(names):
            local = next(name for name in names if "://" not in name)
            raise UsageError(f"data: {local} is local, {urls[0]} a URL; to mix them, write local shards as file:///...")
        from softmask_fast.data.remote.source import RemoteShardSource, expand_urls  # imports fsspec

        return RemoteShardSource(expand_urls(urls), remote)
    files = expand_files(names)
    shards = [path for path, _ in files if path.suffix == ".tar"]
    tables = [(path, part) for path, part in files if path.suffix in TABLE_FORMATS]
    _refuse_splits((path, part) for path, part in files if path.suffix == ".tar")
    if unknown := sorted({path for path, _ in files} - {*shards, *(path for path, _ in tables)}):
        raise UsageError(
            f"data: expected .tar shards, tables ({', '.join(TABLE_FORMATS)}) or folders, got {unknown[0]}"
        )
    sources: list[ShardSource | TableSource] = []
    if shards:
        sources.append(ShardSource(shards))
    if tables:
        sources.append(TableSource(tables, image_root, max_missing, **columns))
    return sources[0] if len(sources) == 1 else JoinedSource(sources)


def open_as_configured(data: str, options: DataConfig, *, split: str, seed: int, image_size: int) -> CaptionSource:
    """`open_source` with the other options of a run's configuration. Columns are those of the run's tables: other data
    of a run that has some do without."""
    columns = {"image_column": options.image_column, "caption_column": options.caption_column}
    if any(columns.values()) and any(map(has_tables, filter(None, (options.data, options.eval_data)))):
        columns = columns if has_tables(data) else {}
    return open_source(
        data, split=split, seed=seed, image_size=image_size, remote=RemoteOptions.of(options),
        image_root=options.image_root, max_missing=options.max_bad_fraction if split == "train" else 1.0, **columns,
    )  # fmt: skip


def has_tables(data: str | Sequence[str]) -> bool:
    """Whether a file of `data` is a table. Raises UsageError for files that do not exist."""
    names = [] if _is_drawn(data) else [name for name in expand_names(data) if "://" not in name]
    return any(path.suffix in TABLE_FORMATS for path, _ in expand_files(names))


def refuse_columns(data: str | Sequence[str], **columns: str | None) -> None:
    """Raises UsageError if a column is named for data that have none."""
    for name, value in columns.items():
        if value:
            raise UsageError(f"{name}: expected only for tables of images and captions, got {value!r} for {data}")


def _is_drawn(data: str | Sequence[str]) -> bool:
    return isinstance(data, str) and data.split(":")[0] == "shapes"


def shared_files(first: str, second: str) -> list[str]:
    """The files and URLs that are part of both. Drawn scenes share none: held-out ones differ from those of
    training."""
    if _is_drawn(first) or _is_drawn(second):
        return []
    files: list[dict[str, set[str]]] = []  # the splits of each that are read; "" for all
    for names in map(expand_names, (first, second)):
        urls = [name for name in names if "://" in name]
        read: dict[str, set[str]] = {url: {""} for url in urls}
        for path, split in expand_files([name for name in names if name not in urls]):
            read.setdefault(str(path.resolve()), set()).update(split.split("+") if split else [""])
        files.append(read)
    common = sorted(files[0].keys() & files[1].keys())
    return [name for name in common if "" in files[0][name] | files[1][name] or files[0][name] & files[1][name]]


def expand_names(data: str | Sequence[str]) -> list[str]:
    """The names in `data`, with comma-separated lists and brace patterns expanded. Raises UsageError for an empty
    name."""
    from braceexpand import UnbalancedBracesError, braceexpand  # part of the training extra, which scenes do not need

    names: list[str] = []
    for item in [data] if isinstance(data, str) else data:
        if item.startswith("pipe:"):
            raise UsageError(f"data: expected files or URLs, got the command {item!r}")
        # A comma-separated list is a brace pattern without the outer braces. The added empty name guarantees a comma.
        try:
            expanded = list(braceexpand("{" + item + ",}"))[:-1]
        except UnbalancedBracesError as error:
            raise UsageError(f"data: {item}: {error}") from error
        if "" in expanded:
            raise UsageError(f"data: expected 'shapes', shards or tables, got an empty name in {item!r}")
        names += expanded
    if not names:
        raise UsageError("data: expected 'shapes', shards or tables, got no names")
    return names


def expand_paths(names: Sequence[str]) -> list[Path]:
    """The files of `expand_files`. Raises UsageError if one has a split."""
    files = expand_files(names)
    _refuse_splits(files)
    return [path for path, _ in files]


def _refuse_splits(files: Iterable[tuple[Path, str | None]]) -> None:
    if named := next((f"{path}:{split}" for path, split in files if split), None):
        raise UsageError(f"data: expected a split only of a table with splits, got {named}")


def expand_files(names: Sequence[str], option: str = "data") -> list[tuple[Path, str | None]]:
    """The local files that `names` stand for, in a fixed order.

    Args:
        names: Files, folders and glob patterns, each with or without ":split".
        option: The option that they came from, for messages.

    Returns:
        Each file, and the split to read from it.

    Raises:
        UsageError: If a name stands for no file.
    """
    files: list[tuple[Path, str | None]] = []
    for name in names:
        split = None
        if not os.path.exists(os.path.expanduser(name)) and (part := _SPLIT.fullmatch(name)):
            name, split = part[1], part[2]
        path = Path(name).expanduser()
        if path.is_dir():
            files += [(file, None) for file in folder_files(path, split, option)]
        elif any(letter in name for letter in "*?["):
            if not (found := sorted(map(Path, glob.glob(str(path))))):
                raise UsageError(f"{option}: nothing matches {name}")
            files += [(file, split) for file in found]
        else:
            files.append((path, split))
    if missing := [str(path) for path, _ in files if not path.exists()]:
        raise UsageError(f"{option}: {len(missing)} of {len(files)} files do not exist: {', '.join(missing[:10])}")
    if other := [path for path, _ in files if not path.is_file()]:
        raise UsageError(f"{option}: expected files, got {other[0]}")
    return files


_SPLIT = re.compile(r"(.+):([\w+-]+)")


class TableSource:
    """The images of tables, each with all its captions. In a .json list each entry is a sample, as in ALBEF.

    Images with the same path share an image id, as do equal images inside a table that have the same name there.
    """

    encoded = True

    def __init__(
        self,
        tables: Sequence[tuple[Path, str | None]],
        image_root: str | None = None,
        max_missing: float = 1.0,
        **columns: str | None,
    ) -> None:
        """Reads the tables.

        Args:
            tables: Files, and the split to read from each.
            image_root: See `image_folder`; default: the folder of the table.
            max_missing: See `check_existence`.
            columns: `image_column` and `caption_column` of `read_tables`.

        Raises:
            UsageError: If a table cannot be read, or its images do not exist.
        """
        self._entries: list[TableEntry] = []
        self._columns: list[str] = []  # caption columns of each entry
        names = []
        read = read_tables(tables, join=lambda path: path.suffix != ".json", option="data", **columns)
        for (path, _), table in zip(tables, read, strict=True):
            root = image_folder(image_root, [one.image for one in table.entries if one.stored is None]) or path.parent
            for entry in table.entries:
                if entry.stored is None and entry.image:
                    entry.image = os.path.abspath(os.path.join(root, entry.image))
                # a name inside a table may not be unique
                own = f"{os.path.abspath(path)}/{entry.row:09d}"
                names.append(entry.image if entry.stored is None and entry.image else own)
            listed = [entry.image for entry in table.entries if entry.stored is None]
            check_existence(listed, max_missing, f"data: {path}", "--image_root")
            self._entries += table.entries
            self._columns += [table.caption_column] * len(table.entries)
        names = relative_names(names)
        self.keys = distinct_keys(names)
        self.image_ids = image_ids(names)
        if any(entry.stored and entry.stored.bytes for entry in self._entries):
            self.sampler = self._by_groups()

    def _by_groups(self) -> WindowedSampler:
        """An order that needs only a few row groups in memory at a time."""
        names, counts, most = [], [], 1
        for place, group in groupby(self._entries, lambda entry: entry.stored and entry.stored[:3]):
            group = list(group)
            names.append(f"{len(names)} {place and (os.path.basename(place[0]), *place[1:])}")
            counts.append(len(group))
            most = max(most, group[0].stored.bytes if place else 0)
        return WindowedSampler(names, counts, max(1, CACHE_BYTES // 2 // most))

    def __len__(self) -> int:
        return len(self._entries)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def read(self, index: int) -> Sample:
        return self.load(self.locate(index))

    def locate(self, index: int) -> tuple[str, TableEntry, str]:
        return self.keys[index], self._entries[index], self._columns[index]

    def load(self, located: tuple[str, TableEntry, str]) -> Sample:
        key, entry, column = located
        if not entry.image:
            raise BadSample(f"no image in row {entry.row}")
        captions, skipped = usable_captions(entry.captions, f"column {column!r}")
        image = read_image(entry.image) if entry.stored is None else read_stored(entry.stored)
        return Sample(key, image, captions, parse_phrases(entry.phrases), skipped)


class JoinedSource:
    """Several sources, one after another."""

    encoded = True

    def __init__(self, sources: Sequence[ShardSource | TableSource]) -> None:
        if any(hasattr(source, "sampler") for source in sources):
            raise UsageError(
                "data: images in parquet files are read by row group and cannot be mixed with shards; "
                "turn them into shards with softmask-fast prepare"
            )
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

"""WebDataset shards by URL: downloaded as whole files into a bounded cache, their indexes kept, read by offset."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import overload
from urllib.parse import urlsplit

import fsspec
import numpy as np

from softmask_fast.data.remote.cache import ShardCache
from softmask_fast.data.remote.download import Downloader, without_query
from softmask_fast.data.remote.options import RemoteOptions
from softmask_fast.data.sampler import WindowedSampler, local_ranks
from softmask_fast.data.seeding import image_ids
from softmask_fast.data.shards import SUFFIX, IndexHead, parse_index, read_head, read_index, read_sample, write_index
from softmask_fast.data.types import BadSample, Sample, distinct_keys, relative_names

logger = logging.getLogger(__name__)

_INDEX_THREADS = 16
_LISTED = 100  # indexes between two lines of the log


class RemoteShardSource:
    """Samples of shards by URL; the keys are those that `ShardSource` gives the same shards on a local disk.

    Only the number of samples of each shard stays in memory; the lists of those being read are loaded when needed. The
    order is windowed (data/sampler.py), so that shards are read as wholes and the cache can be smaller than the data.
    """

    encoded = True

    def __init__(self, urls: Sequence[str], options: RemoteOptions | None = None):
        """Raises ValueError for what is damaged or does not fit, UnreachableFile for what cannot be had."""
        self._options = options = options or RemoteOptions()
        self._urls = list(urls)
        self._names = [name.removesuffix(".tar") for name in relative_names([_place(url) for url in urls])]
        _check_names(self._names)
        self._downloader = Downloader(options.download_tries, options.download_timeout)
        folder = options.cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "softmask_fast")
        self._cache = ShardCache(Path(folder).expanduser(), round(options.cache_gigabytes * 1e9), self._downloader)
        self._heads = self._read_heads()
        counts = [head.samples for head in self._heads]
        if not sum(counts):
            raise ValueError(f"data: no samples in {len(urls)} shards, the first is {without_query(urls[0])}")
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._check_room()
        self._listed = lru_cache(maxsize=2 * (options.shuffle_shards + options.prefetch_shards + 2))(self._list)
        self.order = WindowedSampler(
            self._names, counts, options.shuffle_shards, ahead=options.prefetch_shards, announce=self._prefetch
        )
        self.keys: Sequence[str] = _Keys(self)
        self.image_ids = _ImageIds(self.keys)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> Sample:
        """Downloads the shard where it is not here. Raises BadSample, or UnreachableFile."""
        shard, number = self._locate(index)
        keys, members = self._listed(shard)
        with self._open(shard) as file:
            try:
                return read_sample(keys[number], members[number], file)
            except OSError as error:
                raise BadSample(f"shard cannot be read: {error}") from error

    def key(self, index: int) -> str:
        shard, number = self._locate(index)
        return self._listed(shard)[0][number]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])

    def _open(self, shard: int):
        head = self._heads[shard]
        return self._cache.open(self._urls[shard], head.bytes, head.sha256)

    def _list(self, shard: int) -> tuple[list[str], list[dict[str, tuple[int, int]]]]:
        """Keys and members of all samples of a shard."""
        entries = read_index(self._cache.index_path(self._urls[shard]))
        keys = distinct_keys([f"{self._names[shard]}/{name}" for name, _ in entries])
        return keys, [members for _, members in entries]

    def _read_heads(self) -> list[IndexHead]:
        heads = []
        with ThreadPoolExecutor(_INDEX_THREADS, thread_name_prefix="softmask-index") as pool:
            try:
                for head in pool.map(self._head, self._urls):
                    heads.append(head)
                    if len(heads) % _LISTED == 0:
                        logger.info("indexed %d of %d shards", len(heads), len(self._urls))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return heads

    def _head(self, url: str) -> IndexHead:
        """From the index kept here, else from the one beside the shard, else from the shard itself."""
        path = self._cache.index_path(url)
        if path.exists():
            return read_head(path)
        with self._cache.lock(path.name):
            if not path.exists():
                beside = _index_url(url)
                if (content := self._downloader.read(beside)) is None:
                    self._index_shard(url, path)
                else:
                    parse_index(content.splitlines(), without_query(beside))
                    temporary = path.with_name(f"{path.name}.partial")
                    temporary.write_bytes(content)
                    os.replace(temporary, path)
        return read_head(path)

    def _index_shard(self, url: str, path: Path) -> None:
        size = self._downloader.size(url)
        while True:
            with self._cache.open(url, size) as file:
                shard = Path(file.name)
            try:
                write_index(shard, path)
                return
            except FileNotFoundError:  # evicted in between
                continue
            except ValueError as error:
                raise ValueError(str(error).replace(str(shard), without_query(url))) from error

    def _check_room(self) -> None:
        """A cache that cannot hold what the ranks read at a time would download every shard many times."""
        per_rank = self._options.shuffle_shards + self._options.prefetch_shards + 2
        largest = sorted((head.bytes for head in self._heads), reverse=True)[: local_ranks() * per_rank]
        if sum(largest) > self._cache.limit:
            raise ValueError(
                f"cache_gigabytes: expected at least {sum(largest) / 1e9:.3g} for shuffle_shards="
                f"{self._options.shuffle_shards}, prefetch_shards={self._options.prefetch_shards} and {local_ranks()} "
                f"ranks on this machine, got {self._options.cache_gigabytes:g}"
            )

    def _prefetch(self, shards: Iterable[int]) -> None:
        """Starts downloads; one that fails is tried again, and its failure raised, when the shard is read."""

        def download(shard: int) -> None:
            try:
                self._open(shard).close()
            except Exception as error:
                logger.info("prefetching %s failed: %s", without_query(self._urls[shard]), error)

        for shard in shards:
            threading.Thread(target=download, args=(shard,), name="softmask-prefetch", daemon=True).start()


class _Keys(Sequence[str]):
    """The keys of all samples, loaded with their shard's index."""

    def __init__(self, source: RemoteShardSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._source.key(i) for i in range(*index.indices(len(self)))]
        return self._source.key(index if index >= 0 else len(self) + index)


class _ImageIds:
    """Image ids by index or list of indices, made from the keys."""

    def __init__(self, keys: Sequence[str]):
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int | Sequence[int]) -> np.int64 | np.ndarray:
        if isinstance(index, int | np.integer):
            return image_ids([self._keys[index]])[0]
        return image_ids([self._keys[i] for i in index])


def expand_urls(urls: Sequence[str]) -> list[str]:
    """Patterns ("*") and folders ("/" at the end) replaced by the shards found there; all must be .tar files."""
    found: list[str] = []
    for url in urls:
        protocol = urlsplit(url).scheme
        if "::" in url:
            raise ValueError(f"data: {url}: expected a plain URL, not a chain of file systems")
        if protocol in ("http", "https") or not ("*" in url or url.endswith("/")):
            found.append(url)
            continue
        try:
            system, path = fsspec.url_to_fs(url + "*.tar" if url.endswith("/") else url)
            matches = sorted(system.glob(path))
        except (ImportError, ValueError) as error:
            raise ValueError(f"data: {url}: {error}") from error
        if not matches:
            raise FileNotFoundError(f"data: nothing matches {url}")
        found += [f"{protocol}://{str(match).split('://')[-1]}" for match in matches]
    if wrong := [url for url in found if not without_query(url).endswith(".tar")]:
        raise ValueError(f"data: {without_query(wrong[0])}: expected .tar shards (lists and folders are read locally)")
    return found


def _place(url: str) -> str:
    """The URL as an absolute path, for names that survive moving the data."""
    return "/" + without_query(url).split("://", 1)[1].lstrip("/")


def _index_url(url: str) -> str:
    path = without_query(url)
    return path + SUFFIX + url[len(path) :]


def _check_names(names: Sequence[str]) -> None:
    """With names that are different, and none a folder of another, keys are unique without listing them all."""
    known = set(names)
    if len(known) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"data: the shard {twice}.tar is named twice")
    for name in names:
        folders = name.split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            if (above := "/".join(folders[:depth])) in known:
                raise ValueError(f"data: {above}.tar and {name}.tar: keys could clash; rename one of them")

"""WebDataset shards by URL: indexed once, downloaded as whole files into a size-limited cache, read by offset."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import numpy as np

from softmask_fast.data.parsing import distinct_keys, relative_names
from softmask_fast.data.remote.cache import ShardCache
from softmask_fast.data.remote.download import Downloader, public_part
from softmask_fast.data.remote.options import RemoteOptions
from softmask_fast.data.sampler import WindowedSampler, local_ranks
from softmask_fast.data.seeding import image_ids
from softmask_fast.data.shards import (
    INDEX_SUFFIX,
    MAX_INDEX_BYTES,
    IndexHeader,
    Members,
    read_header,
    read_index,
    read_sample,
    write_index,
)
from softmask_fast.data.types import BadSample, Sample
from softmask_fast.errors import UsageError, printable

logger = logging.getLogger(__name__)

_INDEX_THREADS = 16
_LOG_INTERVAL = 100  # indexes between two lines of the log


class RemoteShardSource:
    """Samples of shards by URL, with the keys that `ShardSource` gives the same shards on a local disk.

    Only the sample count of each shard stays in memory; the index of a shard is loaded when it is read. A
    `WindowedSampler` reads shards as wholes, so that the cache can be smaller than the data.
    """

    encoded = True

    def __init__(self, urls: Sequence[str], options: RemoteOptions | None = None) -> None:
        """Reads the indexes, and makes those that are missing.

        Args:
            urls: Of the shards.
            options: How they are downloaded, cached and mixed.

        Raises:
            UsageError: For damaged shards, or a cache that is too small.
            UnreachableFile: If a download fails.
        """
        self._options = options = options or RemoteOptions()
        self._urls = list(urls)
        self._names = [name.removesuffix(".tar") for name in relative_names([_absolute_path(url) for url in urls])]
        _check_names(self._names)
        self._downloader = Downloader(options.download_tries, options.download_timeout)
        folder = options.cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "softmask_fast")
        self._cache = ShardCache(Path(folder).expanduser(), round(options.cache_gigabytes * 1e9), self._downloader)
        self._headers = self._read_headers()
        counts = [header.samples for header in self._headers]
        if not sum(counts):
            raise UsageError(f"data: no samples in {len(urls)} shards, the first is {public_part(urls[0])}")
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._check_cache_size()
        self._index = lru_cache(maxsize=2 * (options.shuffle_shards + options.prefetch_shards + 2))(self._read_index)
        self.sampler = WindowedSampler(
            self._names, counts, options.shuffle_shards, ahead=options.prefetch_shards, announce=self._prefetch
        )
        self.keys: Sequence[str] = _Keys(self)
        self.image_ids = _ImageIds(self.keys)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_urls": self._urls, "_headers": self._headers, "_cache": self._cache}

    def read(self, index: int) -> Sample:
        """Downloads the shard if it is not cached. Raises BadSample or UnreachableFile."""
        return self.load(self.locate(index))

    def locate(self, index: int) -> tuple[str, int, Members]:
        shard, number = self._locate(index)
        keys, members = self._index(shard)
        return keys[number], shard, members[number]

    def load(self, located: tuple[str, int, Members]) -> Sample:
        """Reads a located sample. Raises as `read` does."""
        key, shard, members = located
        with self._open(shard) as file:
            try:
                return read_sample(key, members, file)
            except OSError as error:
                raise BadSample(f"shard cannot be read: {error}") from error

    def key(self, index: int) -> str:
        """The key of a sample."""
        shard, number = self._locate(index)
        return self._index(shard)[0][number]

    def _locate(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its number within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])

    def _open(self, shard: int) -> FileIO:
        header = self._headers[shard]
        return self._cache.open(self._urls[shard], header.bytes, header.sha256)

    def _read_index(self, shard: int) -> tuple[list[str], list[Members]]:
        """Keys and members of all samples of a shard."""
        url = self._urls[shard]
        path = self._cache.index_path(url)
        try:
            entries = read_index(path)
        except (UsageError, FileNotFoundError) as error:  # only its header was read when the source was opened
            self._drop_index(path, error)
            if self._header(url) != self._headers[shard]:
                raise UsageError(f"data: {public_part(url)} has changed since this run began") from error
            entries = read_index(path)
        keys = distinct_keys([f"{self._names[shard]}/{name}" for name, _ in entries])
        return keys, [members for _, members in entries]

    def _read_headers(self) -> list[IndexHeader]:
        headers = []
        with ThreadPoolExecutor(_INDEX_THREADS, thread_name_prefix="softmask-index") as pool:
            try:
                for header in pool.map(self._header, self._urls):
                    headers.append(header)
                    if len(headers) % _LOG_INTERVAL == 0:
                        logger.info("indexed %d of %d shards", len(headers), len(self._urls))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return headers

    def _header(self, url: str) -> IndexHeader:
        """The header from the cached index, else from the one next to the shard, else from the shard itself."""
        path = self._cache.index_path(url)
        with suppress(FileNotFoundError):
            try:
                return read_header(path)
            except UsageError as error:
                self._drop_index(path, error)
        with self._cache.lock(path.name):
            if not path.exists():
                index_url, temporary = _index_url(url), path.with_name(path.name + ".download")
                try:
                    if self._downloader.fetch_optional(index_url, temporary, MAX_INDEX_BYTES):
                        read_index(temporary, public_part(index_url))
                        os.replace(temporary, path)
                    else:
                        self._index_shard(url, path)
                finally:
                    temporary.unlink(missing_ok=True)
        return read_header(path)

    def _drop_index(self, path: Path, reason: Exception) -> None:
        """Removes a cached index that a killed process or a power failure left incomplete."""
        logger.warning("fetching an index again: %s", reason)
        with self._cache.lock(path.name):
            path.unlink(missing_ok=True)

    def _index_shard(self, url: str, path: Path) -> None:
        size = self._downloader.size(url)
        while True:
            with self._cache.open(url, size) as file:
                shard = Path(file.name)
            try:
                write_index(shard, path)
                return
            except FileNotFoundError:  # evicted in the meantime
                continue
            except UsageError as error:
                raise UsageError(str(error).replace(str(shard), public_part(url))) from error

    def _check_cache_size(self) -> None:
        """Refuses a cache that cannot hold what the ranks read at a time, as it would download every shard many
        times."""
        per_rank = self._options.shuffle_shards + self._options.prefetch_shards + 2
        largest = sorted((header.bytes for header in self._headers), reverse=True)[: local_ranks() * per_rank]
        if sum(largest) > self._cache.limit:
            raise UsageError(
                f"cache_gigabytes: expected at least {sum(largest) / 1e9:.3g} for shuffle_shards="
                f"{self._options.shuffle_shards}, prefetch_shards={self._options.prefetch_shards} and {local_ranks()} "
                f"ranks on this machine, got {self._options.cache_gigabytes:g}"
            )

    def _prefetch(self, shards: Iterable[int]) -> None:
        """Starts downloads. One that fails is tried again when the shard is read, which then raises the error."""

        def download(shard: int) -> None:
            try:
                self._open(shard).close()
            except Exception as error:
                logger.info("prefetching %s failed: %s", printable(public_part(self._urls[shard])), error)

        for shard in shards:
            threading.Thread(target=download, args=(shard,), name="softmask-prefetch", daemon=True).start()


class _Keys(Sequence[str]):
    """The keys of all samples, read from the shards' indexes on demand."""

    def __init__(self, source: RemoteShardSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._source.key(i) for i in range(*index.indices(len(self)))]
        return self._source.key(index if index >= 0 else len(self) + index)


class _ImageIds:
    """Image ids by index or list of indices, computed from the keys."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int | Sequence[int]) -> np.int64 | np.ndarray:
        if isinstance(index, int | np.integer):
            return image_ids([self._keys[index]])[0]
        return image_ids([self._keys[i] for i in index])


def expand_urls(urls: Sequence[str]) -> list[str]:
    """Replaces patterns ("*") and folders (with "/" at the end) by their shards. Raises UsageError if there are
    none."""
    found: list[str] = []
    for url in urls:
        try:
            protocol = urlsplit(url).scheme
        except ValueError as error:
            raise UsageError(f"data: {url} is not a URL: {error}") from error
        if "::" in url:
            raise UsageError(f"data: {url}: expected a plain URL, not a chain of file systems")
        if protocol in ("http", "https") or not ("*" in url or url.endswith("/")):
            found.append(url)
            continue
        try:
            system, path = fsspec.url_to_fs(url + "*.tar" if url.endswith("/") else url)
            matches = sorted(system.glob(path))
        except Exception as error:  # every file system has its own exceptions
            raise UsageError(f"data: {url}: {type(error).__name__}: {error}") from error
        if not matches:
            raise UsageError(f"data: nothing matches {url}")
        found += [f"{protocol}://{str(match).split('://')[-1]}" for match in matches]
    if wrong := [url for url in found if not public_part(url).endswith(".tar")]:
        raise UsageError(f"data: {public_part(wrong[0])}: expected .tar shards; other files are read locally only")
    return found


def _absolute_path(url: str) -> str:
    """The URL without its protocol, for names that survive moving the data."""
    return "/" + public_part(url).split("://", 1)[1].lstrip("/")


def _index_url(url: str) -> str:
    path = re.split("[?#]", url)[0] if urlsplit(url).scheme in ("http", "https") else url
    return path + INDEX_SUFFIX + url[len(path) :]


def _check_names(names: Sequence[str]) -> None:
    """Ensures that keys are unique without listing them: names must differ, and none may be a folder of another."""
    known = set(names)
    if len(known) < len(names):
        repeated = next(name for number, name in enumerate(names) if name in names[:number])
        raise UsageError(f"data: the shard {repeated}.tar is named twice")
    for name in names:
        folders = name.split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            if (above := "/".join(folders[:depth])) in known:
                raise UsageError(f"data: {above}.tar and {name}.tar: keys could clash; rename one of them")

"""A folder of downloaded shards, bounded in size, shared by all processes of a machine."""

from __future__ import annotations

import hashlib
import os
import re
import time
from io import FileIO
from pathlib import Path

from filelock import FileLock, Timeout

from softmask_fast.data.remote.download import Downloader, without_query

_FULL_PAUSE = 0.1  # seconds; until others' downloads, which hold all the room, are done


class ShardCache:
    """Files are downloaded under another name and renamed when whole; the least recently used ones make room.

    What is being downloaded counts with its full size from the start (its name says it), so files and downloads of all
    processes together never exceed the limit. `folder` must be on a local disk: NFS locks are not to be relied on.
    """

    def __init__(self, folder: Path, limit: int, downloader: Downloader):
        """limit: in bytes."""
        self.limit = limit
        self._folder, self._downloader = folder, downloader
        for name in ("shards", "locks", "indexes"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def open(self, url: str, size: int, sha256: str | None = None) -> FileIO:
        """The shard, downloaded where it is not here; read it soon, it may be evicted (an open file stays readable).

        Raises UnreachableFile, and ValueError when it can never fit.
        """
        path = self._folder / "shards" / self._name(url)
        while True:
            if not self._is_here(path, size):
                self._download(url, path, size, sha256)
            try:
                return FileIO(path)
            except FileNotFoundError:
                continue  # evicted in between

    def index_path(self, url: str) -> Path:
        """Where the index of a shard is kept."""
        return self._folder / "indexes" / f"{self._name(url)}.index.jsonl"

    def lock(self, name: str) -> FileLock:
        """Excludes all other threads and processes."""
        return FileLock(self._folder / "locks" / f"{name}.lock")

    def _download(self, url: str, path: Path, size: int, sha256: str | None) -> None:
        with self.lock(path.name):
            if self._is_here(path, size):  # another thread or process was faster
                return
            partial = self._reserve(url, path, size)
            try:
                self._downloader.fetch(url, partial, size, sha256)
                with self._space():
                    os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def _reserve(self, url: str, path: Path, size: int) -> Path:
        """An empty file whose name reserves room for `size` bytes."""
        if size > self.limit:
            raise ValueError(
                f"cache_gigabytes: expected {size / 1e9:.3g} or more for {without_query(url)}, got {self.limit / 1e9:g}"
            )
        while True:
            with self._space():
                reserved = sum(self._reserved(path))
                whole = sorted(self._whole_files())
                used = reserved + sum(n for _, n, _ in whole)
                for _, n, oldest in whole:
                    if used + size <= self.limit:
                        break
                    Path(oldest).unlink(missing_ok=True)
                    used -= n
                if used + size <= self.limit:
                    partial = path.with_name(f"{path.name}.{size}.partial")
                    partial.touch()
                    return partial
            time.sleep(_FULL_PAUSE)

    def _reserved(self, own: Path) -> list[int]:
        """The sizes of all downloads that are under way; what a killed process left is removed."""
        sizes = []
        for partial in (self._folder / "shards").glob("*.partial"):
            name, size, _ = partial.name.rsplit(".", 2)
            if name == own.name:  # we hold its lock, so no one writes it
                partial.unlink(missing_ok=True)
                continue
            try:
                with self.lock(name).acquire(blocking=False):
                    partial.unlink(missing_ok=True)
            except Timeout:
                sizes.append(int(size))
        return sizes

    def _whole_files(self) -> list[tuple[int, int, str]]:
        """(time of last use, bytes, path) of every shard that is here."""
        with os.scandir(self._folder / "shards") as entries:
            files = [(entry.stat(), entry.path) for entry in entries if not entry.name.endswith(".partial")]
        return [(stat.st_mtime_ns, stat.st_size, path) for stat, path in files]

    def _is_here(self, path: Path, size: int) -> bool:
        """Also notes that the shard is in use."""
        try:
            os.utime(path)
            return path.stat().st_size == size  # not so after a power cut, or when the shard was replaced
        except FileNotFoundError:
            return False

    def _space(self) -> FileLock:
        return self.lock("space")

    @staticmethod
    def _name(url: str) -> str:
        shown = without_query(url)
        readable = re.sub(r"[^\w.-]", "_", shown.rsplit("/", 1)[-1])[-80:]
        return f"{hashlib.blake2b(shown.encode(), digest_size=8).hexdigest()}-{readable}"

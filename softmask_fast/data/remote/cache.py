"""A size-limited folder of downloaded shards, shared by all processes of a machine."""

from __future__ import annotations

import hashlib
import os
import re
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path

from filelock import FileLock, Timeout

from softmask_fast.data.remote.download import Downloader, public_part
from softmask_fast.data.types import UnreachableFile
from softmask_fast.errors import UsageError, format_error, printable

_FULL_PAUSE = 0.1  # seconds between checks while other downloads occupy all the space
_SHARD = re.compile(r"[0-9a-f]+-[\w.-]+")  # what `_name` returns; other files are not ours
_PARTIAL = re.compile(rf"({_SHARD.pattern})\.([0-9]+)\.partial")


class ShardCache:
    """Downloads shards on demand and evicts the least recently used ones to make room.

    A file is downloaded under a temporary name, which states its full size, and renamed when complete. So the shards
    and downloads of all processes together never exceed the limit. The folder must be on a local disk, as locks are
    unreliable on NFS.
    """

    def __init__(self, folder: Path, limit: int, downloader: Downloader) -> None:
        """Makes the folder.

        Args:
            folder: Of the cache.
            limit: Of all shards and downloads in it, in bytes.
            downloader: Fetches what is missing.

        Raises:
            UsageError: If the folder cannot be written to.
        """
        self.limit = limit
        self._folder, self._downloader = folder, downloader
        for name in ("shards", "locks", "indexes"):
            try:
                (folder / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"cache_dir: expected a folder to write to, {format_error(error)}") from error
            if not os.access(folder / name, os.R_OK | os.W_OK | os.X_OK):
                raise UsageError(f"cache_dir: expected a folder to write to, got {folder / name}")

    def open(self, url: str, size: int, sha256: str | None = None) -> FileIO:
        """Opens a shard of `size` bytes, downloading it if needed. An open file stays readable when it is evicted.

        Raises:
            UnreachableFile: If the download fails or the cache cannot be used.
            UsageError: If the shard is larger than the cache.
        """
        path = self._folder / "shards" / self._name(url)
        try:
            while True:
                if not self._is_cached(path, size):
                    self._download(url, path, size, sha256)
                with suppress(FileNotFoundError):  # evicted in the meantime
                    return FileIO(path)
        except UnreachableFile:
            raise
        except OSError as error:
            reason = f"the cache cannot be used: {format_error(error)}"
            raise UnreachableFile(error.errno, reason, printable(public_part(url))) from error

    def index_path(self, url: str) -> Path:
        """Path of the cached index of a shard."""
        return self._folder / "indexes" / f"{self._name(url)}.index.jsonl"

    def lock(self, name: str) -> FileLock:
        """A lock between all threads and processes of the machine."""
        return FileLock(self._folder / "locks" / f"{name}.lock")

    def _download(self, url: str, path: Path, size: int, sha256: str | None) -> None:
        with self.lock(path.name):
            if self._is_cached(path, size):  # downloaded by another thread or process
                return
            partial = self._reserve(url, path, size)
            try:
                self._downloader.fetch(url, partial, size, sha256)
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())  # a power failure could leave a file of the right size without content
                with self.lock("space"):
                    os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def _reserve(self, url: str, path: Path, size: int) -> Path:
        """Makes room and creates an empty file whose name reserves `size` bytes."""
        if size > self.limit:
            raise UsageError(
                f"cache_gigabytes: expected {size / 1e9:.3g} or more for {public_part(url)}, got {self.limit / 1e9:g}"
            )
        while True:
            with self.lock("space"):
                reserved = sum(self._reserved(path))
                shards = sorted(self._shards())
                used = reserved + sum(n for _, n, _ in shards)
                for _, n, oldest in shards:
                    if used + size <= self.limit:
                        break
                    with suppress(PermissionError):  # of another user
                        Path(oldest).unlink(missing_ok=True)
                        used -= n
                if used + size <= self.limit:
                    partial = path.with_name(f"{path.name}.{size}.partial")
                    partial.touch()
                    return partial
                if not reserved:  # nothing to wait for
                    raise UsageError(
                        f"cache_dir: {self._folder} holds {used} bytes that this user cannot remove, of {self.limit}"
                    )
            time.sleep(_FULL_PAUSE)

    def _reserved(self, own: Path) -> list[int]:
        """The sizes of all running downloads. Removes what killed processes left."""
        sizes = []
        for partial in (self._folder / "shards").glob("*.partial"):
            if not (named := _PARTIAL.fullmatch(partial.name)):
                continue
            name, size = named.groups()
            if name == own.name:  # left by a killed process, as we hold the lock
                partial.unlink(missing_ok=True)
                continue
            try:
                with self.lock(name).acquire(blocking=False):
                    partial.unlink(missing_ok=True)
            except Timeout:
                sizes.append(int(size))
        return sizes

    def _shards(self) -> list[tuple[int, int, str]]:
        """(time of last use in ns, size in bytes, path) of every cached shard."""
        with os.scandir(self._folder / "shards") as entries:
            ours = [entry for entry in entries if _SHARD.fullmatch(entry.name) and entry.is_file()]
            files = [(entry.stat(), entry.path) for entry in ours if not entry.name.endswith(".partial")]
        return [(stat.st_mtime_ns, stat.st_size, path) for stat, path in files]

    def _is_cached(self, path: Path, size: int) -> bool:
        """Whether the shard is cached; marks it as used."""
        try:
            with suppress(PermissionError):  # of another user
                os.utime(path)
            return path.stat().st_size == size  # differs after a power failure, or if the shard was replaced
        except FileNotFoundError:
            return False

    @staticmethod
    def _name(url: str) -> str:
        shown = public_part(url)
        readable = re.sub(r"[^\w.-]", "_", shown.rsplit("/", 1)[-1])[-80:]
        return f"{hashlib.blake2b(shown.encode(), digest_size=8).hexdigest()}-{readable}"

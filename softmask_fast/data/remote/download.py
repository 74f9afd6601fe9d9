"""Downloads of whole files through fsspec (https, s3, gs, ...), with retries, a stall timeout and size checks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import Callback

from softmask_fast.data.types import FinalError, UnreachableFile
from softmask_fast.errors import printable, without_secrets
from softmask_fast.installation import install_command
from softmask_fast.utils import file_sha256

logger = logging.getLogger(__name__)

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two attempts
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_RETRIED_STATUSES = (408, 425, 429)  # of the HTTP statuses 4xx


class Downloader:
    """Downloads files and retries transient failures, with pauses that double. Thread-safe."""

    def __init__(self, tries: int = 5, timeout: float = 60.0) -> None:
        """Sets the limits: attempts per file, and seconds without data after which an attempt fails."""
        self._tries, self._timeout = tries, timeout

    def size(self, url: str) -> int:
        """The size of a file in bytes. Raises UnreachableFile."""
        info = self._retry(url, lambda progress: self._call(url, "info", progress))
        if not isinstance(info.get("size"), int):
            raise _unreachable(url, "the server does not report the file's size; upload an index (softmask-fast index)")
        return info["size"]

    def fetch_optional(self, url: str, path: Path, most: int) -> bool:
        """Downloads a file of at most `most` bytes to `path`; False if it does not exist or access is denied.

        Raises:
            UnreachableFile: If all attempts fail, or the file is larger.
        """

        def attempt(progress: _Progress) -> None:
            progress.limit, progress.excess = most, "too many"
            self._call(url, "get_file", progress, str(path), callback=progress)

        try:
            self._retry(url, attempt, path)
        except UnreachableFile as error:
            if error.__cause__ is not None and _is_denied(error.__cause__):
                return False
            raise
        return True

    def fetch(self, url: str, path: Path, size: int, sha256: str | None = None) -> None:
        """Downloads a file to `path`. Raises UnreachableFile if all attempts fail, or give another size or hash."""

        def attempt(progress: _Progress) -> None:
            progress.limit = size
            self._call(url, "get_file", progress, str(path), callback=progress)
            if (got := path.stat().st_size) != size:
                raise OSError(f"received {got} bytes instead of {size}: cut off, or changed since it was indexed")
            if sha256 is not None and file_sha256(path) != sha256:
                raise OSError("the content does not match the index: damaged, or changed since it was indexed")

        self._retry(url, attempt, path)

    def _retry(self, url: str, attempt: Callable[[_Progress], T], path: Path | None = None) -> T:
        """The result of the first attempt that succeeds. `path` is the file that attempts write."""
        for number in range(1, self._tries + 1):
            try:
                return attempt(_Progress())
            except ImportError as error:  # the file system's package is missing
                raise _unreachable(url, f"{error}; https and s3 need: {install_command('remote')}") from error
            except Exception as error:  # every file system has its own exceptions
                reason = _cause(error)
                cause = printable(without_secrets(f"{type(reason).__name__}: {str(reason) or 'no message'}"))
                if isinstance(error, OSError) and (error.errno in _DISK_ERRORS or _names(error, path)):
                    raise _unreachable(url, f"cannot be written to {path}: {error.strerror}") from None
                if number == self._tries or _is_denied(error) or isinstance(reason, FinalError):
                    attempts = "1 attempt" if number == 1 else f"{number} attempts"
                    raise _unreachable(url, f"download failed after {attempts}: {cause}") from error
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (number - 1)) * random.uniform(0.75, 1.25)
                logger.warning("%s: %s; retrying in %.1f s", printable(without_secrets(url)), cause, pause)
                time.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _call(self, url: str, operation: str, progress: _Progress, *arguments: Any, **options: Any) -> Any:
        """Calls an operation of the URL's file system, and aborts it if `progress` stalls for too long."""
        system, path = fsspec.url_to_fs(url, **_options(urlsplit(url).scheme))
        if not isinstance(system, AsyncFileSystem):  # has timeouts of its own, or needs none
            return getattr(system, operation)(path, *arguments, **options)
        coroutine = getattr(system, f"_{operation}")(path, *arguments, **options)
        future = asyncio.run_coroutine_threadsafe(coroutine, system.loop)
        while True:
            try:
                return future.result(timeout=min(1.0, self._timeout / 4))
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise  # raised by the operation
                if time.monotonic() - progress.last > self._timeout:
                    future.cancel()
                    raise TimeoutError(f"no data for {self._timeout:g} s") from None


class _Progress(Callback):
    """Notes when data last arrived, and raises FinalError if more arrive than expected."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.limit, self._received = time.monotonic(), None, 0
        self.excess = "changed since it was indexed"

    def relative_update(self, inc: int = 1) -> None:
        if inc:
            self.last = time.monotonic()
        self._received += inc
        if self.limit is not None and self._received > self.limit:
            raise FinalError(f"received more than {self.limit} bytes: {self.excess}")


def public_part(url: str) -> str:
    """What identifies a file: its URL without password and, for http, without what follows "?", often a signature."""
    if urlsplit(url).scheme in ("http", "https"):
        return without_secrets(url)
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _unreachable(url: str, reason: str) -> UnreachableFile:
    return UnreachableFile(errno.EIO, reason, printable(without_secrets(url)))


def _options(protocol: str) -> dict[str, Any]:
    if protocol in ("s3", "s3a"):  # parallel parts would report no progress until a batch of them is complete
        return {"max_concurrency": 1}
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    from softmask_fast.data.remote.redirects import open_session

    given = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    # aiohttp aborts every request after five minutes; a server that compresses would not report the file's size
    ours = {"timeout": aiohttp.ClientTimeout(total=None), "trust_env": True}
    headers = {"Accept-Encoding": "identity", **given.get("headers", {})}
    return {"client_kwargs": {**ours, **given, "headers": headers}, "get_client": open_session}


def _names(error: OSError, path: Path | None) -> bool:
    """Whether an error is about the file that is being written."""
    return path is not None and error.filename == str(path)


def _cause(error: BaseException) -> BaseException:
    """The actual error: fsspec raises FileNotFoundError for every failure to look up an HTTP file."""
    return error.__cause__ or error if isinstance(error, FileNotFoundError) else error


def _is_denied(error: BaseException) -> bool:
    """Whether a retry is pointless: the file does not exist, or access is denied."""
    cause = _cause(error)
    status = getattr(cause, "status", None) or getattr(cause, "code", None)
    if response := getattr(cause, "response", None):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _RETRIED_STATUSES
    return isinstance(cause, FileNotFoundError | PermissionError)

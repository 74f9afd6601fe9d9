"""Downloads through fsspec (https, s3, gs, ...): whole files, retried, a time limit on stalls, a checked size."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
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

logger = logging.getLogger(__name__)

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two attempts
_WORTH_A_RETRY = (408, 425, 429)  # of the HTTP statuses 4xx


class UnreachableFile(OSError):
    """A file that could not be downloaded; the message names the URL, the attempts and the last cause."""


class Downloader:
    """Thread-safe. Every failure that may pass is retried `tries` times in all, with pauses that double."""

    def __init__(self, tries: int = 5, timeout: float = 60.0):
        """timeout: seconds without any data after which an attempt counts as failed."""
        self._tries, self._timeout = tries, timeout

    def size(self, url: str) -> int:
        """The size in bytes. Raises UnreachableFile."""
        info = self._retry(url, lambda progress: self._call(url, "info", progress))
        if not isinstance(info.get("size"), int):
            raise UnreachableFile(
                f"{without_query(url)}: the server does not tell the file's size; write an index beside it "
                f"(softmask-fast index)"
            )
        return info["size"]

    def read(self, url: str) -> bytes | None:
        """The content of a small file; None where there is no such file, or none for us. Raises UnreachableFile."""
        try:
            return self._retry(url, lambda progress: self._call(url, "cat_file", progress))
        except UnreachableFile as error:
            if error.__cause__ is not None and _is_final(error.__cause__):
                return None
            raise

    def fetch(self, url: str, path: Path, size: int, sha256: str | None = None) -> None:
        """Writes the file to `path`. A size or hash other than expected counts as a failure. Raises UnreachableFile."""

        def attempt(progress: _Progress) -> None:
            progress.limit = size
            self._call(url, "get_file", progress, str(path), callback=progress)
            if (got := path.stat().st_size) != size:
                raise OSError(f"{got} bytes came instead of {size}: cut off, or changed since it was indexed")
            if sha256 is not None and file_sha256(path) != sha256:
                raise OSError("the content is not that of the index: damaged, or changed since it was indexed")

        self._retry(url, attempt)

    def _retry(self, url: str, attempt: Callable[[_Progress], T]) -> T:
        for number in range(1, self._tries + 1):
            try:
                return attempt(_Progress())
            except ImportError as error:  # of the file system's package
                raise UnreachableFile(
                    f"{without_query(url)}: {error}; https and s3 need: pip install 'softmask_fast[remote]'"
                ) from error
            except Exception as error:  # each file system has its own
                cause = f"{type(error).__name__}: {str(error) or 'no message'}".replace(url, without_query(url))
                if number == self._tries or _is_final(error):
                    tries = "1 try" if number == 1 else f"{number} tries"
                    raise UnreachableFile(f"{without_query(url)}: cannot be had after {tries}: {cause}") from error
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (number - 1)) * random.uniform(0.75, 1.25)
                logger.warning("%s: %s; trying again in %.1f s", without_query(url), cause, pause)
                time.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _call(self, url: str, operation: str, progress: _Progress, *arguments: Any, **options: Any) -> Any:
        """One operation of the URL's file system, given up when `progress` has stood still for too long."""
        system, path = fsspec.url_to_fs(url, **_options(urlsplit(url).scheme))
        if not isinstance(system, AsyncFileSystem):  # has its own time limits, or needs none
            return getattr(system, operation)(path, *arguments, **options)
        coroutine = getattr(system, f"_{operation}")(path, *arguments, **options)
        future = asyncio.run_coroutine_threadsafe(coroutine, system.loop)
        while True:
            try:
                return future.result(timeout=min(1.0, self._timeout / 4))
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise  # its own
                if time.monotonic() - progress.last > self._timeout:
                    future.cancel()
                    raise TimeoutError(f"no data for {self._timeout:g} s") from None


class _Progress(Callback):
    """When data last came, and that no more comes than was promised."""

    def __init__(self):
        super().__init__()
        self.last, self.limit, self._received = time.monotonic(), None, 0

    def relative_update(self, inc: int = 1) -> None:
        if inc:
            self.last = time.monotonic()
        self._received += inc
        if self.limit is not None and self._received > self.limit:
            raise OSError(f"more than {self.limit} bytes come: changed since it was indexed")


def without_query(url: str) -> str:
    """The URL as it may be shown and compared: what stands behind "?" is often a signature."""
    return url.split("?")[0] if urlsplit(url).scheme in ("http", "https") else url


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _options(protocol: str) -> dict[str, Any]:
    if protocol in ("s3", "s3a"):  # one stream per shard: parts in parallel show no progress until a batch is done
        return {"max_concurrency": 1}
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    given = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    # aiohttp ends every request after five minutes; a server that compresses would not tell the file's own size
    ours = {"timeout": aiohttp.ClientTimeout(total=None), "trust_env": True}
    headers = {"Accept-Encoding": "identity", **given.get("headers", {})}
    return {"client_kwargs": {**ours, **given, "headers": headers}}


def _is_final(error: BaseException) -> bool:
    """Whether the server answered that there is no such file, or not for us: asking again changes nothing."""
    cause = error
    if isinstance(error, FileNotFoundError):  # so fsspec calls every failure to look at an HTTP file
        cause = error.__cause__ or error
    status = getattr(cause, "status", None) or getattr(cause, "code", None)
    if response := getattr(cause, "response", None):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _WORTH_A_RETRY
    return isinstance(cause, FileNotFoundError | PermissionError)

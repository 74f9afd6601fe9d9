"""Atomic writes of files, reading of JSON, and the versions of the installed packages."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softmask_fast.errors import UsageError

MAX_LIST_BYTES = 1 << 32  # of a JSON file or a table, which are read into memory
PACKAGES = ("softmask_fast", "torch", "triton", "transformers", "timm", "deepspeed", "nvidia-dali-cuda130", "xformers")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, over the quota, over the limit of a file's size


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context that turns any library's error about a full disk into an OSError that names `path`: a user error."""
    try:
        yield
    except Exception as error:
        if getattr(error, "filename", None) is not None or (number := full_disk(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def full_disk(error: BaseException | None) -> int | None:
    """The number of the operating system's error behind an exception, if it says that a disk is full."""
    while error is not None:
        # safetensors and tokenizers raise errors of their own
        stated = re.search(r"\(os error (\d+)\)", str(error))
        number = int(stated[1]) if stated else getattr(error, "errno", None)
        if number in FULL:
            return number
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write a file or a folder to, which then becomes `path`.

    Readers see the old content or the new one, never a part, even after a power failure: what was written is flushed
    to the disk before it is renamed. An error leaves the old content and removes the new one; a full disk is a user
    error.
    """
    temporary = path.with_name(path.name + ".partial")
    remove(temporary)  # of a process that was killed
    try:
        with naming(path):
            yield temporary
            flush(temporary)
    except BaseException:
        remove(temporary)
        raise
    move(temporary, path)


def move(source: Path, target: Path) -> None:
    """Rename a flushed file or folder, replacing an older one, and flush the new name to the disk."""
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)
    flush_entry(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder with its content, is on the disk."""
    for entry in path.rglob("*"):
        flush_entry(entry)
    flush_entry(path)


def flush_entry(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Add a line to a UTF-8 file. Raises OSError with the file's name when the disk is full."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """`write_text` of indented JSON with a final line break."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path, option: str) -> Any:
    """The content of a JSON file. Raises UsageError, which names `option`, if it is invalid or larger than
    `MAX_LIST_BYTES`."""
    check_size(path, option)
    try:
        return parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise UsageError(f"{option}: {path} is not valid JSON: {error}") from error


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError if it is invalid, nested too deep, or an object has a name twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):  # json would keep the last value
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)!r} twice")
    return content


def check_size(path: str | Path, option: str) -> None:
    """Raises UsageError if a file is too large to be read into memory."""
    if (size := os.path.getsize(path)) > MAX_LIST_BYTES:
        raise UsageError(f"{option}: {path} has {size} bytes, the limit is {MAX_LIST_BYTES}")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def installed_versions() -> dict[str, str]:
    """The version of Python and of each of `PACKAGES`, or "not installed"."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions

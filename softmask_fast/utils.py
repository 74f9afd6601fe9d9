"""Atomic writes of files, reading of JSON, and the versions of the installed packages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softmask_fast.errors import UsageError

MAX_LIST_BYTES = 1 << 32  # of a JSON file or a table, which are read into memory
PACKAGES = ("softmask_fast", "torch", "triton", "transformers", "timm", "deepspeed", "nvidia-dali-cuda130", "xformers")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which then becomes `path`: readers see the old content or the new one, no part."""
    temporary = path.with_name(path.name + ".partial")
    yield temporary
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """`write_text` of indented JSON with a final line break."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path, option: str) -> Any:
    """The content of a JSON file. Raises UsageError, naming the option that the path came from, if it is invalid or
    larger than `MAX_LIST_BYTES`."""
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

"""Atomic writes of files, and the versions of the installed packages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

PACKAGES = ("softmask_fast", "torch", "triton", "transformers", "timm", "deepspeed", "nvidia-dali-cuda130", "xformers")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file under a temporary name, then rename it: readers see the old file or the new one, no part."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: object) -> None:
    """`write_text` of indented JSON with a final line break."""
    write_text(path, json.dumps(content, indent=2) + "\n")


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

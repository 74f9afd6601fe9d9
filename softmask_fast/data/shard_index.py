"""The index of a shard, `<shard>.index.jsonl`: where each sample's files lie in the tar, without the tar.

First line: {"format": ..., "samples": count, "bytes": size of the shard, "sha256": of the shard}; then one line per
sample, in the shard's order: ["name", {"jpg": [offset, size], "json": [offset, size]}].
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from softmask_fast.data.download import file_sha256
from softmask_fast.data.shards import index_shard
from softmask_fast.files import write_text

FORMAT = "softmask_fast shard index, version 1"
SUFFIX = ".index.jsonl"


@dataclass(frozen=True)
class IndexHead:
    """What is known of a shard before its samples are listed."""

    samples: int
    bytes: int
    sha256: str


def write_index(shard: Path, path: Path) -> IndexHead:
    """Indexes a local shard; the file at `path` appears whole. Raises ValueError when the shard is damaged."""
    entries = [(entry.name, entry.members) for entry in index_shard(shard)]
    head = IndexHead(len(entries), os.path.getsize(shard), file_sha256(shard))
    lines = [json.dumps({"format": FORMAT, **vars(head)})]
    lines += [json.dumps(entry, separators=(",", ":")) for entry in entries]
    write_text(path, "\n".join(lines) + "\n")
    return head


def read_head(path: Path) -> IndexHead:
    """The first line alone. Raises ValueError when it is not that of an index."""
    with open(path, "rb") as file:
        return parse_head(file.readline(10_000), str(path))


def read_index(path: Path) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Name and members (extension -> offset, size) of every sample. Raises ValueError when the file is malformed."""
    return parse_index(path.read_bytes().splitlines(), str(path))


def parse_head(line: bytes, where: str) -> IndexHead:
    try:
        content = json.loads(line)
        if content["format"] == FORMAT and _sizes([content["samples"], content["bytes"]]):
            return IndexHead(content["samples"], content["bytes"], str(content["sha256"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"data: {where} is no shard index ({FORMAT}); write it anew (softmask-fast index)")


def parse_index(lines: list[bytes], where: str) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """As `read_index`. A stranger may have written it: all offsets are seen to lie within the shard."""
    head = parse_head(lines[0] if lines else b"", where)
    entries = []
    for number, line in enumerate(lines[1:], 2):
        try:
            name, members = json.loads(line)
            good = isinstance(name, str) and bool(members)
            for offset, size in members.values():
                good = good and _sizes([offset, size]) and offset + size <= head.bytes
        except (ValueError, TypeError, AttributeError, RecursionError):
            good = False
        if not good:
            raise ValueError(f"data: {where}: line {number} is malformed: {line[:100]!r}")
        entries.append((name, {extension: (offset, size) for extension, (offset, size) in members.items()}))
    if len(entries) != head.samples:
        raise ValueError(f"data: {where} lists {len(entries)} samples, its first line says {head.samples}")
    return entries


def _sizes(values: Iterable[object]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)

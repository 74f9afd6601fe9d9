"""WebDataset shards: tar files, indexed once by their headers and read by offset; nothing is unpacked to disk."""

from __future__ import annotations

import json
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from softmask_fast.data.parsing import distinct_keys, parse_phrases, relative_names, usable_captions
from softmask_fast.data.seeding import image_ids
from softmask_fast.data.types import BadSample, Phrase, Sample
from softmask_fast.errors import UsageError
from softmask_fast.utils import file_sha256, write_text

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("json", "txt")
# recognized only to report the sample as bad, with this as the reason
UNSUPPORTED_EXTENSIONS = ("gif", "bmp", "tif", "tiff", "avif", "heic", "jp2", "svg")

INDEX_FORMAT = "softmask_fast shard index, version 1"
INDEX_SUFFIX = ".index.jsonl"

Members = dict[str, tuple[int, int]]  # extension -> offset and size in bytes within the shard


class ShardEntry(NamedTuple):
    """One sample of a shard."""

    name: str
    members: Members


@dataclass(frozen=True)
class IndexHeader:
    """The first line of an index: what is known of a shard before its samples are listed."""

    samples: int
    bytes: int
    sha256: str


class ShardSource:
    """Samples of tar files: `name.jpg` (.jpeg, .png, .webp) next to `name.json` or `name.txt`.

    JSON: {"captions": [...]} or {"caption": "..."}, optionally "phrases"; text: one caption per line. Keys are
    "shard/name", with the shard's path relative to the common folder of all shards; repeated keys get "#2", "#3", ...
    """

    encoded = True

    def __init__(self, shards: Sequence[Path]):
        """Raises UsageError if a shard is damaged or there are no samples."""
        self._entries: list[tuple[Path, Members]] = []
        keys = []
        for shard, name in zip(shards, relative_names([os.path.abspath(shard) for shard in shards]), strict=True):
            for entry in index_shard(shard):
                self._entries.append((shard, entry.members))
                keys.append(f"{name.removesuffix('.tar')}/{entry.name}")
        if not keys:
            raise UsageError(f"data: no samples in {len(shards)} shards, the first is {shards[0]}")
        self.keys = distinct_keys(keys)
        self.image_ids = image_ids(self.keys)

    def __len__(self) -> int:
        return len(self._entries)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def read(self, index: int) -> Sample:
        return self.load(self.locate(index))

    def locate(self, index: int) -> tuple[str, Path, Members]:
        return self.keys[index], *self._entries[index]

    def load(self, located: tuple[str, Path, Members]) -> Sample:
        key, shard, members = located
        try:
            with FileIO(shard) as file:
                return read_sample(key, members, file)
        except OSError as error:
            raise BadSample(f"shard cannot be read: {error}") from error


def read_sample(key: str, members: Members, shard: FileIO) -> Sample:
    """Reads one sample of an open shard. Raises BadSample if it cannot be used."""
    image = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
    if image is None:
        raise BadSample(f"no .jpg, .jpeg, .png or .webp file, only {', '.join(members)}")
    captions, skipped, phrases = _read_captions(members, shard)
    return Sample(key, _read_member(members, image, shard), captions, phrases, skipped)


def _read_captions(members: Members, shard: FileIO) -> tuple[list[str], int, list[Phrase]]:
    """The captions, how many were dropped, and the phrases."""
    if "json" in members:
        try:
            content = json.loads(_read_member(members, "json", shard))
        except (ValueError, RecursionError) as error:
            raise BadSample(f"invalid .json: {error}") from error
        if not isinstance(content, dict):
            raise BadSample(f".json must be an object, got {type(content).__name__}")
        name = "captions" if "captions" in content else "caption"
        if name in content:
            captions, skipped = usable_captions(content[name], f'"{name}"')
            return captions, skipped, parse_phrases(content.get("phrases", []))
        if "txt" not in members:
            raise BadSample('no "captions" in the .json file')
    if "txt" not in members:
        raise BadSample("no caption file (.json or .txt)")
    try:
        lines = _read_member(members, "txt", shard).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadSample(f".txt is not UTF-8: {error}") from error
    captions, skipped = usable_captions([line for line in lines if line.strip()], ".txt")
    return captions, skipped, []


def _read_member(members: Members, extension: str, shard: FileIO) -> bytes:
    offset, size = members[extension]
    content = os.pread(shard.fileno(), size, offset)
    if len(content) < size:
        raise BadSample(f"the shard ends inside its .{extension} file ({len(content)} of {size} bytes)")
    return content


def index_shard(shard: Path) -> Iterator[ShardEntry]:
    """The samples of one tar file, in file order. Raises UsageError if it is damaged or no tar file."""
    entry, others = None, 0
    for member in _tar_members(shard):
        folder, _, file_name = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = file_name.partition(".")
        name, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
        known = extension in IMAGE_EXTENSIONS + CAPTION_EXTENSIONS + UNSUPPORTED_EXTENSIONS
        if not (member.isfile() and known and stem):  # no stem: a hidden file
            others += 1
            continue
        if entry is None or entry.name != name or extension in entry.members:
            if entry is not None:
                yield entry
            entry = ShardEntry(name, {})
        entry.members[extension] = (member.offset_data, member.size)
    if entry is not None:
        yield entry
    if others:
        logger.info("%s: ignored %d files that are neither images nor captions", shard, others)


def _tar_members(shard: Path) -> Iterator[tarfile.TarInfo]:
    size = os.path.getsize(shard)
    try:
        with tarfile.open(shard, "r:", encoding="utf-8", errors="backslashreplace") as archive:
            try:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # tarfile keeps all members it has seen
                    yield member
            except tarfile.ReadError:
                if archive.offset <= size:
                    raise
                # reading the last file will fail and make its sample a bad one
                logger.warning("%s is cut off inside its last file, at byte %d", shard, size)
                return
            # tarfile stops silently at a header it cannot read
            archive.fileobj.seek(archive.offset)
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset} of {size}")
    except tarfile.ReadError as error:
        raise UsageError(f"data: {shard} is not a readable tar file (uncompressed): {error}") from error


def write_index(shard: Path, path: Path) -> IndexHeader:
    """Indexes a local shard and writes the index atomically. Raises UsageError if the shard is damaged."""
    entries = list(index_shard(shard))
    header = IndexHeader(len(entries), os.path.getsize(shard), file_sha256(shard))
    lines = [json.dumps({"format": INDEX_FORMAT, **asdict(header)})]
    lines += [json.dumps(entry, separators=(",", ":")) for entry in entries]
    write_text(path, "\n".join(lines) + "\n")
    return header


def read_header(path: Path) -> IndexHeader:
    """Reads only the first line of an index. Raises UsageError if it is no index."""
    with open(path, "rb") as file:
        return _parse_header(file.readline(10_000), str(path))


def read_index(path: Path) -> list[ShardEntry]:
    """The samples that an index lists. Raises UsageError if it is malformed."""
    return parse_index(path.read_bytes().splitlines(), str(path))


def parse_index(lines: Sequence[bytes], name: str) -> list[ShardEntry]:
    """Like `read_index`, from lines. The index is not trusted: all offsets are checked to lie within the shard."""
    header = _parse_header(lines[0] if lines else b"", name)
    entries = []
    for number, line in enumerate(lines[1:], 2):
        try:
            sample, members = json.loads(line)
            good = isinstance(sample, str) and bool(members)
            for offset, size in members.values():
                good = good and _are_sizes([offset, size]) and offset + size <= header.bytes
        except (ValueError, TypeError, AttributeError, RecursionError):
            good = False
        if not good:
            raise UsageError(f"data: {name}: line {number} is malformed: {line[:100]!r}")
        entries.append(ShardEntry(sample, {extension: tuple(span) for extension, span in members.items()}))
    if len(entries) != header.samples:
        raise UsageError(f"data: {name} lists {len(entries)} samples, but its first line says {header.samples}")
    return entries


def _parse_header(line: bytes, name: str) -> IndexHeader:
    try:
        content = json.loads(line)
        if content["format"] == INDEX_FORMAT and _are_sizes([content["samples"], content["bytes"]]):
            return IndexHeader(content["samples"], content["bytes"], str(content["sha256"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UsageError(f"data: {name} is not a shard index ({INDEX_FORMAT}); write it again with softmask-fast index")


def _are_sizes(values: Iterable[object]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)

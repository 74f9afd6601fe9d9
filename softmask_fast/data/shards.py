"""WebDataset shards: tar files, indexed once by their headers and read by offset; nothing is unpacked to disk."""

from __future__ import annotations

import json
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from softmask_fast.data.remote.download import file_sha256
from softmask_fast.data.seeding import image_ids
from softmask_fast.data.types import (
    BadSample,
    Phrase,
    Sample,
    distinct_keys,
    parse_phrases,
    relative_names,
    usable_captions,
)
from softmask_fast.utils import write_text

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("json", "txt")
# recognised only so that the sample is named as bad, with this as the reason
UNSUPPORTED_EXTENSIONS = ("gif", "bmp", "tif", "tiff", "avif", "heic", "jp2", "svg")


@dataclass
class Entry:
    """One sample: where its members lie in the shard."""

    shard: str
    name: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension -> offset, size in bytes


class ShardSource:
    """Samples of tar files: `name.jpg` (.jpeg, .png, .webp) beside `name.json` or `name.txt`.

    JSON: {"captions": [...]} or {"caption": "..."}, optionally "phrases"; text: one caption per line. Keys are
    "shard/name", the shard as seen from the folder of them all, with "#2" behind the second of the same.
    """

    encoded = True

    def __init__(self, shards: Sequence[Path]):
        self._entries = [entry for shard in shards for entry in index_shard(shard)]
        if not self._entries:
            raise ValueError(f"data: no samples in {len(shards)} shards, the first is {shards[0]}")
        paths = [os.path.abspath(shard) for shard in shards]
        names = dict(zip(map(str, shards), relative_names(paths), strict=True))
        self.keys = distinct_keys(
            [f"{names[entry.shard].removesuffix('.tar')}/{entry.name}" for entry in self._entries]
        )
        self.image_ids = image_ids(self.keys)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> Sample:
        entry = self._entries[index]
        try:
            with FileIO(entry.shard) as file:
                return read_sample(self.keys[index], entry.members, file)
        except OSError as error:
            raise BadSample(f"shard cannot be read: {error}") from error


def read_sample(key: str, members: dict[str, tuple[int, int]], shard: FileIO) -> Sample:
    """members: extension -> offset, size in bytes. Raises BadSample when the sample cannot be used."""
    image = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
    if image is None:
        raise BadSample(f"no .jpg, .jpeg, .png or .webp file; there is {', '.join(members)}")
    captions, skipped, phrases = _read_captions(members, shard)
    return Sample(key, _read_member(members, image, shard), captions, phrases, skipped)


def _read_captions(members: dict[str, tuple[int, int]], shard: FileIO) -> tuple[list[str], int, list[Phrase]]:
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


def _read_member(members: dict[str, tuple[int, int]], extension: str, shard: FileIO) -> bytes:
    offset, size = members[extension]
    content = os.pread(shard.fileno(), size, offset)
    if len(content) < size:
        raise BadSample(f"the shard ends inside its .{extension} file ({len(content)} of {size} bytes)")
    return content


def index_shard(shard: Path) -> Iterator[Entry]:
    """The samples of one tar file, in its order. Raises ValueError when it is no tar file or is damaged."""
    entry, others = None, 0
    for member in _members(shard):
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
            entry = Entry(str(shard), name)
        entry.members[extension] = (member.offset_data, member.size)
    if entry is not None:
        yield entry
    if others:
        logger.info("%s: %d members are neither images nor captions", shard, others)


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    size = os.path.getsize(shard)
    try:
        with tarfile.open(shard, "r:", encoding="utf-8", errors="backslashreplace") as archive:
            try:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # tarfile keeps all it has seen
                    yield member
            except tarfile.ReadError:
                if archive.offset <= size:
                    raise
                # reading that one file fails, which makes its sample a bad one
                logger.warning("%s is cut off inside its last file, at byte %d", shard, size)
                return
            # tarfile stops silently at a header it cannot read
            archive.fileobj.seek(archive.offset)
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset} of {size}")
    except tarfile.ReadError as error:
        raise ValueError(f"data: {shard} is not a readable tar file (uncompressed): {error}") from error


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

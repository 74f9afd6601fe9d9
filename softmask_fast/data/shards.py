"""WebDataset shards: tar files, indexed once by their headers and read by offset; nothing is unpacked to disk."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from softmask_fast.data.images import MAX_IMAGE_BYTES
from softmask_fast.data.parsing import distinct_keys, parse_phrases, relative_names, text_lines, usable_captions
from softmask_fast.data.seeding import image_ids
from softmask_fast.data.types import BadSample, Phrase, Sample
from softmask_fast.errors import UsageError, printable
from softmask_fast.utils import file_sha256, parse_json, write_text

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff")
CAPTION_EXTENSIONS = ("json", "txt")
# recognized only to name them as the reason why a sample is bad
UNSUPPORTED_EXTENSIONS = ("gif", "bmp", "avif", "heic", "jp2", "svg")

INDEX_FORMAT = "softmask_fast shard index, version 1"
INDEX_SUFFIX = ".index.jsonl"
MAX_INDEX_BYTES = 1 << 28  # three million samples in one shard
_MAX_LINE_BYTES = 1 << 16  # of an index

_MAX_TEXT_BYTES = 1 << 26  # of a sample's .json or .txt
_MAX_HEADER_BYTES = 1 << 20  # of one member's long name and extended attributes

Members = dict[str, tuple[int, int]]  # extension -> offset and size in bytes within the shard


class ShardEntry(NamedTuple):
    """One sample of a shard."""

    name: str
    members: Members


@dataclass(frozen=True)
class IndexHeader:
    """The first line of an index, about the shard."""

    samples: int
    bytes: int
    sha256: str  # hexadecimal


class ShardSource:
    """Samples of tar files: `name.jpg` (.jpeg, .png, .webp, .tif, .tiff) next to `name.json` or `name.txt`.

    JSON files hold {"captions": [...]} or {"caption": "..."}, and may hold "phrases"; text files, one caption per line.
    Keys are "shard/name", with the shard's path relative to the common folder of all shards. Repeated keys get "#2",
    "#3", ...
    """

    encoded = True

    def __init__(self, shards: Sequence[Path]) -> None:
        """Raises UsageError if a shard is damaged or there are no samples."""
        self._entries: list[tuple[Path, Members]] = []
        keys, left_out = [], ""
        for shard, name in zip(shards, relative_names([os.path.abspath(shard) for shard in shards]), strict=True):
            listed = list_shard(shard)
            left_out = left_out or listed.left_out()
            for entry in listed.entries:
                self._entries.append((shard, entry.members))
                keys.append(f"{name.removesuffix('.tar')}/{entry.name}")
        if not keys:
            why = f"; it has {left_out}" if left_out else ""
            raise UsageError(f"data: no samples in {len(shards)} shards, the first is {shards[0]}{why}")
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
        raise BadSample(f"no .jpg, .jpeg, .png, .webp, .tif or .tiff file, only {', '.join(members)}")
    captions, skipped, phrases = _read_captions(members, shard)
    return Sample(key, _read_member(members, image, shard), captions, phrases, skipped)


def _read_captions(members: Members, shard: FileIO) -> tuple[list[str], int, list[Phrase]]:
    """The captions, the number of dropped ones, and the phrases."""
    if "json" in members:
        try:
            content = parse_json(_read_member(members, "json", shard))
        except BadSample:
            raise
        except ValueError as error:
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
    captions, skipped = usable_captions(text_lines(_read_member(members, "txt", shard)), ".txt")
    return captions, skipped, []


def _read_member(members: Members, extension: str, shard: FileIO) -> bytes:
    offset, size = members[extension]
    limit = _MAX_TEXT_BYTES if extension in CAPTION_EXTENSIONS else MAX_IMAGE_BYTES
    if size > limit:
        raise BadSample(f"its .{extension} file has {size} bytes, the limit is {limit}")
    content = os.pread(shard.fileno(), size, offset)
    if len(content) < size:
        raise BadSample(f"the shard ends inside its .{extension} file ({len(content)} of {size} bytes)")
    return content


@dataclass
class Listing:
    """What a shard holds."""

    entries: list[ShardEntry] = field(default_factory=list)  # in file order
    unpaired: list[str] = field(default_factory=list)  # images and captions that belong to no sample
    others: list[str] = field(default_factory=list)  # neither images nor captions

    def left_out(self) -> str:
        """What is not read: how many files, and the first one's name. Empty if everything is read."""
        kinds = ("images or captions without a partner", self.unpaired), ("other files", self.others)
        return ", ".join(f"{len(names)} {what} (the first is {names[0]!r})" for what, names in kinds if names)


def list_shard(shard: Path) -> Listing:
    """Lists the samples of a tar file by its headers, and logs what will not be read.

    Consecutive members are one sample if their names differ only after the last dot: `a.jpg`, `a.txt`. Between them
    there may be others that agree up to the first dot, such as `a.v1.jpg` and `a.v1.txt`. An image or a caption alone
    is not a sample if its name has a further dot, as in `a.mask.png`.

    Raises:
        UsageError: If the file is damaged, or not an uncompressed tar file.
    """
    listing, group, stem = Listing(), [], None
    for member in _tar_members(shard):
        if member.isdir():
            continue
        folder, _, file_name = member.name.removeprefix("./").rpartition("/")
        name, _, extension = file_name.rpartition(".")
        extension = extension.lower()
        if extension not in IMAGE_EXTENSIONS + CAPTION_EXTENSIONS + UNSUPPORTED_EXTENSIONS or file_name[0] == ".":
            listing.others.append(member.name)
            continue
        if not member.isreg() or member.issparse():  # a link, or a file in pieces
            listing.unpaired.append(member.name)
            continue
        if stem != (stem := (folder, file_name.partition(".")[0])):
            _close_group(group, listing)
        path = f"{folder}/{name}" if folder else name
        entry = next((entry for entry in reversed(group) if entry.name == path), None)
        if entry is None or extension in entry.members:
            group.append(entry := ShardEntry(path, {}))
        entry.members[extension] = (member.offset_data, member.size)
    _close_group(group, listing)
    if listing.unpaired:
        logger.warning("%s: not read: %s", printable(str(shard)), listing.left_out())
    elif listing.others:
        logger.info("%s: not read: %s", printable(str(shard)), listing.left_out())
    return listing


def _close_group(group: list[ShardEntry], listing: Listing) -> None:
    """Adds the samples of a group to the listing's entries, and its other members to the unpaired ones."""
    for entry in group:
        whole = len({extension in CAPTION_EXTENSIONS for extension in entry.members}) == 2
        if whole or "." not in entry.name.rpartition("/")[2]:
            listing.entries.append(entry)
            images = [extension for extension in IMAGE_EXTENSIONS if extension in entry.members]
            listing.unpaired += [f"{entry.name}.{extension}" for extension in images[1:]]  # the first is read
        else:
            listing.unpaired += [f"{entry.name}.{extension}" for extension in entry.members]
    group.clear()


class _Headers(io.BufferedReader):
    """A tar file of which only headers are read. It bounds them, as tarfile trusts the size that a header claims."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header says an impossible size")
        return super().read(size)


def _tar_members(shard: Path) -> Iterator[tarfile.TarInfo]:
    size, start = os.path.getsize(shard), 0
    try:
        with (
            _Headers(FileIO(shard)) as file,
            tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as archive,
        ):
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps all members it has seen
                end = member.offset_data + member.size
                if member.size < 0 or archive.offset <= start or (end > size and member.size > MAX_IMAGE_BYTES):
                    raise tarfile.ReadError(f"impossible size {member.size}")
                yield member
                if archive.offset > size:
                    # reading this file will fail, so its sample will be a bad one
                    logger.warning("%s is cut off inside its last file, at byte %d", printable(str(shard)), size)
                    return
                start = archive.offset
            # tarfile stops silently at a header it cannot read
            archive.fileobj.seek(archive.offset)
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            if block.strip(b"\0"):
                raise tarfile.ReadError("no header")
    except OSError as error:
        if error.filename is not None:
            raise
        raise UsageError(f"data: {shard} cannot be read: {error}") from error
    except Exception as error:  # on damaged headers tarfile raises nearly anything
        where = f"damaged or cut off at byte {start} of {size}"
        raise UsageError(f"data: {shard} is not a readable tar file (uncompressed): {where}: {error}") from error


def write_index(shard: Path, path: Path) -> IndexHeader:
    """Indexes a local shard and writes the index to `path` atomically. Raises UsageError if the shard is damaged."""
    entries = list_shard(shard).entries
    header = IndexHeader(len(entries), os.path.getsize(shard), file_sha256(shard))
    lines = [json.dumps({"format": INDEX_FORMAT, **asdict(header)})]
    lines += [json.dumps(entry, separators=(",", ":")) for entry in entries]
    write_text(path, "\n".join(lines) + "\n")
    return header


def read_header(path: Path) -> IndexHeader:
    """Reads only the first line of an index. Raises UsageError if it is not that of an index."""
    with open(path, "rb") as file:
        return _parse_header(file.readline(_MAX_LINE_BYTES), str(path))


def read_index(path: Path, name: str = "") -> list[ShardEntry]:
    """The samples that an index lists. The index is not trusted: all offsets are checked to lie within the shard.

    Args:
        path: Of the index.
        name: What messages call it; default: its path.

    Raises:
        UsageError: If it is malformed or larger than `MAX_INDEX_BYTES`.
    """
    name = name or str(path)
    with open(path, "rb") as file:
        header = _parse_header(file.readline(_MAX_LINE_BYTES), name)
        if (size := os.fstat(file.fileno()).st_size) > MAX_INDEX_BYTES:
            raise UsageError(f"data: {name} has {size} bytes, the limit is {MAX_INDEX_BYTES}")
        entries = []
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), 2):
            try:
                sample, members = parse_json(line)
                good = isinstance(sample, str) and bool(members)
                for offset, size in members.values():
                    good = good and _are_sizes([offset, size]) and offset + size <= header.bytes
            except (ValueError, TypeError, AttributeError):
                good = False
            if not good:
                raise UsageError(f"data: {name}: line {number} is malformed: {line[:100]!r}")
            entries.append(ShardEntry(sample, {extension: tuple(span) for extension, span in members.items()}))
    if len(entries) != header.samples:
        raise UsageError(f"data: {name} lists {len(entries)} samples, but its first line says {header.samples}")
    return entries


def _parse_header(line: bytes, name: str) -> IndexHeader:
    try:
        content = parse_json(line)
        if content["format"] == INDEX_FORMAT and _are_sizes([content["samples"], content["bytes"]]):
            return IndexHeader(content["samples"], content["bytes"], str(content["sha256"]))
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"data: {name} is not a shard index ({INDEX_FORMAT}); write it again with softmask-fast index")


def _are_sizes(values: Iterable[object]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)

"""Tables in Parquet, and in Arrow as `save_to_disk` of Hugging Face's `datasets` writes them. Both may hold images.

A parquet file is read by row groups. An Arrow file is mapped into memory and read at any position.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from softmask_fast.data.images import MAX_IMAGE_BYTES
from softmask_fast.data.types import BadSample
from softmask_fast.errors import UsageError, one_line
from softmask_fast.installation import install_command
from softmask_fast.utils import MAX_LIST_BYTES

COLUMNAR = (".parquet", ".arrow")
MAX_ROWS = 100_000_000  # of a parquet file, in which a few bytes can claim any number of rows
MAX_GROUP_BYTES = 1 << 30  # of the images in a row group
CACHE_BYTES = 1 << 29  # of row groups that a process keeps; it always keeps two
_BATCH = 512  # rows that become Python objects at a time

# names of all columns, names of those that hold images -> name of the image column, names of the caption columns
Choose = Callable[[Sequence[str], Sequence[str]], tuple[str, Sequence[str]]]


class Stored(NamedTuple):
    """Where a table holds an image."""

    file: str
    column: str
    group: int  # row group of a parquet file, record batch of an Arrow file
    row: int  # in the group
    bytes: int  # of all images of the row group; 0 where an image can be read alone
    name: str  # what the table calls the image; may be empty


def columnar_rows(path: Path, choose: Choose) -> Iterator[dict[str, Any]]:
    """The rows of a table, column -> value. An image is a path or `Stored`.

    Raises:
        UsageError: if pyarrow is not installed.
        ValueError: for a damaged file.
    """
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        how = install_command("parquet")
        raise UsageError(f"{path}: reading it needs pyarrow; install it with: {how}") from error
    try:
        yield from (_parquet_rows if path.suffix == ".parquet" else _arrow_rows)(str(path), choose)
    except (pyarrow.ArrowException, OSError) as error:  # pyarrow raises either for damaged files
        if getattr(error, "filename", None) is not None:
            raise
        raise ValueError(one_line(error)) from error


def read_stored(stored: Stored) -> bytes:
    """The encoded image. Raises BadSample if it cannot be read."""
    import pyarrow

    try:
        if stored.file.endswith(".parquet"):
            image = _GROUPS.read(stored)[stored.row]
        else:
            content = _contents(_arrow_batches(*_version(stored.file))[stored.group], stored.column)[stored.row]
            image = content.as_buffer().to_pybytes() if content.is_valid else None
    except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
        raise BadSample(f"{stored.file} cannot be read: {one_line(error)}") from error
    if image is None:
        raise BadSample(f"no image in column {stored.column!r}")
    if len(image) > MAX_IMAGE_BYTES:
        raise BadSample(f"image has {len(image)} bytes, the limit is {MAX_IMAGE_BYTES}")
    return image


def _wanted(schema: Any, choose: Choose) -> tuple[str, list[str], bool]:
    """The image column, the other columns to read, and whether the image column holds files instead of paths."""
    holding = [
        name for name, kind in zip(schema.names, schema.types, strict=True) if _is_struct(kind) or _is_file(kind)
    ]
    image, captions = choose(schema.names, holding)
    others = [name for name in dict.fromkeys((*captions, "phrases", "split")) if name in schema.names]
    return image, others, image in holding


def _is_file(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_struct(kind: Any) -> bool:
    """Whether this is the type that `datasets` stores images as: {"bytes", "path"}."""
    import pyarrow.types as types

    return types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_file(kind.field("bytes").type)


def _parquet_rows(path: str, choose: Choose) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        image, others, holds = _wanted(file.schema_arrow, choose)
        if file.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"it has {file.metadata.num_rows} rows, the limit is {MAX_ROWS}")
        kind, room = file.schema_arrow.field(image).type, MAX_LIST_BYTES
        names = holds and _is_struct(kind) and kind.get_field_index("path") >= 0
        columns = [*others, f"{image}.path" if names else image] if names or not holds else others
        for group in range(file.num_row_groups):
            size, empty = _images_of(file.metadata.row_group(group), image) if holds else (0, True)
            if size > MAX_GROUP_BYTES and not empty:
                advice = "write it again with fewer rows in one (row_group_size)"
                limit = f"the images of row group {group} have {size} bytes, the limit is {MAX_GROUP_BYTES}"
                raise ValueError(f"{limit}; {advice}")
            first = 0
            for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns):
                if (room := room - batch.nbytes) < 0:
                    raise ValueError(f"its texts have more than {MAX_LIST_BYTES} bytes")
                for number, row in enumerate(batch.to_pylist(), first):
                    name = row.get(image)
                    if names:
                        name = name["path"] if name else None
                    stored = Stored(path, image, group, number, size, name or "")
                    yield row | {image: name if empty else stored}
                first += len(batch)


def _images_of(group: Any, image: str) -> tuple[int, bool]:
    """The bytes of a row group's images, and whether it holds only paths."""
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema in (image, f"{image}.bytes"):
            counted = column.statistics is not None and column.statistics.has_null_count
            return column.total_uncompressed_size, counted and column.statistics.null_count == column.num_values
    raise ValueError(f"no data of column {image!r}")


class _Groups:
    """The images of the row groups read most recently."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[Any, ...], list[bytes | None]] = OrderedDict()
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._lock = threading.Lock()

    def read(self, stored: Stored) -> list[bytes | None]:
        key = *_version(stored.file), stored.column, stored.group
        with self._lock:  # one thread reads a group for all
            if key not in self._groups:
                images = _read_group(stored)
                self._groups[key], self._sizes[key] = images, sum(map(len, filter(None, images)))
                while len(self._groups) > 2 and sum(self._sizes.values()) > CACHE_BYTES:
                    oldest, _ = self._groups.popitem(last=False)
                    del self._sizes[oldest]
            self._groups.move_to_end(key)
            return self._groups[key]


_GROUPS = _Groups()


def _read_group(stored: Stored) -> list[bytes | None]:
    import pyarrow.parquet

    images: list[bytes | None] = []
    room = MAX_GROUP_BYTES  # checked again: with dictionary encoding a small group can become large
    with pyarrow.parquet.ParquetFile(stored.file) as file:
        field = file.schema_arrow.field(stored.column)
        columns = [f"{stored.column}.bytes" if _is_struct(field.type) else stored.column]
        for batch in file.iter_batches(batch_size=16, row_groups=[stored.group], columns=columns):
            if (room := room - batch.nbytes) < 0:
                raise ValueError(f"row group {stored.group} has more than {MAX_GROUP_BYTES} bytes of images")
            images += _contents(batch, stored.column).to_pylist()
    return images


def _contents(batch: Any, column: str) -> Any:
    """The column's array of encoded files."""
    array = batch.column(column)
    return array.field("bytes") if _is_struct(array.type) else array


def _arrow_rows(path: str, choose: Choose) -> Iterator[dict[str, Any]]:
    batches = _arrow_batches(*_version(path))
    if batches:
        image, others, holds = _wanted(batches[0].schema, choose)
    for group, batch in enumerate(batches):
        array = batch.column(image)
        contents = _contents(batch, image) if holds else None
        has_path = holds and _is_struct(array.type) and array.type.get_field_index("path") >= 0
        names = array.field("path") if has_path else None if holds else array
        texts = batch.select(others)
        for first in range(0, batch.num_rows, _BATCH):
            for number, row in enumerate(texts.slice(first, _BATCH).to_pylist(), first):
                name = None if names is None else names[number].as_py()
                stored = holds and (names is None or contents[number].is_valid)
                yield row | {image: Stored(path, image, group, number, 0, name or "") if stored else name}


@lru_cache(maxsize=64)
def _arrow_batches(path: str, *version: int) -> list[Any]:
    """The record batches of a mapped file, whose offsets were checked to lie inside it."""
    import pyarrow

    source, before = pyarrow.memory_map(path), pyarrow.total_allocated_bytes()
    start = 8 if source.read(6) == b"ARROW1" else 0  # a file is a stream behind its magic, with a footer
    count = pyarrow.ipc.open_file(source).num_record_batches if start else None
    source.seek(start)
    if sum(map(_unpacked_bytes, pyarrow.ipc.MessageReader.open_stream(source))) > MAX_GROUP_BYTES:
        raise ValueError(f"it is compressed, and has more than {MAX_GROUP_BYTES} bytes; write it uncompressed")
    source.seek(start)
    batches, rows = [], 0
    for batch in pyarrow.ipc.open_stream(source):
        if (rows := rows + batch.num_rows) > MAX_ROWS:  # a column of nulls has rows without bytes
            raise ValueError(f"it has more than {MAX_ROWS} rows")
        if pyarrow.total_allocated_bytes() - before > MAX_GROUP_BYTES:  # mapped buffers do not count
            raise ValueError(f"its dictionaries take more than {MAX_GROUP_BYTES} bytes; write it without")
        batch.validate(full=True)
        batches.append(batch)
    if count not in (None, len(batches)):
        raise ValueError(f"its footer lists {count} record batches, it has {len(batches)}")
    return batches


def _unpacked_bytes(message: Any) -> int:
    """What a message's compressed buffers take in memory: each begins with that size, -1 if it is not compressed.

    Where they lie is in the message's flatbuffer (Message.fbs of the Arrow format), which pyarrow does not show.
    """
    data = memoryview(message.metadata)

    def at(kind: str, position: int) -> int:
        return struct.unpack_from(f"<{kind}", data, position)[0]

    def member(table: int, number: int) -> int:
        """The position of a member of a table, 0 if it has its default."""
        members, slot = table - at("i", table), 4 + 2 * number
        offset = at("H", members + slot) if slot < at("H", members) else 0
        return table + offset if offset else 0

    if message.type not in ("record batch", "dictionary"):
        return 0
    try:
        batch = member(at("I", 0), 2)
        batch += at("I", batch)
        if message.type == "dictionary":
            batch = member(batch, 1)
            batch += at("I", batch)
        if not member(batch, 3):  # no compression
            return 0
        buffers = member(batch, 2)
        buffers += at("I", buffers)
        places = struct.iter_unpack("<qq", data[buffers + 4 : buffers + 4 + 16 * at("I", buffers)])
        body = memoryview(message.body)
        return sum(max(0, *struct.unpack_from("<q", body, offset)) for offset, length in places if length)
    except struct.error as error:
        raise ValueError(f"a {message.type} is damaged: {error}") from error


def _version(path: str) -> tuple[str, int, int]:
    """A key that changes when the file is replaced."""
    status = os.stat(path)
    return path, status.st_mtime_ns, status.st_size

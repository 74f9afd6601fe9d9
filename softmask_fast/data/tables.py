"""Tables of images and captions: .csv, .tsv, .json, .jsonl and .parquet. Nothing is left out in silence."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from softmask_fast.data.parsing import limited
from softmask_fast.data.shards import IMAGE_EXTENSIONS
from softmask_fast.errors import UsageError, printable, short
from softmask_fast.utils import check_size, parse_json

logger = logging.getLogger(__name__)

TABLE_FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
QUOTES = "texts in quotes, which are letters in a .tsv; quotes around texts need a .csv"
_MAX_ROWS = 100_000_000  # of a parquet file, a few bytes of which can be any number of rows


@dataclass
class TableEntry:
    """An image of the table with the captions of all its rows, unchecked."""

    row: int  # of its first mention, counted from 1 without the header
    image: str
    captions: list[Any] = field(default_factory=list)
    phrases: list[Any] = field(default_factory=list)


def read_table(path: Path, image_column: str, caption_column: str) -> list[TableEntry]:
    """The images in the order of their first mention. A caption may be a string or a list of strings.

    Raises:
        UsageError: If the table cannot be read or lacks one of the columns.
        ModuleNotFoundError: For parquet without pyarrow.
    """
    if path.suffix not in TABLE_FORMATS:
        raise UsageError(f"pairs: expected a table ({', '.join(TABLE_FORMATS)}), got {path}")
    check_size(path, "pairs")
    entries: dict[str, TableEntry] = {}
    for number, row in enumerate(_rows(path, (image_column, caption_column)), 1):
        if not isinstance(row, dict):
            raise UsageError(f"pairs: {path}: row {number} must be an object, got {short(row)}")
        # JSON has no header: a row without an image is reported as bad later
        image = row.get(image_column)
        name = image if isinstance(image, str) else "" if image is None else short(image)
        entry = entries.setdefault(name or f"\0{number}", TableEntry(number, name))
        captions = row.get(caption_column)
        if captions is not None:
            entry.captions += limited(captions if isinstance(captions, list) else [captions], 1)
        phrases = row.get("phrases") or []
        entry.phrases += limited(phrases if isinstance(phrases, list) else [phrases], 4)
    if not entries:
        raise UsageError(f"pairs: {path} lists no images")
    return list(entries.values())


def _rows(path: Path, columns: tuple[str, str]) -> Iterator[Any]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    read = {".json": _json_rows, ".jsonl": _jsonl_rows}.get(path.suffix, _separated_rows)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from read(file, columns)
    except (ValueError, csv.Error) as error:
        raise UsageError(f"pairs: {path} cannot be read: {error}") from error


def _json_rows(file: TextIO, columns: tuple[str, str]) -> Iterator[Any]:
    rows = parse_json(file.read())
    if not isinstance(rows, list):
        raise ValueError(f"expected a list of objects, got {type(rows).__name__}")
    yield from rows


def _jsonl_rows(file: TextIO, columns: tuple[str, str]) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _separated_rows(file: TextIO, columns: tuple[str, str]) -> Iterator[dict[str, str]]:
    """Every row has the fields of the header. In a .tsv a quote is a letter like any other."""
    tabs = file.name.endswith(".tsv")
    format = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    lines = csv.reader(file, **format)
    header, rows, several, quoted = None, 0, [], []
    while True:
        first = lines.line_num + 1
        where = f"row {rows + 1}, line {first}" if header else f"line {first}"
        try:
            row = next(lines)
        except StopIteration:
            break
        except csv.Error as error:
            raise ValueError(f"{where}: {error}") from error
        if any("\0" in value for value in row):
            raise ValueError(f"{where} has a NUL, expected UTF-8 text")
        if not row:
            continue
        if header is None:
            header = row
            _check_columns(header, columns)
            continue
        if len(row) != len(header):
            quote = "" if tabs else "; quote texts that hold a comma"
            raise ValueError(f"{where} has {len(row)} fields, the header has {len(header)}{quote}")
        if lines.line_num > first:
            several.append(first)
            _check_quotes(row, header.index(columns[0]), len(header), f"{where} to {lines.line_num}")
        if tabs and any(value[:1] == value[-1:] == '"' for value in row):
            quoted.append(first)
        yield dict(zip(header, row, strict=True))
        rows += 1
    if header is None:
        _check_columns([], columns)
    for found, what in ((several, "quoted line breaks; is a quote not closed?"), (quoted, QUOTES)):
        if found:
            name = printable(file.name)
            logger.warning("%s: %d rows, the first in line %d, have %s", name, len(found), found[0], what)


def _check_quotes(row: list[str], image: int, fields: int, where: str) -> None:
    """Raises ValueError if a quoted field of several lines holds what looks like rows: a quote that was not closed."""
    inner = [line for value in row for line in value.splitlines()[1:]]
    for one in csv.reader(inner):
        if len(one) == fields and one[image].lower().rpartition(".")[2] in IMAGE_EXTENSIONS:
            raise ValueError(f"{where}: a quoted text holds the row {','.join(one)!r}: a quote is not closed")


def _parquet_rows(path: Path, columns: tuple[str, str]) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"pairs: {path}: reading parquet needs pyarrow (pip install pyarrow); or use a CSV or JSON table",
            name="pyarrow",
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, columns)
            if file.metadata.num_rows > _MAX_ROWS:
                raise ValueError(f"it has {file.metadata.num_rows} rows, the limit is {_MAX_ROWS}")
            wanted = [name for name in dict.fromkeys((*columns, "phrases")) if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise UsageError(f"pairs: {path} cannot be read: {error}") from error


def _check_columns(columns: Sequence[str], wanted: Iterable[str]) -> None:
    twice = [name for name in (*wanted, "phrases") if list(columns).count(name) > 1]
    if twice:
        raise ValueError(f"two columns are named {twice[0]!r}")
    if missing := [name for name in wanted if name not in columns]:
        raise ValueError(f"no column {missing[0]!r}; the columns are {', '.join(map(repr, columns))}")

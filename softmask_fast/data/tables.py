"""Tables of images and captions: text, JSON, Parquet and Arrow. Nothing is left out silently."""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from softmask_fast.data.columnar import COLUMNAR, Choose, Stored, columnar_rows, read_stored
from softmask_fast.data.layouts import layout_rows
from softmask_fast.data.parsing import limited
from softmask_fast.data.shards import IMAGE_EXTENSIONS
from softmask_fast.data.types import BadSample
from softmask_fast.errors import UsageError, printable, short
from softmask_fast.utils import check_size, parse_json

logger = logging.getLogger(__name__)

TABLE_FORMATS = (".csv", ".tsv", ".json", ".jsonl", *COLUMNAR)
QUOTES = "texts in quotes, which a .tsv takes literally; to quote texts, use a .csv"
# Names of columns in lower case. The first one always wins; of the others there must be only one.
IMAGE_NAMES = """image file_name filename filepath file_path image_path image_name image_file img img_path path file
                 picture""".split()
CAPTION_NAMES = "caption captions text title sentence sentences description comment prompt raw alt_text".split()
_NUMBERED = re.compile(r"(caption|sentence|text|raw)_?\d+")
_PEEKED = 1000  # rows of JSON whose keys are taken as the columns
_COMPARED = 20  # images that are read to find out whether equal names mean equal images


@dataclass
class TableEntry:
    """An image of the table with the captions of all its rows, unchecked."""

    row: int  # of its first mention, counted from 1 without the header
    image: str  # its path; for a stored one its name, or "row N"
    captions: list[Any] = field(default_factory=list)
    phrases: list[Any] = field(default_factory=list)
    stored: Stored | None = None


@dataclass
class Table:
    """The images in the order of their first mention, and the columns they were read from."""

    entries: list[TableEntry]
    image_column: str
    caption_column: str  # several are separated by commas
    splits: Counter[str] = field(default_factory=Counter)  # rows of each, read or not


def read_tables(
    files: Sequence[tuple[Path, str | None]], image_column: str | None = None, caption_column: str | None = None, *,
    join: Callable[[Path], bool] = lambda path: True, option: str = "pairs",
) -> list[Table]:  # fmt: skip
    """Reads tables. A caption may be a string or a list of strings.

    Args:
        files: Paths, in one of `TABLE_FORMATS`, each with the value of "split" in the rows to read; several are
            separated by +. A table with several splits needs it.
        image_column: Name of a column; None: guessed from `IMAGE_NAMES`, and logged.
        caption_column: Names of one or several columns, separated by commas; None: guessed from `CAPTION_NAMES`.
        join: Whether rows of the same image in this file become one entry.
        option: The option that the paths came from, for messages.

    Returns:
        A table for each file. If other files have the split, one without a row of it is logged, and has no entries.

    Raises:
        UsageError: If a table cannot be read, or lacks a column, or if no table has a split.
    """
    tables = []
    for path, split in files:
        tables.append(_read(path, split, _Columns(path, image_column, caption_column), join(path), option))
    for split in dict.fromkeys(split for _, split in files if split):
        asked = [(path, table) for (path, own), table in zip(files, tables, strict=True) if own == split]
        splits = sum((table.splits for _, table in asked), Counter())
        if unknown := [name for name in split.split("+") if name not in splits]:
            more = f" and {len(asked) - 1} more tables" if len(asked) > 1 else ""
            has = f"{'they have' if more else 'it has'} {_counted(splits) or 'no splits'}"
            raise UsageError(f"{option}: {asked[0][0]}{more}: no split {unknown[0]!r}; {has}")
        if without := [str(path) for path, table in asked if not table.entries]:
            some = ", ".join(without[:10]) + " ..." * (len(without) > 10)
            lacking = f"split {split}: {len(without)} of {len(asked)} tables have no row of it: {some}"
            logger.warning("%s", printable(lacking))
    return tables


def _read(path: Path, split: str | None, columns: _Columns, join: bool, option: str) -> Table:
    if path.suffix not in TABLE_FORMATS:
        raise UsageError(f"{option}: expected a table ({', '.join(TABLE_FORMATS)}), got {path}")
    if path.suffix not in COLUMNAR:  # those are not read into memory as a whole
        check_size(path, option)
    wanted, splits, found = split.split("+") if split else [], Counter(), {}
    try:
        for number, row in enumerate(_rows(path, columns.choose), 1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} must be an object, got {short(row)}")
            own_split = row.get("split")
            if isinstance(own_split, str | int):
                splits[str(own_split)] += 1
            if not wanted or str(own_split) in wanted:
                _add_row(found, number, row, columns, join)
    except (ValueError, csv.Error) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{option}: {path} cannot be read: {error}") from error
    if not wanted and len(splits) > 1:
        one = f"name one after a colon, as in {path}:{next(iter(splits))}"
        raise UsageError(f"{option}: {path} has the splits {_counted(splits)}: {one}")
    if not wanted and not found:
        raise UsageError(f"{option}: {path} lists no images")
    entries = _joined_images(list(found.values())) if join else list(found.values())
    return Table(entries, columns.image, ",".join(columns.captions), splits)


def _add_row(found: dict[str, TableEntry], number: int, row: dict[str, Any], columns: _Columns, join: bool) -> None:
    # JSON has no header: a row without an image is reported as bad later
    image, stored = row.get(columns.image), None
    if isinstance(image, Stored):
        stored, image = image, image.name or f"row {number}"
    name = image if isinstance(image, str) else "" if image is None else short(image)
    alone = f"\0{number}"
    entry = found.setdefault(name if name and join and not stored else alone, TableEntry(number, name, stored=stored))
    for column in columns.captions:
        if (captions := row.get(column)) is not None:
            entry.captions += limited(captions if isinstance(captions, list) else [captions], 1)
    phrases = row.get("phrases") or []
    entry.phrases += limited(phrases if isinstance(phrases, list) else [phrases], 4)


def _counted(splits: Counter[str]) -> str:
    return ", ".join(f"{name} ({count:,} rows)" for name, count in splits.most_common(10))


def _joined_images(entries: list[TableEntry]) -> list[TableEntry]:
    """Joins the entries of stored images that share a name, if a sample of them shows that they are equal images."""
    named: dict[str, list[TableEntry]] = {}
    for entry in entries:
        if entry.stored is not None and entry.stored.name:
            named.setdefault(entry.stored.name, []).append(entry)
    several = [same for same in named.values() if len(same) > 1]
    try:
        for first, second, *_ in several[:: -(-len(several) // _COMPARED) or 1]:
            if read_stored(first.stored) != read_stored(second.stored):
                return entries
    except BadSample:
        return entries
    dropped = set()
    for first, *others in several:
        for other in others:
            first.captions += other.captions
            first.phrases += other.phrases
            dropped.add(id(other))
    return [entry for entry in entries if id(entry) not in dropped]


class _Columns:
    """The columns of a table: those that the user named, or else those guessed from their names."""

    def __init__(self, path: Path, image: str | None, caption: str | None) -> None:
        self.path, self.image, self.captions = path, image or "", caption.split(",") if caption else []
        self.named = bool(image), bool(caption)

    def choose(self, names: Sequence[str], holding: Sequence[str] = ()) -> tuple[str, list[str]]:
        """Names of the image column and the caption columns. Raises ValueError if one is missing or ambiguous.

        Args:
            names: Of all columns.
            holding: Of those that hold image files.
        """
        if not self.named[0]:
            known = any(name.strip().lower() in IMAGE_NAMES for name in names if name not in holding)
            alone = len(holding) == 1 and not known  # with a column of paths, the binary one may be a digest
            self.image = holding[0] if alone else self._guess(names, IMAGE_NAMES, "image")[0]
        if not self.named[1]:
            self.captions = self._guess(names, CAPTION_NAMES, "caption")
        wanted = self.image, *self.captions
        twice = [name for name in (*wanted, "phrases", "split") if list(names).count(name) > 1]
        if twice:
            raise ValueError(f"two columns are named {twice[0]!r}")
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(f"no column {missing[0]!r}; the columns are {_listed(names)}")
        if self.image in self.captions:
            raise ValueError(f"caption_column: expected another column than image_column, got {self.image!r}")
        if (self.image, self.captions) != ("image", ["caption"]) and not all(self.named):
            what = f"images from column {self.image!r}, captions from {_listed(self.captions)}"
            logger.info("%s", printable(f"{self.path}: {what}"))
        return self.image, self.captions

    def _guess(self, names: Sequence[str], known: Sequence[str], kind: str) -> list[str]:
        if known[0] in names:
            return [known[0]]
        found = list(dict.fromkeys(name for name in names if name.strip().lower() in known))
        if kind == "caption" and not found:
            found = [name for name in names if _NUMBERED.fullmatch(name.strip().lower())]
        elif len(found) > 1:
            raise ValueError(f"columns {_listed(found)} may all hold the {kind}: name one, see --{kind}_column")
        if not found:
            raise ValueError(f"no column {known[0]!r}; the columns are {_listed(names)}: see --{kind}_column")
        return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _rows(path: Path, choose: Choose) -> Iterator[Any]:
    if path.suffix in COLUMNAR:
        yield from columnar_rows(path, choose)
        return
    read = {".json": _json_rows, ".jsonl": _jsonl_rows}.get(path.suffix, _separated_rows)
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from read(file, choose)


def _json_rows(file: TextIO, choose: Choose) -> Iterator[Any]:
    content = parse_json(file.read())
    return _object_rows(iter(content if isinstance(content, list) else layout_rows(content)), choose)


def _jsonl_rows(file: TextIO, choose: Choose) -> Iterator[Any]:
    return _object_rows(_lines_of_json(file), choose)


def _object_rows(rows: Iterator[Any], choose: Choose) -> Iterator[Any]:
    """The rows. The keys of the first ones are taken as columns."""
    first = list(islice(rows, _PEEKED))
    if objects := [row for row in first if isinstance(row, dict)]:
        choose(list(dict.fromkeys(name for row in objects for name in row)), ())
    return chain(first, rows)


def _lines_of_json(file: TextIO) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _separated_rows(file: TextIO, choose: Choose) -> Iterator[dict[str, str]]:
    """The rows of a .csv or .tsv, each with the fields of the header. In a .tsv quotes are ordinary characters."""
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
            image, _ = choose(header, ())
            continue
        if len(row) != len(header):
            quote = "" if tabs else "; quote texts that hold a comma"
            raise ValueError(f"{where} has {len(row)} fields, the header has {len(header)}{quote}")
        if lines.line_num > first:
            several.append(first)
            _check_quotes(row, header.index(image), len(header), f"{where} to {lines.line_num}")
        if tabs and any(value[:1] == value[-1:] == '"' for value in row):
            quoted.append(first)
        yield dict(zip(header, row, strict=True))
        rows += 1
    if header is None:
        choose([], ())
    for found, what in ((several, "quoted line breaks; is a quote not closed?"), (quoted, QUOTES)):
        if found:
            name = printable(file.name)
            logger.warning("%s: %d rows, the first in line %d, have %s", name, len(found), found[0], what)


def _check_quotes(row: list[str], image: int, fields: int, where: str) -> None:
    """Raises ValueError if a quoted field holds lines that look like rows, because a quote was not closed."""
    inner = [line for value in row for line in value.splitlines()[1:]]
    for one in csv.reader(inner):
        if len(one) == fields and one[image].lower().rpartition(".")[2] in IMAGE_EXTENSIONS:
            raise ValueError(f"{where}: a quoted text holds the row {','.join(one)!r}: a quote is not closed")

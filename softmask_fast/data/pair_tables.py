"""Tables of image-caption pairs (CSV, TSV, JSON, JSON lines, parquet) as one entry per image."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass
class Entry:
    """An image as it is listed, with the captions of all its rows; nothing is checked yet."""

    row: int  # of its first mention, from 1, a header not counted
    image: str
    captions: list[Any] = field(default_factory=list)
    phrases: list[Any] = field(default_factory=list)


def read_table(path: Path, image_column: str, caption_column: str) -> list[Entry]:
    """The images in the order of their first mention. A caption may be a text or a list of texts.

    Raises ValueError when the table cannot be read or has not these columns, ModuleNotFoundError for parquet without
    pyarrow.
    """
    if path.suffix not in KINDS:
        raise ValueError(f"pairs: expected a table ({', '.join(KINDS)}), got {path}")
    entries: dict[str, Entry] = {}
    for number, row in enumerate(_rows(path, (image_column, caption_column)), 1):
        if not isinstance(row, dict):
            raise ValueError(f"pairs: {path}: row {number} must be an object, got {str(row)[:60]!r}")
        # JSON and JSON lines have no header: a row without an image is listed as bad later
        image = row.get(image_column)
        name = image if isinstance(image, str) else "" if image is None else str(image)[:200]
        entry = entries.setdefault(name or f"\0{number}", Entry(number, name))
        captions = row.get(caption_column)
        entry.captions += captions if isinstance(captions, list) else [] if captions is None else [captions]
        phrases = row.get("phrases") or []
        entry.phrases += phrases if isinstance(phrases, list) else [phrases]
    if not entries:
        raise ValueError(f"pairs: {path} lists no images")
    return list(entries.values())


def _rows(path: Path, columns: tuple[str, str]) -> Iterator[Any]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".json":
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise ValueError(f"expected a list of objects, got {type(rows).__name__}")
                yield from rows
            elif path.suffix == ".jsonl":
                for line in file:
                    if line.strip():
                        yield json.loads(line)
            else:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
                _check_columns(reader.fieldnames or [], columns)
                yield from reader
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"pairs: {path} cannot be read: {error}") from error


def _parquet_rows(path: Path, columns: tuple[str, str]) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"pairs: {path}: reading parquet needs pyarrow (pip install pyarrow); or give a CSV or JSON table",
            name="pyarrow",
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, columns)
            wanted = [name for name in dict.fromkeys((*columns, "phrases")) if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise ValueError(f"pairs: {path} cannot be read: {error}") from error


def _check_columns(there: Iterable[str], wanted: Iterable[str]) -> None:
    if missing := [name for name in wanted if name not in there]:
        raise ValueError(f"no column {missing[0]!r}; there are {', '.join(map(repr, there))}")

"""Makes checked WebDataset shards of a folder of images and a table of captions; writes indexes of shards."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from tqdm import tqdm

from softmask_fast.data.images import check_image, convert_image
from softmask_fast.data.remote.download import file_sha256
from softmask_fast.data.shards import SUFFIX, write_index
from softmask_fast.data.sources import expand_names, expand_paths
from softmask_fast.data.types import BadSample, parse_phrases, usable_captions

JPEG_QUALITY = 95  # of images that are made smaller; the others keep their bytes
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Plan:
    """What decides the shards; a run that was interrupted goes on only with the same plan."""

    pairs_sha256: str
    images: str  # absolute folder
    shard_size: int  # images that are listed for a shard; the bad ones among them leave it smaller
    short_side: int | None  # pixels
    image_column: str
    caption_column: str


@dataclass
class Prepared:
    """What came of it."""

    listed: int  # images
    samples: int
    shards: int
    skipped_captions: int  # without a word, beside good ones
    bad: list[tuple[int, str, str]]  # row, image, reason


def prepare(
    pairs: Path,
    images: Path,
    out: Path,
    *,
    shard_size: int = 5000,
    short_side: int | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    workers: int | None = None,
    progress: bool = False,
) -> Prepared:
    """Decodes every listed image and writes the good ones to out/shard-000000.tar, ... with an index beside each.

    Rows of one image become one sample with several captions. Bad images and captions are listed in out/bad.csv, the
    figures in out/prepared.json, which is written last. The shards are a function of the arguments alone (not of
    `workers`, default: all cores). A run that was interrupted goes on when it is called again.
    Raises ValueError or OSError for what the caller can put right, before anything is written.
    """
    for name, value, least in (("shard_size", shard_size, 1), ("short_side", short_side, 16), ("workers", workers, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not images.is_dir():
        raise ValueError(f"images: expected a folder, {images} is none")
    if image_column == caption_column:
        raise ValueError(f"caption_column: expected another column than image_column, got {caption_column!r}")
    entries = read_table(pairs, image_column, caption_column)
    plan = Plan(file_sha256(pairs), os.path.abspath(images), shard_size, short_side, image_column, caption_column)
    work = _start(out, plan)
    try:
        with FileLock(work / "lock").acquire(blocking=False):
            done = list(_make_shards(entries, plan, out, work, workers, progress))
            report = Prepared(
                listed=len(entries),
                samples=sum(part["samples"] for part in done),
                shards=sum(part["samples"] > 0 for part in done),
                skipped_captions=sum(part["skipped_captions"] for part in done),
                bad=[tuple(row) for part in done for row in part["bad"]],
            )
            with _written(out / "bad.csv") as file:
                csv.writer(file, lineterminator="\n").writerows([("row", "image", "reason"), *report.bad])
            figures = asdict(report) | {"bad": len(report.bad), "plan": asdict(plan)}
            with _written(out / "prepared.json") as file:
                file.write(json.dumps(figures, indent=2) + "\n")
    except Timeout:
        raise ValueError(f"out: another process is preparing {out}") from None
    shutil.rmtree(work)
    return report


def write_indexes(data: str | Sequence[str], progress: bool = False) -> int:
    """Writes `<shard>.index.jsonl` beside local shards; returns how many. Raises ValueError for what is no shard."""
    paths = expand_paths(expand_names(data))
    if wrong := [path for path in paths if path.suffix != ".tar"]:
        raise ValueError(f"shards: expected .tar files, got {wrong[0]}")
    for path in tqdm(paths, unit="shard", disable=not progress):
        write_index(path, path.with_name(path.name + SUFFIX))
    return len(paths)


def _start(out: Path, plan: Plan) -> Path:
    """The folder of what is done so far, new or that of the run to go on with."""
    work = out / "unfinished"
    if (out / "prepared.json").exists():
        raise ValueError(f"out: {out} is prepared already; choose another folder, or remove this one")
    if (work / "plan.json").exists():
        begun = json.loads((work / "plan.json").read_text())
        for name, value in asdict(plan).items():
            if begun[name] != value:
                raise ValueError(f"out: {out} was begun with {name} {begun[name]!r}, now it is {value!r}")
        return work
    if out.exists() and any(path != work for path in out.iterdir()):
        raise ValueError(f"out: expected a new or empty folder, {out} holds files")
    work.mkdir(parents=True, exist_ok=True)
    with _written(work / "plan.json") as file:
        file.write(json.dumps(asdict(plan), indent=2) + "\n")
    return work


def _make_shards(
    entries: list[Entry], plan: Plan, out: Path, work: Path, workers: int | None, progress: bool
) -> Iterator[dict[str, Any]]:
    """What is known of every shard, in order; made in several processes."""
    parts = [entries[first : first + plan.shard_size] for first in range(0, len(entries), plan.shard_size)]
    workers = min(workers or len(os.sched_getaffinity(0)), len(parts))
    arguments = range(len(parts)), parts, repeat(plan), repeat(out), repeat(work)
    with tqdm(total=len(entries), unit="image", disable=not progress) as bar:
        if workers == 1:
            for number, part in enumerate(map(_make_shard, *arguments)):
                bar.update(len(parts[number]))
                yield part
            return
        # spawn: a fork would copy the locks of other threads
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for number, part in enumerate(pool.map(_make_shard, *arguments)):
                bar.update(len(parts[number]))
                yield part


def _make_shard(number: int, entries: list[Entry], plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Writes one shard and its index, unless an earlier run has; its note in `work` comes last."""
    shard, note = out / f"shard-{number:06d}.tar", work / f"shard-{number:06d}.json"
    if note.exists():
        return json.loads(note.read_text())
    partial = work / shard.name
    bad: list[tuple[int, str, str]] = []
    samples = skipped_captions = 0
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for place, entry in enumerate(entries, number * plan.shard_size):
            try:
                extension, image, text, skipped = _sample(entry, plan)
            except BadSample as error:
                bad.append((entry.row, entry.image, str(error)))
                continue
            for name, content in ((f"{place:09d}.{extension}", image), (f"{place:09d}.json", text)):
                member = tarfile.TarInfo(name)  # no times, no owners: the same input gives the same bytes
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            samples += 1
            skipped_captions += skipped
    if samples:
        os.replace(partial, shard)
        write_index(shard, shard.with_name(shard.name + SUFFIX))
    else:
        partial.unlink()
    result = {"samples": samples, "skipped_captions": skipped_captions, "bad": bad}
    with _written(note) as file:
        file.write(json.dumps(result))
    return result


def _sample(entry: Entry, plan: Plan) -> tuple[str, bytes, bytes, int]:
    """Extension, image and JSON of a sample, and how many captions were left out. Raises BadSample."""
    if not entry.image:
        raise BadSample(f"no image in column {plan.image_column!r}")
    captions, skipped = usable_captions(entry.captions, f"column {plan.caption_column!r}")
    parse_phrases(entry.phrases)
    path = os.path.normpath(os.path.join(plan.images, entry.image))
    if not path.startswith(os.path.join(plan.images, "")):  # a table from elsewhere may name any file
        raise BadSample(f"image lies outside of {plan.images}")
    try:
        if not os.path.isfile(path):
            raise BadSample("image is not there")
        image = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise BadSample(f"image cannot be read: {error}") from error
    facts = check_image(image)
    if plan.short_side is not None and min(facts.width, facts.height) > plan.short_side:
        extension, image = "jpg", _smaller(convert_image(image) if facts.convert else image, plan.short_side)
    else:
        with Image.open(io.BytesIO(image)) as picture:
            extension = _EXTENSIONS[picture.format]
    text = {"captions": captions, "image": entry.image} | ({"phrases": entry.phrases} if entry.phrases else {})
    return extension, image, json.dumps(text).encode("ascii"), skipped


def _smaller(image: bytes, short_side: int) -> bytes:
    """The upright image as a JPEG with this short side."""
    with Image.open(io.BytesIO(image)) as picture:
        upright = ImageOps.exif_transpose(picture)
    scale = short_side / min(upright.size)
    resized = upright.resize([max(1, round(side * scale)) for side in upright.size], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


@contextmanager
def _written(path: Path) -> Iterator[TextIO]:
    """A text file that appears whole, or not at all."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        yield file
    os.replace(temporary, path)


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

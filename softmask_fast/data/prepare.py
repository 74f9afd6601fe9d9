"""Turns tables of captions and their images into checked WebDataset shards; indexes existing shards."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import repeat
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from tqdm import tqdm

from softmask_fast.data.columnar import read_stored
from softmask_fast.data.folders import check_existence
from softmask_fast.data.images import check_image, convert_image, read_image
from softmask_fast.data.parsing import parse_phrases, usable_captions
from softmask_fast.data.shards import INDEX_SUFFIX, write_index
from softmask_fast.data.sources import expand_files, expand_names, expand_paths
from softmask_fast.data.tables import TableEntry, read_tables
from softmask_fast.data.types import BadSample
from softmask_fast.errors import UsageError, printable
from softmask_fast.utils import file_sha256, flush, move, naming, read_json, write_json, write_text

JPEG_QUALITY = 95  # of downsized images; the others keep their bytes
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif"}


@dataclass(frozen=True)
class Plan:
    """What determines the shards. An interrupted run can only be continued with the same plan."""

    pairs_sha256: str  # of the table; of the tables' digests if there are several
    split: str | None
    images: str  # absolute folder
    shard_size: int  # listed images per shard; bad ones make a shard smaller
    short_side: int | None  # pixels
    image_column: str
    caption_column: str


@dataclass
class ShardsReport:
    """What `make_shards` wrote and dropped."""

    listed: int  # images in the table
    samples: int
    shards: int
    skipped_captions: int  # without a letter or digit, of images that have others
    bad: list[tuple[int, str, str]]  # row, image, reason


def make_shards(
    pairs: str | Path, images: Path | None, out: Path, *, shard_size: int = 5000, short_side: int | None = None,
    image_column: str | None = None, caption_column: str | None = None, workers: int | None = None,
    progress: bool = False,
) -> ShardsReport:  # fmt: skip
    """Decodes every listed image and writes the good ones to out/shard-000000.tar, ..., each with an index.

    Rows of the same image become one sample with several captions. out/bad.csv lists the bad images. out/prepared.json
    holds the counts and is written last. The same input gives the same bytes. Calling it again continues an interrupted
    run.

    Args:
        pairs: The table, in one of `tables.TABLE_FORMATS`, a folder of Hugging Face's `datasets`, or a pattern of
            tables; each also with a split, as in "dataset_coco.json:val".
        images: Folder of the image paths in the table; default: that of the table.
        out: Folder of the shards, new or empty.
        shard_size: Listed images per shard.
        short_side: In pixels. Images whose short side is longer become JPEGs of that size.
        image_column, caption_column: Names in the table; default: guessed, see `read_tables`.
        workers: Number of processes; default: all cores.
        progress: Show a progress bar.

    Raises:
        UsageError: If an argument, the table or a folder is wrong. Nothing has been written then.
    """
    for name, value, least in (("shard_size", shard_size, 1), ("short_side", short_side, 16), ("workers", workers, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name}: expected at least {least}, got {value}")
    if images is not None and not images.is_dir():
        raise UsageError(f"images: expected a folder, got {images}")
    files = expand_files([str(pairs)], "pairs")
    tables = read_tables(files, image_column, caption_column)
    columns = {(table.image_column, table.caption_column) for table in tables if table.entries}
    if len(columns) > 1:
        raise UsageError(f"pairs: expected tables with the same columns, got {' and '.join(map(str, sorted(columns)))}")
    parents = [os.path.abspath(images or path.parent) for path, _ in files]
    root = os.path.commonpath(parents)
    for parent, table in zip(parents, tables, strict=True):
        for one in table.entries if parent != root else ():
            if one.stored is None and one.image:
                one.image = _below(root, parent, one.image)
    entries = [entry for table in tables for entry in table.entries]
    for (path, _), table in zip(files, tables, strict=True):
        listed = [os.path.join(root, one.image) if one.image else "" for one in table.entries if one.stored is None]
        check_existence(listed, 1.0, f"pairs: {path}", "--images")
    digests = [file_sha256(path) for path, _ in files]
    digest = digests[0] if len(digests) == 1 else sha256("".join(digests).encode()).hexdigest()
    plan = Plan(digest, files[0][1], root, shard_size, short_side, *columns.pop())
    work = _start(out, plan)
    try:
        with FileLock(work / "lock").acquire(blocking=False):
            shards = list(_write_shards(entries, plan, out, work, workers, progress))
            report = ShardsReport(
                listed=len(entries),
                samples=sum(shard["samples"] for shard in shards),
                shards=sum(shard["samples"] > 0 for shard in shards),
                skipped_captions=sum(shard["skipped_captions"] for shard in shards),
                bad=[tuple(row) for shard in shards for row in shard["bad"]],
            )
            table = io.StringIO()
            csv.writer(table, lineterminator="\n").writerows([("row", "image", "reason"), *report.bad])
            write_text(out / "bad.csv", table.getvalue())
            write_json(out / "prepared.json", asdict(report) | {"bad": len(report.bad), "plan": asdict(plan)})
    except Timeout:
        raise UsageError(f"out: another process is preparing {out}") from None
    shutil.rmtree(work)
    return report


def write_indexes(data: str | Sequence[str], progress: bool = False) -> int:
    """Writes `<shard>.index.jsonl` next to each local shard and returns how many. Raises UsageError for damaged
    ones."""
    paths = expand_paths(expand_names(data))
    if wrong := [path for path in paths if path.suffix != ".tar"]:
        raise UsageError(f"shards: expected .tar files, got {wrong[0]}")
    for path in tqdm(paths, unit="shard", disable=not progress):
        write_index(path, path.with_name(path.name + INDEX_SUFFIX))
    return len(paths)


def _start(out: Path, plan: Plan) -> Path:
    """The folder of unfinished work: a new one, or that of the run to continue."""
    work = out / "unfinished"
    if (out / "prepared.json").exists():
        raise UsageError(f"out: {out} is already complete; choose another folder, or remove this one")
    if (work / "plan.json").exists():
        begun = read_json(work / "plan.json", "out")
        for name, value in asdict(plan).items():
            started = begun.get(name) if isinstance(begun, dict) else None
            if started != value:
                raise UsageError(f"out: {out} was started with {name} {started!r}, got {value!r}")
        return work
    if out.exists() and any(path != work for path in out.iterdir()):
        raise UsageError(f"out: expected a new or empty folder, {out} holds files")
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "plan.json", asdict(plan))
    return work


def _write_shards(
    entries: list[TableEntry], plan: Plan, out: Path, work: Path, workers: int | None, progress: bool
) -> Iterator[dict[str, Any]]:
    """Writes all shards in several processes; yields the summary of each, in order."""
    parts = [entries[first : first + plan.shard_size] for first in range(0, len(entries), plan.shard_size)]
    workers = min(workers or len(os.sched_getaffinity(0)), len(parts))
    arguments = range(len(parts)), parts, repeat(plan), repeat(out), repeat(work)
    with tqdm(total=len(entries), unit="image", disable=not progress) as bar, ExitStack() as stack:
        run = map
        if workers > 1:  # spawn: a fork would copy the locks of other threads
            run = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))).map
        try:
            for part, summary in zip(parts, run(_write_shard, *arguments), strict=True):
                bar.update(len(part))
                yield summary
        except BrokenProcessPool as error:
            message = "workers: a process was killed; run the same command again, with fewer if memory is short"
            raise UsageError(message) from error


def _write_shard(number: int, entries: list[TableEntry], plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Writes one shard and its index, then its summary in `work`. Skips what an earlier run finished."""
    shard, done = out / f"shard-{number:06d}.tar", work / f"shard-{number:06d}.json"
    if done.exists():
        return read_json(done, "out")
    partial = work / shard.name
    bad: list[tuple[int, str, str]] = []
    samples = skipped_captions = 0
    with naming(shard), tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, entry in enumerate(entries, number * plan.shard_size):
            try:
                extension, image, text, skipped = _sample(entry, plan)
            except BadSample as error:
                bad.append((entry.row, printable(entry.image), str(error)))
                continue
            for name, content in ((f"{index:09d}.{extension}", image), (f"{index:09d}.json", text)):
                member = tarfile.TarInfo(name)  # without times and owners: the same input gives the same bytes
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            samples += 1
            skipped_captions += skipped
    if samples:
        flush(partial)
        move(partial, shard)
        write_index(shard, shard.with_name(shard.name + INDEX_SUFFIX))
    else:
        partial.unlink()
    summary = {"samples": samples, "skipped_captions": skipped_captions, "bad": bad}
    write_text(done, json.dumps(summary))
    return summary


def _sample(entry: TableEntry, plan: Plan) -> tuple[str, bytes, bytes, int]:
    """Extension, image and JSON of a sample, and the number of dropped captions. Raises BadSample."""
    if not entry.image:
        raise BadSample(f"no image in column {plan.image_column!r}")
    captions, skipped = usable_captions(entry.captions, f"column {plan.caption_column!r}")
    parse_phrases(entry.phrases)
    image = _inner_image(entry.image, plan.images) if entry.stored is None else read_stored(entry.stored)
    facts = check_image(image)
    if plan.short_side is not None and min(facts.width, facts.height) > plan.short_side:
        extension, image = "jpg", _downsize(convert_image(image) if facts.convert else image, plan.short_side)
    else:
        with Image.open(io.BytesIO(image)) as picture:
            extension = _EXTENSIONS[picture.format]
    text = {"captions": captions, "image": entry.image} | ({"phrases": entry.phrases} if entry.phrases else {})
    return extension, image, json.dumps(text).encode("ascii"), skipped


def _below(root: str, parent: str, image: str) -> str:
    """The path from `root` to an image of the folder `parent`. One that leads out of `parent` also leads out of
    `root`."""
    path = os.path.normpath(os.path.join(parent, image))
    return os.path.relpath(path, root) if path.startswith(os.path.join(parent, "")) else os.path.join(os.pardir, image)


def _inner_image(name: str, folder: str) -> bytes:
    path = os.path.normpath(os.path.join(folder, name))
    if not path.startswith(os.path.join(folder, "")):  # the table is not trusted
        raise BadSample(f"image lies outside of {folder}")
    if not os.path.isfile(path):
        raise BadSample("image does not exist")
    return read_image(path)


def _downsize(image: bytes, short_side: int) -> bytes:
    """The upright image as a JPEG whose short side has `short_side` pixels."""
    with Image.open(io.BytesIO(image)) as picture:
        upright = ImageOps.exif_transpose(picture)
    scale = short_side / min(upright.size)
    resized = upright.resize([max(1, round(side * scale)) for side in upright.size], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()

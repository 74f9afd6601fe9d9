"""What folders hold: shards, or what Hugging Face's `datasets` reads. Also checks that the images of tables exist."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from softmask_fast.errors import UsageError, printable, short
from softmask_fast.utils import read_json

logger = logging.getLogger(__name__)

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an imagefolder
TRIED = 32  # images of a table, evenly spread, that decide between several folders
LOOKED_FOR = 10_000  # images of a table, evenly spread, whose existence is checked; 0.02 s on a local disk
_SPLIT = re.compile(r"train(ing)?|val(id|idation)?|dev|test(ing)?|eval", re.IGNORECASE)  # usual names of files
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})(-\w+)?")  # of a split: train-00000-of-00002.parquet


def folder_files(folder: Path, split: str | None = None, option: str = "data") -> list[Path]:
    """The files of a folder in a fixed order: its shards; the table of an imagefolder; what `save_to_disk` wrote; or
    parquet files, in the folder itself or in its subfolder data.

    Args:
        folder: To look into.
        split: The part to take; None: there must be only one.
        option: The option that the folder came from, for messages.

    Raises:
        UsageError: If there is nothing to read, or if there are several splits and none was named.
    """
    if split is not None and (folder / split).is_dir():
        return folder_files(folder / split, option=option)
    if split is None and (shards := sorted(folder.glob("*.tar"))):
        return shards
    if (folder / "dataset_dict.json").is_file():
        listed = read_json(folder / "dataset_dict.json", option)
        splits = listed.get("splits") if isinstance(listed, dict) else None
        raise _several(folder, splits if isinstance(splits, list) else [], split, option)
    if split is None and (folder / "state.json").is_file():
        return _saved_files(folder, option)
    if tables := [folder / name for name in METADATA if (folder / name).is_file()]:
        if len(tables) == 1 and split is None:
            return tables
        given = f"split {split!r}" if split else "one table"
        raise UsageError(f"{option}: {folder}: expected {given}, got {', '.join(table.name for table in tables)}")
    if inner := [path.name for path in sorted(folder.iterdir()) if any((path / name).is_file() for name in METADATA)]:
        raise _several(folder, inner, split, option)
    parts: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet")):
        named = _PART.fullmatch(file.stem)
        alone = file.stem if split or _SPLIT.fullmatch(file.stem) else ""
        parts.setdefault(named[1] if named else alone, []).append(file)
    if not parts:
        expected = f"{', '.join(METADATA)}, a dataset of save_to_disk, or parquet files"
        raise UsageError(
            f"{option}: no .tar files in {folder}, nor {expected}" + (f", of split {split}" if split else "")
        )
    if split is None and len(parts) == 1:
        split = next(iter(parts))
    if split in parts:
        named = _PART.fullmatch(parts[split][0].stem)
        if named and len(parts[split]) != int(named[2]):
            raise UsageError(f"{option}: {folder}: expected {int(named[2])} parts of {split}, got {len(parts[split])}")
        return parts[split]
    raise _several(folder, list(parts), split, option)


def _several(folder: Path, splits: list[str], split: str | None, option: str) -> UsageError:
    if split is None:
        named = ", ".join(map(str, splits[:10]))
        example = f"{folder}:{splits[0]}" if splits else f"{folder}:train"
        return UsageError(f"{option}: {folder} has the splits {named}: name one after a colon, as in {example}")
    return UsageError(f"{option}: {folder} has no split {split!r}; it has {', '.join(map(str, splits[:10]))}")


def _saved_files(folder: Path, option: str) -> list[Path]:
    """The Arrow files of a dataset that `save_to_disk` wrote."""
    state = read_json(folder / "state.json", option)
    files = state.get("_data_files") if isinstance(state, dict) else None
    names = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if not names or not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise UsageError(f'{option}: {folder}/state.json: "_data_files": expected names of files, got {short(files)}')
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise UsageError(f"{option}: {folder}/state.json names {short(missing[0])}, which is not a file")
    return [folder / name for name in names]


def image_folder(roots: str | None, images: Sequence[str]) -> str | None:
    """The folder that holds a table's images.

    Args:
        roots: Folders, separated by commas.
        images: Paths of the table's images.

    Returns:
        The folder in which most of `TRIED` images exist, the first of equal ones.
    """
    folders = roots.split(",") if roots and not os.path.isdir(roots) else [roots]
    some = images[:: -(-len(images) // TRIED) or 1]
    return max(folders, key=lambda folder: sum(os.path.exists(os.path.join(folder or "", image)) for image in some))


def check_existence(images: Sequence[str], most: float, table: str, option: str) -> None:
    """Checks whether the images of a table exist, up to `LOOKED_FOR` of them, and logs how many are missing.

    Args:
        images: Paths of the images; "" for a row without one.
        most: Largest fraction that may be missing.
        table: Name of the table, for messages.
        option: The option that names the images' folder, for messages.

    Raises:
        UsageError: If all are missing, or more than `most`.
    """
    looked = images[:: -(-len(images) // LOOKED_FOR) or 1]
    missing = [image for image in looked if not os.path.exists(image)]
    if not missing:
        return
    some = "images" if len(looked) == len(images) else f"checked images, of {len(images):,} in all,"
    first = missing[0] or "a row without one"
    hint = "; images by URL are not downloaded: img2dataset makes shards of them" if "http" in first else ""
    message = f"{table}: {len(missing):,} of {len(looked):,} {some} do not exist, first: {first}, see {option}{hint}"
    if len(missing) == len(looked) or len(missing) > int(most * len(looked) + 1e-9):
        raise UsageError(message)
    logger.warning("%s", printable(message))

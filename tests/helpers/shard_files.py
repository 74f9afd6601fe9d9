"""Builds small WebDataset shards for tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from softmask_fast.data.synthetic import ShapesSource


def encode(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """Encodes (H, W, 3) uint8 pixels as an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def scene_files(number: int, image_size: int = 32) -> dict[str, bytes]:
    """The members of one good sample, by extension."""
    sample = ShapesSource(num=number + 1, image_size=image_size).read(number)
    return {"jpg": encode(sample.image), "json": json.dumps({"captions": sample.captions}).encode()}


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """Writes samples, name -> extension -> content, as a tar file."""
    return write_tar(
        path, [(f"{name}.{kind}", content) for name, files in samples.items() for kind, content in files.items()]
    )

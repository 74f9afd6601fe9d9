"""Masks of COCO's annotation files, as coverage of a map's patches: maps scored on shapes instead of boxes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from softmask_fast.data.images import MAX_PIXELS
from softmask_fast.errors import UsageError, short
from softmask_fast.evaluation.boxes import region_score
from softmask_fast.utils import read_json


@dataclass(frozen=True)
class ImageMasks:
    """The masks of one image, by the name of what they show; objects of one name together."""

    file_name: str
    masks: dict[str, np.ndarray]  # (H, W) bool


def read_coco_masks(path: str | Path) -> Iterator[ImageMasks]:
    """The images of an annotation file that have masks, in its order: polygons, and run lengths, compressed or not.

    Raises:
        UsageError: for any other file. The message names the annotation that is wrong.
    """
    content = read_json(path, "masks")
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        by_image: dict[Any, list[dict]] = {}
        for annotation in content["annotations"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        images = [(one["id"], one["file_name"], one["height"], one["width"]) for one in content["images"]]
    except (KeyError, TypeError) as error:
        raise UsageError(f"masks: {path} is not a COCO annotation file: {type(error).__name__} {error}") from error
    for number, file_name, height, width in images:
        if not (type(height) is type(width) is int and min(height, width) > 0 and height * width <= MAX_PIXELS):
            size = f"{short(height)} x {short(width)}"
            raise UsageError(f"masks: {path}: image {short(number)}: expected 1 to {MAX_PIXELS} pixels, got {size}")
        masks: dict[str, np.ndarray] = {}
        for annotation in by_image.get(number, []):
            try:
                mask, name = decode_mask(annotation["segmentation"], height, width), names[annotation["category_id"]]
            except (KeyError, TypeError, ValueError, IndexError) as error:
                which = short(annotation.get("id"))
                raise UsageError(f"masks: {path}: annotation {which} has no readable mask: {error!r}") from error
            masks[name] = masks[name] | mask if name in masks else mask
        if masks:
            yield ImageMasks(file_name, masks)


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A segmentation of COCO -> (height, width) bool: a list of polygons [x1, y1, x2, y2, ...], or run lengths down the
    columns, {"size": [height, width], "counts": numbers or COCO's compressed string}."""
    if isinstance(segmentation, list):
        canvas = Image.new("1", (width, height))
        for polygon in segmentation:
            ImageDraw.Draw(canvas).polygon(list(zip(polygon[::2], polygon[1::2], strict=True)), fill=1, outline=1)
        return np.array(canvas)
    counts, size = segmentation["counts"], segmentation["size"]
    lengths = _uncompressed(counts) if isinstance(counts, str | bytes) else counts
    if list(size) != [height, width] or sum(lengths) != height * width:
        raise ValueError(f"expected run lengths of {height} x {width} pixels, got {sum(lengths)} of {size}")
    runs = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return runs.reshape(width, height).T


def _uncompressed(text: str | bytes) -> list[int]:
    """COCO's string of run lengths. Each character holds 5 bits, the lowest first, and a sixth that says that more
    follow. From the third length on, it stores the difference from the length two before."""
    lengths: list[int] = []
    value = shift = 0
    for character in text.encode() if isinstance(text, str) else text:
        part = character - 48
        value |= (part & 31) << shift
        shift += 5
        if part & 32:
            continue
        if part & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths


def mask_score(heat: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """A map (rows, cols) over the whole image against a mask (H, W) bool: whether the center of its largest patch is in
    the mask (averaged over equal ones), and the `region_score` with it."""
    rows, cols = heat.shape
    height, width = mask.shape
    coverage = F.adaptive_avg_pool2d(torch.from_numpy(mask.astype(np.float64))[None], (rows, cols))[0].numpy()
    y = ((np.arange(rows) + 0.5) / rows * height).astype(int)
    x = ((np.arange(cols) + 0.5) / cols * width).astype(int)
    centers = mask[y[:, None], x[None]]
    return float(centers[heat == heat.max()].mean()), region_score(heat, coverage)

"""Scores of one word map against boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from softmask_fast.errors import UsageError

Box = tuple[float, float, float, float]  # x1 y1 x2 y2 as fractions of width and height


@dataclass(frozen=True)
class GroundingScore:
    """One map against the boxes of its phrase; all numbers are fractions in [0, 1]."""

    hit: float  # 1 if the center of the largest patch is inside a box, else 0; averaged over equally large patches
    hit_random: float  # the expected hit of a random patch
    hit_center: float  # the hit of the image's center
    mass_inside: float  # fraction of the map's sum inside the boxes
    area_inside: float  # fraction of the image's area inside the boxes
    mask_inside: float  # mean of the min-max normalized map inside the boxes
    mask_image: float  # mean of the min-max normalized map over the whole image
    flat: bool  # the map is the same everywhere


def grounding_score(heat: np.ndarray, boxes: Sequence[Box]) -> GroundingScore:
    """Scores a map (rows, columns), finite and at least 0, against the union of boxes.

    A flat map scores what a random one is expected to score, and its mask is 0: nothing is masked.

    Raises:
        UsageError: without boxes, or for a box without area inside the image.
    """
    rows, cols = heat.shape
    coverage = box_coverage(boxes, rows, cols)
    centers = _patch_centers_inside(heat.shape, boxes)
    low, high = float(heat.min()), float(heat.max())
    mask = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    total = float(heat.sum(dtype=np.float64))
    area = float(coverage.mean())
    return GroundingScore(
        hit=pointing_hit(heat, boxes),
        hit_random=float(centers.mean()),
        hit_center=float(_inside(np.array([0.5]), np.array([0.5]), boxes)[0, 0]),
        mass_inside=float((heat * coverage).sum()) / total if total > 0 else area,
        area_inside=area,
        mask_inside=float((mask * coverage).sum() / coverage.sum()),
        mask_image=float(mask.mean()),
        flat=high == low,
    )


def pointing_hit(heat: np.ndarray, boxes: Sequence[Box]) -> float:
    """The pointing game: 1 if the center of the map's largest patch is inside a box, else 0; ties are averaged."""
    return float(_patch_centers_inside(heat.shape, boxes)[heat == heat.max()].mean())


def region_score(heat: np.ndarray, coverage: np.ndarray) -> float:
    """Intersection over union of the patches above half of the map's range with boxes or a mask.

    Args:
        heat: (rows, columns), the map. A flat one counts as the whole image.
        coverage: (rows, columns), the fraction of each patch that is covered, by `box_coverage` or by a mask.
    """
    low, high = float(heat.min()), float(heat.max())
    region = heat >= (low + high) / 2
    common = float(coverage[region].sum())
    return common / (float(region.sum()) + float(coverage.sum()) - common)


def proposal_score(
    heat: np.ndarray, boxes: Sequence[Box], proposals: Sequence[Box], size: tuple[int, int]
) -> tuple[bool, float]:
    """Lets a map (rows, columns) float32 choose among proposals, as in weakly supervised grounding on RefCOCO+.

    As in ALBEF, the map is enlarged (bicubic) to the image's size (width, height). It chooses the proposal with the
    largest sum of the map over the square root of the proposal's area (on RefCOCO+, proposals are MAttNet's
    detections). A proposal is right if its intersection over union with one of the boxes is at least 0.5.

    Returns:
        Whether the chosen proposal is right, and the fraction of proposals that are right.
    """
    width, height = size
    full = F.interpolate(torch.from_numpy(heat)[None, None].double(), size=(height, width), mode="bicubic")[0, 0]
    pixels = [np.round(np.multiply(box, (width, height, width, height)), 3) for box in proposals]
    edges = [np.maximum(box, 0).astype(int) for box in pixels]  # a negative index would count from the other end
    sums = [full[y1:y2, x1:x2].sum().item() for x1, y1, x2, y2 in edges]
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in pixels]
    chosen = int(np.argmax(np.divide(sums, np.sqrt(areas))))
    right = [max(intersection_over_union(box, proposal) for box in boxes) >= 0.5 for proposal in proposals]
    return right[chosen], float(np.mean(right))


def intersection_over_union(first: Box, second: Box) -> float:
    """The common area of two boxes over the area of their union."""

    def area(box: Box) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    common = area((*low, *high))
    return common / (area(first) + area(second) - common)


def box_coverage(boxes: Sequence[Box], rows: int, cols: int) -> np.ndarray:
    """The exact fraction of each patch that the union of the boxes covers: (rows, cols) float64.

    Raises UsageError without boxes, or for a box without area inside the image.
    """
    if not boxes:
        raise UsageError("boxes: expected at least one (x1, y1, x2, y2), got none")
    for x1, y1, x2, y2 in boxes:
        if not (max(x1, 0) < min(x2, 1) and max(y1, 0) < min(y2, 1)):
            raise UsageError(f"boxes: expected x1 < x2 and y1 < y2 as fractions of the image, got {(x1, y1, x2, y2)}")
    # Cut the image along every patch and box edge: each cell is then either inside or outside.
    x_edges = np.unique(np.clip([*np.linspace(0, 1, cols + 1), *(x for b in boxes for x in (b[0], b[2]))], 0, 1))
    y_edges = np.unique(np.clip([*np.linspace(0, 1, rows + 1), *(y for b in boxes for y in (b[1], b[3]))], 0, 1))
    x_mid, y_mid = (x_edges[1:] + x_edges[:-1]) / 2, (y_edges[1:] + y_edges[:-1]) / 2
    area = np.diff(y_edges)[:, None] * np.diff(x_edges)[None, :] * _inside(x_mid, y_mid, boxes)
    coverage = np.zeros((rows, cols))
    np.add.at(coverage, ((y_mid * rows).astype(int)[:, None], (x_mid * cols).astype(int)[None, :]), area)
    return coverage * rows * cols


def _inside(x: np.ndarray, y: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """(len(y), len(x)) bool: whether the point is inside, or on the edge of, any box."""
    inside = np.zeros((len(y), len(x)), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        inside |= ((y >= y1) & (y <= y2))[:, None] & ((x >= x1) & (x <= x2))[None, :]
    return inside


def _patch_centers_inside(grid: tuple[int, ...], boxes: Sequence[Box]) -> np.ndarray:
    """(rows, columns) bool: whether the center of each patch of a grid is inside any box."""
    rows, cols = grid
    return _inside((np.arange(cols) + 0.5) / cols, (np.arange(rows) + 0.5) / rows, boxes)

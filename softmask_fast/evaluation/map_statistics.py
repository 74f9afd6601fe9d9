"""Numbers of a word's map, and of the picture under it, for tables and classical learners."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def map_statistics(heat: np.ndarray) -> dict[str, float]:
    """Mean, spread, quantiles, entropy and centroid of a map (rows, columns), at least 0.

    The entropy is that of the map as a distribution, over that of an even one: 1 for an even map, 0 for one patch. The
    centroid (x, y) and its spread are fractions of the picture's width and height. A map of zeros counts as even.
    """
    heat = np.asarray(heat, np.float64)
    rows, columns = heat.shape
    share = _share(heat)
    x, y = (np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows
    center_x, center_y = float(share.sum(0) @ x), float(share.sum(1) @ y)
    positive, levels = share[share > 0], np.quantile(heat, QUANTILES)
    entropy = float(-(positive * np.log(positive)).sum()) / math.log(heat.size) if heat.size > 1 else 1.0
    return {
        "mean": float(heat.mean()),
        "spread": float(heat.std()),
        **{f"q{round(100 * q):02d}": float(level) for q, level in zip(QUANTILES, levels, strict=True)},
        "max": float(heat.max()),
        "entropy": entropy,
        "centroid_x": center_x,
        "centroid_y": center_y,
        "spread_x": math.sqrt(max(0.0, float(share.sum(0) @ (x - center_x) ** 2))),
        "spread_y": math.sqrt(max(0.0, float(share.sum(1) @ (y - center_y) ** 2))),
    }


def color_statistics(picture: np.ndarray, heat: np.ndarray) -> dict[str, float]:
    """Mean and spread of each color of a picture (H, W, 3) uint8 under a map, in [0, 1]; of zeros, of all of it."""
    values = torch.from_numpy(np.ascontiguousarray(heat, np.float32))[None, None]
    full = F.interpolate(values, picture.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
    share, found = _share(full.astype(np.float64)), {}
    for number, color in enumerate(("red", "green", "blue")):
        channel = picture[..., number] / 255.0
        mean = float((share * channel).sum())
        found |= {f"{color}_mean": mean, f"{color}_spread": float(np.sqrt((share * (channel - mean) ** 2).sum()))}
    return found


def _share(heat: np.ndarray) -> np.ndarray:
    """The map as a distribution; even if it is zero."""
    total = heat.sum()
    return heat / total if total > 0 else np.full(heat.shape, 1 / heat.size)

"""Image augmentation: the operations, and their random arguments for one image.

`data.dali_pipeline` runs the operations.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from softmask_fast.errors import UsageError

CROP_RATIO = (3 / 4, 4 / 3)  # width / height
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
# ALBEF's list: nothing changes the hue, because captions name colors
RAND_AUGMENT_OPS = ("identity", "autocontrast", "equalize", "brightness", "contrast", "sharpness", *GEOMETRIC)
RAND_AUGMENT_N = 2  # operations per image
RAND_AUGMENT_MAGNITUDE = 7.0  # 0 to 10
COLOR_PROBABILITY = 0.8
COLOR_STRENGTH = 0.4  # brightness, contrast and saturation are multiplied by 1 +- this
BLUR_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)  # pixels of an image 256 wide; scaled with the image size

# The arguments of one image, each with the value that changes nothing.
NEUTRAL: dict[str, np.ndarray] = {
    "roi_start": np.zeros(2, np.float32),  # y, x as fractions
    "roi_end": np.ones(2, np.float32),
    "mirror": np.array(0, np.int32),
    "matrix": np.eye(2, 3, dtype=np.float32),  # output to input pixels
    "brightness": np.array(1, np.float32),
    "contrast": np.array(1, np.float32),
    "saturation": np.array(1, np.float32),
    "sharpness": np.array(1, np.float32),
    "blur": np.array(0, np.float32),  # sigma, pixels
    "autocontrast": np.array(False),
    "equalize": np.array(False),
}


@dataclass(frozen=True)
class AugmentConfig:
    """Which augmentations are on. Raises UsageError for values out of range."""

    crop: bool = True
    crop_scale: float = 0.2  # smallest area of a crop, as a fraction of the image's
    flip: bool = True  # switch off if captions say left and right
    rand_augment: bool = True
    color: bool = True
    blur: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale <= 1:
            raise UsageError(f"crop_scale: expected in (0, 1], got {self.crop_scale}")

    @classmethod
    def of(cls, options: Any) -> AugmentConfig:
        """From the fields of `options` with the same names."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    @classmethod
    def none(cls) -> AugmentConfig:
        """The whole image, only resized: what evaluation sees."""
        return cls(crop=False, flip=False, rand_augment=False, color=False, blur=False)

    def arguments(self) -> frozenset[str]:
        """Names in `NEUTRAL` that can differ from neutral: the operators that the pipeline needs."""
        names: set[str] = set()
        if self.crop:
            names |= {"roi_start", "roi_end"}
        if self.flip:
            names.add("mirror")
        if self.rand_augment:
            names |= {"matrix" if name in GEOMETRIC else name for name in RAND_AUGMENT_OPS if name != "identity"}
        if self.color:
            names |= {"brightness", "contrast", "saturation"}
        if self.blur:
            names.add("blur")
        return frozenset(names)


def pack(parameters: Sequence[Mapping[str, np.ndarray]], arguments: Collection[str]) -> np.ndarray:
    """(images, width) float32: the named arguments of each image side by side, in alphabetical order."""
    columns = [np.stack([image[name] for image in parameters]) for name in sorted(arguments)]
    flat = [column.reshape(len(parameters), -1).astype(np.float32) for column in columns]
    return np.concatenate([np.empty((len(parameters), 0), np.float32), *flat], axis=1)


def draw_parameters(
    config: AugmentConfig, generator: np.random.Generator, width: int, height: int, image_size: int
) -> dict[str, np.ndarray]:
    """Draws the arguments of one image.

    How many random numbers are drawn depends only on `config`.

    Args:
        config: the augmentations that are on.
        generator: of the random numbers.
        width: of the image, in pixels.
        height: of the image, in pixels.
        image_size: side of the square result, in pixels.

    Returns:
        A value for each key of `NEUTRAL`, of the same shape and dtype.
    """
    values = dict(NEUTRAL)
    if config.crop:
        values["roi_start"], values["roi_end"] = _crop_window(config, generator, width, height)
    if config.flip:
        values["mirror"] = np.array(generator.random() < 0.5, np.int32)
    factors = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
    if config.rand_augment:
        _rand_augment(generator, image_size, values, factors)
    if config.color:
        jitter = generator.uniform(-1, 1, size=4)  # the fourth is unused; drawing it keeps the sequence of older runs
        if generator.random() < COLOR_PROBABILITY:
            for name, amount in zip(factors, jitter, strict=False):
                factors[name] *= 1 + COLOR_STRENGTH * amount
    values.update({name: np.array(factor, np.float32) for name, factor in factors.items()})
    if config.blur:
        sigma = generator.uniform(*BLUR_SIGMA) * image_size / 256
        if generator.random() < BLUR_PROBABILITY:
            values["blur"] = np.array(sigma, np.float32)
    return values


def _crop_window(
    config: AugmentConfig, generator: np.random.Generator, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (y, x) as fractions: the first of ten random crops that fits, or the central crop if none does."""
    areas = generator.uniform(config.crop_scale, 1.0, size=10) * (width * height)
    ratios = np.exp(generator.uniform(*np.log(CROP_RATIO), size=10))
    offset = generator.random(2)  # y, x, as a fraction of the room around the crop
    crops = np.stack([np.sqrt(areas / ratios), np.sqrt(areas * ratios)], axis=1)  # (10, 2) height, width
    fits = np.flatnonzero((crops <= (height, width)).all(axis=1))
    if len(fits):
        extent = crops[fits[0]] / (height, width)
    else:
        ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
        extent = np.array([min(height, width / ratio) / height, min(width, height * ratio) / width])
        offset = np.full(2, 0.5)
    start = offset * (1 - extent)
    return start.astype(np.float32), (start + extent).astype(np.float32)


def _rand_augment(
    generator: np.random.Generator, image_size: int, values: dict[str, np.ndarray], factors: dict[str, float]
) -> None:
    """Chooses operations with replacement and writes their arguments to `values` and `factors`.

    The pipeline applies them in its own order, geometric ones first. Repeated ones are composed.
    """
    strength = RAND_AUGMENT_MAGNITUDE / 10
    choices = generator.integers(len(RAND_AUGMENT_OPS), size=RAND_AUGMENT_N)
    signs = np.where(generator.random(RAND_AUGMENT_N) < 0.5, -1.0, 1.0)
    matrix = np.eye(3)
    for choice, sign in zip(choices, signs, strict=True):
        name = RAND_AUGMENT_OPS[choice]
        factor = 1 + sign * 0.9 * strength
        if name in GEOMETRIC:
            matrix = matrix @ _geometric_matrix(name, sign * strength)
        elif name in factors:
            factors[name] *= factor
        elif name == "sharpness":
            values[name] = np.array(factor, np.float32)
        elif name in ("autocontrast", "equalize"):
            values[name] = np.array(True)
    # from coordinates in [-1, 1] to pixels: x = center * (1 + u), likewise y
    linear, center = matrix[:2, :2], image_size / 2
    shift = center * (matrix[:2, 2] + 1 - linear.sum(axis=1))
    values["matrix"] = np.column_stack([linear, shift]).astype(np.float32)


def _geometric_matrix(name: str, amount: float) -> np.ndarray:
    """(3, 3), output to input, in coordinates that run from -1 to 1; amount in [-1, 1]."""
    matrix = np.eye(3)
    if name == "rotate":
        angle = math.radians(30 * amount)
        matrix[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    else:  # translations by up to a tenth of the width
        row = 0 if name.endswith("_x") else 1
        column, scale = (1 - row, 0.3) if name.startswith("shear") else (2, 0.2)
        matrix[row, column] = scale * amount
    return matrix

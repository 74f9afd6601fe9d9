"""What is done to an image: the settings, and the arguments of one sample, drawn from its own generator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from softmask_fast.config import DataConfig

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
PHOTOMETRIC = ("brightness", "contrast", "color", "sharpness", "autocontrast", "equalize", "posterize", "solarize")
# ALBEF's list: nothing that changes a hue, as captions name colors
RAND_AUGMENT_OPS = ("identity", "autocontrast", "equalize", "brightness", "contrast", "sharpness", *GEOMETRIC)

# The arguments of one sample, each with the value that changes nothing.
NEUTRAL: dict[str, np.ndarray] = {
    "roi_start": np.zeros(2, np.float32),  # y, x as fractions
    "roi_end": np.ones(2, np.float32),
    "mirror": np.array(0, np.int32),
    "matrix": np.eye(2, 3, dtype=np.float32),  # output to input pixels
    "brightness": np.array(1, np.float32),
    "contrast": np.array(1, np.float32),
    "saturation": np.array(1, np.float32),
    "hue": np.array(0, np.float32),  # degrees
    "sharpness": np.array(1, np.float32),
    "blur": np.array(0, np.float32),  # sigma, pixels
    "autocontrast": np.array(False),
    "equalize": np.array(False),
    "posterize": np.array(255, np.uint8),  # the bits that are kept
    "solarize": np.array(256, np.int16),  # values from here on are inverted
}


@dataclass(frozen=True)
class AugmentConfig:
    """Which distortions there are, each switchable, and how strong they are."""

    crop: bool = True
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area, as a fraction of the image's
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: bool = True  # switch off where captions say left and right
    rand_augment: bool = True
    rand_augment_ops: tuple[str, ...] = RAND_AUGMENT_OPS
    rand_augment_n: int = 2  # operations per image
    rand_augment_magnitude: float = 7.0  # 0 to 10
    color: bool = True
    color_probability: float = 0.8
    color_strength: tuple[float, float, float] = (0.4, 0.4, 0.4)  # brightness, contrast, saturation: factors 1 +- this
    color_hue: float = 0.0  # degrees, +-
    blur: bool = True
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of an image 256 wide; scaled with the image size

    @classmethod
    def of(cls, data: DataConfig) -> AugmentConfig:
        """From the options of a run."""
        return cls(
            crop=data.crop,
            crop_scale=(data.crop_scale, 1.0),
            flip=data.flip,
            rand_augment=data.rand_augment,
            color=data.color,
            blur=data.blur,
        )

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be 0 < low <= high <= 1, got {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must be 0 < low <= high, got {self.crop_ratio}")
        known = ("identity", *GEOMETRIC, *PHOTOMETRIC)
        if unknown := [name for name in self.rand_augment_ops if name not in known]:
            raise ValueError(f"rand_augment_ops: unknown {unknown}; there are {', '.join(known)}")
        if self.rand_augment and not self.rand_augment_ops:
            raise ValueError("rand_augment_ops is empty; switch off rand_augment instead")
        if not 0 <= self.rand_augment_magnitude <= 10 or self.rand_augment_n < 0:
            raise ValueError(
                f"rand_augment_magnitude must be in [0, 10] and rand_augment_n at least 0, "
                f"got {self.rand_augment_magnitude} and {self.rand_augment_n}"
            )
        for name in ("color_probability", "blur_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not all(0 <= strength <= 1 for strength in self.color_strength):
            raise ValueError(f"color_strength must be in [0, 1], got {self.color_strength}")
        if not 0 <= self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must be 0 <= low <= high, got {self.blur_sigma}")

    @classmethod
    def none(cls) -> AugmentConfig:
        """The whole image, unchanged but for its size: what evaluation sees."""
        return cls(crop=False, flip=False, rand_augment=False, color=False, blur=False)

    def arguments(self) -> frozenset[str]:
        """Names in `NEUTRAL` that can differ from neutral: what the pipeline has operators for."""
        names: set[str] = set()
        if self.crop:
            names |= {"roi_start", "roi_end"}
        if self.flip:
            names.add("mirror")
        if self.rand_augment:
            for name in self.rand_augment_ops:
                names.add("matrix" if name in GEOMETRIC else "saturation" if name == "color" else name)
        if self.color:
            names |= {"brightness", "contrast", "saturation"} | ({"hue"} if self.color_hue else set())
        if self.blur:
            names.add("blur")
        return frozenset(names - {"identity"})


def draw_parameters(
    config: AugmentConfig, generator: np.random.Generator, width: int, height: int, image_size: int
) -> dict[str, np.ndarray]:
    """The arguments of one sample (keys of `NEUTRAL`) for an image of width x height pixels."""
    values = dict(NEUTRAL)
    if config.crop:
        values["roi_start"], values["roi_end"] = _crop_window(config, generator, width, height)
    if config.flip:
        values["mirror"] = np.array(generator.random() < 0.5, np.int32)
    twist = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
    if config.rand_augment:
        _rand_augment(config, generator, image_size, values, twist)
    if config.color:
        jitter = generator.uniform(-1, 1, size=4)
        if generator.random() < config.color_probability:
            for name, amount, strength in zip(twist, jitter, config.color_strength, strict=False):
                twist[name] *= 1 + strength * amount
            values["hue"] = np.array(config.color_hue * jitter[3], np.float32)
    values.update({name: np.array(value, np.float32) for name, value in twist.items()})
    if config.blur:
        sigma = generator.uniform(*config.blur_sigma) * image_size / 256
        if generator.random() < config.blur_probability:
            values["blur"] = np.array(sigma, np.float32)
    return values


def _crop_window(
    config: AugmentConfig, generator: np.random.Generator, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (y, x) as fractions: random area and aspect ratio, ten attempts, else the largest central crop."""
    areas = generator.uniform(*config.crop_scale, size=10) * (width * height)
    ratios = np.exp(generator.uniform(*np.log(config.crop_ratio), size=10))
    place = generator.random(2)  # y, x
    crops = np.stack([np.sqrt(areas / ratios), np.sqrt(areas * ratios)], axis=1)  # (10, 2) height, width
    fits = np.flatnonzero((crops <= (height, width)).all(axis=1))
    if len(fits):
        extent = crops[fits[0]] / (height, width)
    else:
        ratio = min(max(width / height, config.crop_ratio[0]), config.crop_ratio[1])
        extent = np.array([min(height, width / ratio) / height, min(width, height * ratio) / width])
        place = np.full(2, 0.5)
    start = place * (1 - extent)
    return start.astype(np.float32), (start + extent).astype(np.float32)


def _rand_augment(
    config: AugmentConfig,
    generator: np.random.Generator,
    image_size: int,
    values: dict[str, np.ndarray],
    twist: dict[str, float],
) -> None:
    """Chooses operations with replacement and writes their arguments to `values` and `twist`.

    The pipeline applies them in its own order, geometric ones first; repeated ones are composed.
    """
    strength = config.rand_augment_magnitude / 10
    choices = generator.integers(len(config.rand_augment_ops), size=config.rand_augment_n)
    signs = np.where(generator.random(config.rand_augment_n) < 0.5, -1.0, 1.0)
    matrix = np.eye(3)
    for choice, sign in zip(choices, signs, strict=True):
        name = config.rand_augment_ops[choice]
        factor = 1 + sign * 0.9 * strength
        if name in GEOMETRIC:
            matrix = matrix @ _geometric_matrix(name, sign * strength)
        elif name in ("brightness", "contrast", "color"):
            twist["saturation" if name == "color" else name] *= factor
        elif name == "sharpness":
            values[name] = np.array(factor, np.float32)
        elif name in ("autocontrast", "equalize"):
            values[name] = np.array(True)
        elif name == "posterize":
            values[name] = np.array((0xFF << round(4 * strength)) & 0xFF, np.uint8)
        elif name == "solarize":
            values[name] = np.array(round(256 * (1 - strength)), np.int16)
    # from coordinates in [-1, 1] to pixels: x = centre * (1 + u), likewise y
    turn, centre = matrix[:2, :2], image_size / 2
    shift = centre * (matrix[:2, 2] + 1 - turn.sum(axis=1))
    values["matrix"] = np.column_stack([turn, shift]).astype(np.float32)


def _geometric_matrix(name: str, amount: float) -> np.ndarray:
    """(3, 3), output to input, in coordinates that run from -1 to 1; amount in [-1, 1]."""
    matrix = np.eye(3)
    if name == "rotate":
        angle = math.radians(30 * amount)
        matrix[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    elif name == "shear_x":
        matrix[0, 1] = 0.3 * amount
    elif name == "shear_y":
        matrix[1, 0] = 0.3 * amount
    elif name == "translate_x":
        matrix[0, 2] = 0.2 * amount  # a tenth of the width
    elif name == "translate_y":
        matrix[1, 2] = 0.2 * amount
    return matrix

"""Checks an image before DALI sees it: one file that DALI cannot decode would cost the whole batch.

What DALI decodes exactly as stored (RGB and grey JPEG, PNG, WebP) passes through untouched. What differs between
decoders (CMYK, palettes, alpha, 16 bits, rotation flags outside JPEG) is converted here by PIL, for all devices alike.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from softmask_fast.data.types import BadSample

MAX_PIXELS = 89_478_485  # PIL's own limit against decompression bombs
FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # MPO: a JPEG with further pictures behind it, as phones write it
_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class ImageFacts:
    """What was found when an image was checked."""

    width: int  # pixels, after the EXIF rotation
    height: int
    convert: bool  # True: DALI gets a copy converted by PIL


def check_image(image: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Decodes `image` (an encoded file, or (H, W, 3) uint8) in full.

    Raises BadSample for everything that cannot be trained on: empty, damaged, truncated, unsupported or over-large.
    PIL itself refuses images of more than twice its `Image.MAX_IMAGE_PIXELS`, whatever `max_pixels` says.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise BadSample(f"image array must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
        height, width = image.shape[:2]
        _check_size(width, height, max_pixels)
        return ImageFacts(width, height, convert=False)
    if not image:
        raise BadSample("image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(image)) as picture:
            width, height = picture.size
            _check_size(width, height, max_pixels)
            if picture.format not in FORMATS:
                raise BadSample(f"image format {picture.format} is not supported (JPEG, PNG and WebP are)")
            is_jpeg = picture.format in ("JPEG", "MPO")
            if not is_jpeg and getattr(picture, "is_animated", False):
                raise BadSample(f"image is an animated {picture.format}")
            orientation = picture.getexif().get(_ORIENTATION, 1)
            picture.load()
            plain = picture.mode in ("RGB", "L") and "transparency" not in picture.info
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(f"image is too large: {error}") from error
    # damaged bytes make PIL's decoders raise nearly anything (OSError, SyntaxError, struct.error, zlib.error, ...)
    except Exception as error:
        raise BadSample(f"image cannot be decoded: {error}") from error
    if orientation in _TRANSPOSED:
        width, height = height, width
    return ImageFacts(width, height, convert=not plain or (orientation != 1 and not is_jpeg))


def image_size(image: bytes | np.ndarray) -> tuple[int, int]:
    """Width and height in pixels, upright. Raises BadSample for an image that cannot be used."""
    facts = check_image(image)
    return facts.width, facts.height


def convert_image(image: bytes) -> bytes:
    """The image as an upright RGB PNG without alpha."""
    with Image.open(io.BytesIO(image)) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I"):  # 16 bits: PIL would clip instead of scale
            upright = Image.fromarray((np.asarray(upright, np.uint32) >> 8).astype(np.uint8))
        rgb = upright.convert("RGB")
    buffer = io.BytesIO()
    rgb.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSample(f"image is too large: {width} x {height} pixels, the limit is {max_pixels}")

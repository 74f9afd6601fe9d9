"""Checks images before they are decoded in batches, because one file that DALI cannot decode fails its whole batch.

Files that all decoders read alike (RGB and gray JPEG, PNG, WebP) pass through untouched. PIL converts the others (TIFF,
CMYK, palettes, alpha, 16 bits, a rotation other than one plain EXIF entry of a JPEG), so that every device sees the
same pixels.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from softmask_fast.data.types import BadSample

MEAN = (0.48145466, 0.4578275, 0.40821073)  # normalization of CLIP and ALBEF, for pixels in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_IMAGE_BYTES = 1 << 30  # of an encoded file; 89 million pixels of uncompressed 16-bit RGBA take 0.7e9
MAX_PIXELS = 89_478_485  # PIL's own limit against decompression bombs
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF")  # MPO: a JPEG followed by further pictures, as phones write it
_ORIENTATION = 0x0112  # EXIF tag
_TIFF = "8 bits and gray, RGB, RGB with alpha, CMYK or a palette"
_TIFF_PAGES = 16  # that are checked
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class ImageFacts:
    """What checking an image found."""

    width: int  # pixels, after the EXIF rotation
    height: int
    convert: bool  # True: decode the output of `convert_image` instead


def read_image(path: str | Path) -> bytes:
    """The content of an image file. Raises BadSample if it cannot be read or has more than MAX_IMAGE_BYTES."""
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # reading a pipe may block, a device may be endless
            raise BadSample(f"image is not a file: {path}")
        if (size := os.path.getsize(path)) > MAX_IMAGE_BYTES:
            raise BadSample(f"image has {size} bytes, the limit is {MAX_IMAGE_BYTES}: {path}")
        return Path(path).read_bytes()
    except BadSample:
        raise
    except (OSError, ValueError) as error:  # ValueError: not a valid path, such as one with a null byte
        raise BadSample(f"image cannot be read: {error}") from error


def check_image(image: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Decodes an image in full to find out how it can be used.

    Args:
        image: An encoded file, or (H, W, 3) uint8.
        max_pixels: Largest width times height. PIL also rejects more than twice its `Image.MAX_IMAGE_PIXELS`.

    Raises:
        BadSample: If it is empty, damaged, truncated, too large or of an unsupported format.
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
                raise BadSample(f"image format {picture.format} is not supported (only JPEG, PNG, WebP and TIFF)")
            is_jpeg = picture.format in ("JPEG", "MPO")
            if picture.format == "TIFF":
                _check_tiff(picture)
            elif not is_jpeg and getattr(picture, "is_animated", False):
                raise BadSample(f"image is an animated {picture.format}")
            orientation = picture.getexif().get(_ORIENTATION, 1)
            picture.load()
            if picture.format == "TIFF":  # some versions of PIL rotate it on loading
                (width, height), orientation = ImageOps.exif_transpose(picture).size, 1
            plain = picture.format != "TIFF" and picture.mode in ("RGB", "L") and "transparency" not in picture.info
            plain = plain and _plain_orientation(picture) == orientation
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(f"image is too large: {error}") from error
    except UnidentifiedImageError as error:  # its message holds a memory address
        if image[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise BadSample(f"TIFF of a kind that PIL cannot read: expected {_TIFF}") from error
        raise BadSample("image cannot be decoded: not an image file, or of an unknown format") from error
    # PIL's decoders raise nearly anything for damaged bytes (OSError, SyntaxError, struct.error, zlib.error, ...)
    except Exception as error:
        raise BadSample(f"image cannot be decoded: {error}") from error
    if orientation in _TRANSPOSED:
        width, height = height, width
    return ImageFacts(width, height, convert=not plain)


def _check_tiff(picture: TiffImageFile) -> None:
    """Raises BadSample for a TIFF that is not one viewable picture: sensor values of unknown range, bands besides the
    colors, several pictures. Smaller copies of the picture and its mask, as in geographic files, are fine."""
    bits, kinds = picture.tag_v2.get(258, (1,)), picture.tag_v2.get(339, (1,))  # BitsPerSample, SampleFormat
    if max(bits) > 8 or set(kinds) != {1}:
        kind = "floating point" if 3 in kinds else "signed" if 2 in kinds else "unsigned"
        raise BadSample(
            f"TIFF with {len(bits)} bands of {max(bits)} bits, {kind}: expected {_TIFF}; scale it to 8 bits"
        )
    if 0 in picture.tag_v2.get(338, ()):  # ExtraSamples: not alpha
        raise BadSample(f"TIFF with {len(bits)} bands: expected {_TIFF}; choose three bands")
    for page in range(1, _TIFF_PAGES + 1):
        try:
            picture.seek(page)
        except EOFError:
            break
        if page == _TIFF_PAGES or not picture.tag_v2.get(254, 0) & 5:  # NewSubfileType: a smaller copy, a mask
            raise BadSample(f"TIFF with several pages: page {page + 1} is not a smaller copy of the first")
    picture.seek(0)


def _plain_orientation(picture: Image.Image) -> int | None:
    """The EXIF orientation if every decoder reads the same, else None. PIL also reads XMP and any type of number, and
    takes the first of several EXIF segments."""
    found = [picture.info["exif"]] if "exif" in picture.info else []
    if isinstance(picture, JpegImageFile):
        found = [data for marker, data in picture.applist if marker == "APP1" and data[:6] == b"Exif\0\0"]
    if not found:
        return 1
    if len(found) > 1 or not isinstance(picture, JpegImageFile):
        return None
    exif = found[0][6:]
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}[exif[:4]]
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        entries = [struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * number) for number in range(count)]
    except (KeyError, struct.error):
        return None
    values = [entry[1:] for entry in entries if entry[0] == _ORIENTATION]
    if not values:
        return 1
    kind, length, value = values[0]
    return value if len(values) == 1 and (kind, length) == (3, 1) and 1 <= value <= 8 else None


def image_size(image: bytes | np.ndarray) -> tuple[int, int]:
    """(width, height) in pixels, after the EXIF rotation. Raises BadSample if the image cannot be used."""
    facts = check_image(image)
    return facts.width, facts.height


def decode_image(image: bytes | np.ndarray) -> Image.Image:
    """The image, upright, as RGB without alpha."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    with Image.open(io.BytesIO(image)) as picture:
        return upright_rgb(picture)


def upright_rgb(picture: Image.Image) -> Image.Image:
    """An open image, rotated as its EXIF entry says, as RGB without alpha."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):  # 16 bits: PIL would clip instead of scale
        upright = Image.fromarray((np.asarray(upright, np.uint32) >> 8).astype(np.uint8))
    return upright.convert("RGB")


def convert_image(image: bytes) -> bytes:
    """The image as an upright RGB PNG without alpha."""
    buffer = io.BytesIO()
    decode_image(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSample(f"image is too large: {width} x {height} pixels, the limit is {max_pixels}")

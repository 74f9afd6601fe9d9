"""The one DALI pipeline: decode, random resized crop, RandAugment, color, blur, flip, normalise; on a GPU or a CPU.

DALI draws no random numbers here: the arguments of every sample come from `draw_parameters` and enter as inputs. So the
pixels of a sample depend on nothing but the sample, the seed and the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from softmask_fast.data.augment import NEUTRAL, AugmentConfig, draw_parameters
from softmask_fast.data.images import MAX_PIXELS, check_image, convert_image

__all__ = ["MEAN", "STD", "AugmentConfig", "DaliPipeline", "draw_parameters", "evaluation_pixels"]

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP and ALBEF, for pixels in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)

_TWIST = ("brightness", "contrast", "saturation", "hue")
_UNCHANGED = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)  # filter kernels
_SMOOTHED = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_EVALUATION_BATCH = 64


@pipeline_def(enable_conditionals=True)
def _definition(image_size: int, encoded: bool, arguments: frozenset[str], gpu: bool):
    """The graph. Operators exist only for the `arguments` that can differ from neutral; each runs only on the samples
    that need it."""
    given = {name: fn.external_source(name=name) for name in sorted(arguments)}

    def operand(name: str):  # of arithmetic with the image
        return given[name].gpu() if gpu else given[name]

    image = fn.external_source(name="image", layout=None if encoded else "HWC")
    if encoded:
        # hw_decoder_load: which decoder takes a file must not depend on its place in the batch
        options = {"hw_decoder_load": 1.0, "jpeg_fancy_upsampling": True} if gpu else {}
        image = fn.decoders.image(image, device="mixed" if gpu else "cpu", output_type=types.RGB, **options)
    elif gpu:
        image = image.gpu()

    window = {"roi_start": given["roi_start"], "roi_end": given["roi_end"]} if "roi_start" in given else {}
    image = fn.resize(
        image, size=(image_size, image_size), interp_type=types.INTERP_CUBIC, roi_relative=bool(window), **window
    )
    if "matrix" in given:
        fill = sum(MEAN) / 3 * 255
        image = fn.warp_affine(image, matrix=given["matrix"], fill_value=fill, interp_type=types.INTERP_LINEAR)
    twist = {name: given[name] for name in _TWIST if name in given}
    if twist:
        image = fn.color_twist(image, **twist)
    if "autocontrast" in given:
        if given["autocontrast"]:
            low = fn.reductions.min(image, axes=(0, 1), keep_dims=True)
            high = fn.reductions.max(image, axes=(0, 1), keep_dims=True)
            flat = high == low  # such a channel stays as it is
            factor = 255.0 / fn.cast(high - low + 255 * flat, dtype=types.FLOAT)
            image = fn.cast((image - low * (high > low)) * factor, dtype=types.UINT8)
    if "equalize" in given:
        if given["equalize"]:
            image = fn.equalize(image)
    if "posterize" in given:
        if given["posterize"] < 255:
            image = image & operand("posterize")
    if "solarize" in given:
        if given["solarize"] < 256:
            image = image ^ fn.cast((image >= operand("solarize")) * 255, dtype=types.UINT8)
    if "sharpness" in given:
        if given["sharpness"] != 1:
            # below 1 a blend with a smoothed copy, above 1 an extrapolation away from it
            factor = operand("sharpness")
            image = fn.filter(image, factor * _UNCHANGED + (1 - factor) * _SMOOTHED)
    if "blur" in given:
        if given["blur"] > 0:
            image = fn.gaussian_blur(image, sigma=given["blur"])
    mirror = {"mirror": given["mirror"]} if "mirror" in given else {}
    return fn.crop_mirror_normalize(
        image,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
        **mirror,
    )


class DaliPipeline:
    """The pipeline for batches of up to `batch_size` images. One batch is under way at a time."""

    def __init__(
        self,
        *,
        image_size: int,
        batch_size: int,
        encoded: bool,
        arguments: frozenset[str] = frozenset(),
        device: torch.device | str = "cpu",
        num_threads: int = 1,
    ):
        """encoded: images are files (bytes), else (H, W, 3) uint8; arguments: `AugmentConfig.arguments()`."""
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {device}")
        gpu = self.device.type == "cuda"
        self._image_size, self._encoded, self._arguments = image_size, encoded, arguments
        self._pipeline = _definition(
            image_size,
            encoded,
            arguments,
            gpu,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=1,  # a deeper queue would have to be filled before the first result
        )
        self._pipeline.build()

    def schedule(
        self, images: Sequence[bytes | np.ndarray], parameters: Sequence[Mapping[str, np.ndarray]] | None = None
    ) -> None:
        """Starts on a batch in the background; the one before it must have been taken by `result`."""
        if self._encoded:
            images = [np.frombuffer(image, np.uint8) for image in images]
        self._pipeline.feed_input("image", list(images))
        for name in self._arguments:
            values = [sample[name] for sample in parameters] if parameters else [NEUTRAL[name]] * len(images)
            self._pipeline.feed_input(name, np.stack(values))
        self._pipeline.schedule_run()

    def result(self) -> torch.Tensor:
        """The scheduled batch: (B, 3, image_size, image_size) float32, normalised by MEAN and STD."""
        (output,) = self._pipeline.share_outputs()
        pixels = torch.empty(tuple(output.as_tensor().shape()), dtype=torch.float32, device=self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        feed_ndarray(output.as_tensor(), pixels, cuda_stream=stream)
        self._pipeline.release_outputs()
        return pixels


@lru_cache(maxsize=4)
def _evaluation_pipeline(image_size: int, encoded: bool, device: torch.device) -> DaliPipeline:
    return DaliPipeline(image_size=image_size, batch_size=_EVALUATION_BATCH, encoded=encoded, device=device)


def evaluation_pixels(
    images: Sequence[bytes | np.ndarray],
    image_size: int,
    *,
    device: torch.device | str = "cpu",
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor:
    """(B, 3, image_size, image_size) float32: each whole image resized (bicubic) and normalised; nothing is random.

    images: encoded files or (H, W, 3) uint8 arrays. Raises BadSample (a ValueError) for one that cannot be used.
    """
    pixels = torch.empty((len(images), 3, image_size, image_size), dtype=torch.float32, device=device)
    for encoded in (True, False):
        places = [i for i, image in enumerate(images) if isinstance(image, np.ndarray) != encoded]
        for start in range(0, len(places), _EVALUATION_BATCH):
            chunk = places[start : start + _EVALUATION_BATCH]
            facts = [check_image(images[i], max_pixels) for i in chunk]
            pipeline = _evaluation_pipeline(image_size, encoded, torch.device(device))
            pipeline.schedule([convert_image(images[i]) if fact.convert else images[i]
                               for i, fact in zip(chunk, facts, strict=True)])  # fmt: skip
            pixels[chunk] = pipeline.result()
    return pixels

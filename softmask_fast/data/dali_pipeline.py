"""The DALI pipeline: decode, crop, RandAugment, color, blur, flip, normalize; on a GPU or a CPU.

DALI draws no random numbers here: the arguments of every image come from `augment.draw_parameters` and are fed as
inputs. So the pixels of a sample depend only on the sample, the seed and the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.plugin.pytorch import feed_ndarray

from softmask_fast.data.augment import NEUTRAL, pack
from softmask_fast.data.images import MEAN, STD

_COLOR_TWIST = ("brightness", "contrast", "saturation")
_UNCHANGED = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)  # filter kernels
_SMOOTHED = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


@pipeline_def(enable_conditionals=True)
def _definition(image_size: int, encoded: bool, arguments: frozenset[str], gpu: bool) -> DataNode:
    """The graph. It has operators only for the `arguments` that can differ from neutral, and runs them only on the
    images that need them."""
    given = _arguments(arguments)
    image = fn.external_source(name="image", layout=None if encoded else "HWC", no_copy=True)
    if encoded:
        # hw_decoder_load=1: which decoder takes a file must not depend on its position in the batch
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
    twist = {name: given[name] for name in _COLOR_TWIST if name in given}
    if twist:
        image = fn.color_twist(image, **twist)
    if "autocontrast" in given:
        if given["autocontrast"]:
            low = fn.reductions.min(image, axes=(0, 1), keep_dims=True)
            high = fn.reductions.max(image, axes=(0, 1), keep_dims=True)
            flat = high == low  # a flat channel stays unchanged
            factor = 255.0 / fn.cast(high - low + 255 * flat, dtype=types.FLOAT)
            image = fn.cast((image - low * (high > low)) * factor, dtype=types.UINT8)
    if "equalize" in given:
        if given["equalize"]:
            image = fn.equalize(image)
    if "sharpness" in given:
        if given["sharpness"] != 1:
            # below 1 a blend with a smoothed copy, above 1 an extrapolation away from it
            factor = given["sharpness"].gpu() if gpu else given["sharpness"]
            image = fn.filter(image, factor * _UNCHANGED + (1 - factor) * _SMOOTHED)
    if "blur" in given:
        if given["blur"] > 0:
            image = fn.gaussian_blur(image, sigma=given["blur"])
    mirror = {"mirror": given["mirror"]} if "mirror" in given else {}
    return fn.crop_mirror_normalize(
        image, dtype=types.FLOAT, output_layout="CHW", mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD], **mirror,
    )  # fmt: skip


def _arguments(names: frozenset[str]) -> dict[str, DataNode]:
    """Each argument of an image, cut from one row that holds all of them. Feeding one row is much faster than ten."""
    given, start = {}, 0
    packed = fn.external_source(name="arguments") if names else None
    for name in sorted(names):
        neutral = NEUTRAL[name]
        if neutral.ndim == 0:
            value = packed[start]
        else:
            value = fn.reshape(packed[start : start + neutral.size], shape=neutral.shape)
        if neutral.dtype == bool:
            value = value != 0
        elif neutral.dtype == np.int32:
            value = fn.cast(value, dtype=types.INT32)
        given[name], start = value, start + neutral.size
    return given


class DaliPipeline:
    """The pipeline for batches of up to `batch_size` images. One batch at a time is scheduled."""

    def __init__(
        self, *, image_size: int, batch_size: int, encoded: bool, arguments: frozenset[str] = frozenset(),
        device: torch.device | str = "cpu", num_threads: int = 1,
    ) -> None:  # fmt: skip
        """
        Args:
            image_size: Side of the square result in pixels.
            encoded: True if images are files (bytes); False if they are (H, W, 3) uint8 arrays.
            arguments: What varies between images: `AugmentConfig.arguments()`.
            device: A CPU or CUDA device, on which the images are decoded and returned.
            num_threads: Threads that decode.
        """
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {device}")
        gpu = self.device.type == "cuda"
        self._encoded, self._arguments = encoded, arguments
        self._pipeline = _definition(
            image_size,
            encoded,
            arguments,
            gpu,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=1,  # a deeper queue must be filled before the first result
        )
        self._pipeline.build()

    def schedule(self, images: Sequence[bytes | np.ndarray], parameters: np.ndarray | None = None) -> None:
        """Starts a batch in the background. The previous one must have been fetched with `result`.

        Args:
            images: Read in place, so they must not change before `result` returns. Files may also be (size,) uint8
                arrays; images of equal size may be one array, (B, H, W, 3).
            parameters: (B, width) float32 from `augment.pack`, the arguments of all images; default: neutral ones.
        """
        if isinstance(images, np.ndarray) and not self._encoded:
            self._images = images  # kept alive
        else:
            self._images = [np.frombuffer(i, np.uint8) if isinstance(i, bytes) else i for i in images]
        self._pipeline.feed_input("image", self._images)
        if self._arguments:
            if parameters is None:
                parameters = pack([NEUTRAL] * len(images), self._arguments)
            self._pipeline.feed_input("arguments", parameters)
        self._pipeline.schedule_run()

    def result(self) -> torch.Tensor:
        """The scheduled batch: (B, 3, image_size, image_size) float32, normalized by MEAN and STD."""
        try:
            (output,) = self._pipeline.share_outputs()
        finally:
            self._images = []
        if self.device.type == "cpu":
            pixels = torch.from_dlpack(output.as_tensor())  # not copied: DALI's executor allocates every batch anew
        else:
            pixels = torch.empty(tuple(output.as_tensor().shape()), dtype=torch.float32, device=self.device)
            feed_ndarray(output.as_tensor(), pixels, cuda_stream=torch.cuda.current_stream(self.device))
        self._pipeline.release_outputs()
        return pixels

"""Which sequences see which image, prepared once for every call that shares it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softmask_fast.ops import registry
from softmask_fast.ops.checks import check_index_range, check_integer, check_tensor


class ImagePlan(NamedTuple):
    """The result of `plan_image_index`; `soft_masked_attention` takes it as `image_index`."""

    image_index: Tensor  # (S,) int64
    images: int
    boundaries: Tensor | None  # (S + 1,) int32, for packed rows
    rows: int  # T packed rows, or S
    table: Tensor  # int32: the sequences or rows by image, for kernels


def plan_image_index(
    image_index: Tensor, images: int, *, boundaries: Tensor | None = None, rows: int | None = None
) -> ImagePlan:
    """Prepares the `image_index` of `soft_masked_attention` once, for all layers of a step and their backward passes.

    Args:
        image_index: (S,) int64, the image of each sequence.
        images: B, the number of images.
        boundaries: (S + 1,) int32, for packed rows: sequence i is rows boundaries[i] to boundaries[i + 1] - 1.
        rows: T, the number of packed rows; those from boundaries[S] on belong to no sequence.

    Returns:
        An `ImagePlan`, on the device of `image_index`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Values are checked only on the CPU;
            on a GPU, a sequence with an image out of range gives NaN.
    """
    check_tensor("image_index", image_index, ("S",), dtypes=(torch.int64,))
    check_integer("images", images, 0, None)
    if boundaries is None:
        if rows is not None:
            raise ValueError("rows: expected None without boundaries, got a number")
        rows = image_index.shape[0]
    else:
        like = ("image_index", image_index)
        check_tensor("boundaries", boundaries, (image_index.shape[0] + 1,), dtypes=(torch.int32,), like=like)
        check_integer("rows", rows, 0, None)
    eager = registry.plain_eager(image_index, boundaries)
    make_table = _plan if eager else torch.ops.softmask_fast.plan_image_index
    table = make_table(image_index, images, boundaries, rows)
    return ImagePlan(image_index, images, boundaries, rows, table)


def check_sequences(image_index: Tensor, images: int, boundaries: Tensor | None, rows: int) -> None:
    """Raises ValueError unless every image exists and boundaries ascend from 0 to at most `rows`, for CPU tensors."""
    check_index_range("image_index", image_index, images)
    if boundaries is None or boundaries.device.type != "cpu":
        return
    values = boundaries.tolist()
    if values[0] != 0 or values[-1] > rows or any(a > b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"boundaries: expected ascending values from 0 to at most {rows}, got {values}")


torch.library.define(
    "softmask_fast::plan_image_index", "(Tensor image_index, SymInt images, Tensor? boundaries, SymInt rows) -> Tensor"
)


def _plan(image_index, images, boundaries, rows):
    check_sequences(image_index, images, boundaries, rows)
    run = registry.resolve("soft_masked_attention", None, image_index.device)["plan"]
    return run(image_index, images, boundaries, rows)


torch.library.impl("softmask_fast::plan_image_index", "CompositeExplicitAutograd", _plan)


@torch.library.register_fake("softmask_fast::plan_image_index")
def _plan_fake(image_index, images, boundaries, rows):
    return image_index.new_empty(images + 2 + (1 if boundaries is None else 2) * rows, dtype=torch.int32)

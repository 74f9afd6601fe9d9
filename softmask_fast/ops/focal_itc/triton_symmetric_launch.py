"""Launches the kernels of `triton_symmetric.py`: what they cover, sizes, tiles and chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from softmask_fast.ops.focal_itc import triton_symmetric as kernels
from softmask_fast.ops.focal_itc.state import Outputs, Problem, expansion_order
from softmask_fast.ops.triton_support import (
    INTERPRETED,
    Machine,
    device_of,
    element_options,
    machine_of,
    next_power_of_2,
    with_aligned_rows,
)

# Chunks of G are multiples of every tile, and at most 64 MiB of 2-byte elements. H100, 2026-11-27, prototype, forward
# and backward at B 65,536, d 256: 23.2 ms with these, 24.7 with 4,096 rows, 21.8 with chunks of twice 64 MiB.
CHUNK_ROWS, CHUNK_COLUMNS = 8192, 4096
PARTIAL_SUMS = 2**23  # float32 of the forward: 32 MiB for the rows of a chunk, and as many for the columns
MAGNIFY = 4096.0  # |G| is less than 8 relative to the largest grad, so times this it fits float16
ADD_ROWS = 256  # sums per program that adds up partial sums: two per thread of 4 warps; chosen, not timed
GROUP = 8  # row tiles that go through the columns together, as in Triton's tutorial on products; no other was timed


def covers(problem: Problem) -> bool:
    """Whether these parts do it: row i's positive is key i alone, no statistics, elements of 2 bytes."""
    return problem.ids is None and problem.seed is None and problem.image.dtype in (torch.bfloat16, torch.float16)


def tiles(width: int, machine: Machine) -> dict[str, int | bool]:
    """Tile sizes, warps and pipeline stages of the two kernels with a program per tile; `width` is a multiple of 16."""
    if INTERPRETED:
        block_b, block_k, largest_d, warps, stages = 16, 32, 16, 4, 1
    elif machine.capability >= 90:
        # H100, 2026-11-27, prototype, forward and G at B 16,384: d 256 0.41 and 0.54 ms, d 768 0.79 and 0.92 ms. At
        # d 256 8 warps with whole tiles 0.57 and 0.85, (128, 256) with 8 warps 0.54 and 0.70, the same without
        # descriptors 0.62 and 0.83. Not measured on Blackwell, where 4 warps spill.
        block_b, block_k, largest_d, warps, stages = 128, 128, 64, 4 if machine.capability == 90 else 8, 3
    else:
        block_b, block_k, largest_d, warps, stages = 128, 128, 32, 8, 3
    block_d, descriptors = min(largest_d, next_power_of_2(width)), machine.capability >= 90
    return {
        "BLOCK_B": block_b, "BLOCK_K": block_k, "BLOCK_D": block_d, "EVEN": descriptors or width % block_d == 0,
        "GROUP": GROUP, "IN_PARTS": INTERPRETED or descriptors, "TMA": descriptors, "num_warps": warps,
        "num_stages": stages, **machine.launch_options,
    }  # fmt: skip


def finish_tiles(width: int, machine: Machine) -> dict[str, int | bool]:
    """The same of the kernel that ends the forward."""
    block_b = 16 if INTERPRETED else 64 if machine.capability < 100 else 32  # 64 does not compile for Blackwell
    block_d = min(16 if INTERPRETED else 64 if machine.capability else 32, next_power_of_2(width))
    return {
        "BLOCK_B": block_b, "BLOCK_D": block_d, "EVEN": width % block_d == 0, "num_warps": 4, "num_stages": 1,
        **machine.launch_options,
    }  # fmt: skip


def _inputs(image: Tensor, text: Tensor, sizes: dict[str, int | bool]) -> tuple:
    """What the kernels with a program per tile take for image and text."""
    if not sizes["TMA"]:
        return image, text
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, width = image.shape
    descriptors = []
    for tensor, rows in ((image, sizes["BLOCK_B"]), (text, sizes["BLOCK_K"])):
        if batch == 1:  # the stride may be any number
            tensor = tensor.as_strided((1, width), (width, 1))
        elif tensor.stride(0) < width:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        descriptors.append(TensorDescriptor.from_tensor(tensor, [rows, sizes["BLOCK_D"]]))
    return tuple(descriptors)


def forward(problem: Problem, out: Outputs) -> None:
    """Writes the results of both directions."""
    image, text = with_aligned_rows(problem.image, 1), with_aligned_rows(problem.text, 1)
    temperature = problem.temperature
    batch, width = image.shape
    machine = machine_of(image.device)
    sizes, elements = tiles(width, machine), element_options(image.dtype)
    inputs = _inputs(image, text, sizes)
    block = sizes["BLOCK_B"]
    column_tiles = -(-batch // sizes["BLOCK_K"])
    # partial sums of rows are (column_tiles, chunk), of columns (chunk / block, batch)
    chunk = max(1, PARTIAL_SUMS // max(batch, column_tiles * block)) * block
    chunk = min(chunk, batch)
    chunks = -(-batch // chunk)
    row_parts = temperature.new_empty(column_tiles, chunk)
    column_parts = temperature.new_empty(-(-chunk // block), batch)
    row_sums, column_sums = (row_parts, column_parts) if chunks == 1 else temperature.new_empty(2, 1, batch).unbind(0)
    strides = (image.stride(0), text.stride(0))
    with device_of(image):
        for first in range(0, batch, chunk):
            rows = min(chunk, batch - first)
            row_tiles = -(-rows // block)
            kernels.symmetric_sums[(row_tiles * column_tiles,)](
                *inputs, temperature, row_parts, column_parts, *strides, batch, width, first, rows, chunk,
                **sizes, **elements,
            )  # fmt: skip
            if chunks > 1:
                _add(row_parts, row_sums[0, first:], rows, column_tiles, first=True)
                _add(column_parts, column_sums[0], batch, row_tiles, first=first == 0)
        sizes = finish_tiles(width, machine)
        kernels.symmetric_finish[(-(-batch // sizes["BLOCK_B"]),)](
            image, text, temperature, row_sums, column_sums, *out[:3], *strides, batch, width, problem.gamma,
            row_sums.shape[0], column_sums.shape[0], ORDER=expansion_order(problem.gamma), **sizes,
            **elements,
        )  # fmt: skip


def _add(parts: Tensor, sums: Tensor, size: int, count: int, first: bool) -> None:
    """Adds the first `count` rows of parts, `size` columns of them, to the sums."""
    kernels.add_parts[(-(-size // ADD_ROWS),)](parts, sums, size, count, parts.stride(0), FIRST=first, BLOCK_B=ADD_ROWS)


def backward(
    grad_loss: Tensor, problem: Problem, row_state: Tensor, dominant: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and temperature; empty where not wanted.

    Every gradient wanted or not, the kernel is the same, so that each has the same bits alone and with the others.
    """
    (wants_image, wants_text, wants_temperature), temperature = wanted, problem.temperature
    image, text = with_aligned_rows(problem.image, 1), with_aligned_rows(problem.text, 1)
    grad_loss, unpadded = grad_loss.contiguous(), problem.image.shape[1]
    batch, width = image.shape
    sizes = tiles(width, machine_of(image.device))
    inputs, elements = _inputs(image, text, sizes), element_options(image.dtype)
    largest = largest_size(grad_loss)
    chunk_rows, chunk_columns = min(CHUNK_ROWS, batch), min(CHUNK_COLUMNS, batch)
    gradient = image.new_empty(chunk_rows, -(-chunk_columns // 16) * 16)  # rows that begin at multiples of 16 bytes
    sums = [temperature.new_empty(batch, width) if wanted else None for wanted in (wants_image, wants_text)]
    with_products = []
    with device_of(image):
        for first in range(0, batch, chunk_rows):
            rows = slice(first, min(first + chunk_rows, batch))
            for first_column in range(0, batch, chunk_columns):
                columns = slice(first_column, min(first_column + chunk_columns, batch))
                height, breadth = rows.stop - rows.start, columns.stop - columns.start
                programs = -(-height // sizes["BLOCK_B"]) * -(-breadth // sizes["BLOCK_K"])
                with_products.append(temperature.new_empty(programs))
                kernels.symmetric_gradient[(programs,)](
                    grad_loss, largest, *inputs, temperature, row_state, gradient, with_products[-1], image.stride(0),
                    text.stride(0), gradient.stride(0), batch, width, first, first_column, height, breadth, MAGNIFY,
                    **sizes, **elements,
                )  # fmt: skip
                part = gradient[:height, :breadth]
                if wants_image:
                    add_product(sums[0][rows], part, text[columns], first_column == 0)
                if wants_text:
                    add_product(sums[1][columns], part.T, image[rows], first == 0)
    factor = largest / (temperature * MAGNIFY)
    grad_image, grad_text = (
        source.new_empty(0)
        if total is None
        else torch.mul(total[:, :unpadded], factor, out=source.new_empty(batch, unpadded))
        for source, total in zip((image, text), sums, strict=True)
    )
    grad_temperature = temperature.new_empty(0)
    if wants_temperature:
        # it cancels where gains and losses of rows balance, hence float64
        total = torch.cat(with_products).sum(dtype=torch.float64)
        grad_temperature = (-total * factor / temperature).to(temperature.dtype)
    return grad_image, grad_text, grad_temperature


def largest_size(grad_loss: Tensor) -> Tensor:
    """The largest size of the rows' incoming gradients, which gradients of logits are relative to.

    At least 2^-100, so that MAGNIFY / it is finite where all are 0. NaN and infinity do not count: they are for their
    own rows.
    """
    return grad_loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().amax().clamp(min=2.0**-100)


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total = left right, or total += left right, in float32 by the library, in place.

    The same bits every time where the library promises it: with cuBLAS on one stream, or CUBLAS_WORKSPACE_CONFIG set.
    """
    if total.device.type != "cuda" or torch.version.hip is not None:  # there products have the dtype of their inputs
        left, right, widened = left.float(), right.float(), {}
    else:
        widened = {} if left.dtype == torch.float32 else {"out_dtype": torch.float32}
    with full_float32() if left.dtype == torch.float32 else nullcontext():
        if first:
            torch.mm(left, right, **widened, out=total)
        else:
            torch.addmm(total, left, right, **widened, out=total)


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 in float32, whatever the program allows."""
    settings = torch.backends.cuda.matmul
    allowed = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = allowed

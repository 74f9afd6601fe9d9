"""loss="sigmoid" in Triton: kernels with a program per tile of products, and their launches.

As in `triton_symmetric.py` a tile serves both directions of a batch that is its own keys, and the backward writes the
gradient of the logits chunk by chunk and leaves the products with it to the library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask_fast.ops.focal_itc.positives import PositiveLists
from softmask_fast.ops.focal_itc.state import Keys, Rows, expansion_order
from softmask_fast.ops.focal_itc.triton_kernels import add_products, focal, log1p
from softmask_fast.ops.focal_itc.triton_symmetric_launch import (
    CHUNK_COLUMNS,
    CHUNK_ROWS,
    MAGNIFY,
    PARTIAL_SUMS,
    add_product,
    largest_size,
)
from softmask_fast.ops.triton_support import (
    INTERPRETED,
    Machine,
    device_of,
    element_options,
    machine_of,
    next_power_of_2,
    with_aligned_rows,
)
from softmask_fast.ops.triton_tiles import load_tile


@triton.jit
def sigmoid_tile(
    p_x, p_y, p_ids, p_key_ids, p_temperature, p_bias, x_b, y_m, r0, c0, B, M, D, row_offset,
    HAS_IDS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the rows from r0 on with the keys from c0 on; 1 where positive, else -1; log p and 1 - p.

    The scale is one float, not the pair of `load_scales`: no gradients of a row cancel here as the softmax's do.
    """
    row, column = r0 + tl.arange(0, BLOCK_B), c0 + tl.arange(0, BLOCK_K)
    m_rows, m_keys = row < B, column < M
    p_x += r0.to(tl.int64) * x_b
    p_y += c0.to(tl.int64) * y_m
    products = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = load_tile(p_x, tl.arange(0, BLOCK_B) * x_b, d, m_rows, d < D, WIDEN)
        y = load_tile(p_y, tl.arange(0, BLOCK_K) * y_m, d, m_keys, d < D, WIDEN)
        products = add_products(products, x, y, first, PRECISION)
    wanted, found = row + row_offset, column
    if HAS_IDS:
        wanted = tl.load(p_ids + row, mask=m_rows, other=0)
        found = tl.load(p_key_ids + column, mask=m_keys, other=0)
    sign = tl.where(wanted[:, None] == found[None, :], 1.0, -1.0)
    temperature = tl.load(p_temperature)
    scale = tl.div_rn(tl.full(temperature.shape, 1.0, tl.float32), temperature)
    z = (products * scale + tl.load(p_bias) + products * 0.0) * sign  # NaN where a product is not finite
    e = tl.exp(-tl.abs(z))
    return products, sign, tl.minimum(z, 0.0) - log1p(e), tl.where(z > 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def sigmoid_sums(
    p_x, p_y, p_ids, p_key_ids, p_temperature, p_bias, p_row_parts, p_column_parts,
    x_b, y_m, B, M, D, first_row, rows, row_offset, row_parts_n, gamma,
    ORDER: tl.constexpr, HAS_IDS: tl.constexpr, BOTH: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(rows, BLOCK_B), cdiv(M, BLOCK_K)): the loss of a tile of the rows first_row ... first_row + rows.

    Its row sums, row_parts (cdiv(M, BLOCK_K), row_parts_n) from first_row on, and with BOTH its column sums,
    column_parts (cdiv(rows, BLOCK_B), M).
    """
    i, j = tl.program_id(0), tl.program_id(1)
    r0, c0 = first_row + i * BLOCK_B, j * BLOCK_K
    _, _, log_p, one_minus_p = sigmoid_tile(
        p_x, p_y, p_ids, p_key_ids, p_temperature, p_bias, x_b, y_m, r0, c0, B, M, D, row_offset,
        HAS_IDS, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN, PRECISION,
    )  # fmt: skip
    row, column = r0 + tl.arange(0, BLOCK_B), c0 + tl.arange(0, BLOCK_K)
    loss, _ = focal(log_p, one_minus_p, gamma, ORDER)
    loss = tl.where((row < first_row + rows)[:, None] & (column < M)[None, :], loss, 0.0)
    p_row_parts += j.to(tl.int64) * row_parts_n + row - first_row
    tl.store(p_row_parts, tl.sum(loss, 1), mask=row < first_row + rows)
    if BOTH:
        tl.store(p_column_parts + i.to(tl.int64) * M + column, tl.sum(loss, 0), mask=column < M)


@triton.jit
def sigmoid_gradient(
    p_grad, p_key_grad, p_largest, p_x, p_y, p_ids, p_key_ids, p_temperature, p_bias, p_gradient, p_totals,
    x_b, y_m, gradient_b, B, M, D, first_row, first_column, rows, columns, row_offset, gamma, magnify,
    ORDER: tl.constexpr, HAS_IDS: tl.constexpr, BOTH: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(rows, BLOCK_B), cdiv(columns, BLOCK_K)): a tile of a chunk of the gradient of the logits.

    gradient (rows, columns): relative to the largest size of the losses' gradients, times `magnify`, so that float16
    keeps small ones. totals (2, cdiv(columns, BLOCK_K), rows): the row sums of gradient times products, and of the
    gradient. The losses' gradients are grad (B,) of the rows, with BOTH also key_grad (M,) of the columns.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    r0, c0 = first_row + i * BLOCK_B, first_column + j * BLOCK_K
    products, sign, log_p, one_minus_p = sigmoid_tile(
        p_x, p_y, p_ids, p_key_ids, p_temperature, p_bias, x_b, y_m, r0, c0, B, M, D, row_offset,
        HAS_IDS, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN, PRECISION,
    )  # fmt: skip
    row, column = r0 + tl.arange(0, BLOCK_B), c0 + tl.arange(0, BLOCK_K)
    m_rows, m_columns = row < first_row + rows, column < first_column + columns
    weight = tl.load(p_grad + row, mask=m_rows, other=0.0)[:, None]
    if BOTH:
        weight = weight + tl.load(p_key_grad + column, mask=m_columns, other=0.0)[None, :]
    _, slope = focal(log_p, one_minus_p, gamma, ORDER)
    gradient = slope * one_minus_p * (weight * (magnify / tl.load(p_largest))) * -sign
    gradient = tl.where(m_rows[:, None] & m_columns[None, :], gradient, 0.0)
    # as rows: Triton 3.6 fails for sm_100 where products are reduced to a row, and it to one number
    p_totals += j.to(tl.int64) * rows + row - first_row
    tl.store(p_totals, tl.sum(gradient * products, 1), mask=m_rows)
    tl.store(p_totals + tl.num_programs(1).to(tl.int64) * rows, tl.sum(gradient, 1), mask=m_rows)
    o_gradient = (row - first_row)[:, None] * gradient_b + (column - first_column)[None, :]
    mask = m_rows[:, None] & m_columns[None, :]
    tl.store(p_gradient + o_gradient, gradient.to(p_gradient.dtype.element_ty), mask=mask)


def tiles(dtype: torch.dtype, width: int, machine: Machine) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages; by what compiles without spills, not timed."""
    if INTERPRETED:
        sizes = 16, 32, 16, 4, 1
    elif dtype == torch.float32:
        sizes = 64, 64, 32, 8, 1
    else:  # the larger tile spills registers from Hopper on, and with few columns anywhere
        sizes = 128 if machine.capability < 90 and width > 32 else 64, 64, 64, 8, 3
    block_d = min(sizes[2], next_power_of_2(width))
    options = dict(BLOCK_B=sizes[0], BLOCK_K=sizes[1], BLOCK_D=block_d, num_warps=sizes[3], num_stages=sizes[4])
    return {**options, **machine.launch_options}


class _Launch:
    """What both kernels take of one matrix of products."""

    def __init__(self, rows: Rows, keys: Keys, both: bool) -> None:
        self.x, self.y = with_aligned_rows(rows.features, 1), with_aligned_rows(keys.features, 1)
        ids, key_ids = (None if rows.ids is None else part.ids.contiguous() for part in (rows, keys))
        (self.batch, self.width), self.keys = self.x.shape, self.y.shape[0]
        self.inputs = self.x, self.y, ids, key_ids, rows.temperature, rows.options.bias
        self.strides, self.gamma = (self.x.stride(0), self.y.stride(0)), rows.options.gamma
        self.row_offset = rows.options.row_offset - keys.first
        self.sizes = tiles(self.x.dtype, self.width, machine_of(self.x.device))
        self.options = dict(
            ORDER=expansion_order(self.gamma),
            HAS_IDS=ids is not None,
            BOTH=both,
            **self.sizes,
            **element_options(self.x.dtype),
        )

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        return triton.cdiv(rows, self.sizes["BLOCK_B"]), triton.cdiv(columns, self.sizes["BLOCK_K"])


def add_losses(rows: Rows, keys: Keys, positives: PositiveLists | None, losses: Tensor) -> None:
    """See `sigmoid.parts`."""
    both = len(losses) == 2
    launch = _Launch(rows, keys, both)
    batch, total, block = launch.batch, launch.keys, launch.sizes["BLOCK_B"]
    column_tiles = launch.grid(1, total)[1]
    chunk = min(max(1, PARTIAL_SUMS // max(total, column_tiles * block)) * block, batch)
    row_parts = losses.new_empty(column_tiles, chunk)
    column_parts = losses.new_empty(triton.cdiv(chunk, block), total if both else 0)
    with device_of(launch.x):
        for first in range(0, batch, chunk):
            height = min(chunk, batch - first)
            grid = launch.grid(height, total)
            sigmoid_sums[grid](
                *launch.inputs, row_parts, column_parts, *launch.strides, batch, total, launch.width, first, height,
                launch.row_offset, chunk, launch.gamma, **launch.options,
            )  # fmt: skip
            losses[0, first : first + height] += row_parts[:, :height].sum(0)
            if both:
                losses[1] += column_parts[: grid[0]].sum(0)


def gradients(grad_loss: Tensor, rows: Rows, keys: Keys, wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """See `sigmoid.parts`."""
    temperature, grad_loss = rows.temperature, grad_loss.contiguous()
    largest = largest_size(grad_loss)
    scale, totals = largest / MAGNIFY, []
    launch = _Launch(rows, keys, len(grad_loss) == 2)
    x, y, batch, total = launch.x, launch.y, launch.batch, launch.keys
    # the bytes that the chunks of `triton_symmetric_launch.py` have with 2-byte elements
    chunk_rows, chunk_columns = min(2 * CHUNK_ROWS // x.element_size(), batch), min(CHUNK_COLUMNS, total)
    chunk = x.new_empty(chunk_rows, -(-chunk_columns // 16) * 16)  # rows that begin at multiples of 16 bytes
    sums = [
        temperature.new_empty(source.shape) if wants else None for source, wants in zip((x, y), wanted[:2], strict=True)
    ]
    with device_of(x):
        for first in range(0, batch, chunk_rows):
            for first_column in range(0, total, chunk_columns):
                part = slice(first, min(first + chunk_rows, batch))
                columns = slice(first_column, min(first_column + chunk_columns, total))
                shape = part.stop - part.start, columns.stop - columns.start
                grid = launch.grid(*shape)
                parts = temperature.new_empty(2, grid[1], shape[0])
                sigmoid_gradient[grid](
                    grad_loss[0], grad_loss[-1], largest, *launch.inputs, chunk, parts, *launch.strides,
                    chunk.stride(0), batch, total, launch.width, first, first_column, *shape, launch.row_offset,
                    launch.gamma, MAGNIFY, **launch.options,
                )  # fmt: skip
                totals.append(parts.sum((1, 2), dtype=torch.float64))
                gradient = chunk[: shape[0], : shape[1]]
                if wanted[0]:
                    add_product(sums[0][part], gradient, y[columns], first_column == 0)
                if wanted[1]:
                    add_product(sums[1][columns], gradient.T, x[part], first == 0)
    features = [
        x.new_empty(0) if found is None else (found[:, : rows.features.shape[1]] * (scale / temperature)).to(x.dtype)
        for found in sums
    ]
    with_products, alone = torch.stack(totals).sum(0) * scale
    grad_temperature = (-with_products / temperature.double() ** 2).to(temperature.dtype)
    return *features, grad_temperature, alone.to(temperature.dtype)

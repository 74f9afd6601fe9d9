"""Launches the kernels of the focal contrastive loss: sizes, tiles and grids."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from softmask_fast.ops.focal_itc import triton_backward, triton_finish, triton_kernels
from softmask_fast.ops.focal_itc.operators import ROW_STATES
from softmask_fast.ops.focal_itc.positives import positive_lists
from softmask_fast.ops.focal_itc.reference import Options
from softmask_fast.ops.focal_itc.sampling import stream_keys
from softmask_fast.ops.triton_support import INTERPRETED, device_of, element_options, next_power_of_2

LARGEST_WIDTH = 1024
MERGE_ROWS = 128  # rows per program of the kernels without products


def tiles(kernel: str, dtype: torch.dtype, width: int, large: bool) -> dict[str, int | bool]:
    """Tile sizes, warps and pipeline stages of a kernel. ``large``: at least 200 KiB of shared memory per program.

    Chosen by sizes alone, not timed at run time: another tile is another order of summation, and results must be the
    same bit for bit in every run.
    """
    block_d = max(16, next_power_of_2(width))
    backward = kernel in ("grad_rows", "grad_keys")
    if INTERPRETED:
        sizes = (16, 32, min(block_d, 32))
        options = {"num_warps": 4, "num_stages": 1}
    elif dtype == torch.float32:
        sizes = (32, 32, min(block_d, 64))
        options = {"num_warps": 4, "num_stages": 2 if large else 1}
    elif large:
        sizes = (64, 64, min(block_d, 256))
        options = {"num_warps": 8, "num_stages": 2}
    else:
        sizes = (64, 32 if backward else 64, min(block_d, 128))
        options = {"num_warps": 4, "num_stages": 1}
    blocks = dict(zip(("BLOCK_B", "BLOCK_K", "BLOCK_D"), sizes, strict=True))
    if backward:
        blocks["BLOCK_C"] = blocks["BLOCK_D"]
    return {**blocks, "RESIDENT": block_d == blocks["BLOCK_D"], **options}


def obstacle(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The obstacle of this implementation."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"it runs on a GPU (or, slowly, with TRITON_INTERPRET=1 in the environment), the tensors are on {device}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {dtype}"
    if width > LARGEST_WIDTH:
        return f"it takes features of up to {LARGEST_WIDTH} elements, not {width}"
    return None


def _is_large(device: torch.device) -> bool:
    if INTERPRETED:
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 200 * 1024


def _split(rows: int, keys: int, block_rows: int, block_keys: int, device: torch.device) -> tuple[int, int]:
    """Number of splits of the keys, and keys per split: enough programs for the device, whatever the number of rows."""
    programs = 6 if INTERPRETED else 2 * torch.cuda.get_device_properties(device).multi_processor_count
    tiles_of_keys = -(-keys // block_keys)
    wanted = min(-(-programs // -(-rows // block_rows)), tiles_of_keys)
    tiles_per_split = -(-tiles_of_keys // wanted)
    return -(-tiles_of_keys // tiles_per_split), tiles_per_split * block_keys


def _order(gamma: float) -> int:
    """gamma where (1 - p)^gamma is expanded in powers of p, else -1."""
    return int(gamma) if gamma in (0, 1, 2, 3) else -1


def _strides(rows: Tensor, teacher_rows: Tensor | None, keys: Tensor) -> tuple[int, ...]:
    return (*rows.stride(), *((0, 0) if teacher_rows is None else teacher_rows.stride()), *keys.stride())


def forward(
    rows: Tensor,
    keys: Tensor,
    temperature: Tensor,
    teacher_rows: Tensor | None,
    ids: Tensor | None,
    key_ids: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (B,), row_state (9, B), dominant (B,), statistics (3, B), hard_negative (B,); see ``operators``."""
    (batch, width), total = rows.shape, keys.shape[0]
    order = _order(options.gamma)
    terms = max(order, 0) + 1
    count = None
    if ids is not None:
        ids, key_ids = ids.contiguous(), key_ids.contiguous()
        count = positive_lists(rows, ids, key_ids, options.row_offset).count
    loss = temperature.new_empty(batch)
    row_state = temperature.new_empty(ROW_STATES, batch)
    dominant = temperature.new_empty(batch, dtype=torch.int64)
    statistics = temperature.new_empty(3, batch if options.stats else 0)
    hard_negative = temperature.new_empty(batch if options.stats else 0, dtype=torch.int64)
    flags = {"HAS_TEACHER": teacher_rows is not None}
    sizes = tiles("row_sums", rows.dtype, width, _is_large(rows.device))
    splits, keys_per_split = _split(batch, total, sizes["BLOCK_B"], sizes["BLOCK_K"], rows.device)
    sums = temperature.new_empty(splits, triton_kernels.SUMS.value, batch)
    places = temperature.new_empty(splits, triton_kernels.PLACES.value, batch, dtype=torch.int32)
    grid = (-(-batch // sizes["BLOCK_B"]), splits)
    merge_grid = (-(-batch // MERGE_ROWS),)
    inputs = (rows, teacher_rows, keys, ids, key_ids, temperature, sums, places)
    strides = _strides(rows, teacher_rows, keys)
    with device_of(rows):
        triton_kernels.row_sums[grid](
            *inputs, *strides, batch, total, width, options.row_offset, options.first_negative, options.last_negative,
            *stream_keys(options.seed, options.direction), keys_per_split, TERMS=terms, HAS_IDS=ids is not None,
            STATS=options.stats, **flags, **sizes, **element_options(rows.dtype),
        )  # fmt: skip
        triton_finish.merge[merge_grid](
            sums, places, temperature, batch, splits, TERMS=terms, **flags, BLOCK_B=MERGE_ROWS
        )
        row_terms = None
        if order < 0:
            row_terms = temperature.new_empty(splits, 4, batch)
            triton_kernels.row_terms[grid](
                *inputs, row_terms, *strides, batch, total, width, options.row_offset, options.gamma, keys_per_split,
                HAS_IDS=ids is not None, **flags, **sizes, **element_options(rows.dtype),
            )  # fmt: skip
        triton_finish.finish[merge_grid](
            sums, places, row_terms, count, temperature, loss, row_state, dominant, statistics, hard_negative,
            batch, splits, options.gamma, options.alpha,
            ORDER=order, ANY=options.any_positive, STATS=options.stats, **flags, BLOCK_B=MERGE_ROWS,
        )  # fmt: skip
    return loss, row_state, dominant, statistics, hard_negative


def backward(
    grad_loss: Tensor,
    rows: Tensor,
    keys: Tensor,
    temperature: Tensor,
    teacher_rows: Tensor | None,
    ids: Tensor | None,
    key_ids: Tensor | None,
    row_state: Tensor,
    dominant: Tensor,
    wants_rows: bool,
    wants_keys: bool,
    wants_temperature: bool,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, keys and temperature; empty where not wanted."""
    (batch, width), total = rows.shape, keys.shape[0]
    grad_loss = grad_loss.contiguous()
    if ids is not None:
        ids, key_ids = ids.contiguous(), key_ids.contiguous()
    flags = {
        "ORDER": _order(options.gamma), "ANY": options.any_positive, "HAS_TEACHER": teacher_rows is not None,
        "HAS_IDS": ids is not None, **element_options(rows.dtype),
    }  # fmt: skip
    inputs = (rows, teacher_rows, keys, ids, key_ids, temperature, row_state, dominant)
    strides = _strides(rows, teacher_rows, keys)
    scalars = (batch, total, width, options.row_offset, options.gamma, options.alpha)
    large = _is_large(rows.device)
    grad_rows, grad_keys, grad_temperature = rows.new_empty(0), keys.new_empty(0), temperature.new_empty(0)
    with device_of(rows):
        if wants_rows or wants_temperature:
            sizes = tiles("grad_rows", rows.dtype, width, large)
            splits, keys_per_split = _split(batch, total, sizes["BLOCK_B"], sizes["BLOCK_K"], rows.device)
            dtype = rows.dtype if splits == 1 else torch.float32
            partial = rows.new_empty((splits, batch, width) if wants_rows else 0, dtype=dtype)
            grad_inverse = temperature.new_empty(splits, batch)
            columns = -(-width // sizes["BLOCK_C"]) if wants_rows else 1
            triton_backward.grad_rows[(-(-batch // sizes["BLOCK_B"]), splits, columns)](
                grad_loss, *inputs, partial, grad_inverse, *strides, *scalars, keys_per_split, WANTS_ROWS=wants_rows,
                **flags, **sizes,
            )  # fmt: skip
            if wants_rows:
                grad_rows = partial[0] if splits == 1 else partial.sum(0).to(rows.dtype)
            if wants_temperature:
                grad_temperature = -grad_inverse.sum()
        if wants_keys:
            sizes = tiles("grad_keys", rows.dtype, width, large)
            grad_keys = keys.new_empty(keys.shape)
            scale = grad_loss.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            triton_backward.grad_keys[(-(-total // sizes["BLOCK_K"]), -(-width // sizes["BLOCK_C"]))](
                grad_loss, scale, *inputs, grad_keys, *strides, *scalars, **flags, **sizes
            )
    return grad_rows, grad_keys, grad_temperature

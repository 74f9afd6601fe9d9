"""Launches the kernels of ``triton_kernels.py``: sizes, tiles and grids."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops.soft_masked_attention import triton_kernels as kernels
from softmask_fast.ops.triton_support import (
    INTERPRETED,
    Machine,
    device_of,
    element_options,
    machine_of,
    next_power_of_2,
    strides,
    with_aligned_rows,
    with_dense_rows,
)


def tiles(kernel: str, dtype: torch.dtype, width: int, rows: int, machine: Machine) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages of a kernel for heads of ``width`` and ``rows`` stacked rows per image.

    Chosen by sizes alone, not timed at run time: another tile is another order of summation, and results must be the
    same bit for bit in every run. That none of them spills registers is what tests/test_aot.py is for.
    """
    block_d = max(16, next_power_of_2(width))
    half, wide = dtype != torch.float32, block_d > 64
    block_c = block_d if half else max(16, min(block_d // 2, 32))
    if INTERPRETED:
        sizes = (16, 32, 1, 4)
    elif not half:
        sizes = (16 if kernel == "backward_key_value" else 32, 32, 1, 8 if wide and machine.capability else 4)
    else:
        hopper = machine.capability == 90
        block_m = 64 if rows > 32 else 32
        # BLOCK_M, BLOCK_N, num_stages, num_warps
        sizes = {
            "forward": (32 if wide and not hopper else block_m, 64 if hopper and block_d == 64 else 32, 2, 4),
            "backward_query": (32 if wide else block_m, 32, 2 if wide else 1, 4),
            "backward_key_value": (32, 32 if wide else 64, 1, 4),
            "backward_keep": (16 if wide else 32, 32, 1, 4),
        }[kernel]
    chosen = dict(zip(("BLOCK_M", "BLOCK_N", "num_stages", "num_warps"), sizes, strict=True))
    return chosen | {"BLOCK_D": block_d, "BLOCK_C": block_c, **machine.launch_options}


def _plan(image_index: Tensor | None, images: int) -> tuple[Tensor | None, Tensor | None]:
    if image_index is None:
        return None, None
    sequences = len(image_index)
    starts = torch.empty(images + 2, dtype=torch.int32, device=image_index.device)
    order = torch.empty(sequences, dtype=torch.int32, device=image_index.device)
    block = 64 if INTERPRETED else 1024
    kernels.plan[(images + 1,)](image_index.contiguous(), starts, order, sequences, images, BLOCK=block)
    return starts, order


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    image_index: Tensor | None,
    value_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    result = torch.empty_like(query)
    query, key, value = with_aligned_rows(query, 1), with_aligned_rows(key, 2), with_aligned_rows(value, 2)
    value_bias, keep, output = with_aligned_rows(value_bias, 1), with_dense_rows(keep, 2), _room_for(result)
    sequences, heads, length, width = query.shape
    images, _, tokens, _ = key.shape
    statistics = query.new_empty((sequences, heads, length, 2), dtype=torch.float32)
    if query.numel() == 0:
        return result, statistics
    with device_of(query):
        starts, order = _plan(image_index, images)
        rows = -(-sequences * length // max(images, 1))
        options = tiles("forward", query.dtype, width, rows, machine_of(query.device))
        split = -(-rows // options["BLOCK_M"])
        kernels.forward[(split * heads * _groups(images, image_index),)](
            query, key, value, keep, value_bias, key_mask, starts, order, output, statistics,
            *query.stride(), *key.stride(), *value.stride(), *output.stride(),
            *strides(keep, 2), *strides(value_bias, 2), *strides(key_mask, 2),
            images, heads, length, tokens, width, scale, split,
            HAS_INDEX=image_index is not None, HAS_KEEP=keep is not None, HAS_BIAS=value_bias is not None,
            HAS_MASK=key_mask is not None, **element_options(query.dtype), **options,
        )  # fmt: skip
    return _cut_to(result, output), statistics


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    image_index: Tensor | None,
    value_bias: Tensor | None,
    key_mask: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    scale: float,
    query_gradient: bool,
    key_value_gradient: bool,
    keep_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = query.new_empty(0)
    results = [torch.empty_like(tensor) for tensor in ((query, key, value) if key_value_gradient else (query,))]
    d_query, d_key, d_value = [_room_for(result) for result in results] + [nothing] * (3 - len(results))
    output, value_bias = with_aligned_rows(output, 1), with_aligned_rows(value_bias, 1)
    grad_output, query = with_aligned_rows(grad_output, 1), with_aligned_rows(query, 1)
    key, value, keep = with_aligned_rows(key, 2), with_aligned_rows(value, 2), with_dense_rows(keep, 2)
    sequences, heads, length, width = query.shape
    images, _, tokens, _ = key.shape
    d_keep = query.new_empty((sequences, tokens), dtype=torch.float32) if keep_gradient else nothing
    delta = query.new_empty((sequences, heads, length), dtype=torch.float32)
    if query.numel() == 0:
        gradients = [result.zero_() for result in results] + [nothing] * (3 - len(results))
        return *gradients, d_keep.zero_() if keep is None else d_keep.zero_().to(keep.dtype)
    inputs = (*grad_output.stride(), *query.stride(), *key.stride(), *value.stride())
    common = {"HAS_INDEX": image_index is not None, "HAS_MASK": key_mask is not None, **element_options(query.dtype)}
    exact = {"EXACT_DELTA": query.dtype == torch.float32}
    with device_of(query):
        starts, order = _plan(image_index, images)
        rows = -(-sequences * length // max(images, 1))
        options = tiles("backward_query", query.dtype, width, rows, machine_of(query.device))
        split = -(-rows // options["BLOCK_M"])
        kernels.backward_query[(split * heads * _groups(images, image_index),)](
            grad_output, query, key, value, keep, value_bias, key_mask, starts, order, output, statistics, delta,
            d_query,
            *inputs, *output.stride(), *d_query.stride(),
            *strides(keep, 2), *strides(value_bias, 2), *strides(key_mask, 2),
            images, heads, length, tokens, width, scale, split,
            HAS_KEEP=keep is not None, HAS_BIAS=value_bias is not None, **exact, **common, **options,
        )  # fmt: skip
        if key_value_gradient:
            options = tiles("backward_key_value", query.dtype, width, rows, machine_of(query.device))
            kernels.backward_key_value[(-(-tokens // options["BLOCK_N"]), heads, images)](
                grad_output, query, key, value, keep, key_mask, starts, order, statistics, delta, d_key, d_value,
                *inputs, *d_key.stride(), *d_value.stride(), *strides(keep, 2), *strides(key_mask, 2),
                heads, length, tokens, width, scale,
                HAS_KEEP=keep is not None, **exact, **common, **options,
            )  # fmt: skip
        if keep_gradient:
            options = tiles("backward_keep", query.dtype, width, rows, machine_of(query.device))
            kernels.backward_keep[(-(-tokens // options["BLOCK_N"]), sequences)](
                grad_output, query, key, value, keep, key_mask,
                None if image_index is None else image_index.contiguous(), statistics, delta, d_keep,
                *inputs, *keep.stride(), *strides(key_mask, 2),
                images, heads, length, tokens, width, scale, **common, **options,
            )  # fmt: skip
            d_keep = d_keep.to(keep.dtype)
    gradients = [_cut_to(*pair) for pair in zip(results, (d_query, d_key, d_value), strict=False)]
    d_query, d_key, d_value = gradients + [nothing] * (3 - len(gradients))
    return d_query if query_gradient else nothing, d_key, d_value, d_keep


def _room_for(result: Tensor) -> Tensor:
    """What the kernels write in place of ``result``: itself, or wider rows, see ``with_aligned_rows``."""
    missing = -result.shape[-1] % 16
    return result.new_empty(*result.shape[:-1], result.shape[-1] + missing) if missing else result


def _cut_to(result: Tensor, room: Tensor) -> Tensor:
    return result if room is result else result.copy_(room[..., : result.shape[-1]])


def _groups(images: int, image_index: Tensor | None) -> int:
    """Images, and one more group for sequences whose image does not exist."""
    return images if image_index is None else images + 1

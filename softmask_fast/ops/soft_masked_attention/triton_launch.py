"""Launches the kernels of `triton_kernels.py`: sizes, tiles and grids."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops.soft_masked_attention import triton_kernels as kernels
from softmask_fast.ops.soft_masked_attention import triton_plan
from softmask_fast.ops.triton_support import (
    INTERPRETED,
    Machine,
    device_of,
    element_options,
    machine_of,
    next_power_of_2,
    strides,
    with_aligned_rows,
)

ONE_TILE = 128  # the most rows of a tile
LARGEST_GRID = 65_535  # CUDA's limit of all dimensions but the first
IMAGES_PER_PROGRAM = 8  # of `backward_key_value` where most images leave it nothing to do


def tiles(
    kernel: str, dtype: torch.dtype, width: int, rows: int, machine: Machine, own_keys: bool = False, keep: bool = True
) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages of a kernel for heads of `width` and `rows` stacked rows per image.

    Chosen by sizes alone, not timed at run time: another tile is another order of summation, and results must be the
    same bit for bit in every run. That none of them spills registers is what tests/test_aot.py is for. `own_keys` is
    asked for where `backward_rows` can write dK and dV, see `can_own_keys`.
    """
    block_d = max(16, next_power_of_2(width))
    half, wide = dtype != torch.float32, block_d > 64
    block_c = block_d if half else max(16, min(block_d // 2, 32))
    block_m = min(max(next_power_of_2(rows + rows // 3), 32), ONE_TILE)  # `rows` is an average: most images fit
    if INTERPRETED:
        sizes = (16, 32, 1, 4)
    elif not half:  # the largest that do not spill; not timed
        sizes = (16 if kernel == "backward_key_value" else 32, 32, 1, 8 if wide and machine.capability else 4)
    else:
        hopper = machine.capability == 90
        small_m = 64 if rows > 32 else 32
        # BLOCK_M, BLOCK_N, num_stages, num_warps
        if kernel == "forward" and hopper and not wide:
            # H100, 2026-11-27, prototype, S 1,024, B 256, L 30, N 257: 203 us; 8 warps: 269; 64 keys, 8 warps,
            # 2 stages: 403; 64 x 64, 2 stages, two programs an image: 440. Only tiles of 128 rows were timed.
            sizes = (block_m, 32, 3, 4)
        elif own_keys:
            # the same run: 428 us; 8 warps: 604 (460 with 128 registers); 64 keys, 8 warps: 595; dQ and dK, dV in two
            # kernels: 1,177. Only tiles of 128 rows were timed. Without keep 2 stages spill a register.
            sizes = (block_m, 32, 2 if keep else 3, 4)
        elif kernel == "backward_rows" and hopper and not wide:
            # the same run, dQ alone: 302 us; 1 stage: 349
            sizes = (small_m, 32, 3, 4)
        else:  # sm_80, Blackwell, AMD, wide heads: the largest that do not spill; not timed
            sizes = {
                "forward": (32 if wide and not hopper else small_m, 32, 2, 4),
                "backward_rows": (32 if wide else small_m, 32, 2 if wide else 1, 4),
                "backward_key_value": (32, 32 if wide else 64, 1, 4),
                "backward_keep": (16 if wide else 32, 32, 1, 4),
            }[kernel]
    chosen = dict(zip(("BLOCK_M", "BLOCK_N", "num_stages", "num_warps"), sizes, strict=True))
    return chosen | {"BLOCK_D": block_d, "BLOCK_C": block_c, **machine.launch_options}


def can_own_keys(
    dtype: torch.dtype, width: int, rows: int, indexed: bool, masked: bool, machine: Machine, packed: bool = False
) -> bool:
    """Whether `backward_rows` is to write dK and dV of the images whose rows fit one tile.

    It spills registers with a key mask, for wide heads, on sm_100, and packed on sm_80; it is not measured on AMD, and
    a float32 tile has too few rows for it. Without an index a tile of 128 rows spills one register in float16, so it is
    kept to 64.
    """
    capability = machine.capability
    spills = masked or width > 64 or capability >= 100 or (packed and capability == 80)
    fits = dtype != torch.float32 and capability > 0 and rows <= (ONE_TILE if indexed else 48)
    return INTERPRETED or (fits and not spills)


def plan(image_index: Tensor, images: int, boundaries: Tensor | None, rows: int) -> Tensor:
    packed = boundaries is not None
    table = torch.empty(images + 2 + (2 if packed else 1) * rows, dtype=torch.int32, device=image_index.device)
    with device_of(image_index):
        triton_plan.plan[(images + 1,)](
            image_index.contiguous(), boundaries.contiguous() if packed else None, table,
            len(image_index), images, rows, PACKED=packed, BLOCK=64 if INTERPRETED else 1024,
        )  # fmt: skip
    return table


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    image_index: Tensor | None,
    boundaries: Tensor | None,
    table: Tensor | None,
    value_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    result, packed = torch.empty_like(query), boundaries is not None
    query = with_aligned_rows(query, 1 + packed)  # packed rows are found by 32-bit offsets
    key, value = with_aligned_rows(key, 2), with_aligned_rows(value, 2)
    value_bias, keep, output = with_aligned_rows(value_bias, 1), with_aligned_rows(keep, 2), _room_for(result, packed)
    if packed and value_bias is not None:
        output.copy_(value_bias[None, :, None])
    sequences, heads, length, width = query.shape
    images, _, tokens, _ = key.shape
    statistics = query.new_empty((sequences, heads, length, 2), dtype=torch.float32)
    if query.numel() == 0:
        return result, statistics
    with device_of(query):
        if image_index is not None and table is None:
            table = plan(image_index, images, boundaries, sequences * length if packed else sequences)
        rows = -(-sequences * length // max(images, 1))
        options = tiles("forward", query.dtype, width, rows, machine_of(query.device))
        split = -(-rows // options["BLOCK_M"])
        kernels.forward[(split * heads * _groups(images, image_index),)](
            query, key, value, keep, value_bias, key_mask, table, output, statistics,
            *query.stride(), *key.stride(), *value.stride(), *output.stride(),
            *strides(keep, 2)[:1], *strides(value_bias, 2), *strides(key_mask, 2),
            images, heads, length, tokens, width, _columns(keep), scale, split,
            HAS_KEEP=keep is not None, HAS_BIAS=value_bias is not None,
            **_common_options(query, image_index, packed, key_mask), **options,
        )  # fmt: skip
    return _cut_to(result, output), statistics


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    image_index: Tensor | None,
    boundaries: Tensor | None,
    table: Tensor | None,
    value_bias: Tensor | None,
    key_mask: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    scale: float,
    query_gradient: bool,
    key_value_gradient: bool,
    keep_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing, packed = query.new_empty(0), boundaries is not None
    results = [torch.empty_like(tensor) for tensor in ((query, key, value) if key_value_gradient else (query,))]
    d_query, d_key, d_value = [_room_for(result, packed and result is results[0]) for result in results] + [nothing] * (
        3 - len(results)
    )
    value_bias = with_aligned_rows(value_bias, 1)
    output, grad_output, query = (with_aligned_rows(rows, 1 + packed) for rows in (output, grad_output, query))
    key, value, kept = with_aligned_rows(key, 2), with_aligned_rows(value, 2), with_aligned_rows(keep, 2)
    sequences, heads, length, width = query.shape
    images, _, tokens, _ = key.shape
    d_keep = query.new_empty(keep.shape, dtype=torch.float32) if keep_gradient else nothing
    delta = query.new_empty((sequences, heads, length), dtype=torch.float32)
    if query.numel() == 0:
        gradients = [result.zero_() for result in results] + [nothing] * (3 - len(results))
        return *gradients, d_keep.zero_() if keep is None else d_keep.zero_().to(keep.dtype)
    inputs = (*grad_output.stride(), *query.stride(), *key.stride(), *value.stride())
    masks = (*strides(kept, 2)[:1], *strides(key_mask, 2))
    sizes = (images, heads, length, tokens, width, _columns(kept), scale)
    common = _common_options(query, image_index, packed, key_mask)
    with device_of(query):
        machine = machine_of(query.device)
        if image_index is not None and table is None:
            table = plan(image_index, images, boundaries, sequences * length if packed else sequences)
        rows = -(-sequences * length // max(images, 1))
        # How many rows each image has is known on the device alone. Where they are few on average, the first kernel
        # finishes the images that fit its tile, and the second one looks for the others, if there can be any.
        own_keys = key_value_gradient and can_own_keys(
            query.dtype, width, rows, image_index is not None, key_mask is not None, machine, packed
        )
        options = tiles("backward_rows", query.dtype, width, rows, machine, own_keys, keep is not None)
        fitting = options["BLOCK_M"] if own_keys else -1
        split = 1 if own_keys else -(-rows // options["BLOCK_M"])
        kernels.backward_rows[(split * heads * _groups(images, image_index),)](
            grad_output, query, key, value, kept, value_bias, key_mask, table, output, statistics, delta,
            d_query, d_key, d_value,
            *inputs, *output.stride(), *d_query.stride(),
            *strides(d_key if own_keys else None, 4), *strides(d_value if own_keys else None, 4),
            masks[0], *strides(value_bias, 2), *masks[1:],
            *sizes, split,
            OWNS_KEYS=own_keys, HAS_KEEP=keep is not None, HAS_BIAS=value_bias is not None, **common, **options,
        )  # fmt: skip
        most = length if image_index is None else sequences * length
        if key_value_gradient and most > fitting:
            chunk = IMAGES_PER_PROGRAM if own_keys else 1
            options = tiles("backward_key_value", query.dtype, width, rows, machine)
            chunks = -(-images // chunk)
            for first in range(0, chunks, LARGEST_GRID):
                grid = (-(-tokens // options["BLOCK_N"]), heads, min(chunks - first, LARGEST_GRID))
                kernels.backward_key_value[grid](
                    grad_output, query, key, value, kept, key_mask, table, statistics, delta, d_key, d_value,
                    *inputs, *d_key.stride(), *d_value.stride(), *masks, *sizes, fitting, first,
                    CHUNK=chunk, HAS_KEEP=keep is not None, **common, **options,
                )  # fmt: skip
        if keep_gradient:
            options = tiles("backward_keep", query.dtype, width, rows, machine)
            kernels.backward_keep[(-(-tokens // options["BLOCK_N"]) * len(keep),)](
                grad_output, query, key, value, kept, key_mask,
                None if image_index is None else image_index.contiguous(),
                boundaries.contiguous() if packed else None, statistics, delta, d_keep,
                *inputs, *masks, *sizes, **common, **options,
            )  # fmt: skip
            d_keep = d_keep.to(keep.dtype)
    gradients = [_cut_to(*pair) for pair in zip(results, (d_query, d_key, d_value), strict=False)]
    d_query, d_key, d_value = gradients + [nothing] * (3 - len(gradients))
    return d_query if query_gradient else nothing, d_key, d_value, d_keep


def _room_for(result: Tensor, zeroed: bool) -> Tensor:
    """What the kernels write in place of `result`: itself, or wider rows, see `with_aligned_rows`. Zeroed where
    packed rows may belong to no sequence, whom no kernel visits.
    """
    missing = -result.shape[-1] % 16
    far = zeroed and result.shape[2] * result.stride(2) >= 2**31
    room = result.new_empty(*result.shape[:-1], result.shape[-1] + missing) if missing or far else result
    return room.zero_() if zeroed else room


def _cut_to(result: Tensor, room: Tensor) -> Tensor:
    return result if room is result else result.copy_(room[..., : result.shape[-1]])


def _groups(images: int, image_index: Tensor | None) -> int:
    """Images, and one more group for sequences whose image does not exist."""
    return images if image_index is None else images + 1


def _common_options(
    query: Tensor, image_index: Tensor | None, packed: bool, key_mask: Tensor | None
) -> dict[str, object]:
    present = {"HAS_INDEX": image_index is not None, "PACKED": packed, "HAS_MASK": key_mask is not None}
    return {"EXACT": query.dtype == torch.float32, **present, **element_options(query.dtype)}


def _columns(keep: Tensor | None) -> int:
    """Columns of keep, with the padding of `with_aligned_rows`."""
    return 0 if keep is None else keep.shape[1]

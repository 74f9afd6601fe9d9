"""Launches the kernels of the focal contrastive loss: sizes, tiles and grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softmask_fast.ops.focal_itc import triton_backward, triton_finish, triton_kernels, triton_negatives
from softmask_fast.ops.focal_itc.operators import BlockwiseForward
from softmask_fast.ops.focal_itc.positives import PositiveLists
from softmask_fast.ops.focal_itc.state import Keys, Options, Outputs, Rows, expansion_order
from softmask_fast.ops.focal_itc.triton_symmetric_launch import (
    CHUNK_COLUMNS,
    CHUNK_ROWS,
    GROUP,
    MAGNIFY,
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

MERGE_ROWS = 128  # rows per program of the kernels without products: one per thread of 4 warps; chosen, not timed


def tiles(
    kernel: str, dtype: torch.dtype, width: int, machine: Machine, crowded: bool, teacher: bool, ids: bool
) -> dict[str, int | bool]:
    """Tile sizes, warps and pipeline stages of a kernel; `crowded`: see `_is_crowded`.

    Chosen by sizes alone, not timed at run time: another tile is another order of summation, and results must be the
    same bit for bit in every run. That none of them spills registers is what tests/test_aot.py is for.
    """
    block_d = max(16, next_power_of_2(width))
    backward, nvidia = kernel in ("grad_rows", "grad_keys"), machine.capability > 0
    # BLOCK_B, BLOCK_K, BLOCK_D, BLOCK_C, num_warps, num_stages
    if INTERPRETED:
        sizes = (16, 32, min(block_d, 32), min(block_d, 32), 4, 1)
    elif kernel == "chunk_gradient":
        # by what compiles without spills, not timed
        if dtype == torch.float32 or not nvidia:
            sizes = (64, 64, 16 if dtype == torch.float32 else 64, 0, 8 if nvidia else 4, 1)
        else:
            sizes = (128, 64, 64, 0, 8, 3)
    elif dtype == torch.float32:
        # by what compiles without spills (on Blackwell fewer columns at a time, without ids more warps); not timed
        columns = 16 if machine.capability >= 100 else 32
        many = block_d > 32 if backward else (crowded or not ids) and block_d > columns
        more_warps = 8 if many and nvidia else 4
        sizes = (32, 32, max(16, min(block_d // 2, columns)), min(block_d, 128), more_warps, 1)
    elif machine.shared_memory < 200 * 1024 or kernel == "row_negatives":
        # sm_80, AMD: the tiles below do not fit; the noise of row_negatives takes the registers of a second tile
        more_warps = 8 if backward and block_d > 32 and nvidia else 4
        sizes = (64, 32, min(block_d, 64), min(block_d, 128), more_warps, 1)
    else:
        whole_rows = block_d if block_d <= 256 else 64
        # crowded: narrower, or registers spill; not timed
        if kernel == "grad_rows" and machine.capability == 90 and not (crowded or ids):
            # H100, 2026-11-27, queue of 65,536, B 4,096, d 256, alpha 0.4, no ids: 4.62 ms with 3 stages, which today
            # spill a register with a teacher, 5.86 with the tiles below. 2 stages are not timed. With ids both spill.
            sizes = (128, 32, whole_rows, min(block_d, 256), 8, 2 if teacher else 3)
        elif kernel == "grad_rows":
            sizes = (64, 32 if crowded else 64, whole_rows, min(block_d, 256), 8, 1)
        elif kernel == "grad_keys":
            sizes = (32 if crowded else 64, 64, whole_rows, min(block_d, 256), 8, 2)
        else:
            narrow = (kernel == "row_sums" and crowded) or machine.capability != 90
            sizes = (128, 32 if narrow else 64, whole_rows, 0, 8, 2)
    names = ("BLOCK_B", "BLOCK_K", "BLOCK_D", "BLOCK_C", "num_warps", "num_stages")
    chosen = dict(zip(names, sizes, strict=True))
    resident = block_d == chosen["BLOCK_D"]
    if kernel == "chunk_gradient":
        return {name: chosen[name] for name in names if name != "BLOCK_C"} | {"GROUP": GROUP} | machine.launch_options
    if not backward:
        del chosen["BLOCK_C"]
    elif resident:
        chosen["BLOCK_C"] = block_d
    return {**chosen, "RESIDENT": resident, **machine.launch_options}


def _split(rows: int, keys: int, block_rows: int, block_keys: int, device: torch.device) -> tuple[int, int]:
    """Number of splits of the keys, and keys per split: enough programs for the device, whatever the number of rows.

    Two for each multiprocessor, so that none is idle where programs begin and end; chosen, not timed. Of the widest
    tiles one program fits at a time.
    """
    programs = 6 if INTERPRETED else 2 * torch.cuda.get_device_properties(device).multi_processor_count
    tiles_of_keys = -(-keys // block_keys)
    wanted = min(-(-programs // -(-rows // block_rows)), tiles_of_keys)
    tiles_per_split = -(-tiles_of_keys // wanted)
    return -(-tiles_of_keys // tiles_per_split), tiles_per_split * block_keys


def _spans(ids: Tensor | None, key_ids: Tensor | None) -> Tensor | None:
    """(2, M) int32: the first and the last row that have the id of each key; no row lies between where none has it."""
    if ids is None:
        return None
    values, order = torch.sort(ids, stable=True)
    order = order.to(torch.int32)
    first = torch.searchsorted(values, key_ids)
    last = torch.searchsorted(values, key_ids, right=True) - 1
    found = first <= last
    limits = (order[first.clamp(max=len(order) - 1)], order[last.clamp(min=0)])
    return torch.stack([torch.where(found, limits[0], 2**31 - 1), torch.where(found, limits[1], -1)])


def _is_crowded(options: Options) -> bool:
    """Whether a row has more sums, or a gradient more steps, than the registers of the widest tiles leave room for."""
    return options.any_positive or expansion_order(options.gamma) not in (0, 1, 2)


def _strides(rows: Tensor, teacher_rows: Tensor | None, keys: Tensor) -> tuple[int, ...]:
    return (*rows.stride(), *((0, 0) if teacher_rows is None else teacher_rows.stride()), *keys.stride())


class Forward(BlockwiseForward):
    """See `operators.BlockwiseForward`. Between two blocks of keys it holds the sums over all keys so far."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(_aligned(rows))
        temperature, options, rows = self.temperature, self.options, self.rows
        self.order = expansion_order(options.gamma)
        self.passes = 1 if self.order >= 0 else 2
        self.sums = temperature.new_empty(0, triton_kernels.SUMS.value, rows.shape[0])
        self.places = temperature.new_empty(0, triton_kernels.PLACES.value, rows.shape[0], dtype=torch.int32)
        self.terms = temperature.new_empty(0, triton_kernels.TERM_SUMS.value, rows.shape[0])

    def _add(self, keys: Keys, second_pass: bool, positives: PositiveLists | None) -> None:
        rows, options, (keys, key_ids, first_key) = self.rows, self.options, keys
        (batch, width), total = rows.shape, keys.shape[0]
        inputs_given = self.teacher_rows is not None, self.ids is not None
        given = (rows.dtype, width, machine_of(rows.device), _is_crowded(options), *inputs_given)
        sizes, terms_kept = tiles("row_terms" if second_pass else "row_sums", *given), max(self.order, 0) + 1
        splits, keys_per_split = _split(batch, total, sizes["BLOCK_B"], sizes["BLOCK_K"], rows.device)
        flags = {"HAS_TEACHER": self.teacher_rows is not None}
        common = {"HAS_IDS": self.ids is not None, **flags, **sizes, **element_options(rows.dtype)}
        keys, key_ids = with_aligned_rows(keys, 1), None if key_ids is None else key_ids.contiguous()
        inputs = (rows, self.teacher_rows, keys, self.ids, key_ids, _spans(self.ids, key_ids), self.temperature)
        strides = _strides(rows, self.teacher_rows, keys)
        grid = (-(-batch // sizes["BLOCK_B"]), splits)
        with device_of(rows):
            if second_pass:
                terms = _after(self.terms, splits)
                triton_kernels.row_terms[grid](
                    *inputs, self.sums, self.places, terms[-splits:], *strides, batch, total, width, first_key,
                    options.row_offset, options.gamma, keys_per_split, **common,
                )  # fmt: skip
                self.terms = terms.sum(0, keepdim=True)
                return
            sums, places = _after(self.sums, splits), _after(self.places, splits)
            triton_kernels.row_sums[grid](
                *inputs, sums[-splits:], places[-splits:], *strides, batch, total, width, first_key,
                options.row_offset, keys_per_split, TERMS=terms_kept, ANY=options.any_positive, STATS=options.stats,
                **common,
            )  # fmt: skip
            if options.stats:
                sizes = tiles("row_negatives", *given)
                triton_negatives.row_negatives[-(-batch // sizes["BLOCK_B"]), splits](
                    rows, keys, self.ids, key_ids, self.temperature, options.seed, sums[-splits:], places[-splits:],
                    *rows.stride(), *keys.stride(), batch, total, width, first_key,
                    options.row_offset, options.first_negative, options.last_negative, options.direction,
                    keys_per_split,
                    HAS_IDS=self.ids is not None, **sizes, **element_options(rows.dtype),
                )  # fmt: skip
            triton_finish.merge[(-(-batch // MERGE_ROWS),)](
                sums, places, self.temperature, batch, sums.shape[0], TERMS=terms_kept, **flags, BLOCK_B=MERGE_ROWS
            )
            self.sums, self.places = sums[:1], places[:1]

    def _finish(self, out: Outputs) -> None:
        options, batch = self.options, self.rows.shape[0]
        count = torch.ones_like(out.dominant) if self.count is None else self.count
        with device_of(self.rows):
            triton_finish.finish[(-(-batch // MERGE_ROWS),)](
                self.sums, self.places, self.terms, count, self.temperature, options.alpha, *out, batch, options.gamma,
                ORDER=self.order, ANY=options.any_positive,
                STATS=options.stats, HAS_TEACHER=self.teacher_rows is not None, BLOCK_B=MERGE_ROWS,
            )  # fmt: skip


def _aligned(rows: Rows) -> Rows:
    """Rows as the kernels read them."""
    features, teacher = with_aligned_rows(rows.features, 1), with_aligned_rows(rows.teacher, 1)
    return rows._replace(features=features, teacher=teacher, ids=None if rows.ids is None else rows.ids.contiguous())


def _after(kept: Tensor, splits: int) -> Tensor:
    """`kept`, sums over earlier blocks of keys if any, followed by room for those of `splits` splits."""
    room = kept.new_empty(kept.shape[0] + splits, *kept.shape[1:])
    room[: kept.shape[0]] = kept
    return room


def backward(
    grad_loss: Tensor, rows: Rows, keys: Keys, state: tuple[Tensor, Tensor], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `operators.Backward`."""
    grad_loss, unpadded = grad_loss.contiguous(), rows.features.shape[1]
    keys, key_ids, first_key = keys
    rows, teacher_rows, ids, temperature, options = _aligned(rows)
    keys, key_ids = with_aligned_rows(keys, 1), None if key_ids is None else key_ids.contiguous()
    flags = {
        "ORDER": expansion_order(options.gamma),
        "ANY": options.any_positive,
        "HAS_TEACHER": teacher_rows is not None,
        "HAS_IDS": ids is not None,
        **element_options(rows.dtype),
    }
    width = rows.shape[1]
    inputs = (rows, teacher_rows, keys, ids, key_ids, _spans(ids, key_ids), temperature, options.alpha, *state)
    numbers = (
        *_strides(rows, teacher_rows, keys), len(rows), len(keys), width, first_key, options.row_offset, options.gamma
    )  # fmt: skip
    inputs_given = teacher_rows is not None, ids is not None
    given = (rows.dtype, width, machine_of(rows.device), _is_crowded(options), *inputs_given)
    make = _in_chunks if width > tiles("grad_rows", *given)["BLOCK_C"] else _by_tiles
    with device_of(rows):
        grad_rows, grad_keys, grad_temperature = make(grad_loss, inputs, numbers, flags, given, wanted)
    if unpadded < width:
        grad_rows, grad_keys = (gradient[..., :unpadded].contiguous() for gradient in (grad_rows, grad_keys))
    return grad_rows, grad_keys, grad_temperature


def _by_tiles(
    grad_loss: Tensor, inputs: tuple, numbers: tuple, flags: dict, given: tuple, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, keys and temperature, empty where not wanted: each tile of products is multiplied at once."""
    (wants_rows, wants_keys, wants_temperature), (rows, _, keys), temperature = wanted, inputs[:3], inputs[6]
    (batch, width), total = rows.shape, len(keys)
    grad_rows, grad_keys, grad_temperature = rows.new_empty(0), keys.new_empty(0), temperature.new_empty(0)
    if wants_rows or wants_temperature:
        sizes = tiles("grad_rows", *given)
        splits, keys_per_split = _split(batch, total, sizes["BLOCK_B"], sizes["BLOCK_K"], rows.device)
        dtype = rows.dtype if splits == 1 else torch.float32
        partial = rows.new_empty((splits, batch, width) if wants_rows else 0, dtype=dtype)
        grad_inverse = temperature.new_empty(splits, batch)
        triton_backward.grad_rows[(-(-batch // sizes["BLOCK_B"]), splits)](
            grad_loss, *inputs, partial, grad_inverse, *numbers, keys_per_split, WANTS_ROWS=wants_rows, **flags, **sizes
        )
        if wants_rows:
            grad_rows = partial[0] if splits == 1 else partial.sum(0).to(rows.dtype)
        if wants_temperature:
            grad_temperature = -grad_inverse.sum()
    if wants_keys:
        sizes, grad_keys = tiles("grad_keys", *given), keys.new_empty(keys.shape)
        triton_backward.grad_keys[(-(-total // sizes["BLOCK_K"]),)](
            grad_loss, largest_size(grad_loss), *inputs, grad_keys, *numbers, **flags, **sizes
        )
    return grad_rows, grad_keys, grad_temperature


def _in_chunks(
    grad_loss: Tensor, inputs: tuple, numbers: tuple, flags: dict, given: tuple, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same through chunks of G in memory, and products by the library, where columns do not fit one tile.

    `grad_rows` and `grad_keys` would make the products again for every BLOCK_C columns: for two blocks of columns six
    times 2 B M D operations, ten with a teacher, where this has three and four. Every gradient wanted or not, the
    kernel is the same, so that each has the same bits alone and with the others.
    """
    (wants_rows, wants_keys, wants_temperature), (rows, _, keys), temperature = wanted, inputs[:3], inputs[6]
    (batch, width), total, sizes = rows.shape, len(keys), tiles("chunk_gradient", *given)
    block_k, largest = sizes["BLOCK_K"], largest_size(grad_loss)
    chunk_rows = min(CHUNK_ROWS, batch)
    chunk_keys = CHUNK_ROWS * CHUNK_COLUMNS * 2 // rows.element_size() // chunk_rows  # as many bytes for any dtype
    chunk_keys = min(max(chunk_keys // block_k, 1) * block_k, total)
    gradient = rows.new_empty(chunk_rows, -(-chunk_keys // 16) * 16)  # rows that begin at multiples of 16 bytes
    sum_rows = temperature.new_empty(batch, width) if wants_rows else None
    sum_keys = temperature.new_empty(chunk_keys, width) if wants_keys else None
    grad_rows, grad_temperature = rows.new_empty(0), temperature.new_empty(0)
    grad_keys = keys.new_empty(keys.shape if wants_keys else 0)
    factor, sum_x = largest / (temperature * MAGNIFY), torch.zeros_like(temperature, dtype=torch.float64)
    for first_key in range(0, total, chunk_keys):
        columns = slice(first_key, min(first_key + chunk_keys, total))
        breadth = columns.stop - first_key
        for first_row in range(0, batch, chunk_rows):
            part = slice(first_row, min(first_row + chunk_rows, batch))
            height = part.stop - first_row
            programs = -(-height // sizes["BLOCK_B"]) * -(-breadth // block_k)
            with_products = temperature.new_empty(programs, sizes["BLOCK_B"])
            triton_backward.chunk_gradient[(programs,)](
                grad_loss, largest, *inputs, gradient, with_products, *numbers, gradient.stride(0), first_row,
                first_key, height, breadth, MAGNIFY, **flags, **sizes,
            )  # fmt: skip
            chunk = gradient[:height, :breadth]
            if wants_temperature:
                sum_x += with_products.sum(dtype=torch.float64)  # it cancels where gains and losses of rows balance
            if wants_rows:
                add_product(sum_rows[part], chunk, keys[columns], first_key == 0)
            if wants_keys:
                add_product(sum_keys[:breadth], chunk.T, rows[part], first_row == 0)
        if wants_keys:
            torch.mul(sum_keys[:breadth], factor, out=grad_keys[columns])
    if wants_rows:
        grad_rows = torch.mul(sum_rows, factor, out=rows.new_empty(batch, width))
    if wants_temperature:
        grad_temperature = (-sum_x * math.log(2) * factor).to(temperature.dtype)  # x is to base 2
    return grad_rows, grad_keys, grad_temperature

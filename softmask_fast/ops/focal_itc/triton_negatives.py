"""Hard negatives of the focal contrastive loss in Triton: one draw per row from the softmax, positives excluded.

A pass of its own, over the keys that may be drawn, which are few where there is a queue: the noise of a tile takes
more registers than the sums of `row_sums` leave.
"""

import triton
import triton.language as tl

from softmask_fast.ops.focal_itc.triton_kernels import (
    BEST,
    BLANK,
    CHOICE,
    MAX,
    NO_SCORE,
    PLACES,
    SUMS,
    load_scales,
    log1p,
    multiply,
    relative,
    tile_of_positives,
)
from softmask_fast.ops.triton_tiles import load_tile


@triton.jit
def mix(x):
    """lowbias32, see sampling.py; x is uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def gumbel(row, column, seed_high, stream):
    """-log2(E) of global rows (BLOCK_B, 1) and key columns (1, BLOCK_K), as in sampling.py."""
    first = mix(row.to(tl.uint32) + stream)
    second = mix(first ^ seed_high ^ 0x85EBCA6B)
    bits = mix(mix(column.to(tl.uint32) ^ first) + second)
    v = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994)
    return -tl.log2(-log1p(-v))


@triton.jit
def row_negatives(
    p_rows, p_keys, p_ids, p_key_ids, p_temperature, p_seed, p_sums, p_places,
    rows_b, rows_d, keys_m, keys_d,
    B, M, D, first_key, row_offset, first_negative, last_negative, direction, KEYS_PER_SPLIT,
    HAS_IDS: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_B), splits), after `row_sums` and before `merge`: BEST and CHOICE of each split."""
    first_row = tl.program_id(0) * BLOCK_B
    row = first_row + tl.arange(0, BLOCK_B)
    m_rows = row < B
    d = tl.arange(0, BLOCK_D)
    scales = load_scales(p_temperature, p_rows.dtype.element_ty)
    seed = tl.load(p_seed)
    seed_high = (seed >> 32).to(tl.uint32)
    stream = mix(seed.to(tl.uint32) ^ tl.where(direction == 1, 0x9E3779B9, 0).to(tl.uint32))
    p_rows += first_row.to(tl.int64) * rows_b
    rows = load_tile(p_rows, tl.arange(0, BLOCK_B) * rows_b, d * rows_d, m_rows, d < D, WIDEN)
    p_sums += tl.program_id(1).to(tl.int64) * SUMS * B + row
    p_places += tl.program_id(1).to(tl.int64) * PLACES * B + row
    maximum = tl.load(p_sums + MAX * B, mask=m_rows, other=0.0)
    best = tl.full((BLOCK_B,), NO_SCORE, tl.float32)
    choice = tl.full((BLOCK_B,), -1, tl.int32)

    start = tl.program_id(1) * KEYS_PER_SPLIT
    stop = tl.minimum(tl.minimum(start + KEYS_PER_SPLIT, M), last_negative - first_key)
    start = tl.maximum(start, first_negative - first_key)
    p_keys += start.to(tl.int64) * keys_m
    for first in range(start, stop, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        m_keys = key < stop
        products, _, _ = multiply(
            p_rows, p_rows, p_keys, rows_b, rows_d, rows_b, rows_d, keys_m, keys_d, m_rows, m_keys, D, rows, rows, rows,
            False, RESIDENT, False, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN, PRECISION,
        )  # fmt: skip
        p_keys += BLOCK_K * keys_m
        number = first_key + key
        barred = tile_of_positives(p_ids, p_key_ids, row, key, number, m_rows, m_keys, row_offset, HAS_IDS)
        score = relative(products, maximum[:, None], scales)
        score += gumbel((row + row_offset)[:, None], number[None, :], seed_high, stream)
        score = tl.where(barred | (m_keys == 0)[None, :], BLANK, score)
        tile_best, tile_choice = tl.max(score, 1, return_indices=True)
        choice = tl.where(tile_best > best, first_key + first + tile_choice, choice)
        best = tl.maximum(best, tile_best)
    tl.store(p_sums + BEST * B, best, mask=m_rows)
    tl.store(p_places + CHOICE * B, choice, mask=m_rows)

"""Backward kernels of the focal contrastive loss in Triton: tiles of products are recomputed from the row state.

`grad_rows` and `grad_keys` multiply each tile of dloss / ds at once, `chunk_gradient` leaves that to the library.
As in the forward, work that only a few tiles need is behind a branch: positives, the dominant key, the end of the keys.
"""

import triton
import triton.language as tl

from softmask_fast.ops.focal_itc.triton_kernels import (
    LN_2,
    LOG2_E,
    ROW_DOMINANT_GRADIENT,
    ROW_HARD,
    ROW_LOG_SUM,
    ROW_MAX,
    ROW_POSITIVE_LOG_SUM,
    ROW_POSITIVE_MAX,
    ROW_TEACHER_LOG_SUM,
    ROW_TEACHER_MAX,
    ROW_WEIGHT,
    load_alpha,
    load_scales,
    may_have_positives,
    multiply,
    positive_tile,
    relative,
)
from softmask_fast.ops.focal_itc.triton_symmetric import tile_place
from softmask_fast.ops.triton_tiles import load_tile


@triton.jit
def load_state(p_state, row, m_rows, B, HAS_TEACHER: tl.constexpr):
    """What every element needs of the row state (see state.py), in the shape that broadcasts to a tile.

    Reference and log of the sum, reference and log of the sum of the teacher, W.
    """
    p_state += row
    maximum = tl.load(p_state + ROW_MAX * B, mask=m_rows, other=0.0)
    log_sum = tl.load(p_state + ROW_LOG_SUM * B, mask=m_rows, other=0.0) * LOG2_E
    weight = tl.load(p_state + ROW_WEIGHT * B, mask=m_rows, other=0.0)
    teacher_max, teacher_log_sum = maximum, log_sum
    if HAS_TEACHER:
        teacher_max = tl.load(p_state + ROW_TEACHER_MAX * B, mask=m_rows, other=0.0)
        teacher_log_sum = tl.load(p_state + ROW_TEACHER_LOG_SUM * B, mask=m_rows, other=0.0) * LOG2_E
    return (
        tl.expand_dims(maximum, 1),
        tl.expand_dims(log_sum, 1),
        tl.expand_dims(teacher_max, 1),
        tl.expand_dims(teacher_log_sum, 1),
        tl.expand_dims(weight, 1),
    )


@triton.jit
def focal_weight(log2_p, p, gamma, ORDER: tl.constexpr):
    """w(p) of `reference.py` for p < 1."""
    q = 1.0 - p
    rest = q - (gamma * LN_2) * (p * log2_p)
    if ORDER == 0:
        weight = tl.full(p.shape, 1.0, tl.float32)
    elif ORDER == 1:
        weight = rest
    elif ORDER == 2:
        weight = q * rest
    elif ORDER == 3:
        weight = q * q * rest
    else:
        weight = tl.exp2((gamma - 1.0) * tl.log2(tl.maximum(q, 1e-7))) * rest
    return weight


@triton.jit
def logit_gradient(products, momentum, state, gamma, alpha, scales, ORDER: tl.constexpr, HAS_TEACHER: tl.constexpr):
    """dloss_i / ds_ij of a tile as if it had no positive and no dominant key, and x; formulas in `reference.py`."""
    x = relative(products, state[0], scales)
    log2_p = x - state[1]
    p = tl.exp2(log2_p)
    gradient = p * state[4]
    if HAS_TEACHER:
        soft = tl.exp2(relative(momentum, state[2], scales)) * (alpha * tl.exp2(-state[3]))
        gradient -= soft * focal_weight(log2_p, p, gamma, ORDER)
    return gradient, x


@triton.jit
def with_few(
    gradient, x, products, p_state, row, m_rows, B, log_sum, is_dominant, is_positive, gamma, scales,
    ORDER: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """`logit_gradient` completed at positives and at dominant keys."""
    p_state += row
    if ANY:
        reference = tl.expand_dims(tl.load(p_state + ROW_POSITIVE_MAX * B, mask=m_rows, other=0.0), 1)
        positive_log_sum = tl.expand_dims(tl.load(p_state + ROW_POSITIVE_LOG_SUM * B, mask=m_rows, other=0.0), 1)
        share = tl.exp2(tl.minimum(relative(products, reference, scales), 0.0) - positive_log_sum * LOG2_E)
    else:
        log2_p = x - log_sum
        share = focal_weight(log2_p, tl.exp2(log2_p), gamma, ORDER)
    hard = tl.expand_dims(tl.load(p_state + ROW_HARD * B, mask=m_rows, other=0.0), 1)
    gradient = tl.where(is_positive, gradient - hard * share, gradient)
    at_dominant = tl.expand_dims(tl.load(p_state + ROW_DOMINANT_GRADIENT * B, mask=m_rows, other=0.0), 1)
    return tl.where(is_dominant, at_dominant, gradient)


@triton.jit
def tile_gradient(
    products, momentum, p_ids, p_key_ids, p_spans, p_state, row, key, m_rows, m_keys, dominant, first_row, first,
    B, M, first_key, row_offset, state, gamma, alpha, scales,
    ORDER: tl.constexpr, ANY: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_IDS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dloss_i / ds_ij of a tile, 0 beyond the last key, and x. first_row, first: its first row and key."""
    gradient, x = logit_gradient(products, momentum, state, gamma, alpha, scales, ORDER, HAS_TEACHER)
    first_number = first_key + first
    has_dominant = tl.max(((dominant >= first_number) & (dominant < first_number + BLOCK_K)).to(tl.int32), 0) > 0
    with_positives = may_have_positives(
        p_spans, key, m_keys, M, first_number, first_row, row_offset, HAS_IDS, BLOCK_B, BLOCK_K
    )
    if (first + BLOCK_K > M) | with_positives | has_dominant:
        row_ids, key_ids = row, key
        if HAS_IDS:
            row_ids = tl.load(p_ids + row, mask=m_rows, other=0)
            key_ids = tl.load(p_key_ids + key, mask=m_keys, other=0)
        number = first_key + key
        is_positive = positive_tile(
            row_ids[:, None], key_ids[None, :], row[:, None], number[None, :], row_offset, HAS_IDS
        )
        is_dominant = number[None, :] == dominant[:, None]
        gradient = with_few(
            gradient, x, products, p_state, row, m_rows, B, state[1], is_dominant, is_positive, gamma, scales,
            ORDER, ANY,
        )  # fmt: skip
        gradient = tl.where(m_keys[None, :], gradient, 0.0)
    return gradient, x


@triton.jit
def grad_rows(
    p_grad, p_rows, p_teacher, p_keys, p_ids, p_key_ids, p_spans, p_temperature, p_alpha, p_state, p_dominant,
    p_grad_rows, p_grad_inverse,
    rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d,
    B, M, D, first_key, row_offset, gamma, KEYS_PER_SPLIT,
    ORDER: tl.constexpr, ANY: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_IDS: tl.constexpr, WANTS_ROWS: tl.constexpr,
    RESIDENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_B), splits): the gradient of a block of rows, of at most BLOCK_C columns.

    grad_rows (splits, B, D) of any floating dtype; grad_inverse (splits, B): sum_j dloss/ds_ij x_ij grad_i / tau.
    """
    first_row = tl.program_id(0) * BLOCK_B
    row = first_row + tl.arange(0, BLOCK_B)
    m_rows = row < B
    split = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    # program_id(2) is 0, but a compiler that knows it computes places before the loop, and registers spill on sm_90
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    scales = load_scales(p_temperature, p_rows.dtype.element_ty)
    alpha = load_alpha(p_alpha, HAS_TEACHER)
    p_rows += first_row.to(tl.int64) * rows_b
    rows = load_tile(p_rows, tl.arange(0, BLOCK_B) * rows_b, d * rows_d, m_rows, d < D, WIDEN)
    teacher = rows
    if HAS_TEACHER:
        p_teacher += first_row.to(tl.int64) * teacher_b
        teacher = load_tile(p_teacher, tl.arange(0, BLOCK_B) * teacher_b, d * teacher_d, m_rows, d < D, WIDEN)
    dominant = tl.load(p_dominant + row, mask=m_rows, other=0).to(tl.int32)
    state = load_state(p_state, row, m_rows, B, HAS_TEACHER)
    total = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    with_x = tl.zeros((BLOCK_B,), tl.float32)
    start = split * KEYS_PER_SPLIT
    p_keys += start.to(tl.int64) * keys_m
    for first in range(start, tl.minimum(start + KEYS_PER_SPLIT, M), BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        m_keys = key < M
        products, momentum, keys = multiply(
            p_rows, p_teacher, p_keys, rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d, m_rows, m_keys, D, rows,
            teacher, rows, HAS_TEACHER, RESIDENT, False, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN, PRECISION,
        )  # fmt: skip
        gradient, x = tile_gradient(
            products, momentum, p_ids, p_key_ids, p_spans, p_state, row, key, m_rows, m_keys, dominant, first_row,
            first, B, M, first_key, row_offset, state, gamma, alpha, scales, ORDER, ANY, HAS_TEACHER, HAS_IDS,
            BLOCK_B, BLOCK_K,
        )  # fmt: skip
        with_x += tl.sum(gradient * x, 1)
        if WANTS_ROWS:
            if not RESIDENT:
                keys = load_tile(p_keys, tl.arange(0, BLOCK_K) * keys_m, c * keys_d, m_keys, c < D, WIDEN)
            total = tl.dot(gradient.to(keys.dtype), keys, total, input_precision=PRECISION)
        p_keys += BLOCK_K * keys_m
    factor = tl.load(p_grad + row, mask=m_rows, other=0.0) * (scales[0] * LN_2)
    if WANTS_ROWS:
        o_total = (split.to(tl.int64) * B + row) * D
        tl.store(
            p_grad_rows + o_total[:, None] + c[None, :],
            (total * factor[:, None]).to(p_grad_rows.dtype.element_ty),
            mask=m_rows[:, None] & (c < D)[None, :],
        )
    tl.store(p_grad_inverse + split.to(tl.int64) * B + row, with_x * factor * LN_2, mask=m_rows)


@triton.jit
def grad_keys(
    p_grad, p_largest, p_rows, p_teacher, p_keys, p_ids, p_key_ids, p_spans, p_temperature, p_alpha, p_state,
    p_dominant, p_grad_keys,
    rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d,
    B, M, D, first_key, row_offset, gamma,
    ORDER: tl.constexpr, ANY: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_IDS: tl.constexpr,
    RESIDENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(M, BLOCK_K),): the gradient of a tile of keys, grad_keys (M, D), D at most BLOCK_C.

    `p_largest` has the largest size of grad: rows are weighted relative to it, so that float16 keeps small gradients.
    """
    first = tl.program_id(0) * BLOCK_K
    key = first + tl.arange(0, BLOCK_K)
    m_keys = key < M
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_C)
    scales = load_scales(p_temperature, p_rows.dtype.element_ty)
    alpha = load_alpha(p_alpha, HAS_TEACHER)
    largest = tl.load(p_largest)
    p_keys += first.to(tl.int64) * keys_m
    keys = load_tile(p_keys, tl.arange(0, BLOCK_K) * keys_m, d * keys_d, m_keys, d < D, WIDEN)
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for first_row in range(0, B, BLOCK_B):
        row = first_row + tl.arange(0, BLOCK_B)
        m_rows = row < B
        products, momentum, rows = multiply(
            p_rows, p_teacher, p_keys, rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d, m_rows, m_keys, D, keys,
            keys, keys, HAS_TEACHER, RESIDENT, True, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN, PRECISION,
        )  # fmt: skip
        dominant = tl.load(p_dominant + row, mask=m_rows, other=-1).to(tl.int32)
        state = load_state(p_state, row, m_rows, B, HAS_TEACHER)
        gradient, _ = tile_gradient(
            products, momentum, p_ids, p_key_ids, p_spans, p_state, row, key, m_rows, m_keys, dominant, first_row,
            first, B, M, first_key, row_offset, state, gamma, alpha, scales, ORDER, ANY, HAS_TEACHER, HAS_IDS,
            BLOCK_B, BLOCK_K,
        )  # fmt: skip
        gradient *= (tl.load(p_grad + row, mask=m_rows, other=0.0) / largest)[:, None]
        if not RESIDENT:
            rows = load_tile(p_rows, tl.arange(0, BLOCK_B) * rows_b, c * rows_d, m_rows, c < D, WIDEN)
        total = tl.dot(tl.trans(gradient.to(rows.dtype)), rows, total, input_precision=PRECISION)
        p_rows += BLOCK_B * rows_b
        if HAS_TEACHER:
            p_teacher += BLOCK_B * teacher_b
    tl.store(
        p_grad_keys + key.to(tl.int64)[:, None] * D + c[None, :],
        (total * (largest * scales[0] * LN_2)).to(p_grad_keys.dtype.element_ty),
        mask=m_keys[:, None] & (c < D)[None, :],
    )


@triton.jit
def chunk_gradient(
    p_grad, p_largest, p_rows, p_teacher, p_keys, p_ids, p_key_ids, p_spans, p_temperature, p_alpha, p_state,
    p_dominant, p_gradient, p_with_products,
    rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d,
    B, M, D, first_key, row_offset, gamma, gradient_b, first_row, first_column, rows, columns, magnify,
    ORDER: tl.constexpr, ANY: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_IDS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program per tile of a chunk of G = grad_i dloss_i / ds_ij: the rows from first_row, the keys from first_column.

    gradient (rows, columns): G relative to the largest size of grad, times `magnify`, so that float16 keeps small
    gradients; with_products (programs, BLOCK_B): sums G x of the rows of each tile. The chunk ends between tiles, or
    where B and M end.
    """
    i, j = tile_place(tl.program_id(0), tl.cdiv(rows, BLOCK_B), tl.cdiv(columns, BLOCK_K), GROUP)
    r0, first = first_row + i * BLOCK_B, first_column + j * BLOCK_K
    row, key = r0 + tl.arange(0, BLOCK_B), first + tl.arange(0, BLOCK_K)
    m_rows, m_keys = row < B, key < M
    scales = load_scales(p_temperature, p_rows.dtype.element_ty)
    alpha = load_alpha(p_alpha, HAS_TEACHER)
    p_rows += r0.to(tl.int64) * rows_b
    p_keys += first.to(tl.int64) * keys_m
    if HAS_TEACHER:
        p_teacher += r0.to(tl.int64) * teacher_b
    nothing = m_rows
    products, momentum, _ = multiply(
        p_rows, p_teacher, p_keys, rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d, m_rows, m_keys, D, nothing,
        nothing, nothing, HAS_TEACHER, False, False, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN, PRECISION,
    )  # fmt: skip
    dominant = tl.load(p_dominant + row, mask=m_rows, other=-1).to(tl.int32)
    state = load_state(p_state, row, m_rows, B, HAS_TEACHER)
    gradient, x = tile_gradient(
        products, momentum, p_ids, p_key_ids, p_spans, p_state, row, key, m_rows, m_keys, dominant, r0, first, B, M,
        first_key, row_offset, state, gamma, alpha, scales, ORDER, ANY, HAS_TEACHER, HAS_IDS, BLOCK_B, BLOCK_K,
    )  # fmt: skip
    gradient *= (tl.load(p_grad + row, mask=m_rows, other=0.0) * (magnify / tl.load(p_largest)))[:, None]
    o_gradient = (row - first_row)[:, None] * gradient_b + (key - first_column)[None, :]
    tl.store(p_gradient + o_gradient, gradient.to(p_gradient.dtype.element_ty), mask=m_rows[:, None] & m_keys[None, :])
    # not one number: Triton 3.6 fails for sm_100 where products are reduced to a row, and that to a number
    p_with_products += tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    tl.store(p_with_products, tl.sum(gradient * x, 1))

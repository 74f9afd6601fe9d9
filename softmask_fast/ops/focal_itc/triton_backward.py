"""Backward kernels of the focal contrastive loss in Triton: tiles of products are recomputed from the row state."""

import triton
import triton.language as tl

from softmask_fast.ops.focal_itc.triton_kernels import load_tile, multiply, positive_tile


@triton.jit
def load_state(p_state, row, m_rows, B):
    """The nine numbers of each row, see operators.py."""
    p_state += row
    return (
        tl.load(p_state, mask=m_rows, other=0.0),
        tl.load(p_state + B, mask=m_rows, other=0.0),
        tl.load(p_state + 2 * B, mask=m_rows, other=0.0),
        tl.load(p_state + 3 * B, mask=m_rows, other=0.0),
        tl.load(p_state + 4 * B, mask=m_rows, other=0.0),
        tl.load(p_state + 5 * B, mask=m_rows, other=0.0),
        tl.load(p_state + 6 * B, mask=m_rows, other=0.0),
        tl.load(p_state + 7 * B, mask=m_rows, other=0.0),
        tl.load(p_state + 8 * B, mask=m_rows, other=0.0),
    )


@triton.jit
def across(state, BY_KEYS: tl.constexpr):
    """The row state in the shape that broadcasts to a tile."""
    shaped = ()
    for i in tl.static_range(9):
        if BY_KEYS:
            shaped = shaped + (state[i][None, :],)
        else:
            shaped = shaped + (state[i][:, None],)
    return shaped


@triton.jit
def logit_gradient(
    products, momentum, state, counted, is_dominant, is_positive, gamma, alpha, inverse,
    ORDER: tl.constexpr, ANY: tl.constexpr, HAS_TEACHER: tl.constexpr,
):  # fmt: skip
    """dloss_i / ds_ij of a tile, and x; the formulas stand in reference.py."""
    maximum, log_sum, teacher_max, teacher_log_sum, weight, hard, positive_max, positive_log_sum, at_dominant = state
    x = tl.minimum((products - maximum) * inverse, 0.0)
    log_p = x - log_sum
    p = tl.exp(log_p)
    gradient = p * weight
    if HAS_TEACHER or not ANY:
        q = 1.0 - p
        rest = q - gamma * p * log_p
        if ORDER == 0:
            focal_weight = 1.0 + 0.0 * p
        elif ORDER == 1:
            focal_weight = rest
        elif ORDER == 2:
            focal_weight = q * rest
        elif ORDER == 3:
            focal_weight = q * q * rest
        else:
            focal_weight = tl.exp((gamma - 1.0) * tl.log(tl.maximum(q, 1e-7))) * rest
        if HAS_TEACHER:
            soft = tl.exp((momentum - teacher_max) * inverse - teacher_log_sum)
            gradient -= alpha * soft * focal_weight
        if not ANY:
            gradient -= tl.where(is_positive, hard * focal_weight, 0.0)
    if ANY:
        share = tl.exp(tl.minimum((products - positive_max) * inverse, 0.0) - positive_log_sum)
        gradient -= tl.where(is_positive, hard * share, 0.0)
    gradient = tl.where(is_dominant, at_dominant, gradient)
    return tl.where(counted, gradient, 0.0), tl.where(is_dominant, 0.0, x)


@triton.jit
def grad_rows(
    p_grad, p_rows, p_teacher, p_keys, p_ids, p_key_ids, p_temperature, p_state, p_dominant, p_grad_rows,
    p_grad_inverse,
    rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d,
    B, M, D, row_offset, gamma, alpha, KEYS_PER_SPLIT,
    ORDER: tl.constexpr, ANY: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_IDS: tl.constexpr, WANTS_ROWS: tl.constexpr,
    RESIDENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_B), splits, cdiv(D, BLOCK_C)): BLOCK_C columns of the gradient of a block of rows.

    grad_rows (splits, B, D) of any floating dtype; grad_inverse (splits, B): sum_j dloss/ds_ij x_ij grad_i / tau.
    """
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_rows = row < B
    row64 = row.to(tl.int64)
    split = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inverse = 1.0 / tl.load(p_temperature)
    rows = load_tile(p_rows, row64 * rows_b, d * rows_d, m_rows, d < D, WIDEN)
    teacher = rows
    if HAS_TEACHER:
        teacher = load_tile(p_teacher, row64 * teacher_b, d * teacher_d, m_rows, d < D, WIDEN)
    row_ids = row64
    if HAS_IDS:
        row_ids = tl.load(p_ids + row, mask=m_rows, other=0)
    dominant = tl.load(p_dominant + row, mask=m_rows, other=0).to(tl.int32)
    state = across(load_state(p_state, row, m_rows, B), False)
    total = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    with_x = tl.zeros((BLOCK_B,), tl.float32)
    start = split * KEYS_PER_SPLIT
    for first in range(start, tl.minimum(start + KEYS_PER_SPLIT, M), BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        m_keys = key < M
        o_keys = key.to(tl.int64) * keys_m
        products, momentum, keys = multiply(
            p_rows, p_teacher, p_keys, row64 * rows_b, row64 * teacher_b, o_keys, rows_d, teacher_d, keys_d, m_rows,
            m_keys, D, rows, teacher, rows, HAS_TEACHER, RESIDENT, False, BLOCK_D, WIDEN, PRECISION,
        )  # fmt: skip
        key_ids = key
        if HAS_IDS:
            key_ids = tl.load(p_key_ids + key, mask=m_keys, other=0)
        is_positive = positive_tile(row_ids[:, None], key_ids[None, :], row[:, None], key[None, :], row_offset, HAS_IDS)
        gradient, x = logit_gradient(
            products, momentum, state, m_keys[None, :], key[None, :] == dominant[:, None], is_positive, gamma, alpha,
            inverse, ORDER, ANY, HAS_TEACHER,
        )  # fmt: skip
        with_x += tl.sum(gradient * x, 1)
        if WANTS_ROWS:
            if not RESIDENT:
                keys = load_tile(p_keys, o_keys, c * keys_d, m_keys, c < D, WIDEN)
            total = tl.dot(gradient.to(keys.dtype), keys, total, input_precision=PRECISION)
    factor = tl.load(p_grad + row, mask=m_rows, other=0.0) * inverse
    if WANTS_ROWS:
        o_total = (split.to(tl.int64) * B + row64) * D
        tl.store(
            p_grad_rows + o_total[:, None] + c[None, :],
            (total * factor[:, None]).to(p_grad_rows.dtype.element_ty),
            mask=m_rows[:, None] & (c < D)[None, :],
        )
    if tl.program_id(2) == 0:
        tl.store(p_grad_inverse + split.to(tl.int64) * B + row, with_x * factor, mask=m_rows)


@triton.jit
def grad_keys(
    p_grad, p_scale, p_rows, p_teacher, p_keys, p_ids, p_key_ids, p_temperature, p_state, p_dominant, p_grad_keys,
    rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d,
    B, M, D, row_offset, gamma, alpha,
    ORDER: tl.constexpr, ANY: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_IDS: tl.constexpr,
    RESIDENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(M, BLOCK_K), cdiv(D, BLOCK_C)): BLOCK_C columns of the gradient of a tile of keys, grad_keys (M, D).

    ``p_scale`` has the largest size of grad: rows are weighted relative to it, so that float16 keeps small gradients.
    """
    key = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_keys = key < M
    key64 = key.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inverse = 1.0 / tl.load(p_temperature)
    scale = tl.load(p_scale)
    keys = load_tile(p_keys, key64 * keys_m, d * keys_d, m_keys, d < D, WIDEN)
    key_ids = key64
    if HAS_IDS:
        key_ids = tl.load(p_key_ids + key, mask=m_keys, other=0)
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for first in range(0, B, BLOCK_B):
        row = first + tl.arange(0, BLOCK_B)
        m_rows = row < B
        row64 = row.to(tl.int64)
        products, momentum, rows = multiply(
            p_rows, p_teacher, p_keys, row64 * rows_b, row64 * teacher_b, key64 * keys_m, rows_d, teacher_d, keys_d,
            m_rows, m_keys, D, keys, keys, keys, HAS_TEACHER, RESIDENT, True, BLOCK_D, WIDEN, PRECISION,
        )  # fmt: skip
        row_ids = row64
        if HAS_IDS:
            row_ids = tl.load(p_ids + row, mask=m_rows, other=0)
        is_positive = positive_tile(row_ids[None, :], key_ids[:, None], row[None, :], key[:, None], row_offset, HAS_IDS)
        dominant = tl.load(p_dominant + row, mask=m_rows, other=0).to(tl.int32)
        gradient, _ = logit_gradient(
            products, momentum, across(load_state(p_state, row, m_rows, B), True), m_rows[None, :],
            key[:, None] == dominant[None, :], is_positive, gamma, alpha, inverse, ORDER, ANY, HAS_TEACHER,
        )  # fmt: skip
        gradient *= (tl.load(p_grad + row, mask=m_rows, other=0.0) / scale)[None, :]
        if not RESIDENT:
            rows = load_tile(p_rows, row64 * rows_b, c * rows_d, m_rows, c < D, WIDEN)
        total = tl.dot(gradient.to(rows.dtype), rows, total, input_precision=PRECISION)
    tl.store(
        p_grad_keys + key64[:, None] * D + c[None, :],
        (total * (scale * inverse)).to(p_grad_keys.dtype.element_ty),
        mask=m_keys[:, None] & (c < D)[None, :],
    )

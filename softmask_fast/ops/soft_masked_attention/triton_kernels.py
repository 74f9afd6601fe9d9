"""Kernels of soft_masked_attention in Triton; formulas in `reference.py`, launches in `triton_launch.py`.

A caption has too few rows for a tile of a tensor core, so the rows of all sequences of an image are stacked: row r of
an image is token `r % L` of its sequence `r // L`, and every row brings the keep of its own sequence. The plan
lists the sequences by image and says where each image's begin; with PACKED it lists rows (see `triton_plan.py`).

EXACT is for float32 inputs. Half precision takes the faster way wherever its rounding is not felt there.

Offsets are 64 bits wide from image to image and from row to row; inside of the keys of one image and of keep they are
32, because tiles of wide pointers take the registers of the products (the launches see to it that 32 are enough).
"""

import triton
import triton.language as tl

from softmask_fast.ops.soft_masked_attention.triton_plan import group_of, stacked_rows
from softmask_fast.ops.triton_tiles import load_tile, place_in_grid, products

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def logit_factor(scale, EXACT: tl.constexpr):
    """What products are multiplied with. Logits come in units of ln 2; with EXACT, of 1."""
    return scale if EXACT else scale * LOG2_E


@triton.jit
def exponential(logits, EXACT: tl.constexpr):
    """exp of logits in the unit of `logit_factor`.

    A power of 2 is one instruction; around a power of e the compiler sets four. EXACT keeps the latter: it scales
    differences of logits, which rounds less than scaling logits does.
    """
    return tl.exp(logits) if EXACT else tl.exp2(logits)


@triton.jit
def load_statistics(p_statistics, o_rows, m_rows, EXACT: tl.constexpr):
    """What `attention` takes: maximum and inverse sum of rows; without EXACT the first holds both."""
    shift = tl.load(p_statistics + 2 * o_rows, mask=m_rows, other=0.0)
    inverse = tl.load(p_statistics + 2 * o_rows + 1, mask=m_rows, other=0.0)
    if not EXACT:
        shift = shift - tl.log2(inverse)  # inf where nothing is attended: A = 0
    return shift, inverse


@triton.jit
def attention(logits, shift, inverse, EXACT: tl.constexpr):
    """A. Without EXACT one multiplication less, and the rounding of a log-sum-exp, far below that of half precision."""
    weights = exponential(logits - shift, EXACT)
    if EXACT:
        weights = weights * inverse
    return weights


@triton.jit
def load_keep(p_keep, o_sequences, o_keys, m_keys):
    """Rows beyond the last one read the keep of some other sequence: they are never stored, and need no mask.

    `m_keys` allows the columns that exist, padding included: a multiple of 16, so that they come 16 bytes at a time.
    """
    return tl.load(p_keep + (o_sequences + o_keys), mask=m_keys, other=0.0).to(tl.float32)


@triton.jit
def masked_logits(scores, keep, p_mask, o_mask, m_keys, HAS_KEEP: tl.constexpr, HAS_MASK: tl.constexpr):
    """z = keep s; -inf at padding. `scores`, `keep` have the keys in columns; `o_mask` are offsets per key."""
    if HAS_KEEP:
        scores = scores * keep
    attended = m_keys
    if HAS_MASK:
        attended = attended & (tl.load(p_mask + o_mask, mask=m_keys, other=0) != 0)
    return tl.where(attended, scores, float("-inf"))


@triton.jit
def forward(
    p_query, p_key, p_value, p_keep, p_bias, p_mask, p_plan, p_output, p_statistics,
    query_s, query_h, query_l, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    output_s, output_h, output_l, output_d, keep_s, bias_h, bias_d, mask_b, mask_n,
    B, H, L, N, D, columns, scale, SPLIT,
    EXACT: tl.constexpr,
    HAS_INDEX: tl.constexpr, PACKED: tl.constexpr,
    HAS_KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (SPLIT * H * (B + 1),): program `split` takes row tiles split, split + SPLIT, ... of a head of an image.

    If all rows of an image fit into one tile, as usual, its keys and values are read once. Image B stands for sequences
    whose image does not exist: they get NaN. The maximum that is saved has the unit of `logit_factor`.
    """
    i_program = tl.program_id(0)
    split, head, image = i_program % SPLIT, (i_program // SPLIT) % H, i_program // (SPLIT * H)
    start, n_rows = group_of(image, p_plan, L, HAS_INDEX, PACKED)
    d = tl.arange(0, BLOCK_D)
    m_d = d < D
    factor = logit_factor(scale, EXACT)
    image64, head64 = image.to(tl.int64), head.to(tl.int64)
    p_key += image64 * key_b + head64 * key_h
    p_value += image64 * value_b + head64 * value_h
    again = split * BLOCK_M
    for tile in range(split, tl.cdiv(n_rows, BLOCK_M), SPLIT):
        sequence, token, owner, m_rows = stacked_rows(
            tile * BLOCK_M + tl.arange(0, BLOCK_M), start, n_rows, p_plan, B, L, HAS_INDEX, PACKED
        )
        o_query = sequence * query_s + head64 * query_h + token * query_l
        query = load_tile(p_query, o_query, d * query_d, m_rows, m_d, WIDEN)
        maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        rows = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        last = tl.where(image < B, N, 0)
        for first in range(0, last, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            m_keys = n < N
            key = load_tile(p_key, n * key_n, d * key_d, m_keys, m_d, WIDEN)
            scores = factor * products(
                query, key, p_query, o_query, query_d, m_rows, p_key, n * key_n, key_d, m_keys, D,
                BLOCK_C, WIDEN, PRECISION,
            )  # fmt: skip
            keep = scores
            if HAS_KEEP:
                keep = load_keep(p_keep, (owner * keep_s)[:, None], n[None, :], (n < columns)[None, :])
            logits = masked_logits(
                scores, keep, p_mask, (image64 * mask_b + n * mask_n)[None, :], m_keys[None, :], HAS_KEEP, HAS_MASK
            )
            new_maximum = tl.maximum(maximum, tl.max(logits, 1))
            reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weights = exponential(logits - reference[:, None], EXACT)
            decay = exponential(maximum - reference, EXACT)
            total = total * decay + tl.sum(weights, 1)
            if HAS_KEEP:
                weights = weights * keep
            value = load_tile(p_value, n * value_n, d * value_d, m_keys, m_d, WIDEN)
            rows = rows * decay[:, None]
            rows = tl.dot(weights.to(value.dtype), value, rows, input_precision=PRECISION)
            maximum = new_maximum
        inverse = tl.where(total > 0, 1.0 / total, 0.0)
        rows = rows * inverse[:, None]
        if HAS_BIAS:
            bias = tl.load(p_bias + head64 * bias_h + d * bias_d, mask=m_d, other=0.0).to(tl.float32)
            rows = rows + bias[None, :]
        rows = tl.where(image < B, rows, float("nan"))
        # made again: kept through the loop over the keys, the places of the rows spilled registers
        sequence, token, owner, m_rows = stacked_rows(
            again + tl.arange(0, BLOCK_M), start, n_rows, p_plan, B, L, HAS_INDEX, PACKED
        )
        again += SPLIT * BLOCK_M
        o_output = sequence * output_s + head64 * output_h + token * output_l
        tl.store(
            p_output + o_output[:, None] + (d * output_d)[None, :],
            rows.to(p_output.dtype.element_ty),
            mask=m_rows[:, None] & m_d[None, :],
        )
        o_statistics = ((sequence * H + head) * L + token) * 2
        tl.store(p_statistics + o_statistics, tl.where(maximum == float("-inf"), 0.0, maximum), mask=m_rows)
        tl.store(p_statistics + o_statistics + 1, inverse, mask=m_rows)


@triton.jit
def backward_rows(
    p_grad, p_query, p_key, p_value, p_keep, p_bias, p_mask, p_plan, p_output, p_statistics, p_delta,
    p_d_query, p_d_key, p_d_value,
    grad_s, grad_h, grad_l, grad_d, query_s, query_h, query_l, query_d, key_b, key_h, key_n, key_d,
    value_b, value_h, value_n, value_d, output_s, output_h, output_l, output_d,
    d_query_s, d_query_h, d_query_l, d_query_d, d_key_b, d_key_h, d_key_n, d_key_d,
    d_value_b, d_value_h, d_value_n, d_value_d, keep_s, bias_h, bias_d, mask_b, mask_n,
    B, H, L, N, D, columns, scale, SPLIT,
    OWNS_KEYS: tl.constexpr, EXACT: tl.constexpr,
    HAS_INDEX: tl.constexpr, PACKED: tl.constexpr,
    HAS_KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Same grid as `forward`. Writes dq, and delta, which the other backward kernels read.

    With OWNS_KEYS a program whose image has no more rows than a tile also writes dK and dV: no other adds to them.
    Images with more rows leave them to `backward_key_value`.

    delta is <dO, O - b_v>; with EXACT it is summed from the maps in a pass of its own, because the rounding of O is
    felt where the gradients of the logits nearly cancel.
    """
    i_program = tl.program_id(0)
    split, head, image = i_program % SPLIT, (i_program // SPLIT) % H, i_program // (SPLIT * H)
    start, n_rows = group_of(image, p_plan, L, HAS_INDEX, PACKED)
    d = tl.arange(0, BLOCK_D)
    m_d = d < D
    factor = logit_factor(scale, EXACT)
    image64, head64 = image.to(tl.int64), head.to(tl.int64)
    p_key += image64 * key_b + head64 * key_h
    p_value += image64 * value_b + head64 * value_h
    last = tl.where(image < B, N, 0)
    present = last  # nothing is read of an image without rows, whose gradients are zero
    tiles = tl.cdiv(n_rows, BLOCK_M)
    if OWNS_KEYS:
        p_d_key += image64 * d_key_b + head64 * d_key_h
        p_d_value += image64 * d_value_b + head64 * d_value_h
        fits = tiles <= 1
        present = tl.where(n_rows > 0, last, 0)
        tiles = tl.maximum(tiles, 1)
    again = split * BLOCK_M
    for tile in range(split, tiles, SPLIT):
        sequence, token, owner, m_rows = stacked_rows(
            tile * BLOCK_M + tl.arange(0, BLOCK_M), start, n_rows, p_plan, B, L, HAS_INDEX, PACKED
        )
        o_query = sequence * query_s + head64 * query_h + token * query_l
        o_grad = sequence * grad_s + head64 * grad_h + token * grad_l
        grad = load_tile(p_grad, o_grad, d * grad_d, m_rows, m_d, WIDEN)
        o_row = (sequence * H + head) * L + token
        shift, inverse = load_statistics(p_statistics, o_row, m_rows, EXACT)
        if not EXACT:
            o_output = sequence * output_s + head64 * output_h + token * output_l
            attended = load_tile(p_output, o_output, d * output_d, m_rows, m_d, True)
            if HAS_BIAS:
                bias = tl.load(p_bias + head64 * bias_h + d * bias_d, mask=m_d, other=0.0).to(tl.float32)
                attended = attended - bias[None, :]
            delta = tl.sum(grad.to(tl.float32) * attended, 1)
        # read after delta is made, which has no registers to spare
        query = load_tile(p_query, o_query, d * query_d, m_rows, m_d, WIDEN)
        if EXACT:
            delta = tl.zeros((BLOCK_M,), tl.float32)
            for first in range(0, last, BLOCK_N):
                n = first + tl.arange(0, BLOCK_N)
                m_keys = n < present
                key = load_tile(p_key, n * key_n, d * key_d, m_keys, m_d, WIDEN)
                value = load_tile(p_value, n * value_n, d * value_d, m_keys, m_d, WIDEN)
                scores = factor * products(
                    query, key, p_query, o_query, query_d, m_rows, p_key, n * key_n, key_d, m_keys, D,
                    BLOCK_C, WIDEN, PRECISION,
                )  # fmt: skip
                keep = scores
                if HAS_KEEP:
                    keep = load_keep(p_keep, (owner * keep_s)[:, None], n[None, :], (n < columns)[None, :])
                logits = masked_logits(
                    scores, keep, p_mask, (image64 * mask_b + n * mask_n)[None, :], m_keys[None, :], HAS_KEEP, HAS_MASK
                )
                weights = attention(logits, shift[:, None], inverse[:, None], EXACT)
                if HAS_KEEP:
                    weights = weights * keep
                weights_gradient = products(
                    grad, value, p_grad, o_grad, grad_d, m_rows, p_value, n * value_n, value_d, m_keys, D,
                    BLOCK_C, WIDEN, PRECISION,
                )  # fmt: skip
                delta += tl.sum(weights * weights_gradient, 1)
        tl.store(p_delta + o_row, delta, mask=m_rows)
        d_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(0, last, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            m_keys = n < present
            key = load_tile(p_key, n * key_n, d * key_d, m_keys, m_d, WIDEN)
            value = load_tile(p_value, n * value_n, d * value_d, m_keys, m_d, WIDEN)
            scores = factor * products(
                query, key, p_query, o_query, query_d, m_rows, p_key, n * key_n, key_d, m_keys, D,
                BLOCK_C, WIDEN, PRECISION,
            )  # fmt: skip
            keep = scores
            if HAS_KEEP:
                keep = load_keep(p_keep, (owner * keep_s)[:, None], n[None, :], (n < columns)[None, :])
            logits = masked_logits(
                scores, keep, p_mask, (image64 * mask_b + n * mask_n)[None, :], m_keys[None, :], HAS_KEEP, HAS_MASK
            )
            weights = attention(logits, shift[:, None], inverse[:, None], EXACT)
            weights_gradient = products(
                grad, value, p_grad, o_grad, grad_d, m_rows, p_value, n * value_n, value_d, m_keys, D,
                BLOCK_C, WIDEN, PRECISION,
            )  # fmt: skip
            if HAS_KEEP:
                logits_gradient = (weights * (weights_gradient * keep - delta[:, None]) * keep).to(key.dtype)
                weights = weights * keep
            else:
                logits_gradient = (weights * (weights_gradient - delta[:, None])).to(key.dtype)
            if OWNS_KEYS:
                if fits:
                    d_value = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=PRECISION)
                    d_key = tl.dot(tl.trans(logits_gradient), query, input_precision=PRECISION) * scale
                    m_tile = (n < N)[:, None] & m_d[None, :]
                    o_d_value = (n * d_value_n)[:, None] + (d * d_value_d)[None, :]
                    o_d_key = (n * d_key_n)[:, None] + (d * d_key_d)[None, :]
                    tl.store(p_d_value + o_d_value, d_value.to(p_d_value.dtype.element_ty), mask=m_tile)
                    tl.store(p_d_key + o_d_key, d_key.to(p_d_key.dtype.element_ty), mask=m_tile)
            d_query = tl.dot(logits_gradient, key, d_query, input_precision=PRECISION)
        d_query = tl.where(image < B, d_query * scale, float("nan"))
        # made again: kept through the loop over the keys, the places of the rows spilled registers
        sequence, token, owner, m_rows = stacked_rows(
            again + tl.arange(0, BLOCK_M), start, n_rows, p_plan, B, L, HAS_INDEX, PACKED
        )
        again += SPLIT * BLOCK_M
        o_d_query = sequence * d_query_s + head64 * d_query_h + token * d_query_l
        tl.store(
            p_d_query + o_d_query[:, None] + (d * d_query_d)[None, :],
            d_query.to(p_d_query.dtype.element_ty),
            mask=m_rows[:, None] & m_d[None, :],
        )


@triton.jit
def backward_key_value(
    p_grad, p_query, p_key, p_value, p_keep, p_mask, p_plan, p_statistics, p_delta, p_d_key, p_d_value,
    grad_s, grad_h, grad_l, grad_d, query_s, query_h, query_l, query_d, key_b, key_h, key_n, key_d,
    value_b, value_h, value_n, value_d, d_key_b, d_key_h, d_key_n, d_key_d, d_value_b, d_value_h, d_value_n, d_value_d,
    keep_s, mask_b, mask_n,
    B, H, L, N, D, columns, scale, fitting, first_chunk,
    CHUNK: tl.constexpr, EXACT: tl.constexpr,
    HAS_INDEX: tl.constexpr, PACKED: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N), H, chunks from first_chunk on): one program owns dK and dV of a key tile of CHUNK images.

    A grid ends at 65,535 chunks, so many images take several launches: with `place_in_grid` sm_80 spills registers.
    It passes over all rows of each image that has more than `fitting`; for the others `backward_rows` has done it.
    """
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    m_d = d < D
    factor = logit_factor(scale, EXACT)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_keys = n < N
    head64 = head.to(tl.int64)
    for place in range(0, CHUNK):
        image = (first_chunk + tl.program_id(2)) * CHUNK + place
        start, n_rows = group_of(tl.minimum(image, B - 1), p_plan, L, HAS_INDEX, PACKED)
        if (image < B) & (n_rows > fitting):
            image64 = image.to(tl.int64)
            p_image_key = p_key + (image64 * key_b + head64 * key_h)
            p_image_value = p_value + (image64 * value_b + head64 * value_h)
            key = load_tile(p_image_key, n * key_n, d * key_d, m_keys, m_d, WIDEN)
            value = load_tile(p_image_value, n * value_n, d * value_d, m_keys, m_d, WIDEN)
            d_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            d_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for first in range(0, n_rows, BLOCK_M):
                sequence, token, owner, m_rows = stacked_rows(
                    first + tl.arange(0, BLOCK_M), start, n_rows, p_plan, B, L, HAS_INDEX, PACKED
                )
                o_query = sequence * query_s + head64 * query_h + token * query_l
                query = load_tile(p_query, o_query, d * query_d, m_rows, m_d, WIDEN)
                o_grad = sequence * grad_s + head64 * grad_h + token * grad_l
                grad = load_tile(p_grad, o_grad, d * grad_d, m_rows, m_d, WIDEN)
                o_row = (sequence * H + head) * L + token
                shift, inverse = load_statistics(p_statistics, o_row, m_rows, EXACT)
                delta = tl.load(p_delta + o_row, mask=m_rows, other=0.0)
                if EXACT:  # rounded as in backward_rows, so that what cancels with its delta cancels here
                    scores = products(
                        query, key, p_query, o_query, query_d, m_rows, p_image_key, n * key_n, key_d, m_keys, D,
                        BLOCK_C, WIDEN, PRECISION,
                    )  # fmt: skip
                    weights_gradient = products(
                        grad, value, p_grad, o_grad, grad_d, m_rows, p_image_value, n * value_n, value_d, m_keys, D,
                        BLOCK_C, WIDEN, PRECISION,
                    )  # fmt: skip
                    scores, weights_gradient = tl.trans(scores), tl.trans(weights_gradient)
                else:
                    scores = products(
                        key, query, p_image_key, n * key_n, key_d, m_keys, p_query, o_query, query_d, m_rows, D,
                        BLOCK_C, WIDEN, PRECISION,
                    )  # fmt: skip
                    weights_gradient = products(
                        value, grad, p_image_value, n * value_n, value_d, m_keys, p_grad, o_grad, grad_d, m_rows, D,
                        BLOCK_C, WIDEN, PRECISION,
                    )  # fmt: skip
                scores *= factor  # (BLOCK_N, BLOCK_M)
                keep = scores
                if HAS_KEEP:
                    keep = load_keep(p_keep, (owner * keep_s)[None, :], n[:, None], (n < columns)[:, None])
                logits = masked_logits(
                    scores, keep, p_mask, (image64 * mask_b + n * mask_n)[:, None], m_keys[:, None], HAS_KEEP, HAS_MASK
                )
                weights = attention(logits, shift[None, :], inverse[None, :], EXACT)
                if HAS_KEEP:
                    logits_gradient = weights * (weights_gradient * keep - delta[None, :]) * keep
                    weights = weights * keep
                else:
                    logits_gradient = weights * (weights_gradient - delta[None, :])
                d_value = tl.dot(weights.to(grad.dtype), grad, d_value, input_precision=PRECISION)
                d_key = tl.dot(logits_gradient.to(query.dtype), query, d_key, input_precision=PRECISION)
            m_tile = m_keys[:, None] & m_d[None, :]
            p_image_d_key = p_d_key + (image64 * d_key_b + head64 * d_key_h)
            p_image_d_value = p_d_value + (image64 * d_value_b + head64 * d_value_h)
            o_d_key = (n * d_key_n)[:, None] + (d * d_key_d)[None, :]
            o_d_value = (n * d_value_n)[:, None] + (d * d_value_d)[None, :]
            tl.store(p_image_d_key + o_d_key, (d_key * scale).to(p_d_key.dtype.element_ty), mask=m_tile)
            tl.store(p_image_d_value + o_d_value, d_value.to(p_d_value.dtype.element_ty), mask=m_tile)


@triton.jit
def backward_keep(
    p_grad, p_query, p_key, p_value, p_keep, p_mask, p_index, p_boundaries, p_statistics, p_delta, p_d_keep,
    grad_s, grad_h, grad_l, grad_d, query_s, query_h, query_l, query_d, key_b, key_h, key_n, key_d,
    value_b, value_h, value_n, value_d, keep_s, mask_b, mask_n,
    B, H, L, N, D, columns, scale,
    EXACT: tl.constexpr, HAS_INDEX: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N), S): one program owns dkeep of a key tile of one sequence; d_keep (S, N) is float32."""
    tile, _, sequence = place_in_grid(tl.cdiv(N, BLOCK_N), 1)
    image = sequence
    if HAS_INDEX:
        image = tl.load(p_index + sequence)
    exists = (image >= 0) & (image < B)
    image64, sequence64 = tl.where(exists, image, 0).to(tl.int64), sequence.to(tl.int64)
    begin, end, o_sequence = sequence * 0, sequence * 0 + L, sequence64
    if PACKED:
        begin = tl.maximum(tl.load(p_boundaries + sequence), 0)
        end = tl.minimum(tl.load(p_boundaries + sequence + 1), L)
        o_sequence = sequence64 * 0
    d = tl.arange(0, BLOCK_D)
    m_d = d < D
    factor = logit_factor(scale, EXACT)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_keys = n < N
    keep = tl.load(p_keep + sequence64 * keep_s + n, mask=m_keys, other=0.0).to(tl.float32)[None, :]
    d_keep = tl.zeros((BLOCK_N,), tl.float32)
    to_natural = 1.0 if EXACT else LN_2
    for head in range(0, H):
        p_head_key = p_key + image64 * key_b + head * key_h
        p_head_value = p_value + image64 * value_b + head * value_h
        key = load_tile(p_head_key, n * key_n, d * key_d, m_keys, m_d, WIDEN)
        value = load_tile(p_head_value, n * value_n, d * value_d, m_keys, m_d, WIDEN)
        for first in range(begin, end, BLOCK_M):
            token = first + tl.arange(0, BLOCK_M)
            m_rows = token < end
            o_query = o_sequence * query_s + head * query_h + token.to(tl.int64) * query_l
            query = load_tile(p_query, o_query, d * query_d, m_rows, m_d, WIDEN)
            o_grad = o_sequence * grad_s + head * grad_h + token.to(tl.int64) * grad_l
            grad = load_tile(p_grad, o_grad, d * grad_d, m_rows, m_d, WIDEN)
            o_row = (o_sequence * H + head) * L + token
            shift, inverse = load_statistics(p_statistics, o_row, m_rows, EXACT)
            delta = tl.load(p_delta + o_row, mask=m_rows, other=0.0)
            scores = factor * products(
                query, key, p_query, o_query, query_d, m_rows, p_head_key, n * key_n, key_d, m_keys, D,
                BLOCK_C, WIDEN, PRECISION,
            )  # fmt: skip
            logits = masked_logits(
                scores, keep, p_mask, (image64 * mask_b + n * mask_n)[None, :], m_keys[None, :], True, HAS_MASK
            )
            weights = attention(logits, shift[:, None], inverse[:, None], EXACT)
            weights_gradient = products(
                grad, value, p_grad, o_grad, grad_d, m_rows, p_head_value, n * value_n, value_d, m_keys, D,
                BLOCK_C, WIDEN, PRECISION,
            )  # fmt: skip
            logits_gradient = weights * (weights_gradient * keep - delta[:, None])
            d_keep += tl.sum(logits_gradient * scores * to_natural + weights * weights_gradient, 0)
    d_keep = tl.where(exists, d_keep, float("nan"))
    tl.store(p_d_keep + sequence64 * N + n, d_keep, mask=m_keys)

"""Kernels of word_gradcam and word_soft_mask in Triton. The formulas stand in `reference.py`, launches in
`triton_launch.py`.

One word, three launches: `word_products` streams K and V once, many programs per image, and leaves two numbers per
head and token; `word_map` makes the map or the mask of an image of them, in one program; `mask_features` streams
the features once. All words: two matrix passes, whose softmax statistics are all that is kept between them.
"""

import triton
import triton.language as tl

from softmask_fast.ops.triton_tiles import load_tile, place_in_grid, products


@triton.jit
def capped(logits, soft_cap):
    """soft_cap tanh(logits / soft_cap), to about 1 unit in the last place: a polynomial near 0 (Cephes), where the
    quotient would cancel.
    """
    x = logits / soft_cap
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return soft_cap * tl.where(tl.abs(x) < 0.625, p * z * x + x, tl.where(x < 0, -large, large))


@triton.jit
def load_log_sum_exp(p_sum, o_rows, m_rows):
    """-inf, of a row without any key, becomes inf: its map is zero."""
    sums = tl.load(p_sum + o_rows, mask=m_rows, other=0.0)
    return tl.where(sums == float("-inf"), float("inf"), sums)


@triton.jit
def word_products(
    p_query, p_key, p_value, p_grad, p_word, p_mask, p_sum, p_logits, p_gradients,
    query_b, query_h, query_l, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    grad_b, grad_h, grad_l, grad_d, mask_b, mask_n, sum_b, sum_h, sum_l,
    H, group, L, N, D, scale, soft_cap,
    HAS_MASK: tl.constexpr, HAS_SUM: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N), H, B). logits (B, H, N): <q_i, K_n> scale, capped, less the row's log-sum-exp if there is
    one, -inf at padding; gradients: <dO_i, V_n>. `group` heads of queries share a head of keys.
    """
    tile, head, image = place_in_grid(tl.cdiv(N, BLOCK_N), H)
    head, image = head.to(tl.int64), image.to(tl.int64)
    key_head = head // group
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_keys = n < N
    n64 = n.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m_d = d < D
    word = tl.load(p_word + image)
    exists = (word >= 0) & (word < L)
    word = tl.where(exists, word, 0)
    query = tl.load(p_query + image * query_b + head * query_h + word * query_l + d * query_d, mask=m_d, other=0.0)
    grad = tl.load(p_grad + image * grad_b + head * grad_h + word * grad_l + d * grad_d, mask=m_d, other=0.0)
    key = load_tile(p_key + image * key_b + key_head * key_h, n64 * key_n, d * key_d, m_keys, m_d, True)
    value = load_tile(p_value + image * value_b + key_head * value_h, n64 * value_n, d * value_d, m_keys, m_d, True)
    logits = tl.sum(key * query.to(tl.float32)[None, :], 1) * scale
    gradients = tl.sum(value * grad.to(tl.float32)[None, :], 1)
    if HAS_CAP:
        logits = capped(logits, soft_cap)
    if HAS_SUM:
        logits = logits - load_log_sum_exp(p_sum, image * sum_b + head * sum_h + word * sum_l, exists)
    if HAS_MASK:
        attended = tl.load(p_mask + image * mask_b + n * mask_n, mask=m_keys, other=0) != 0
        logits = tl.where(attended, logits, float("-inf"))
    o_row = (image * H + head) * N + n
    tl.store(p_logits + o_row, logits, mask=m_keys)
    tl.store(p_gradients + o_row, tl.where(exists, gradients, float("nan")), mask=m_keys)


@triton.jit
def word_map(
    p_logits, p_gradients, p_mask, p_map, mask_b, mask_n, H, N, prefix, constant_spread,
    HAS_MASK: tl.constexpr, HAS_SUM: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (B,), BLOCK_N >= N, BLOCK_H heads at a time. logits, gradients (B, H, N); map (B, N): the map of an image,
    or keep with NORMALISE. With HAS_SUM the logits are logarithms of the attention.
    """
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    m_keys = n < N
    p_logits += image * H * N
    p_gradients += image * H * N
    cam = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, H, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        o_rows = head[:, None] * N + n[None, :]
        m_rows = (head < H)[:, None] & m_keys[None, :]
        logits = tl.load(p_logits + o_rows, mask=m_rows, other=float("-inf"))
        gradients = tl.load(p_gradients + o_rows, mask=m_rows, other=0.0)
        if HAS_SUM:
            weights = tl.exp(logits) / H
        else:
            maximum = tl.max(logits, 1)
            maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
            weights = tl.exp(logits - maximum[:, None])
            total = tl.sum(weights, 1)
            weights = weights * tl.where(total == 0, 0.0, 1.0 / (total * H))[:, None]
        # comparisons are false for NaN, so that a NaN stays: tl.maximum would drop it
        cam += tl.sum(weights * tl.where(gradients < 0, 0.0, gradients), 0)
    attended = m_keys
    if HAS_MASK:
        attended = tl.load(p_mask + image * mask_b + n * mask_n, mask=m_keys, other=0) != 0
    result = tl.where(attended, cam, 0.0)
    if NORMALISE:
        # All from the same registers: a map computed again may be rounded otherwise (fused multiply-add), and `/` is
        # approximate on a GPU; either takes keep out of [0, 1] by a few 1e-8.
        patch = attended & (n >= prefix)
        low = tl.min(tl.where(patch, cam, float("inf")), 0)
        high = tl.max(tl.where(patch, cam, 0.0), 0)
        spread = high - low
        varies = spread > constant_spread * high
        keep = 1.0 - tl.div_rn(cam - low, tl.where(varies, spread, 1.0))
        keep = tl.where(keep < 0.0, 0.0, tl.where(keep > 1.0, 1.0, keep))
        keep = tl.where(patch, tl.where(varies, keep, 1.0), 1.0)
        result = tl.where(result == result, keep, float("nan"))
    tl.store(p_map + image * N + n, result, mask=m_keys)


@triton.jit
def mask_features(
    p_features, p_keep, p_masked, features_b, features_n, features_c, masked_b, masked_n, masked_c, N, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N), cdiv(C, BLOCK_C), B). masked (B, N, C): features times keep (B, N)."""
    tile, channels, image = place_in_grid(tl.cdiv(N, BLOCK_N), tl.cdiv(C, BLOCK_C))
    image = image.to(tl.int64)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    c = channels * BLOCK_C + tl.arange(0, BLOCK_C)
    m_keys, m_channels = n < N, c < C
    n64, c64 = n.to(tl.int64), c.to(tl.int64)
    keep = tl.load(p_keep + image * N + n, mask=m_keys, other=0.0)
    features = load_tile(p_features + image * features_b, n64 * features_n, c64 * features_c, m_keys, m_channels, WIDEN)
    masked = (features.to(tl.float32) * keep[:, None]).to(p_masked.dtype.element_ty)
    o_masked = (n64 * masked_n)[:, None] + (c64 * masked_c)[None, :]
    tl.store(p_masked + image * masked_b + o_masked, masked, mask=m_keys[:, None] & m_channels[None, :])


@triton.jit
def all_words_statistics(
    p_query, p_key, p_mask, p_statistics,
    query_b, query_h, query_l, query_d, key_b, key_h, key_n, key_d, mask_b, mask_n,
    H, group, L, N, D, scale, soft_cap,
    HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(L, BLOCK_L), H, B). statistics (B, H, L, 2): maximum and inverse sum of every row of the softmax."""
    tile, head, image = place_in_grid(tl.cdiv(L, BLOCK_L), H)
    head, image = head.to(tl.int64), image.to(tl.int64)
    word = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    m_words = word < L
    d = tl.arange(0, BLOCK_D)
    m_d = d < D
    o_query = word.to(tl.int64) * query_l
    p_query += image * query_b + head * query_h
    p_key += image * key_b + head // group * key_h
    query = load_tile(p_query, o_query, d * query_d, m_words, m_d, WIDEN)
    maximum = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        attended = n < N
        o_key = n.to(tl.int64) * key_n
        key = load_tile(p_key, o_key, d * key_d, attended, m_d, WIDEN)
        logits = scale * products(
            query, key, p_query, o_query, query_d, m_words, p_key, o_key, key_d, attended, D, BLOCK_C, WIDEN, PRECISION
        )
        if HAS_CAP:
            logits = capped(logits, soft_cap)
        if HAS_MASK:
            attended = attended & (tl.load(p_mask + image * mask_b + n * mask_n, mask=attended, other=0) != 0)
        logits = tl.where(attended[None, :], logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - reference) + tl.sum(tl.exp(logits - reference[:, None]), 1)
        maximum = new_maximum
    o_statistics = 2 * ((image * H + head) * L + word)
    tl.store(p_statistics + o_statistics, tl.where(maximum == float("-inf"), 0.0, maximum), mask=m_words)
    tl.store(p_statistics + o_statistics + 1, tl.where(total == 0, 0.0, 1.0 / total), mask=m_words)


@triton.jit
def all_words_map(
    p_query, p_key, p_value, p_grad, p_mask, p_sum, p_statistics, p_map,
    query_b, query_h, query_l, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    grad_b, grad_h, grad_l, grad_d, mask_b, mask_n, sum_b, sum_h, sum_l,
    H, group, L, N, D, scale, soft_cap,
    HAS_MASK: tl.constexpr, HAS_SUM: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N), cdiv(L, BLOCK_L), B). map (B, L, N): the mean over heads of A relu(dO V^T). With HAS_SUM
    the log-sum-exp of the rows takes the place of the statistics.
    """
    tile, words, image = place_in_grid(tl.cdiv(N, BLOCK_N), tl.cdiv(L, BLOCK_L))
    image = image.to(tl.int64)
    word = words * BLOCK_L + tl.arange(0, BLOCK_L)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_words, m_keys = word < L, n < N
    word64, n64 = word.to(tl.int64), n.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m_d = d < D
    attended = m_keys
    if HAS_MASK:
        attended = attended & (tl.load(p_mask + image * mask_b + n * mask_n, mask=m_keys, other=0) != 0)
    o_query, o_grad, o_key, o_value = word64 * query_l, word64 * grad_l, n64 * key_n, n64 * value_n
    p_query += image * query_b
    p_grad += image * grad_b
    p_key += image * key_b
    p_value += image * value_b
    cam = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    for head in range(0, H):
        query = load_tile(p_query, o_query, d * query_d, m_words, m_d, WIDEN)
        grad = load_tile(p_grad, o_grad, d * grad_d, m_words, m_d, WIDEN)
        key = load_tile(p_key, o_key, d * key_d, m_keys, m_d, WIDEN)
        value = load_tile(p_value, o_value, d * value_d, m_keys, m_d, WIDEN)
        if HAS_SUM:
            maximum = load_log_sum_exp(p_sum, image * sum_b + head * sum_h + word64 * sum_l, m_words)
        else:
            o_statistics = 2 * ((image * H + head) * L + word)
            maximum = tl.load(p_statistics + o_statistics, mask=m_words, other=0.0)
            inverse = tl.load(p_statistics + o_statistics + 1, mask=m_words, other=0.0)
        logits = scale * products(
            query, key, p_query, o_query, query_d, m_words, p_key, o_key, key_d, m_keys, D, BLOCK_C, WIDEN, PRECISION
        )
        if HAS_CAP:
            logits = capped(logits, soft_cap)
        logits = tl.where(attended[None, :], logits, float("-inf"))
        gradients = products(
            grad, value, p_grad, o_grad, grad_d, m_words, p_value, o_value, value_d, m_keys, D,
            BLOCK_C, WIDEN, PRECISION,
        )  # fmt: skip
        weights = tl.exp(logits - maximum[:, None])
        if not HAS_SUM:
            weights = weights * inverse[:, None]
        cam += weights * tl.where(gradients < 0, 0.0, gradients)
        p_query += query_h
        p_grad += grad_h
        if (head + 1) % group == 0:
            p_key += key_h
            p_value += value_h
    if HAS_MASK:
        cam = tl.where(attended[None, :], cam, 0.0)
    o_map = (image * L + word64)[:, None] * N + n[None, :]
    tl.store(p_map + o_map, cam / H, mask=m_words[:, None] & m_keys[None, :])

"""Forward kernels of the focal contrastive loss in Triton. Formulas: `reference.py`, launches: `triton_launch.py`.

Student and teacher rows share each tile of keys. One key of each row, its "dominant" key, is kept out of the sums: no
other one is more than twice as probable, so every other p is at most 2/3, powers of 1 - p expand without cancellation,
and 1 - p of the dominant key is the sum of all others over the total. Its share is added by `finish`. With STATS the
dominant key is the most probable one, the first of equals.

Logarithms are to base 2, which is what the hardware has. Sums over keys are relative to a reference, the product of the
dominant key: x = (product - reference) log2(e) / tau, and u likewise for the teacher.

Most tiles have no positive, no new dominant key and no end of the keys. Work for these is behind branches that all
threads take or skip together. Every element pays only for the rest.
"""

import triton
import triton.language as tl

from softmask_fast.ops.focal_itc import state
from softmask_fast.ops.triton_tiles import load_tile

# Rows of the row state (ROW_STATES, B).
ROW_MAX = tl.constexpr(state.ROW_MAX)
ROW_LOG_SUM = tl.constexpr(state.ROW_LOG_SUM)
ROW_TEACHER_MAX = tl.constexpr(state.ROW_TEACHER_MAX)
ROW_TEACHER_LOG_SUM = tl.constexpr(state.ROW_TEACHER_LOG_SUM)
ROW_WEIGHT = tl.constexpr(state.ROW_WEIGHT)
ROW_HARD = tl.constexpr(state.ROW_HARD)
ROW_POSITIVE_MAX = tl.constexpr(state.ROW_POSITIVE_MAX)
ROW_POSITIVE_LOG_SUM = tl.constexpr(state.ROW_POSITIVE_LOG_SUM)
ROW_DOMINANT_GRADIENT = tl.constexpr(state.ROW_DOMINANT_GRADIENT)
ROW_STATES = tl.constexpr(state.ROW_STATES)

# Rows of `sums` (splits, SUMS, B), float32. T and H hold pairs for k = 0 ... 3: sum 2^u 2^(kx) and sum 2^u 2^(kx) x
# over the keys, and without 2^u over the positives; none of the sums but POSITIVE_SUM counts the dominant key.
MAX = tl.constexpr(0)  # the dominant key's product
TEACHER_MAX = tl.constexpr(1)
TEACHER_DOMINANT = tl.constexpr(2)  # the teacher's product with the dominant key
OTHERS = tl.constexpr(3)  # sum 2^x over all keys
POSITIVE = tl.constexpr(4)  # and over the positives among them
ENTROPY = tl.constexpr(5)  # sum 2^x x
BEST = tl.constexpr(6)  # best score of a hard negative, relative to MAX
POSITIVE_MAX = tl.constexpr(7)  # largest product of a positive
POSITIVE_SUM = tl.constexpr(8)  # the same sum relative to it (both only for ANY)
T = tl.constexpr(9)
H = tl.constexpr(17)
SUMS = tl.constexpr(25)
# Rows of `places` (splits, PLACES, B), int32.
DOMINANT = tl.constexpr(0)
DOMINANT_POSITIVE = tl.constexpr(1)  # 1 where it is a positive
CHOICE = tl.constexpr(2)  # the hard negative, -1 for none
PLACES = tl.constexpr(3)
TERM_SUMS = tl.constexpr(4)  # rows of `terms` (splits, TERM_SUMS, B), see `row_terms`
BLANK = tl.constexpr(-1e30)  # product of a key that does not exist
NO_SCORE = tl.constexpr(-1e15)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TEACHER_MARGIN = tl.constexpr(8.0)  # the teacher's sums may grow by 2^8 before they are made relative to a new maximum


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, to full relative precision: the rounding error of 1 + x cancels."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def load_scales(p_temperature, dtype: tl.constexpr):
    """log2(e) / tau, and for float32 features what its rounding leaves over.

    An error of the scale is one of all logits in the same direction, which the temperature's gradient feels ten times
    over: 5e-7 of it at 0.07, where twice PyTorch's error is less. The products of 2-byte features are off by more.
    """
    temperature = tl.load(p_temperature)
    if dtype == tl.float32:
        scale = tl.full((), 1.4426950408889634, tl.float64) / temperature.to(tl.float64)
        rounded = scale.to(tl.float32)
        scales = rounded, (scale - rounded.to(tl.float64)).to(tl.float32)
    else:
        scales = (LOG2_E / temperature,)
    return scales


@triton.jit
def add_products(total, left, right, first, PRECISION: tl.constexpr):
    """total + left right^T, for the columns from `first` on.

    In float32 the sum over these columns begins at 0, which Triton must not see, or it makes one chain of all columns
    with the rounding errors of a single long sum.
    """
    if left.dtype == tl.float32:
        nothing = tl.full(total.shape, tl.minimum(first, 0).to(tl.float32), tl.float32)
        total += tl.dot(left, tl.trans(right), nothing, input_precision=PRECISION)
    else:
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def multiply(
    p_rows, p_teacher, p_keys, rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d, m_rows, m_keys, D, rows, teacher,
    keys, HAS_TEACHER: tl.constexpr, RESIDENT: tl.constexpr, BY_KEYS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of student and teacher rows with keys, (rows, keys).

    Always this way round: the transposed product rounds differently, which large logits feel.

    The pointers stand at the first row and key of the tile, so that offsets within it take 32 bits. RESIDENT: D fits
    one tile, and what the caller holds (the keys where BY_KEYS, else the rows) is loaded already; the other side is
    loaded here and returned. Else both sides are read in tiles of BLOCK_D.
    """
    o_rows, o_teacher = tl.arange(0, BLOCK_B) * rows_b, tl.arange(0, BLOCK_B) * teacher_b
    o_keys = tl.arange(0, BLOCK_K) * keys_m
    d = tl.arange(0, BLOCK_D)
    other = keys
    if RESIDENT:
        if BY_KEYS:
            other = load_tile(p_rows, o_rows, d * rows_d, m_rows, d < D, WIDEN)
            student = tl.dot(other, tl.trans(keys), input_precision=PRECISION)
            momentum = student
            if HAS_TEACHER:
                teacher = load_tile(p_teacher, o_teacher, d * teacher_d, m_rows, d < D, WIDEN)
                momentum = tl.dot(teacher, tl.trans(keys), input_precision=PRECISION)
        else:
            other = load_tile(p_keys, o_keys, d * keys_d, m_keys, d < D, WIDEN)
            student = tl.dot(rows, tl.trans(other), input_precision=PRECISION)
            momentum = student
            if HAS_TEACHER:
                momentum = tl.dot(teacher, tl.trans(other), input_precision=PRECISION)
    else:
        student = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
        momentum = student
        for first in range(0, D, BLOCK_D):
            column = first + d
            key_tile = load_tile(p_keys, o_keys, column * keys_d, m_keys, column < D, WIDEN)
            row_tile = load_tile(p_rows, o_rows, column * rows_d, m_rows, column < D, WIDEN)
            student = add_products(student, row_tile, key_tile, first, PRECISION)
            if HAS_TEACHER:
                row_tile = load_tile(p_teacher, o_teacher, column * teacher_d, m_rows, column < D, WIDEN)
                momentum = add_products(momentum, row_tile, key_tile, first, PRECISION)
    return student, momentum, other


@triton.jit
def load_alpha(p_alpha, HAS_TEACHER: tl.constexpr):
    """The weight of the soft targets, a float64 on the device; 0 without a teacher."""
    alpha = 0.0
    if HAS_TEACHER:
        alpha = tl.load(p_alpha).to(tl.float32)
    return alpha


@triton.jit
def relative(products, reference, scales):
    """x of a tile: the difference comes first, so that differences of large logits stay exact."""
    difference = products - reference
    x = difference * scales[0]
    if len(scales) == 2:
        x += difference * scales[1]
    return x


@triton.jit
def positive_tile(row_ids, key_ids, row, number, row_offset, HAS_IDS: tl.constexpr):
    """Positive mask of a tile; rows and keys come in the shapes that broadcast to it."""
    if HAS_IDS:
        mask = row_ids == key_ids
    else:
        mask = number == row + row_offset
    return mask


@triton.jit
def with_dominant(products, maximum, dominant, number):
    """The products of a tile before the one with the dominant key was blanked."""
    return tl.where(number[None, :] == dominant[:, None], maximum[:, None], products)


@triton.jit
def tile_of_positives(p_ids, p_key_ids, row, key, number, m_rows, m_keys, row_offset, HAS_IDS: tl.constexpr):
    """Positive mask (rows, keys) of a tile."""
    row_ids, key_ids = row, key
    if HAS_IDS:
        row_ids = tl.load(p_ids + row, mask=m_rows, other=0)
        key_ids = tl.load(p_key_ids + key, mask=m_keys, other=0)
    mask = positive_tile(row_ids[:, None], key_ids[None, :], row[:, None], number[None, :], row_offset, HAS_IDS)
    return mask & m_keys[None, :]


@triton.jit
def may_have_positives(
    p_spans, key, m_keys, M, first_number, first_row, row_offset,
    HAS_IDS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """False where no row from `first_row` on has a positive in this tile of keys.

    `p_spans` (2, M) int32 has the first and the last row that have the id of each key.
    """
    if HAS_IDS:
        first = tl.load(p_spans + key, mask=m_keys, other=2147483647)
        last = tl.load(p_spans + M + key, mask=m_keys, other=-1)
        found = tl.max(((first < first_row + BLOCK_B) & (last >= first_row)).to(tl.int32), 0) > 0
    else:
        distance = first_row + row_offset - first_number
        found = (distance < BLOCK_K) & (distance > -BLOCK_B)
    return found


@triton.jit
def raise_maximum(
    sums, t, h, maximum, new_maximum, teacher_max, new_teacher_max, teacher_dominant, dominant_positive, replaced,
    scale, HAS_TEACHER: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Makes the sums relative to new maxima; where `replaced`, the old dominant key becomes one of the others."""
    others, positive, entropy, best = sums
    delta = tl.where(maximum > BLANK, (new_maximum - maximum) * scale, 0.0)
    one = tl.where(replaced, 1.0, 0.0)
    hard = one * dominant_positive
    others, positive = others + one, positive + hard
    factor = tl.exp2(-delta)
    entropy = (entropy - delta * others) * factor
    decay, weight = one, one
    if HAS_TEACHER:
        decay = tl.exp2((teacher_max - new_teacher_max) * scale)
        weight = one * tl.exp2(tl.minimum((teacher_dominant - new_teacher_max) * scale, 0.0))
    new_t, new_h = (), ()
    power = tl.full(delta.shape, 1.0, tl.float32)
    for k in tl.static_range(TERMS):
        if HAS_TEACHER:
            plain, with_x = t[k]
            plain = plain * decay + weight
            new_t = new_t + ((plain * power, (with_x * decay - delta * plain) * power),)
        plain, with_x = h[k]
        plain = plain + hard
        new_h = new_h + ((plain * power, (with_x - delta * plain) * power),)
        power = power * factor
    if not HAS_TEACHER:
        new_t = t
    return (others * factor, positive * factor, entropy, best - delta), new_t, new_h


@triton.jit
def pairs_of_zeros(zero, TERMS: tl.constexpr):
    """TERMS pairs of `zero`, to which `add_powers` adds."""
    pairs = ()
    for _ in tl.static_range(TERMS):
        pairs = pairs + ((zero, zero),)
    return pairs


@triton.jit
def add_powers(pairs, weight, e, x, TERMS: tl.constexpr):
    """pairs + (sum weight 2^(kx), sum weight 2^(kx) x) over the keys of a tile."""
    added = ()
    for k in tl.static_range(TERMS):
        plain, with_x = pairs[k]
        added = added + ((plain + tl.sum(weight, 1), with_x + tl.sum(weight * x, 1)),)
        weight = weight * e
    return added


@triton.jit
def row_sums(
    p_rows, p_teacher, p_keys, p_ids, p_key_ids, p_spans, p_temperature, p_sums, p_places,
    rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d,
    B, M, D, first_key, row_offset, KEYS_PER_SPLIT,
    TERMS: tl.constexpr, ANY: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_IDS: tl.constexpr, STATS: tl.constexpr,
    RESIDENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_B), splits): the sums of a block of rows over KEYS_PER_SPLIT keys, powers 0 ... TERMS - 1.

    `first_key` is the number of the first key; positives and the results count in these numbers. Hard negatives are
    left to `row_negatives`.
    """
    first_row = tl.program_id(0) * BLOCK_B
    row = first_row + tl.arange(0, BLOCK_B)
    m_rows = row < B
    d = tl.arange(0, BLOCK_D)
    scales = load_scales(p_temperature, p_rows.dtype.element_ty)
    scale = scales[0]
    p_rows += first_row.to(tl.int64) * rows_b
    rows = load_tile(p_rows, tl.arange(0, BLOCK_B) * rows_b, d * rows_d, m_rows, d < D, WIDEN)
    teacher = rows
    if HAS_TEACHER:
        p_teacher += first_row.to(tl.int64) * teacher_b
        teacher = load_tile(p_teacher, tl.arange(0, BLOCK_B) * teacher_b, d * teacher_d, m_rows, d < D, WIDEN)
    margin = 0.0
    if not STATS:
        margin = 1.0 / scale

    zero = tl.zeros((BLOCK_B,), tl.float32)
    maximum, teacher_max, positive_max = zero + BLANK, zero + BLANK, zero + BLANK
    teacher_dominant, dominant_positive, positive_sum = zero, zero, zero
    sums = (zero, zero, zero, zero + NO_SCORE)
    t, h = pairs_of_zeros(zero, TERMS), pairs_of_zeros(zero, TERMS)
    dominant = tl.zeros((BLOCK_B,), tl.int32)
    choice = dominant - 1

    start = tl.program_id(1) * KEYS_PER_SPLIT
    p_keys += start.to(tl.int64) * keys_m
    for first in range(start, tl.minimum(start + KEYS_PER_SPLIT, M), BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        m_keys = key < M
        number = first_key + key
        products, momentum, _ = multiply(
            p_rows, p_teacher, p_keys, rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d, m_rows, m_keys, D, rows,
            teacher, rows, HAS_TEACHER, RESIDENT, False, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN, PRECISION,
        )  # fmt: skip
        p_keys += BLOCK_K * keys_m
        rises = tl.max(products, 1) > maximum + margin
        if HAS_TEACHER:
            rises = rises | ((tl.max(momentum, 1) - teacher_max) * scale > TEACHER_MARGIN)
        with_positives = may_have_positives(
            p_spans, key, m_keys, M, first_key + first, first_row, row_offset, HAS_IDS, BLOCK_B, BLOCK_K
        )
        # joined with itself: Triton 3.6 fails for sm_100 where products are reduced to a row, and it to one number
        twice = tl.cat(rises.to(tl.int32), rises.to(tl.int32), can_reorder=True)
        if (first + BLOCK_K > M) | (tl.max(twice, 0) > 0):
            products = tl.where(m_keys[None, :], products, BLANK)
            tile_max, tile_argmax = tl.max(products, 1, return_indices=True)
            rises = tile_max > maximum + margin
            new_maximum = tl.where(rises, tile_max, maximum)
            new_teacher_max = teacher_max
            if HAS_TEACHER:
                momentum = tl.where(m_keys[None, :], momentum, BLANK)
                new_teacher_max = tl.maximum(teacher_max, tl.max(momentum, 1))
            sums, t, h = raise_maximum(
                sums, t, h, maximum, new_maximum, teacher_max, new_teacher_max, teacher_dominant, dominant_positive,
                rises & (maximum > BLANK), scale, HAS_TEACHER, TERMS,
            )  # fmt: skip
            maximum, teacher_max = new_maximum, new_teacher_max
            dominant = tl.where(rises, first_key + first + tile_argmax, dominant)
            row_ids, key_ids = row, dominant
            if HAS_IDS:
                row_ids = tl.load(p_ids + row, mask=m_rows, other=0)
                key_ids = tl.load(p_key_ids + first + tile_argmax, mask=rises, other=0)
            is_positive = positive_tile(row_ids, key_ids, row, dominant, row_offset, HAS_IDS)
            dominant_positive = tl.where(rises, tl.where(is_positive, 1.0, 0.0), dominant_positive)
            is_dominant = number[None, :] == dominant[:, None]
            if HAS_TEACHER:
                at_dominant = tl.sum(tl.where(is_dominant, momentum, 0.0), 1)
                teacher_dominant = tl.where(rises, at_dominant, teacher_dominant)
                momentum = tl.where(is_dominant, BLANK, momentum)
            products = tl.where(is_dominant, BLANK, products)

        if ANY:
            if with_positives:  # before the sums, while the products are all that a tile takes registers for
                is_positive = tile_of_positives(p_ids, p_key_ids, row, key, number, m_rows, m_keys, row_offset, HAS_IDS)
                candidates = tl.where(is_positive, with_dominant(products, maximum, dominant, number), BLANK)
                new_positive_max = tl.maximum(positive_max, tl.max(candidates, 1))
                positive_sum = positive_sum * tl.exp2((positive_max - new_positive_max) * scale)
                positive_e = tl.exp2(relative(candidates, new_positive_max[:, None], scales))
                positive_sum += tl.sum(tl.where(is_positive, positive_e, 0.0), 1)
                positive_max = new_positive_max

        x = relative(products, maximum[:, None], scales)
        e = tl.exp2(x)
        others, positive, entropy, best = sums
        lost = products * 0.0  # NaN where a product is not finite: minus infinity alone would add nothing
        if HAS_TEACHER:
            lost = (products + momentum) * 0.0
        others += tl.sum(e + lost, 1)
        if STATS:
            entropy += tl.sum(e * x, 1)
        if HAS_TEACHER:
            t = add_powers(t, tl.exp2(relative(momentum, teacher_max[:, None], scales)), e, x, TERMS)
        if with_positives:
            is_positive = tile_of_positives(p_ids, p_key_ids, row, key, number, m_rows, m_keys, row_offset, HAS_IDS)
            positive += tl.sum(tl.where(is_positive, e, 0.0), 1)
            counted = is_positive & (number[None, :] != dominant[:, None])
            h = add_powers(h, tl.where(counted, 1.0, 0.0), e, x, TERMS)
        sums = (others, positive, entropy, best)

    p_sums += tl.program_id(1).to(tl.int64) * SUMS * B + row
    p_places += tl.program_id(1).to(tl.int64) * PLACES * B + row
    store_sums(
        p_sums, p_places, m_rows, B, maximum, teacher_max, teacher_dominant, sums, positive_max, positive_sum, t, h,
        dominant, dominant_positive, choice, TERMS,
    )  # fmt: skip


@triton.jit
def store_sums(
    p_sums, p_places, m_rows, B, maximum, teacher_max, teacher_dominant, sums, positive_max, positive_sum, t, h,
    dominant, dominant_positive, choice, TERMS: tl.constexpr,
):  # fmt: skip
    """Write the running sums of the rows, B apart: floats to p_sums, column numbers to p_places."""
    others, positive, entropy, best = sums
    tl.store(p_sums + MAX * B, maximum, mask=m_rows)
    tl.store(p_sums + TEACHER_MAX * B, teacher_max, mask=m_rows)
    tl.store(p_sums + TEACHER_DOMINANT * B, teacher_dominant, mask=m_rows)
    tl.store(p_sums + OTHERS * B, others, mask=m_rows)
    tl.store(p_sums + POSITIVE * B, positive, mask=m_rows)
    tl.store(p_sums + ENTROPY * B, entropy, mask=m_rows)
    tl.store(p_sums + BEST * B, best, mask=m_rows)
    tl.store(p_sums + POSITIVE_MAX * B, positive_max, mask=m_rows)
    tl.store(p_sums + POSITIVE_SUM * B, positive_sum, mask=m_rows)
    for k in tl.static_range(TERMS):
        tl.store(p_sums + (T + 2 * k) * B, t[k][0], mask=m_rows)
        tl.store(p_sums + (T + 2 * k + 1) * B, t[k][1], mask=m_rows)
        tl.store(p_sums + (H + 2 * k) * B, h[k][0], mask=m_rows)
        tl.store(p_sums + (H + 2 * k + 1) * B, h[k][1], mask=m_rows)
    tl.store(p_places + DOMINANT * B, dominant, mask=m_rows)
    tl.store(p_places + DOMINANT_POSITIVE * B, dominant_positive.to(tl.int32), mask=m_rows)
    tl.store(p_places + CHOICE * B, choice, mask=m_rows)


@triton.jit
def focal(log_p, one_minus_p, gamma, ORDER: tl.constexpr):
    """f(p) and w(p) of `reference.py`; ORDER = gamma where it is 0, 1, 2 or 3, else -1."""
    if ORDER == 0:
        power = tl.full(log_p.shape, 1.0, tl.float32)
    elif ORDER == 1:
        power = one_minus_p
    elif ORDER == 2:
        power = one_minus_p * one_minus_p
    elif ORDER == 3:
        power = one_minus_p * one_minus_p * one_minus_p
    else:
        power = tl.where(one_minus_p > 0, tl.exp(gamma * tl.log(tl.maximum(one_minus_p, 1e-37))), 0.0)
    ratio = -tl.exp(log_p) * log_p / tl.where(one_minus_p > 0, one_minus_p, 1.0)
    return -power * log_p, power * (1.0 + gamma * tl.where(one_minus_p > 0, ratio, 1.0))


@triton.jit
def row_terms(
    p_rows, p_teacher, p_keys, p_ids, p_key_ids, p_spans, p_temperature, p_sums, p_places, p_terms,
    rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d,
    B, M, D, first_key, row_offset, gamma, KEYS_PER_SPLIT,
    HAS_TEACHER: tl.constexpr, HAS_IDS: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Second pass for gammas that do not expand, same grid as `row_sums`, after `merge`.

    terms (splits, TERM_SUMS, B): loss and weight under the teacher's 2^u, loss and weight over the positives; the
    dominant key is left out.
    """
    first_row = tl.program_id(0) * BLOCK_B
    row = first_row + tl.arange(0, BLOCK_B)
    m_rows = row < B
    d = tl.arange(0, BLOCK_D)
    scales = load_scales(p_temperature, p_rows.dtype.element_ty)
    p_rows += first_row.to(tl.int64) * rows_b
    rows = load_tile(p_rows, tl.arange(0, BLOCK_B) * rows_b, d * rows_d, m_rows, d < D, WIDEN)
    teacher = rows
    if HAS_TEACHER:
        p_teacher += first_row.to(tl.int64) * teacher_b
        teacher = load_tile(p_teacher, tl.arange(0, BLOCK_B) * teacher_b, d * teacher_d, m_rows, d < D, WIDEN)
    maximum = tl.load(p_sums + MAX * B + row, mask=m_rows, other=0.0)
    teacher_max = tl.load(p_sums + TEACHER_MAX * B + row, mask=m_rows, other=0.0)
    log_sum = log1p(tl.load(p_sums + OTHERS * B + row, mask=m_rows, other=0.0))
    dominant = tl.load(p_places + DOMINANT * B + row, mask=m_rows, other=0)
    zero = tl.zeros((BLOCK_B,), tl.float32)
    soft_loss, soft_weight, hard_loss, hard_weight = zero, zero, zero, zero
    start = tl.program_id(1) * KEYS_PER_SPLIT
    p_keys += start.to(tl.int64) * keys_m
    for first in range(start, tl.minimum(start + KEYS_PER_SPLIT, M), BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        m_keys = key < M
        products, momentum, _ = multiply(
            p_rows, p_teacher, p_keys, rows_b, rows_d, teacher_b, teacher_d, keys_m, keys_d, m_rows, m_keys, D, rows,
            teacher, rows, HAS_TEACHER, RESIDENT, False, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN, PRECISION,
        )  # fmt: skip
        p_keys += BLOCK_K * keys_m
        number = first_key + key
        with_positives = may_have_positives(
            p_spans, key, m_keys, M, first_key + first, first_row, row_offset, HAS_IDS, BLOCK_B, BLOCK_K
        )
        counted = m_keys[None, :] & (number[None, :] != dominant[:, None])
        log_p = tl.minimum(relative(products, maximum[:, None], scales) * LN_2 - log_sum[:, None], 0.0)
        loss, weight = focal(log_p, 1.0 - tl.exp(log_p), gamma, -1)
        if HAS_TEACHER:
            soft = tl.where(counted, tl.exp2(relative(momentum, teacher_max[:, None], scales)), 0.0)
            soft_loss += tl.sum(soft * loss, 1)
            soft_weight += tl.sum(soft * weight, 1)
        if with_positives:
            is_positive = tile_of_positives(p_ids, p_key_ids, row, key, number, m_rows, m_keys, row_offset, HAS_IDS)
            hard = tl.where(is_positive & counted, 1.0, 0.0)
            hard_loss += tl.sum(hard * loss, 1)
            hard_weight += tl.sum(hard * weight, 1)
    p_terms += tl.program_id(1).to(tl.int64) * TERM_SUMS * B + row
    tl.store(p_terms, soft_loss, mask=m_rows)
    tl.store(p_terms + B, soft_weight, mask=m_rows)
    tl.store(p_terms + 2 * B, hard_loss, mask=m_rows)
    tl.store(p_terms + 3 * B, hard_weight, mask=m_rows)

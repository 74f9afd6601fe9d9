"""The last steps of the forward in Triton: the sums of all splits become one, and these the loss of each row."""

import triton
import triton.language as tl

from softmask_fast.ops.focal_itc.triton_kernels import (
    BEST,
    BLANK,
    CHOICE,
    DOMINANT,
    DOMINANT_POSITIVE,
    ENTROPY,
    LN_2,
    MAX,
    NO_SCORE,
    OTHERS,
    PLACES,
    POSITIVE,
    POSITIVE_MAX,
    POSITIVE_SUM,
    ROW_DOMINANT_GRADIENT,
    ROW_HARD,
    ROW_LOG_SUM,
    ROW_MAX,
    ROW_POSITIVE_LOG_SUM,
    ROW_POSITIVE_MAX,
    ROW_TEACHER_LOG_SUM,
    ROW_TEACHER_MAX,
    ROW_WEIGHT,
    SUMS,
    TEACHER_DOMINANT,
    TEACHER_MAX,
    H,
    T,
    focal,
    load_alpha,
    load_scales,
    log1p,
    pairs_of_zeros,
    raise_maximum,
    relative,
    store_sums,
)


@triton.jit
def merge(
    p_sums, p_places, p_temperature, B, splits,
    TERMS: tl.constexpr, HAS_TEACHER: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_B),): the sums over all splits, in ascending order, into the place of the first."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_rows = row < B
    scale = load_scales(p_temperature, tl.float32)[0]
    p_sums += row
    p_places += row
    zero = tl.zeros((BLOCK_B,), tl.float32)
    maximum, teacher_max, positive_max = zero + BLANK, zero + BLANK, zero + BLANK
    teacher_dominant, dominant_positive, positive_sum = zero, zero, zero
    sums = (zero, zero, zero, zero + NO_SCORE)
    t, h = pairs_of_zeros(zero, TERMS), pairs_of_zeros(zero, TERMS)
    dominant = tl.zeros((BLOCK_B,), tl.int32)
    choice = dominant - 1
    p, p_place = p_sums, p_places
    for _ in range(0, splits):
        its_maximum = tl.load(p + MAX * B, mask=m_rows, other=0.0)
        its_teacher_max = tl.load(p + TEACHER_MAX * B, mask=m_rows, other=0.0)
        its_teacher_dominant = tl.load(p + TEACHER_DOMINANT * B, mask=m_rows, other=0.0)
        its_positive_max = tl.load(p + POSITIVE_MAX * B, mask=m_rows, other=0.0)
        its_positive_sum = tl.load(p + POSITIVE_SUM * B, mask=m_rows, other=0.0)
        its_dominant = tl.load(p_place + DOMINANT * B, mask=m_rows, other=0)
        its_dominant_positive = tl.load(p_place + DOMINANT_POSITIVE * B, mask=m_rows, other=0).to(tl.float32)
        its_choice = tl.load(p_place + CHOICE * B, mask=m_rows, other=0)
        its_sums = (
            tl.load(p + OTHERS * B, mask=m_rows, other=0.0),
            tl.load(p + POSITIVE * B, mask=m_rows, other=0.0),
            tl.load(p + ENTROPY * B, mask=m_rows, other=0.0),
            tl.load(p + BEST * B, mask=m_rows, other=0.0),
        )
        its_t, its_h = (), ()
        for k in tl.static_range(TERMS):
            its_t = its_t + (
                (
                    tl.load(p + (T + 2 * k) * B, mask=m_rows, other=0.0),
                    tl.load(p + (T + 2 * k + 1) * B, mask=m_rows, other=0.0),
                ),
            )
            its_h = its_h + (
                (
                    tl.load(p + (H + 2 * k) * B, mask=m_rows, other=0.0),
                    tl.load(p + (H + 2 * k + 1) * B, mask=m_rows, other=0.0),
                ),
            )

        # blocks of keys come in any order: of equal keys the one of the lowest number is dominant
        rises = (its_maximum > maximum) | ((its_maximum == maximum) & (its_dominant < dominant))
        new_maximum = tl.maximum(maximum, its_maximum)
        new_teacher_max = tl.maximum(teacher_max, its_teacher_max)
        sums, t_raised, h = raise_maximum(
            sums, t, h, maximum, new_maximum, teacher_max, new_teacher_max, teacher_dominant, dominant_positive,
            rises & (maximum > BLANK), scale, HAS_TEACHER, TERMS,
        )  # fmt: skip
        its_sums, its_t_raised, its_h = raise_maximum(
            its_sums, its_t, its_h, its_maximum, new_maximum, its_teacher_max, new_teacher_max, its_teacher_dominant,
            its_dominant_positive, rises == 0, scale, HAS_TEACHER, TERMS,
        )  # fmt: skip
        choice = tl.where(its_sums[3] > sums[3], its_choice, choice)
        best = tl.maximum(its_sums[3], sums[3])
        sums = (sums[0] + its_sums[0], sums[1] + its_sums[1], sums[2] + its_sums[2], best)
        new_t, new_h = (), ()
        for k in tl.static_range(TERMS):
            if HAS_TEACHER:
                new_t = new_t + ((t_raised[k][0] + its_t_raised[k][0], t_raised[k][1] + its_t_raised[k][1]),)
            new_h = new_h + ((h[k][0] + its_h[k][0], h[k][1] + its_h[k][1]),)
        if HAS_TEACHER:
            t = new_t
        h = new_h
        new_positive_max = tl.maximum(positive_max, its_positive_max)
        positive_sum = positive_sum * tl.exp2((positive_max - new_positive_max) * scale)
        positive_sum += its_positive_sum * tl.exp2((its_positive_max - new_positive_max) * scale)
        dominant = tl.where(rises, its_dominant, dominant)
        dominant_positive = tl.where(rises, its_dominant_positive, dominant_positive)
        teacher_dominant = tl.where(rises, its_teacher_dominant, teacher_dominant)
        maximum, teacher_max, positive_max = new_maximum, new_teacher_max, new_positive_max
        p += SUMS * B
        p_place += PLACES * B

    store_sums(
        p_sums, p_places, m_rows, B, maximum, teacher_max, teacher_dominant, sums, positive_max, positive_sum, t, h,
        dominant, dominant_positive, choice, TERMS,
    )  # fmt: skip


@triton.jit
def expand(p_pairs, B, m_rows, log_sum, total, ORDER: tl.constexpr):
    """Loss and weight of the keys in the pairs: (1 - p)^ORDER in powers of p."""
    loss = tl.zeros(log_sum.shape, tl.float32)
    weight = loss
    power = loss + 1.0
    for k in tl.static_range(ORDER + 1):
        # binomial coefficients with their signs, of ORDER over k and of ORDER - 1 over k - 1
        if k == 0:
            outer, inner = 1.0, 0.0
        elif k == 1:
            outer, inner = -1.0 * ORDER, -1.0
        elif k == 2:
            outer, inner = 1.0 if ORDER == 2 else 3.0, 1.0 if ORDER == 2 else 2.0
        else:
            outer, inner = -1.0, -1.0
        plain = tl.load(p_pairs + 2 * k * B, mask=m_rows, other=0.0)
        with_log_p = (tl.load(p_pairs + (2 * k + 1) * B, mask=m_rows, other=0.0) * LN_2 - log_sum * plain) * power
        loss -= outer * with_log_p
        weight += outer * plain * power + ORDER * inner * with_log_p
        power = power / total
    return loss, weight


@triton.jit
def finish(
    p_sums, p_places, p_terms, p_count, p_temperature, p_alpha, p_loss, p_state, p_dominant, p_statistics, p_negative,
    B, gamma,
    ORDER: tl.constexpr, HAS_TEACHER: tl.constexpr, ANY: tl.constexpr, STATS: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_B),): loss, row state (see state.py) and statistics from the merged sums.

    `p_terms` (TERM_SUMS, B) holds the merged sums of `row_terms` where ORDER is -1.
    """
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_rows = row < B
    scales = load_scales(p_temperature, tl.float32)
    alpha = load_alpha(p_alpha, HAS_TEACHER)
    p_sums += row
    p_places += row
    maximum = tl.load(p_sums + MAX * B, mask=m_rows, other=0.0)
    others = tl.load(p_sums + OTHERS * B, mask=m_rows, other=0.0)
    positive = tl.load(p_sums + POSITIVE * B, mask=m_rows, other=0.0)
    positive_max = tl.load(p_sums + POSITIVE_MAX * B, mask=m_rows, other=0.0)
    positive_log_sum = tl.log(tl.maximum(tl.load(p_sums + POSITIVE_SUM * B, mask=m_rows, other=1.0), 1.0))
    dominant = tl.load(p_places + DOMINANT * B, mask=m_rows, other=0)
    is_positive = tl.load(p_places + DOMINANT_POSITIVE * B, mask=m_rows, other=0).to(tl.float32)
    total = 1.0 + others
    log_sum = log1p(others)
    p = 1.0 / total
    dominant_loss, dominant_weight = focal(-log_sum, others / total, gamma, ORDER)

    zero = tl.zeros((BLOCK_B,), tl.float32)
    rest_loss, rest_weight, target, mass_weight, mass_gradient = zero, zero, zero, zero, zero
    soft_loss, soft_weight, hard_loss, hard_weight = zero, zero, zero, zero
    if ORDER >= 0:
        hard_loss, hard_weight = expand(p_sums + H * B, B, m_rows, log_sum, total, ORDER)
        if HAS_TEACHER:
            soft_loss, soft_weight = expand(p_sums + T * B, B, m_rows, log_sum, total, ORDER)
    else:
        soft_loss = tl.load(p_terms + row, mask=m_rows, other=0.0)
        soft_weight = tl.load(p_terms + B + row, mask=m_rows, other=0.0)
        hard_loss = tl.load(p_terms + 2 * B + row, mask=m_rows, other=0.0)
        hard_weight = tl.load(p_terms + 3 * B + row, mask=m_rows, other=0.0)
    teacher_max, teacher_log_sum = zero, zero
    if HAS_TEACHER:
        teacher_max = tl.load(p_sums + TEACHER_MAX * B, mask=m_rows, other=0.0)
        teacher_dominant = tl.load(p_sums + TEACHER_DOMINANT * B, mask=m_rows, other=0.0)
        weight = tl.exp2(tl.minimum(relative(teacher_dominant, teacher_max, scales), 0.0))
        teacher_total = tl.load(p_sums + T * B, mask=m_rows, other=0.0) + weight
        teacher_log_sum = tl.log(teacher_total)
        rest_loss += alpha * soft_loss / teacher_total
        rest_weight += alpha * soft_weight / teacher_total
        target += alpha * weight / teacher_total
    if ANY:
        one_minus_mass = (tl.maximum(others - positive, 0.0) + 1.0 - is_positive) / total
        log_mass = tl.where(
            is_positive > 0,
            log1p(-tl.minimum(one_minus_mass, 0.9999999)),
            relative(positive_max, maximum, scales) * LN_2 + positive_log_sum - log_sum,
        )
        mass_loss, mass_weight = focal(tl.minimum(log_mass, 0.0), one_minus_mass, gamma, ORDER)
        rest_loss += (1.0 - alpha) * mass_loss
        mass_weight *= 1.0 - alpha
        hard = mass_weight
        mass_gradient = hard * p * tl.where(is_positive > 0, -one_minus_mass / (1.0 - one_minus_mass), 1.0)
    else:
        hard = (1.0 - alpha) / tl.load(p_count + row, mask=m_rows, other=1).to(tl.float32)
        rest_loss += hard * hard_loss
        rest_weight += hard * hard_weight
        target += hard * is_positive
    # p W - t w of the dominant key, without the difference of near equals that it is where p and t are near 1
    gradient = p * rest_weight - others / total * target * dominant_weight + mass_gradient
    lost = (others + maximum + teacher_max) * 0.0  # NaN where a product is not finite, whose row has no loss

    p_state += row
    tl.store(p_loss + row, rest_loss + target * dominant_loss + lost, mask=m_rows)
    tl.store(p_state + ROW_MAX * B, maximum, mask=m_rows)
    tl.store(p_state + ROW_LOG_SUM * B, log_sum, mask=m_rows)
    tl.store(p_state + ROW_TEACHER_MAX * B, teacher_max, mask=m_rows)
    tl.store(p_state + ROW_TEACHER_LOG_SUM * B, teacher_log_sum, mask=m_rows)
    weight = rest_weight + target * dominant_weight + mass_weight + lost
    tl.store(p_state + ROW_WEIGHT * B, weight, mask=m_rows)
    tl.store(p_state + ROW_HARD * B, hard, mask=m_rows)
    tl.store(p_state + ROW_POSITIVE_MAX * B, positive_max, mask=m_rows)
    tl.store(p_state + ROW_POSITIVE_LOG_SUM * B, positive_log_sum, mask=m_rows)
    tl.store(p_state + ROW_DOMINANT_GRADIENT * B, gradient + lost, mask=m_rows)
    tl.store(p_dominant + row, dominant.to(tl.int64), mask=m_rows)
    if STATS:
        entropy = log_sum - tl.load(p_sums + ENTROPY * B, mask=m_rows, other=0.0) * LN_2 / total
        choice = tl.where(lost == 0.0, tl.load(p_places + CHOICE * B, mask=m_rows, other=0), -1)
        tl.store(p_statistics + row, is_positive + lost, mask=m_rows)
        tl.store(p_statistics + B + row, entropy, mask=m_rows)
        tl.store(p_statistics + 2 * B + row, (positive + is_positive) / total, mask=m_rows)
        tl.store(p_negative + row, choice.to(tl.int64), mask=m_rows)

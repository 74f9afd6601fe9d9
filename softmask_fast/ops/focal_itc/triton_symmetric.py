"""Kernels of a batch that is its own keys: each product <x_i, y_j> of image row i and text row j, made once, serves
both directions. Launches: `triton_symmetric_launch.py`, operator: `operators.py`, formulas: `reference.py`.

The positive of row i is key i and nothing else, so it is left out of all sums and 1 - p of it is exact: the sum over
the others divided by the total. Logarithms are to base 2.

Forward: one exponential 2^x for both directions, x = (product - reference) log2(e) / tau + offset, with one reference
and offset for all of the batch that keep unit vectors from overflowing: (0, 0) down to a temperature of 0.0144, then
(1, 100). Where a sum is not between 2^-80 and 2^126 (vectors that are not unit vectors, low temperatures, NaN)
`symmetric_finish` makes the sums of its rows again, relative to their own maxima. Below 2^-80 terms that underflow to
0 could be seen in a sum of 2^22.

Backward: G_ij = dloss / ds_ij of both directions = 2^x_ij (a_i + b_j), again one exponential and the same one, so that
p adds up to 1 as it did in the forward; two where sums of the tile were made again. The products with G are left to the
library.
"""

import triton
import triton.language as tl

from softmask_fast.ops.focal_itc.triton_kernels import (
    BLANK,
    LN_2,
    LOG2_E,
    ROW_DOMINANT_GRADIENT,
    ROW_HARD,
    ROW_LOG_SUM,
    ROW_MAX,
    ROW_POSITIVE_MAX,
    ROW_STATES,
    ROW_TEACHER_MAX,
    ROW_WEIGHT,
    focal,
    log1p,
)

OFFSET = tl.constexpr(100.0)
LEAST_SUM = tl.constexpr(8.271806125530277e-25)  # 2^-80
LARGEST_SUM = tl.constexpr(8.507059173023462e37)  # 2^126
# Of the row state (see state.py) the maximum is any reference here, and the dominant key the positive. There is no
# teacher, whose place the sum takes: of 2^x over all keys, 0 where it was made again.
ROW_SUM = ROW_TEACHER_MAX


@triton.jit
def tile_place(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP row tiles at a time, column by column, so that neighbors in time share L2."""
    per_group = GROUP * column_tiles
    first = program // per_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + program % per_group % size, program % per_group // size


@triton.jit
def product_tile(
    p_x, p_y, x_b, y_b, r0, c0, B, D,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> of rows r0 ... and columns c0 ..., float32 (BLOCK_B, BLOCK_K); nothing is promised beyond the end B.

    TMA: p_x and p_y are tensor descriptors with blocks (BLOCK_B, BLOCK_D) and (BLOCK_K, BLOCK_D). EVEN: BLOCK_D
    divides D.
    """
    total = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    if TMA:
        for first in range(0, D, BLOCK_D):
            x, y = p_x.load([r0, first]), p_y.load([c0, first])
            if WIDEN:
                x, y = x.to(tl.float32), y.to(tl.float32)
            total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
    else:
        d = tl.arange(0, BLOCK_D)
        o_x = tl.minimum(r0 + tl.arange(0, BLOCK_B), B - 1).to(tl.int64) * x_b
        o_y = tl.minimum(c0 + tl.arange(0, BLOCK_K), B - 1).to(tl.int64) * y_b
        p_x += o_x[:, None] + d[None, :]
        p_y += o_y[:, None] + d[None, :]
        for first in range(0, D, BLOCK_D):
            if EVEN:
                x, y = tl.load(p_x), tl.load(p_y)
            else:
                m_d = (first + d)[None, :] < D
                x, y = tl.load(p_x, mask=m_d, other=0.0), tl.load(p_y, mask=m_d, other=0.0)
            if WIDEN:
                x, y = x.to(tl.float32), y.to(tl.float32)
            total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
            p_x += BLOCK_D
            p_y += BLOCK_D
    return total


@triton.jit
def halves(tile):
    """Left and right half of the columns of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def scale_and_reference(p_temperature):
    """log2(e) / tau, reference and offset. A division that is not approximate: the same bits in every kernel."""
    temperature = tl.load(p_temperature)
    scale = tl.div_rn(tl.full(temperature.shape, LOG2_E, tl.float32), temperature)
    low = scale > OFFSET
    return scale, tl.where(low, 1.0, 0.0), tl.where(low, OFFSET, 0.0)


@triton.jit
def add_tile(products, scale, reference, offset, r0, c0, B, p_columns, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of 2^x of a tile: stores those of its columns, returns those of its rows."""
    row, column = r0 + tl.arange(0, BLOCK_B), c0 + tl.arange(0, BLOCK_K)
    # before the exponentials, so that one tile is alive at a time
    if (r0 + BLOCK_B > B) | (c0 + BLOCK_K > B) | ((r0 < c0 + BLOCK_K) & (c0 < r0 + BLOCK_B)):
        counted = (row < B)[:, None] & (column < B)[None, :] & (row[:, None] != column[None, :])
        products = tl.where(counted, products, BLANK)
    e = tl.exp2((products - reference) * scale + offset) + products * 0.0  # NaN where a product is not finite
    tl.store(p_columns + column, tl.sum(e, 0), mask=column < B)
    return tl.sum(e, 1)


@triton.jit
def symmetric_sums(
    p_image, p_text, p_temperature, p_row_parts, p_column_parts,
    image_b, text_b, B, D, first_row, rows, row_parts_n,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    IN_PARTS: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program per tile of the rows first_row ... first_row + rows and all columns.

    row_parts (cdiv(B, BLOCK_K), row_parts_n) from first_row on and column_parts (cdiv(rows, BLOCK_B), B): the sums of
    each tile's rows and columns, without the pairs (i, i).
    """
    i, j = tile_place(tl.program_id(0), tl.cdiv(rows, BLOCK_B), tl.cdiv(B, BLOCK_K), GROUP)
    r0, c0 = first_row + i * BLOCK_B, j * BLOCK_K
    scale, reference, offset = scale_and_reference(p_temperature)
    products = product_tile(
        p_image, p_text, image_b, text_b, r0, c0, B, D, BLOCK_B, BLOCK_K, BLOCK_D, EVEN, TMA, WIDEN, PRECISION
    )
    p_column_parts += i.to(tl.int64) * B
    if IN_PARTS:
        HALF: tl.constexpr = BLOCK_K // 2
        left, right = halves(products)
        total = add_tile(left, scale, reference, offset, r0, c0, B, p_column_parts, BLOCK_B, HALF)
        total += add_tile(right, scale, reference, offset, r0, c0 + HALF, B, p_column_parts, BLOCK_B, HALF)
    else:
        total = add_tile(products, scale, reference, offset, r0, c0, B, p_column_parts, BLOCK_B, BLOCK_K)
    n = i * BLOCK_B + tl.arange(0, BLOCK_B)
    tl.store(p_row_parts + j.to(tl.int64) * row_parts_n + n, total, mask=(n < rows) & (first_row + n < B))


@triton.jit
def sum_of_parts(p_parts, parts_n, parts, n, mask):
    """Sums over parts (parts, parts_n) in ascending order, 1 or more where not wanted."""
    total = tl.zeros(n.shape, tl.float32)
    p_parts += n
    for _ in range(0, parts):
        total += tl.load(p_parts, mask=mask, other=1.0)
        p_parts += parts_n
    return total


@triton.jit
def add_parts(p_parts, p_sums, N, parts, parts_n, FIRST: tl.constexpr, BLOCK_B: tl.constexpr):
    """Grid (cdiv(N, BLOCK_B),): adds the sums over parts (parts, parts_n) to sums (N,); FIRST: sums hold nothing."""
    n = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = n < N
    total = sum_of_parts(p_parts, parts_n, parts, n, mask)
    if not FIRST:
        total += tl.load(p_sums + n, mask=mask, other=0.0)
    tl.store(p_sums + n, total, mask=mask)


@triton.jit
def sums_again(
    p_x, p_y, x_b, y_b, r0, B, D, scale,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest product of each of BLOCK_B rows with the keys but its own, and the sum of 2^X relative to it."""
    row = r0 + tl.arange(0, BLOCK_B)
    maximum, total = tl.full((BLOCK_B,), BLANK, tl.float32), tl.zeros((BLOCK_B,), tl.float32)
    for c0 in range(0, B, BLOCK_B):
        column = c0 + tl.arange(0, BLOCK_B)
        products = product_tile(
            p_x, p_y, x_b, y_b, r0, c0, B, D, BLOCK_B, BLOCK_B, BLOCK_D, EVEN, False, WIDEN, PRECISION
        )
        counted = (column < B)[None, :] & (row[:, None] != column[None, :])
        raised = tl.maximum(maximum, tl.max(tl.where(counted, products, BLANK), 1))
        e = tl.where(counted, tl.exp2((products - raised[:, None]) * scale) + products * 0.0, 0.0)
        total = total * tl.exp2((maximum - raised) * scale) + tl.sum(e, 1)
        maximum = raised
    return maximum, total


@triton.jit
def finish_direction(
    p_x, p_y, p_sums, parts, p_temperature, p_loss, p_state, p_dominant, x_b, y_b, diagonal, r0, B, D, gamma,
    ORDER: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Loss and state of BLOCK_B rows of one direction from the sums (parts, B) and the product of each positive."""
    row = r0 + tl.arange(0, BLOCK_B)
    m_rows = row < B
    scale, reference, offset = scale_and_reference(p_temperature)
    others = sum_of_parts(p_sums, B, parts, row, m_rows)
    reference += tl.zeros((BLOCK_B,), tl.float32)
    x = (diagonal - reference) * scale + offset
    total = others + tl.exp2(x)
    kept = total
    # of NaN no comparison is true
    misses = m_rows & (((others > LEAST_SUM) & (total < LARGEST_SUM)) == 0)
    if tl.max(misses.to(tl.int32), 0) > 0:
        maximum, others = sums_again(p_x, p_y, x_b, y_b, r0, B, D, scale, BLOCK_B, BLOCK_D, EVEN, WIDEN, PRECISION)
        reference = tl.maximum(maximum, diagonal)
        others *= tl.exp2((maximum - reference) * scale)
        x = (diagonal - reference) * scale
        total = others + tl.exp2(x)
        kept = tl.zeros((BLOCK_B,), tl.float32)
        offset = 0.0
    bits = others.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    # log2 of (1 - p) / p: exponents apart from mantissas, so that large x lose nothing; the last term keeps NaN
    ratio = tl.where(others == 0.0, -1e30, tl.log2(mantissa) + (exponent - x)) + (others + diagonal) * 0.0
    log_p = -(tl.maximum(ratio, 0.0) * LN_2 + log1p(tl.exp2(-tl.abs(ratio))))
    one_minus_p = tl.div_rn(others, total)
    loss, weight = focal(log_p, one_minus_p, gamma, ORDER)
    zero = tl.zeros((BLOCK_B,), tl.float32)
    p_state += row
    tl.store(p_loss + row, loss, mask=m_rows)
    for state in tl.static_range(ROW_STATES):
        value = zero
        if state == ROW_MAX:
            value = reference
        elif state == ROW_LOG_SUM:
            value = (tl.log2(total) - offset) * LN_2
        elif state == ROW_SUM:
            value = kept
        elif state == ROW_WEIGHT:
            value = weight
        elif state == ROW_HARD:
            value = zero + 1.0
        elif state == ROW_POSITIVE_MAX:
            value = diagonal
        elif state == ROW_DOMINANT_GRADIENT:
            value = -one_minus_p * weight
        tl.store(p_state + state * B, value, mask=m_rows)
    tl.store(p_dominant + row, row.to(tl.int64), mask=m_rows)


@triton.jit
def symmetric_finish(
    p_image, p_text, p_temperature, p_row_sums, p_column_sums, p_loss, p_state, p_dominant,
    image_b, text_b, B, D, gamma, row_parts, column_parts,
    ORDER: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_B),): loss (2, B), row state and dominant (2, B) of both directions of these rows.

    row_sums (row_parts, B), column_sums (column_parts, B).
    """
    r0 = tl.program_id(0) * BLOCK_B
    # by the matrix units, as all other products: what they round off is then alike in the differences
    products = product_tile(
        p_image, p_text, image_b, text_b, r0, r0, B, D, BLOCK_B, BLOCK_B, BLOCK_D, EVEN, False, WIDEN, PRECISION
    )
    own = tl.arange(0, BLOCK_B)[:, None] == tl.arange(0, BLOCK_B)[None, :]
    diagonal = tl.sum(tl.where(own, products, 0.0), 1)
    finish_direction(
        p_image, p_text, p_row_sums, row_parts, p_temperature, p_loss, p_state, p_dominant, image_b, text_b, diagonal,
        r0, B, D, gamma, ORDER, BLOCK_B, BLOCK_D, EVEN, WIDEN, PRECISION,
    )  # fmt: skip
    finish_direction(
        p_text, p_image, p_column_sums, column_parts, p_temperature, p_loss + B, p_state + ROW_STATES * B,
        p_dominant + B, text_b, image_b, diagonal, r0, B, D, gamma, ORDER, BLOCK_B, BLOCK_D, EVEN, WIDEN, PRECISION,
    )  # fmt: skip


@triton.jit
def load_direction(p_grad, p_state, n, B, factor):
    """Sum and weight of rows; past the end the sum of the last, and the weight 0."""
    place = tl.minimum(n, B - 1)
    weight = tl.load(p_state + ROW_WEIGHT * B + place) * (tl.load(p_grad + place) * factor)
    return tl.load(p_state + ROW_SUM * B + place), tl.where(n < B, weight, 0.0)


@triton.jit
def load_reference(p_state, n, B):
    """Reference and log of the sum to base 2."""
    place = tl.minimum(n, B - 1)
    return tl.load(p_state + ROW_MAX * B + place), tl.load(p_state + ROW_LOG_SUM * B + place) * LOG2_E


@triton.jit
def load_positive(p_grad, p_state, row, m_rows, B, factor):
    """G of the positives' pairs of one direction, and that times their products less the reference."""
    gradient = tl.load(p_state + ROW_DOMINANT_GRADIENT * B + row, mask=m_rows, other=0.0)
    gradient *= tl.load(p_grad + row, mask=m_rows, other=0.0) * factor
    product = tl.load(p_state + ROW_POSITIVE_MAX * B + row, mask=m_rows, other=0.0)
    return gradient, gradient * (product - tl.load(p_state + ROW_MAX * B + row, mask=m_rows, other=0.0))


@triton.jit
def gradient_tile(
    products, scale, reference, offset, row_sum, row_weight, p_grad, p_state, p_gradient, gradient_b, r0, c0, first_row,
    first_column, B, factor, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Stores G of a tile; returns the sum over it of G's two parts times the products less their references.

    p_grad and p_state: of direction 0.
    """
    row, column = r0 + tl.arange(0, BLOCK_B), c0 + tl.arange(0, BLOCK_K)
    p_other_grad, p_other_state = p_grad + B, p_state + ROW_STATES * B
    column_sum, column_weight = load_direction(p_other_grad, p_other_state, column, B, factor)
    m_rows, m_columns = row < B, column < B
    few = (r0 + BLOCK_B > B) | (c0 + BLOCK_K > B) | ((r0 < c0 + BLOCK_K) & (c0 < r0 + BLOCK_B))
    if few:
        counted = m_rows[:, None] & m_columns[None, :] & (row[:, None] != column[None, :])
        products = tl.where(counted, products, BLANK)
    if tl.minimum(tl.min(row_sum, 0), tl.min(column_sum, 0)) > 0.0:
        products -= reference
        a, b = tl.div_rn(row_weight, row_sum), tl.div_rn(column_weight, column_sum)
        gradient = tl.exp2(products * scale + offset) * (a[:, None] + b[None, :])
        total = tl.sum(gradient * products, 1)
    else:
        row_reference, row_log_sum = load_reference(p_state, row, B)
        difference = products - row_reference[:, None]
        gradient = tl.exp2(difference * scale - row_log_sum[:, None]) * row_weight[:, None]
        total = tl.sum(gradient * difference, 1)
        column_reference, column_log_sum = load_reference(p_other_state, column, B)
        difference = products - column_reference[None, :]
        of_columns = tl.exp2(difference * scale - column_log_sum[None, :]) * column_weight[None, :]
        total += tl.sum(of_columns * difference, 1)
        gradient += of_columns
    if few:
        own, own_total = load_positive(p_grad, p_state, row, m_rows, B, factor)
        other, other_total = load_positive(p_other_grad, p_other_state, row, m_rows, B, factor)
        gradient = tl.where(row[:, None] == column[None, :], (own + other)[:, None], gradient)
        total += tl.where((row >= c0) & (row < c0 + BLOCK_K), own_total + other_total, 0.0)
    o_gradient = (row - first_row)[:, None] * gradient_b + (column - first_column)[None, :]
    tl.store(
        p_gradient + o_gradient,
        gradient.to(p_gradient.dtype.element_ty),
        mask=m_rows[:, None] & m_columns[None, :],
    )
    return tl.sum(total, 0)


@triton.jit
def symmetric_gradient(
    p_grad, p_largest, p_image, p_text, p_temperature, p_state, p_gradient, p_with_products,
    image_b, text_b, gradient_b, B, D, first_row, first_column, rows, columns, magnify,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    IN_PARTS: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program per tile of a chunk of G: the rows from first_row and the columns from first_column on.

    gradient (rows, columns): G relative to the largest size of grad (2, B), times `magnify`, so that float16 keeps
    small gradients. with_products: sum G <x_i, y_j> of each program's tile, in float32. In each direction a row
    of G adds up to nothing, so there its products count from their reference: large logits then cost no precision.
    """
    i, j = tile_place(tl.program_id(0), tl.cdiv(rows, BLOCK_B), tl.cdiv(columns, BLOCK_K), GROUP)
    r0, c0 = first_row + i * BLOCK_B, first_column + j * BLOCK_K
    scale, reference, offset = scale_and_reference(p_temperature)
    factor = magnify / tl.load(p_largest)
    products = product_tile(
        p_image, p_text, image_b, text_b, r0, c0, B, D, BLOCK_B, BLOCK_K, BLOCK_D, EVEN, TMA, WIDEN, PRECISION
    )
    row_sum, row_weight = load_direction(p_grad, p_state, r0 + tl.arange(0, BLOCK_B), B, factor)
    if IN_PARTS:
        HALF: tl.constexpr = BLOCK_K // 2
        QUARTER: tl.constexpr = BLOCK_K // 4
        left, right = halves(products)
        far_left, near_left = halves(left)
        near_right, far_right = halves(right)
        total = gradient_tile(
            far_left, scale, reference, offset, row_sum, row_weight, p_grad, p_state, p_gradient, gradient_b, r0,
            c0, first_row, first_column, B, factor, BLOCK_B, QUARTER,
        )  # fmt: skip
        total += gradient_tile(
            near_left, scale, reference, offset, row_sum, row_weight, p_grad, p_state, p_gradient, gradient_b, r0,
            c0 + QUARTER, first_row, first_column, B, factor, BLOCK_B, QUARTER,
        )  # fmt: skip
        total += gradient_tile(
            near_right, scale, reference, offset, row_sum, row_weight, p_grad, p_state, p_gradient, gradient_b, r0,
            c0 + HALF, first_row, first_column, B, factor, BLOCK_B, QUARTER,
        )  # fmt: skip
        total += gradient_tile(
            far_right, scale, reference, offset, row_sum, row_weight, p_grad, p_state, p_gradient, gradient_b, r0,
            c0 + HALF + QUARTER, first_row, first_column, B, factor, BLOCK_B, QUARTER,
        )  # fmt: skip
    else:
        total = gradient_tile(
            products, scale, reference, offset, row_sum, row_weight, p_grad, p_state, p_gradient, gradient_b, r0,
            c0, first_row, first_column, B, factor, BLOCK_B, BLOCK_K,
        )  # fmt: skip
    tl.store(p_with_products + tl.program_id(0), total)

"""What the Triton kernels of all operators share: tiles of rows, and products of two of them."""

import triton
import triton.language as tl


@triton.jit
def place_in_grid(first, second):
    """This program's place in a grid of (first, second, any number), which is launched as one dimension: all but CUDA's
    first end at 65,535.
    """
    program = tl.program_id(0)
    return program % first, program // first % second, program // (first * second)


@triton.jit
def load_tile(p, o_rows, o_columns, m_rows, m_columns, WIDEN: tl.constexpr):
    """The tile at offsets o_rows + o_columns, 0 where masked; float32 if WIDEN."""
    tile = tl.load(p + o_rows[:, None] + o_columns[None, :], mask=m_rows[:, None] & m_columns[None, :], other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def products(
    left, right, p_left, o_left, left_d, m_left, p_right, o_right, right_d, m_right, D,
    BLOCK_C: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<left_i, right_j> of the rows of two tiles, float32.

    If BLOCK_C is less than the width of the tiles, their columns are loaded again, BLOCK_C at a time. float32 tiles
    need this: whole rows of two tiles do not fit into the registers.
    """
    if BLOCK_C == left.shape[1]:
        total = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    else:
        total = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
        for first in range(0, D, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            left_part = load_tile(p_left, o_left, c * left_d, m_left, c < D, WIDEN)
            right_part = load_tile(p_right, o_right, c * right_d, m_right, c < D, WIDEN)
            total = tl.dot(left_part, tl.trans(right_part), total, input_precision=PRECISION)
    return total

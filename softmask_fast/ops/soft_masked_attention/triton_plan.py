"""Which rows belong to which image: the kernel that makes the table of an `ImagePlan`, and how the others read it."""

import triton
import triton.language as tl


@triton.jit
def plan(p_index, p_boundaries, p_plan, S, B, R, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """p_plan: starts (B + 2), then order (R,): the sequences by image, ascending; packed: the rows by image, and then
    the sequence of each, (R,). Sequences without a valid image belong to image B; rows of no sequence are left out.

    One program per image scans all indices twice; no sort, no atomics, nothing returns to the host.
    """
    image = tl.program_id(0)
    before = 0
    for first in range(0, S, BLOCK):
        sequence = first + tl.arange(0, BLOCK)
        index, _, count = rows_of_sequences(sequence, p_index, p_boundaries, S, B, R, PACKED)
        before += tl.sum(tl.where(index < image, count, 0), 0)
    tl.store(p_plan + image, tl.minimum(before, R))
    p_order = p_plan + B + 2
    for first in range(0, S, BLOCK):
        sequence = first + tl.arange(0, BLOCK)
        index, begin, count = rows_of_sequences(sequence, p_index, p_boundaries, S, B, R, PACKED)
        count = tl.where(index == image, count, 0)
        place = before + tl.cumsum(count, 0) - count
        for row in range(0, tl.max(count, 0)):
            mine = (row < count) & (place + row < R)
            tl.store(p_order + place + row, begin + row, mask=mine)
            if PACKED:
                tl.store(p_order + R + place + row, sequence, mask=mine)
        before += tl.sum(count, 0)
    if image == B:
        tl.store(p_plan + B + 1, tl.minimum(before, R))


@triton.jit
def rows_of_sequences(sequence, p_index, p_boundaries, S, B, R, PACKED: tl.constexpr):
    """Image, first row and number of rows of sequences; of the padded form each is one row here. What `boundaries`
    say is held to the R rows that exist.
    """
    exists = sequence < S
    index = tl.load(p_index + sequence, mask=exists, other=0)
    index = tl.where((index < 0) | (index >= B), B, index)
    begin, count = sequence, exists.to(tl.int32)
    if PACKED:
        begin = tl.maximum(tl.minimum(tl.load(p_boundaries + sequence, mask=exists, other=0), R), 0)
        end = tl.minimum(tl.load(p_boundaries + sequence + 1, mask=exists, other=0), R)
        count = tl.maximum(end - begin, 0)
    return index, begin, count


@triton.jit
def group_of(image, p_plan, L, HAS_INDEX: tl.constexpr, PACKED: tl.constexpr):
    """First place in `order` and number of rows of an image; without an index sequence i belongs to image i."""
    if HAS_INDEX:
        start = tl.load(p_plan + image)
        rows = tl.load(p_plan + image + 1) - start
        if not PACKED:
            rows = rows * L
    else:
        start = image
        rows = image * 0 + L
    return start, rows


@triton.jit
def stacked_rows(places, start, rows, p_plan, B, L, HAS_INDEX: tl.constexpr, PACKED: tl.constexpr):
    """Of the stacked rows `places` of an image: sequence (int64) and token, by which they are found; the sequence
    whose keep they have; validity. Packed rows are found as the tokens of one sequence of all L rows.
    """
    valid = places < rows
    if PACKED:
        slot = tl.where(valid, start + places, start)
        row = tl.load(p_plan + B + 2 + slot, mask=valid, other=0)
        owner = tl.load(p_plan + B + 2 + L + slot, mask=valid, other=0)
        sequence, token = (row * 0).to(tl.int64), row
    else:
        slot = tl.where(valid, start + places // L, start)
        if HAS_INDEX:
            owner = tl.load(p_plan + B + 2 + slot, mask=valid, other=0)
        else:
            owner = slot
        sequence, token = owner.to(tl.int64), places % L
    return sequence, token, owner, valid

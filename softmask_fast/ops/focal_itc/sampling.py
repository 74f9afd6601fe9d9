"""The random numbers of the hard-negative sampler: a hash of (seed, direction, row, column), the same everywhere.

A hard negative is drawn with the Gumbel-max trick: `argmax_j(s_j - log(E_j))` over the candidate columns, with
`E_j` unit exponential, follows `softmax(s)` restricted to them. `E_j` comes from 32 hashed bits, so no
implementation has to store noise, tiles may be visited in any order, and a row draws the same key on one process and
on many.

The mixer is Chris Wellons' public-domain `lowbias32` (https://nullprogram.com/blog/2018/07/31/).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
LARGEST_UNIFORM = 1 - 2.0**-24  # the largest float32 below 1: keeps log1p(-v) finite


def _mix(x: Tensor) -> Tensor:
    """lowbias32 on int64 tensors that hold unsigned 32-bit values (the products wrap, their low 32 bits stay right)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def row_keys(first_row: int, rows: int, seed: Tensor, direction: int) -> tuple[Tensor, Tensor]:
    """Two 32-bit hash keys for each of the rows `first_row ... first_row + rows - 1`, as int64 tensors (rows,).

    `seed`: () int64, never read by the host.
    """
    low, high = seed & _MASK, seed >> 32 & _MASK
    stream = _mix(low ^ (0x9E3779B9 * direction))
    first = _mix((torch.arange(first_row, first_row + rows, device=seed.device) + stream) & _MASK)
    return first, _mix(first ^ high ^ 0x85EBCA6B)


def negative_log_exponential(
    keys: tuple[Tensor, Tensor], first_column: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Gumbel noise `-log(E)` of `columns` columns from `first_column` on -> (rows, columns) of `dtype`."""
    first, second = keys
    column = torch.arange(first_column, first_column + columns, device=first.device)
    bits = _mix((_mix(column[None] ^ first[:, None]) + second[:, None]) & _MASK)
    # 1 - v is the uniform number: a small v, so a small E, keeps its relative precision, and small E are what wins.
    v = (bits.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=LARGEST_UNIFORM).to(dtype)
    return -torch.log(-torch.log1p(-v))

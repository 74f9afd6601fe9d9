"""Which keys are the positives of a row, without a (B, M) mask: the implementations that stream look here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PositiveLists(NamedTuple):
    """Row i's positives among a block of keys are ``columns[first[i] : first[i] + count[i]]``, ascending.

    The columns are global numbers of keys. O(B + M) memory, however many positives there are.
    """

    columns: Tensor  # (keys,) int64 with ids, else (B,)
    first: Tensor  # (B,) int64
    count: Tensor  # (B,) int64, 0 where the row has no positive in this block


def positive_lists(
    rows: Tensor, ids: Tensor | None, keys: Tensor, key_ids: Tensor | None, row_offset: int, first_key: int
) -> PositiveLists:
    """The positives among the block ``keys``, whose first key has the number ``first_key``.

    They are the keys of equal id, or key ``row_offset + i`` for row i.
    """
    if ids is None:
        number = torch.arange(rows.shape[0], device=rows.device)
        column = number + row_offset
        inside = (column >= first_key) & (column < first_key + keys.shape[0])
        return PositiveLists(column, number, inside.to(torch.int64))
    values, columns = torch.sort(key_ids, stable=True)
    first = torch.searchsorted(values, ids)
    return PositiveLists(columns + first_key, first, torch.searchsorted(values, ids, right=True) - first)


def positive_tile(part: slice, column: Tensor, ids: Tensor | None, key_ids: Tensor | None, row_offset: int) -> Tensor:
    """One tile of the positive mask: rows ``part``, keys of the numbers ``column``, which have the ids ``key_ids``."""
    if ids is not None:
        return ids[part, None] == key_ids[None]
    row = torch.arange(part.start + row_offset, part.stop + row_offset, device=column.device)
    return row[:, None] == column[None]

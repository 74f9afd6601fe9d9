"""Which keys are the positives of a row, without a (B, M) mask: the implementations that stream look here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softmask_fast.ops.focal_itc.state import Keys


class PositiveLists(NamedTuple):
    """Row i's positives among a block of keys are `columns[first[i] : first[i] + count[i]]`, ascending.

    The columns are global numbers of keys. O(B + M) memory, however many positives there are.
    """

    columns: Tensor  # (keys,) int64
    first: Tensor  # (B,) int64
    count: Tensor  # (B,) int64, 0 where the row has no positive in this block


def positive_lists(ids: Tensor, keys: Keys) -> PositiveLists:
    """The positives of rows with these ids among a block of keys: those of equal id."""
    values, columns = torch.sort(keys.ids, stable=True)
    first = torch.searchsorted(values, ids)
    return PositiveLists(columns + keys.first, first, torch.searchsorted(values, ids, right=True) - first)


def positive_tile(part: slice, column: Tensor, ids: Tensor | None, key_ids: Tensor | None, row_offset: int) -> Tensor:
    """One tile of the positive mask: rows `part`, keys of the numbers `column`, which have the ids `key_ids`."""
    if ids is not None:
        return ids[part, None] == key_ids[None]
    row = torch.arange(part.start + row_offset, part.stop + row_offset, device=column.device)
    return row[:, None] == column[None]

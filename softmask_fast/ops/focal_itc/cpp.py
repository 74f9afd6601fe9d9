"""The loss on the CPU: matrix products of the framework, tile by tile, and csrc/cpu/focal_itc.cpp for all the rest.

gamma 0, 1, 2 and 3 read the keys once in the forward, other gammas twice; the backward reads them once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops.focal_itc.operators import ROW_STATES, BlockwiseForward
from softmask_fast.ops.focal_itc.positives import PositiveLists, positive_lists
from softmask_fast.ops.focal_itc.reference import Options
from softmask_fast.ops.focal_itc.streamed import spans

# A tile of student and teacher products is 4 MiB: 2 cores keep their halves in the second-level cache.
TILE_ROWS = 512
TILE_KEYS = 1024
SUMS, PLACES = 25, 3  # sizes of the structures in csrc/cpu/focal_itc.cpp


def expansion_order(gamma: float) -> int:
    """gamma where (1 - p)^gamma is expanded in powers of p, else -1."""
    return int(gamma) if gamma in (0, 1, 2, 3) else -1


class _Products:
    """Buffers for the products of one block of rows with one tile of keys."""

    def __init__(self, rows: Tensor, keys: Tensor, teacher_rows: Tensor | None):
        size = min(rows.shape[0], TILE_ROWS) * min(keys.shape[0], TILE_KEYS)
        self.inputs = rows, keys, teacher_rows
        self.buffers = [torch.empty(size) if source is not None else None for source in (rows, teacher_rows)]

    def block(self, first: int, last: int) -> list[Tensor | None]:
        """The rows of student and teacher in float32."""
        rows, _, teacher_rows = self.inputs
        return [None if source is None else source[first:last].float() for source in (rows, teacher_rows)]

    def tile(self, block: list[Tensor | None], low: int, high: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The keys of the tile in float32, and the products of student and teacher with them."""
        keys = self.inputs[1][low:high].float()
        products = [None, None]
        for i, (rows, buffer) in enumerate(zip(block, self.buffers, strict=True)):
            if rows is not None:
                out = buffer[: rows.shape[0] * keys.shape[0]].view(rows.shape[0], keys.shape[0])
                products[i] = torch.mm(rows, keys.T, out=out)
        return keys, *products


class Forward(BlockwiseForward):
    """See ``operators.BlockwiseForward``."""

    def __init__(
        self, rows: Tensor, temperature: Tensor, teacher_rows: Tensor | None, ids: Tensor | None, options: Options
    ):
        super().__init__(rows, temperature, teacher_rows, ids, options)
        self.order, self.inverse = expansion_order(options.gamma), 1 / float(temperature)
        self.passes = 1 if self.order >= 0 else 2
        self.sums = torch.empty(rows.shape[0], SUMS, dtype=torch.float64)
        self.places = torch.empty(rows.shape[0], PLACES, dtype=torch.int64)
        self.empty = True

    def _add(
        self, keys: Tensor, key_ids: Tensor | None, first_key: int, second_pass: bool, positives: PositiveLists
    ) -> None:
        operators, options = torch.ops.softmask_fast_cpp, self.options
        products = _Products(self.rows, keys, self.teacher_rows)
        for first, last in spans(self.rows.shape[0], TILE_ROWS):
            block, part = products.block(first, last), slice(first, last)
            lists = positives.columns, positives.first[part], positives.count[part]
            for low, high in spans(keys.shape[0], TILE_KEYS):
                _, student, teacher = products.tile(block, low, high)
                common = student, teacher, self.inverse, first_key + low, *lists
                if second_pass:
                    operators.focal_itc_terms(*common, options.gamma, self.sums[part], self.places[part])
                else:
                    operators.focal_itc_sums(
                        *common, self.empty and low == 0, max(self.order, 0), options.stats, options.first_negative,
                        options.last_negative, options.seed, options.direction, options.row_offset + first,
                        self.sums[part], self.places[part],
                    )  # fmt: skip
        self.empty = False

    def _finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        options, batch = self.options, self.rows.shape[0]
        results = torch.empty(1 + ROW_STATES + 3, batch)
        columns = torch.empty(2, batch, dtype=torch.int64)
        torch.ops.softmask_fast_cpp.focal_itc_finish(
            self.sums, self.places, self.count, self.inverse, options.gamma, self.order, options.alpha,
            options.any_positive, results, columns,
        )  # fmt: skip
        loss, row_state, statistics = results.split([1, ROW_STATES, 3])
        dominant, hard_negative = columns
        if not options.stats:
            statistics, hard_negative = statistics[:, :0], hard_negative[:0]
        # Clones, because the outputs of an operator must not share memory.
        return loss[0].clone(), row_state.clone(), dominant.clone(), statistics.clone(), hard_negative.clone()


def backward(
    grad_loss: Tensor,
    rows: Tensor,
    keys: Tensor,
    temperature: Tensor,
    teacher_rows: Tensor | None,
    ids: Tensor | None,
    key_ids: Tensor | None,
    row_state: Tensor,
    dominant: Tensor,
    wants_rows: bool,
    wants_keys: bool,
    wants_temperature: bool,
    options: Options,
    first_key: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, keys and temperature, for keys numbered from ``first_key``; empty where not wanted."""
    order, inverse = expansion_order(options.gamma), 1 / float(temperature)
    positives = positive_lists(rows, ids, keys, key_ids, options.row_offset, first_key)
    grad_rows = torch.zeros(rows.shape if wants_rows else 0)
    grad_keys = torch.zeros(keys.shape if wants_keys else 0)
    grad_inverse = torch.zeros(rows.shape[0], dtype=torch.float64)
    products = _Products(rows, keys, teacher_rows)
    for first, last in spans(rows.shape[0], TILE_ROWS):
        block = products.block(first, last)
        part = slice(first, last)
        for low, high in spans(keys.shape[0], TILE_KEYS):
            y, student, teacher = products.tile(block, low, high)
            torch.ops.softmask_fast_cpp.focal_itc_gradient(
                student, teacher, inverse, first_key + low, positives.columns, positives.first[part],
                positives.count[part], options.gamma, order, options.alpha, options.any_positive,
                grad_loss[part].contiguous(), row_state[:, part], dominant[part], grad_inverse[part],
            )  # fmt: skip
            if wants_rows:
                grad_rows[part].addmm_(student, y)
            if wants_keys:
                grad_keys[low:high].addmm_(student.T, block[0])
    grad_temperature = -grad_inverse.sum().to(temperature.dtype) if wants_temperature else temperature.new_empty(0)
    return grad_rows.to(rows.dtype), grad_keys.to(keys.dtype), grad_temperature

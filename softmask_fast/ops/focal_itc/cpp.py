"""The loss on the CPU: matrix products of the framework, tile by tile, and csrc/cpu/focal_itc.cpp for all the rest.

gamma 0, 1, 2 and 3 read the keys once in the forward, other gammas twice; the backward reads them once. The kernels
take whole tensors and the place of a tile in them, since a view costs the host more than a small tile takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from softmask_fast.ops.checks import check_number
from softmask_fast.ops.focal_itc.operators import BlockwiseForward
from softmask_fast.ops.focal_itc.positives import PositiveLists, positive_lists
from softmask_fast.ops.focal_itc.state import Keys, Options, Outputs, Problem, Rows, expansion_order
from softmask_fast.ops.focal_itc.streamed import spans

# A tile of student and teacher products is 4 MiB: 2 cores keep their halves in the second-level cache. Rows of 2 or
# 4 KiB would share its lines: 512 x 1,024 takes 1.11 to 1.14 times as long, forward and backward at B 1,024 to 4,096,
# d 256 (Xeon with AVX512, 2 threads, medians of 5 interleaved runs, 2026-11-28).
TILE_ROWS = 528
TILE_KEYS = 1040
SUMS, PLACES = 25, 3  # sizes of the structures in csrc/cpu/focal_itc.cpp, which checks them


def _part(tensor: Tensor, first: int, last: int) -> Tensor:
    """tensor[first:last], without the cost of a view where that is all of it."""
    return tensor if last - first == tensor.shape[0] else tensor[first:last]


def tiles_of(
    rows: Tensor, teacher: Tensor | None, keys: Tensor, both: bool = False
) -> Iterator[tuple[slice, slice, Tensor, Tensor, tuple[Tensor, Tensor | None, Tensor | None]]]:
    """Of each tile its rows and keys, their features in float32, and its products: student, teacher, transposed.

    `both`: the last are room for the same products transposed.
    """
    height, width = min(rows.shape[0], TILE_ROWS), min(keys.shape[0], TILE_KEYS)
    buffers = (
        torch.empty(height, width),
        None if teacher is None else torch.empty(height, width),
        torch.empty(width, height) if both else None,
    )
    for first, last in spans(rows.shape[0], TILE_ROWS):
        sources = [None if x is None else _part(x, first, last).float() for x in (rows, teacher)]
        for low, high in spans(keys.shape[0], TILE_KEYS):
            y, products = _part(keys, low, high).float(), buffers
            if (last - first, high - low) != (height, width):
                shape = last - first, high - low
                shapes = zip(buffers, (shape, shape, shape[::-1]), strict=True)
                products = tuple(x if x is None else x.view(-1)[: shape[0] * shape[1]].view(size) for x, size in shapes)
            torch.mm(sources[0], y.T, out=products[0])
            if teacher is not None:
                torch.mm(sources[1], y.T, out=products[1])
            yield slice(first, last), slice(low, high), sources[0], y, products


class _Sums:
    """The sums of the rows of one direction, or of both, over tiles of products."""

    def __init__(self, temperature: Tensor, options: Options, directions: int, batch: int) -> None:
        self.options, self.order, self.inverse = options, expansion_order(options.gamma), inverse_of(temperature)
        self.passes = 1 if self.order >= 0 else 2
        self.sampler = (
            options.stats,
            options.first_negative,
            options.last_negative,
            int(options.seed) if options.stats else 0,
            options.direction,
        )
        self.sums = torch.empty(directions, batch, SUMS, dtype=torch.float64)
        self.places = torch.empty(directions, batch, PLACES, dtype=torch.int64)
        self.empty = True

    def add(
        self, rows: Tensor, teacher: Tensor | None, keys: Tensor, key_offset: int, lists: PositiveLists | None,
        second_pass: bool,
    ) -> None:  # fmt: skip
        """Adds all tiles of a block of keys, whose numbers begin with `key_offset`."""
        kernels, options, lists = torch.ops.softmask_fast_cpp, self.options, lists or (None,) * 3
        for part, place, _, _, products in tiles_of(rows, teacher, keys, self.sums.shape[0] == 2):
            common = (*products, self.inverse, part.start, place.start, key_offset, *lists, options.row_offset)
            if second_pass:
                kernels.focal_itc_terms(*common, options.gamma, self.sums, self.places)
            else:
                start = self.empty and place.start == 0
                kernels.focal_itc_sums(*common, start, max(self.order, 0), *self.sampler, self.sums, self.places)
        self.empty = False

    def finish(self, count: Tensor | None, out: Outputs) -> None:
        options = self.options
        torch.ops.softmask_fast_cpp.focal_itc_finish(
            self.sums, self.places, count, self.inverse, options.gamma, self.order, number(options.alpha),
            options.any_positive, options.stats, *out,
        )  # fmt: skip


def inverse_of(temperature: Tensor) -> float:
    """1 / temperature. Raises ValueError out of its range, which a compiled graph has not checked."""
    return 1 / check_number("temperature", float(temperature), above=0)


def number(alpha: Tensor | None) -> float:
    """alpha on the host; 0 without soft targets."""
    return 0.0 if alpha is None else float(alpha)


class Forward(BlockwiseForward):
    """See `operators.BlockwiseForward`."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.sums = _Sums(self.temperature, self.options, 1, self.rows.shape[0])
        self.passes = self.sums.passes

    def _add(self, keys: Keys, second_pass: bool, positives: PositiveLists | None) -> None:
        self.sums.add(self.rows, self.teacher_rows, keys.features, keys.first, positives, second_pass)

    def _finish(self, out: Outputs) -> None:
        self.sums.finish(self.count, out)


def backward(
    grad_loss: Tensor, rows: Rows, keys: Keys, state: tuple[Tensor, Tensor], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `operators.Backward`."""
    lists = None if rows.ids is None else positive_lists(rows.ids, keys)
    one_direction = (tensor[None] for tensor in (grad_loss, *state))
    return _gradients(rows, keys, lists, *one_direction, wanted)


def _gradients(
    rows: Rows, keys: Keys, lists: PositiveLists | None, grad_loss: Tensor, row_state: Tensor, dominant: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of rows, keys and temperature, of one direction or of both: grad_loss (directions, B)."""
    options, inverse, lists = rows.options, inverse_of(rows.temperature), lists or (None,) * 3
    of_inverse = torch.zeros(dominant.shape, dtype=torch.float64)
    numbers = options.gamma, expansion_order(options.gamma), number(options.alpha), options.any_positive
    saved = *numbers, grad_loss.contiguous(), row_state, dominant, of_inverse

    def run(products: tuple[Tensor | None, ...], first_row: int, first_key: int) -> None:
        torch.ops.softmask_fast_cpp.focal_itc_gradient(
            *products, inverse, first_row, first_key, keys.first, *lists, options.row_offset, *saved
        )

    grad_rows, grad_keys = add_gradients(run, rows, keys, len(dominant) == 2, wanted[:2])
    grad_temperature = -of_inverse.sum().to(rows.temperature.dtype) if wanted[2] else torch.empty(0)
    return grad_rows, grad_keys, grad_temperature


def add_gradients(
    run: Callable[[tuple[Tensor | None, ...], int, int], None],
    rows: Rows,
    keys: Keys,
    both: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and keys; `run`, given a tile's first row and key, turns its products into their gradient."""
    x, y = rows.features, keys.features
    totals = [torch.empty(source.shape if wants else 0) for source, wants in zip((x, y), wanted, strict=True)]
    for part, place, x_part, y_part, products in tiles_of(x, rows.teacher, y, both):
        run(products, part.start, place.start)
        gradient = products[0]
        if wanted[0]:
            total = _part(totals[0], part.start, part.stop)
            total.addmm_(gradient, y_part, beta=0 if place.start == 0 else 1)
        if wanted[1]:
            total = _part(totals[1], place.start, place.stop)
            total.addmm_(gradient.T, x_part, beta=0 if part.start == 0 else 1)
    return totals[0].to(x.dtype), totals[1].to(y.dtype)


def symmetric_forward(problem: Problem, out: Outputs) -> None:
    """Writes the results of both directions."""
    image, text, ids = problem.image, problem.text, problem.ids
    lists = None if ids is None else positive_lists(ids, Keys(text, ids))
    sums = _Sums(problem.temperature, problem.options, 2, image.shape[0])
    for second_pass in range(sums.passes):
        sums.add(image, None, text, 0, lists, bool(second_pass))
    sums.finish(None if lists is None else lists.count, out)


def symmetric_backward(
    grad_loss: Tensor, problem: Problem, row_state: Tensor, dominant: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and temperature, of both directions together; empty where not wanted."""
    (rows, keys), _ = problem.directions()
    lists = None if rows.ids is None else positive_lists(rows.ids, keys)
    return _gradients(rows, keys, lists, grad_loss, row_state, dominant, wanted)

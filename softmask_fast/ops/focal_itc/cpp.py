"""The loss on the CPU: matrix products of the framework, tile by tile, and csrc/cpu/focal_itc.cpp for all the rest.

gamma 0, 1, 2 and 3 read the keys once in the forward, other gammas twice; the backward reads them once.
"""

from __future__ import annotations

from collections.abc import Iterator

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


def _number(alpha: Tensor | None) -> float:
    return 0.0 if alpha is None else float(alpha)


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
        self.seed = int(options.seed) if options.stats else 0
        self.passes = 1 if self.order >= 0 else 2
        self.sums = torch.empty(rows.shape[0], SUMS, dtype=torch.float64)
        self.places = torch.empty(rows.shape[0], PLACES, dtype=torch.int64)
        self.empty = True

    def _add(
        self, keys: Tensor, key_ids: Tensor | None, first_key: int, second_pass: bool, positives: PositiveLists
    ) -> None:
        products = _Products(self.rows, keys, self.teacher_rows)
        for first, last in spans(self.rows.shape[0], TILE_ROWS):
            block = products.block(first, last)
            for low, high in spans(keys.shape[0], TILE_KEYS):
                _, student, teacher = products.tile(block, low, high)
                start = self.empty and low == 0
                self.take(slice(first, last), student, teacher, first_key + low, positives, start, second_pass)
        self.empty = False

    def take(
        self,
        part: slice,
        student: Tensor,
        teacher: Tensor | None,
        first_key: int,
        positives: PositiveLists,
        start: bool,
        second_pass: bool,
    ) -> None:
        """Adds a tile of products, which it overwrites, of the rows ``part``; start: it is their first one."""
        operators, options = torch.ops.softmask_fast_cpp, self.options
        lists = positives.columns, positives.first[part], positives.count[part]
        common = student, teacher, self.inverse, first_key, *lists
        if second_pass:
            operators.focal_itc_terms(*common, options.gamma, self.sums[part], self.places[part])
        else:
            operators.focal_itc_sums(
                *common, start, max(self.order, 0), options.stats, options.first_negative, options.last_negative,
                self.seed, options.direction, options.row_offset + part.start, self.sums[part], self.places[part],
            )  # fmt: skip

    def _finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        options, batch = self.options, self.rows.shape[0]
        results = torch.empty(1 + ROW_STATES + 3, batch)
        columns = torch.empty(2, batch, dtype=torch.int64)
        torch.ops.softmask_fast_cpp.focal_itc_finish(
            self.sums, self.places, self.count, self.inverse, options.gamma, self.order, _number(options.alpha),
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
    positives = positive_lists(rows, ids, keys, key_ids, options.row_offset, first_key)
    grad_rows = torch.zeros(rows.shape if wants_rows else 0)
    grad_keys = torch.zeros(keys.shape if wants_keys else 0)
    gradient = _LogitGradient(grad_loss, temperature, row_state, dominant, positives, options)
    products = _Products(rows, keys, teacher_rows)
    for first, last in spans(rows.shape[0], TILE_ROWS):
        block = products.block(first, last)
        part = slice(first, last)
        for low, high in spans(keys.shape[0], TILE_KEYS):
            y, student, teacher = products.tile(block, low, high)
            gradient.replace(part, student, teacher, first_key + low)
            if wants_rows:
                grad_rows[part].addmm_(student, y)
            if wants_keys:
                grad_keys[low:high].addmm_(student.T, block[0])
    grad_temperature = gradient.temperature() if wants_temperature else temperature.new_empty(0)
    return grad_rows.to(rows.dtype), grad_keys.to(keys.dtype), grad_temperature


class _LogitGradient:
    """The gradient of the products of one direction, by temperature, tile by tile."""

    def __init__(
        self,
        grad_loss: Tensor,
        temperature: Tensor,
        row_state: Tensor,
        dominant: Tensor,
        positives: PositiveLists,
        options: Options,
    ):
        self.grad_loss, self.row_state, self.dominant = grad_loss.contiguous(), row_state, dominant
        self.positives, self.options = positives, options
        self.order, self.inverse = expansion_order(options.gamma), 1 / float(temperature)
        self.dtype, self.alpha = temperature.dtype, _number(options.alpha)
        self.of_inverse = torch.zeros(grad_loss.shape[0], dtype=torch.float64)

    def replace(self, part: slice, student: Tensor, teacher: Tensor | None, first_key: int) -> None:
        """Writes the gradient of a tile of products, of the rows ``part``, in their place."""
        positives, options = self.positives, self.options
        torch.ops.softmask_fast_cpp.focal_itc_gradient(
            student, teacher, self.inverse, first_key, positives.columns, positives.first[part], positives.count[part],
            options.gamma, self.order, self.alpha, options.any_positive, self.grad_loss[part],
            self.row_state[:, part], self.dominant[part], self.of_inverse[part],
        )  # fmt: skip

    def temperature(self) -> Tensor:
        """The gradient of the temperature, once all tiles were replaced."""
        return -self.of_inverse.sum().to(self.dtype)


def symmetric_covers(image: Tensor, ids: Tensor | None, options: Options) -> bool:
    """Both directions together, whatever the options."""
    return True


def symmetric_forward(
    image: Tensor, text: Tensor, temperature: Tensor, ids: Tensor | None, options: Options
) -> tuple[Tensor, ...]:
    """The outputs of both directions, stacked; see symmetric.py."""
    positives = positive_lists(image, ids, text, ids, options.row_offset, 0)
    runs = []
    for direction, rows in enumerate((image, text)):
        runs.append(Forward(rows, temperature, None, ids, options._replace(direction=direction)))
        runs[-1].count = positives.count
    for second_pass in range(runs[0].passes):
        for part, keys, *_, products, transposed in _tiles_both_ways(image, text):
            runs[0].take(part, products, None, keys.start, positives, keys.start == 0, bool(second_pass))
            runs[1].take(keys, transposed, None, part.start, positives, part.start == 0, bool(second_pass))
    return tuple(torch.stack(parts) for parts in zip(*(run.finish() for run in runs), strict=True))


def symmetric_backward(
    grad_loss: Tensor,
    image: Tensor,
    text: Tensor,
    temperature: Tensor,
    ids: Tensor | None,
    row_state: Tensor,
    dominant: Tensor,
    wants_image: bool,
    wants_text: bool,
    wants_temperature: bool,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and temperature, of both directions together; empty where not wanted."""
    positives = positive_lists(image, ids, text, ids, options.row_offset, 0)
    gradients = [
        _LogitGradient(grad_loss[i], temperature, row_state[i], dominant[i], positives, options) for i in range(2)
    ]
    grad_image = torch.zeros(image.shape if wants_image else 0)
    grad_text = torch.zeros(text.shape if wants_text else 0)
    for part, keys, x, y, products, transposed in _tiles_both_ways(image, text):
        gradients[0].replace(part, products, None, keys.start)
        gradients[1].replace(keys, transposed, None, part.start)
        products += transposed.T
        if wants_image:
            grad_image[part].addmm_(products, y)
        if wants_text:
            grad_text[keys].addmm_(products.T, x)
    grad_temperature = temperature.new_empty(0)
    if wants_temperature:
        grad_temperature = gradients[0].temperature() + gradients[1].temperature()
    return grad_image.to(image.dtype), grad_text.to(text.dtype), grad_temperature


def _tiles_both_ways(image: Tensor, text: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor]]:
    """For each tile the rows of images and of texts, both in float32, their products, and these transposed."""
    tiles = _Products(image, text, None)
    buffer = torch.empty_like(tiles.buffers[0])
    for first, last in spans(image.shape[0], TILE_ROWS):
        block = tiles.block(first, last)
        for low, high in spans(text.shape[0], TILE_KEYS):
            y, products, _ = tiles.tile(block, low, high)
            transposed = buffer[: products.numel()].view(high - low, last - first).copy_(products.T)
            yield slice(first, last), slice(low, high), block[0], y, products, transposed

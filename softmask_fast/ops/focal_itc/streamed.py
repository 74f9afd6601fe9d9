"""The loss in tiles, in plain PyTorch: any device and dtype, any gamma, nothing of size (B, M).

The forward reads the keys twice: once for the softmax sums of each row, once for the loss, whose terms need them. The
backward recomputes each tile of products from the row state and turns it into the gradient of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softmask_fast.ops.focal_itc import operators
from softmask_fast.ops.focal_itc import state as layout
from softmask_fast.ops.focal_itc.positives import PositiveLists, positive_tile
from softmask_fast.ops.focal_itc.reference import focal_cross_entropy, focal_weight, poison
from softmask_fast.ops.focal_itc.sampling import negative_log_exponential, row_keys
from softmask_fast.ops.focal_itc.state import Keys, Options, Outputs, Rows

# A tile of float32 products is 4 MiB, whatever the batch; not timed: it is the fallback of every device.
TILE_ROWS = 1024
TILE_KEYS = 1024


def spans(size: int, tile: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the tiles of `size` elements."""
    for first in range(0, size, tile):
        yield first, min(first + tile, size)


class _RunningSum:
    """Row maximum of the products and sum of `exp((product - maximum) / temperature)`, over tiles of products.

    The sum leaves out the term of the maximum itself, 1, as the rest may be small compared with it.
    """

    def __init__(self, rows: int, temperature: Tensor) -> None:
        self.temperature = temperature
        self.lowest = torch.finfo(temperature.dtype).min / 4
        self.max = temperature.new_full((rows,), self.lowest)
        self.others = temperature.new_zeros(rows)
        self.argmax = temperature.new_zeros(rows, dtype=torch.int64)

    def add(self, part: slice, products: Tensor, first_key: int) -> None:
        """Adds products of the rows `part` with the keys numbered from `first_key`."""
        old_max, old_others = self.max[part], self.others[part]
        tile_max, tile_argmax = products.max(dim=1)
        # Tiles may come in any order: of equal ones the key of the lowest number is the most probable.
        better = (tile_max > old_max) | (tile_max == old_max) & (self.argmax[part] > first_key)
        new_max = torch.maximum(old_max, tile_max)
        terms = ((products - new_max[:, None]) / self.temperature).exp_()
        place = tile_argmax[:, None]
        terms.scatter_(1, place, terms.gather(1, place).masked_fill_(better[:, None], 0.0))
        replaced = better & (old_max > self.lowest)
        decay = torch.exp((old_max - new_max) / self.temperature)
        self.others[part] = (old_others + replaced) * decay + terms.sum(dim=1) + poison(products).squeeze(1)
        self.argmax[part] = torch.where(better, tile_argmax + first_key, self.argmax[part])
        self.max[part] = new_max

    def log(self) -> Tensor:
        """Log of the sum, the term of the maximum included."""
        return self.others.log1p()


class _Tile:
    """Products of a block of rows with a tile of keys, and what follows from them once the row state is known."""

    def __init__(
        self, part: slice, first_key: int, products: Tensor, teacher: Tensor | None, temperature: Tensor
    ) -> None:
        self.part, self.first_key, self.products, self.teacher = part, first_key, products, teacher
        self.temperature = temperature
        self.column = torch.arange(first_key, first_key + products.shape[1], device=products.device)

    def read(
        self, row_state: Tensor, dominant: Tensor, ids: Tensor | None, key_ids: Tensor | None, options: Options
    ) -> None:
        """log p and the mask of the positives."""
        self.options, self.state = options, row_state[:, self.part, None]
        self.is_dominant = dominant[self.part, None] == self.column
        below_max = (self.products - self.state[layout.ROW_MAX]) / self.temperature
        self.below_max = below_max.masked_fill(self.is_dominant, 0.0)  # exact, however the product was rounded
        self.log_p = self.below_max - self.state[layout.ROW_LOG_SUM]
        self.positive = positive_tile(self.part, self.column, ids, key_ids, options.row_offset)

    def target(self) -> Tensor | None:
        """alpha t + hard on the positives; "any" leaves the second out, no alpha the first."""
        target = None
        if self.teacher is not None:
            below_max = (self.teacher - self.state[layout.ROW_TEACHER_MAX]) / self.temperature
            target = self.options.alpha * torch.exp(below_max - self.state[layout.ROW_TEACHER_LOG_SUM])
        if not self.options.any_positive:
            share = self.positive * self.state[layout.ROW_HARD]
            target = share if target is None else target + share
        return target

    def draw(self) -> tuple[Tensor, Tensor]:
        """Score and key number of the best hard negative of each row in this tile; -inf where it has none."""
        options = self.options
        rows, columns = self.products.shape
        noise_keys = row_keys(options.row_offset + self.part.start, rows, options.seed, options.direction)
        noise = negative_log_exponential(noise_keys, self.first_key, columns, self.log_p.dtype)
        barred = self.positive | (self.column < options.first_negative) | (self.column >= options.last_negative)
        score, choice = (self.log_p + noise).masked_fill(barred, -torch.inf).max(dim=1)
        return score, choice + self.first_key

    def gradient(self) -> Tensor:
        """dloss_i / ds_ij."""
        gradient = self.log_p.exp() * self.state[layout.ROW_WEIGHT]
        target = self.target()
        if target is not None:
            gradient -= target * focal_weight(self.log_p, self.options.gamma)
        if self.options.any_positive:
            below_max = (self.products - self.state[layout.ROW_POSITIVE_MAX]) / self.temperature
            log_share = (below_max - self.state[layout.ROW_POSITIVE_LOG_SUM]).masked_fill(~self.positive, -torch.inf)
            gradient -= log_share.exp() * self.state[layout.ROW_HARD]
        return gradient


def _tiles(
    rows: Tensor, teacher_rows: Tensor | None, temperature: Tensor, keys: Keys
) -> Iterator[tuple[slice, slice, _Tile]]:
    """All tiles with the places of their rows and of their keys."""
    dtype, (keys, _, first_key) = temperature.dtype, keys
    for first, last in spans(rows.shape[0], TILE_ROWS):
        part = slice(first, last)
        x = rows[part].to(dtype)
        teacher = None if teacher_rows is None else teacher_rows[part].to(dtype)
        for low, high in spans(keys.shape[0], TILE_KEYS):
            y = keys[low:high].to(dtype)
            momentum = None if teacher is None else teacher @ y.T
            yield part, slice(low, high), _Tile(part, first_key + low, x @ y.T, momentum, temperature)


class Forward(operators.BlockwiseForward):
    """See `operators.BlockwiseForward`."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        batch, temperature = len(self.rows), self.temperature
        self.student, self.teacher, self.positives = (_RunningSum(batch, temperature) for _ in range(3))
        self.row_state = temperature.new_zeros(layout.ROW_STATES, batch)
        self.loss, self.best = temperature.new_zeros(batch), temperature.new_full((batch,), -torch.inf)
        self.statistics = temperature.new_zeros(3, batch)
        self.hard_negative = temperature.new_full((batch,), -1, dtype=torch.int64)
        self.in_second_pass = False

    def _add(self, keys: Keys, second_pass: bool, positives: PositiveLists | None) -> None:
        if second_pass and not self.in_second_pass:
            self._end_first_pass()
        for part, place, tile in _tiles(self.rows, self.teacher_rows, self.temperature, keys):
            if not second_pass:
                self.student.add(part, tile.products, tile.first_key)
                if tile.teacher is not None:
                    self.teacher.add(part, tile.teacher, tile.first_key)
            else:
                ids = None if keys.ids is None else keys.ids[place]
                tile.read(self.row_state, self.student.argmax, self.ids, ids, self.options)
                self._add_terms(part, tile)

    def _end_first_pass(self) -> None:
        self.in_second_pass = True
        self.row_state[layout.ROW_MAX] = self.student.max
        self.row_state[layout.ROW_LOG_SUM] = self.student.log()
        if self.teacher_rows is not None:
            self.row_state[layout.ROW_TEACHER_MAX] = self.teacher.max
            self.row_state[layout.ROW_TEACHER_LOG_SUM] = self.teacher.log()
        if not self.options.any_positive:
            share = 1.0 if self.count is None else self.count.to(self.loss.dtype).reciprocal()
            self.row_state[layout.ROW_HARD] = share * self.options.hard

    def _add_terms(self, part: slice, tile: _Tile) -> None:
        gamma = self.options.gamma
        lowest = torch.finfo(self.loss.dtype).min
        self.positives.add(part, tile.products.masked_fill(~tile.positive, lowest), tile.first_key)
        target = tile.target()
        if target is not None:
            self.loss[part] += (target * focal_cross_entropy(tile.log_p, gamma)).sum(dim=1)
            self.row_state[layout.ROW_WEIGHT, part] += (target * focal_weight(tile.log_p, gamma)).sum(dim=1)
        if self.options.stats:
            self.statistics[0, part] += (tile.positive & tile.is_dominant).any(dim=1)
            self.statistics[1, part] -= (tile.log_p.exp() * tile.log_p).sum(dim=1)
            score, choice = tile.draw()
            self.hard_negative[part] = torch.where(score > self.best[part], choice, self.hard_negative[part])
            self.best[part] = torch.maximum(self.best[part], score)

    def _finish(self, out: Outputs) -> None:
        state, options = self.row_state, self.options
        state[layout.ROW_POSITIVE_MAX] = self.positives.max
        state[layout.ROW_POSITIVE_LOG_SUM] = self.positives.log()
        below_max = (self.positives.max - self.student.max) / self.temperature
        log_mass = below_max + state[layout.ROW_POSITIVE_LOG_SUM] - state[layout.ROW_LOG_SUM]
        self.statistics[2] = log_mass.exp()
        self.statistics[0] += self.student.others * 0  # NaN where a product is not finite
        if options.any_positive:
            state[layout.ROW_HARD] = options.hard * focal_weight(log_mass, options.gamma)
            state[layout.ROW_WEIGHT] += state[layout.ROW_HARD]
            self.loss += options.hard * focal_cross_entropy(log_mass, options.gamma)
        results = self.loss, state, self.student.argmax, self.statistics, self.hard_negative
        for target, result in zip(out, results[: 5 if options.stats else 3], strict=False):
            target.copy_(result)


def backward(
    grad_loss: Tensor, rows: Rows, keys: Keys, state: tuple[Tensor, Tensor], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `operators.Backward`."""
    x, teacher, ids, temperature, options = rows
    dtype = temperature.dtype
    wants_rows, wants_keys, wants_temperature = wanted
    grad_rows = temperature.new_zeros(x.shape if wants_rows else 0)
    grad_keys = temperature.new_zeros(keys.features.shape if wants_keys else 0)
    grad_temperature = temperature.new_zeros(() if wants_temperature else 0)
    for part, place, tile in _tiles(x, teacher, temperature, keys):
        tile.read(*state, ids, None if keys.ids is None else keys.ids[place], options)
        gradient = tile.gradient() * (grad_loss[part, None] / temperature)
        if wants_rows:
            grad_rows[part].addmm_(gradient, keys.features[place].to(dtype))
        if wants_keys:
            grad_keys[place].addmm_(gradient.T, x[part].to(dtype))
        if wants_temperature:
            # A row of dloss/ds sums to 0, so s_ij may be taken relative to its maximum: less rounding.
            grad_temperature -= (gradient * tile.below_max).sum()
    return grad_rows.to(x.dtype), grad_keys.to(keys.features.dtype), grad_temperature

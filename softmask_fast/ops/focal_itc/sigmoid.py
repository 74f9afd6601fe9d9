"""loss="sigmoid" in tiles, in plain PyTorch: any device and dtype, any gamma, nothing of size (B, M).

No row needs a sum over its keys before its terms, so the forward reads the keys once, and the backward recomputes each
tile of products. Where a batch is its own keys, one tile serves both directions: row sums are the loss of the images,
column sums that of the texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask_fast.ops.focal_itc import streamed
from softmask_fast.ops.focal_itc.positives import positive_tile
from softmask_fast.ops.focal_itc.reference import focal_cross_entropy, focal_weight
from softmask_fast.ops.focal_itc.state import DIFFERENTIABLE, Keys, Problem, Rows, check_every_row_has_positive


class Side(NamedTuple):
    """One matrix of products: image rows with text keys or text rows with image keys, or with ``both`` both of them."""

    rows: Rows
    keys: Keys
    direction: int
    both: bool
    row_place: int  # of the features and of the keys among the gradients
    key_place: int

    def weight(self, grad_loss: Tensor, part: slice, place: slice) -> Tensor:
        """dloss / d of each term of a tile, in a shape that broadcasts to it."""
        weight = grad_loss[self.direction, part, None]
        return weight + grad_loss[1, None, place] if self.both else weight


def sides(problem: Problem) -> list[Side]:
    """The matrices of products to go through. Raises ValueError for a row whose id no key has (a GPU asserts it)."""
    both, places = problem.own_keys, ((0, 1), (1, 0)) if problem.image_keys is None else ((0, 3), (1, 2))
    found = []
    for direction, (rows, keys) in enumerate(problem.directions()[: 1 if both else 2]):
        if rows.ids is not None and not both:
            check_every_row_has_positive(torch.isin(rows.ids, keys.ids), rows.ids)
        found.append(Side(rows, keys, direction, both, *places[direction]))
    return found


def _tiles(side: Side, bias: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Of each tile its rows, its keys, their features, the products, +-1 for positives and others, and log p."""
    x, _, ids, temperature, options = side.rows
    for part in (slice(*span) for span in streamed.spans(x.shape[0], streamed.TILE_ROWS)):
        x_part = x[part].to(temperature.dtype)
        for place in (slice(*span) for span in streamed.spans(side.keys.features.shape[0], streamed.TILE_KEYS)):
            y = side.keys.features[place].to(temperature.dtype)
            products, column = x_part @ y.T, torch.arange(place.start, place.stop, device=x.device)
            key_ids = None if ids is None else side.keys.ids[place]
            positive = positive_tile(part, column, ids, key_ids, options.row_offset)
            sign = positive.to(temperature.dtype).mul_(2).sub_(1)
            yield part, place, x_part, y, products, sign, F.logsigmoid((products / temperature + bias) * sign)


def forward(problem: Problem, loss: Tensor) -> None:
    """Writes the loss (2, B)."""
    loss.zero_()
    for side in sides(problem):
        for part, place, *_, log_p in _tiles(side, problem.bias):
            terms = focal_cross_entropy(log_p, problem.gamma) if problem.gamma else -log_p
            loss[side.direction, part] += terms.sum(1)
            if side.both:
                loss[1, place] += terms.sum(0)


def backward(grad_loss: Tensor, problem: Problem, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, in the order of the problem; None for the others."""
    totals = [
        torch.zeros_like(x, dtype=problem.temperature.dtype) if wants else None
        for x, wants in zip(problem[:DIFFERENTIABLE], wanted, strict=True)
    ]
    temperature = problem.temperature
    for side in sides(problem):
        for part, place, x, y, products, sign, log_p in _tiles(side, problem.bias):
            # 1 - p of what is right, times -w(p) dlog p / ds
            gradient = torch.expm1(log_p).mul_(sign).mul_(side.weight(grad_loss, part, place))
            if problem.gamma:
                gradient *= focal_weight(log_p, problem.gamma)
            of_products = gradient / temperature
            if wanted[side.row_place]:
                totals[side.row_place][part].addmm_(of_products, y)
            if wanted[side.key_place]:
                totals[side.key_place][place].addmm_(of_products.T, x)
            if wanted[4]:
                totals[4] -= (gradient * products).sum() / temperature**2
            if wanted[5]:
                totals[5] += gradient.sum()
    return [None if total is None else total.to(x.dtype) for x, total in zip(problem, totals, strict=False)]

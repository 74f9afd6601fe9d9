"""loss="sigmoid" in tiles, in plain PyTorch: any device and dtype, any gamma, nothing of size (B, M).

No row needs a sum over its keys before its terms, so the forward reads the keys once, and the backward recomputes each
tile of products. Where a batch is its own keys, one tile serves both directions: row sums are the losses of the images,
column sums those of the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask_fast.ops.focal_itc import streamed
from softmask_fast.ops.focal_itc.operators import BlockwiseForward
from softmask_fast.ops.focal_itc.positives import PositiveLists, positive_tile
from softmask_fast.ops.focal_itc.reference import focal_cross_entropy, focal_weight
from softmask_fast.ops.focal_itc.state import Keys, Outputs, Rows


class Forward(BlockwiseForward):
    """See `operators.BlockwiseForward` and `parts`."""

    passes = 1

    def __init__(self, add_losses: Callable, rows: Rows) -> None:
        super().__init__(rows)
        self.add_losses, self.given = add_losses, rows
        self.losses = _no_losses(1, rows)

    def _add(self, keys: Keys, second_pass: bool, positives: PositiveLists | None) -> None:
        self.add_losses(self.given, keys, positives, self.losses)

    def _finish(self, out: Outputs) -> None:
        out.loss.copy_(self.losses[0])


def _no_losses(directions: int, rows: Rows) -> Tensor:
    return rows.temperature.new_zeros(directions, rows.features.shape[0], dtype=torch.float64)


def parts(add_losses: Callable, gradients: Callable) -> dict[str, Callable]:
    """The parts of an implementation, see operators.py, from two functions.

    `add_losses(rows, keys, positives, losses)` adds to the losses, float64, of one direction, (1, B), or of both,
    (2, B), where a batch is its own keys; `positives` only saves the making of them. `gradients(grad_loss, rows,
    keys, wanted)`, `grad_loss` of either size, returns the gradients of rows, keys, temperature and bias, those of
    rows and keys empty where not wanted.
    """

    def backward(grad_loss, rows, keys, state, wanted):
        return gradients(grad_loss[None], rows, keys, wanted)

    def symmetric_forward(problem, out):
        rows, keys = problem.directions()[0]
        losses = _no_losses(2, rows)
        add_losses(rows, keys, None, losses)
        out.loss.copy_(losses)

    def symmetric_backward(grad_loss, problem, row_state, dominant, wanted):
        return gradients(grad_loss, *problem.directions()[0], wanted)

    return {
        "forward": partial(Forward, add_losses),
        "backward": backward,
        "symmetric_forward": symmetric_forward,
        "symmetric_backward": symmetric_backward,
    }


def _tiles(rows: Rows, keys: Keys) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Of each tile its rows, its keys, their features, the products, +-1 for positives and others, and log p."""
    x, _, ids, temperature, options = rows
    for part in (slice(*span) for span in streamed.spans(x.shape[0], streamed.TILE_ROWS)):
        x_part = x[part].to(temperature.dtype)
        for place in (slice(*span) for span in streamed.spans(keys.features.shape[0], streamed.TILE_KEYS)):
            y = keys.features[place].to(temperature.dtype)
            products, column = x_part @ y.T, torch.arange(place.start, place.stop, device=x.device) + keys.first
            key_ids = None if ids is None else keys.ids[place]
            sign = positive_tile(part, column, ids, key_ids, options.row_offset).to(temperature.dtype).mul_(2).sub_(1)
            logits = products / temperature + options.bias + products * 0  # NaN where a product is not finite
            yield part, place, x_part, y, products, sign, F.logsigmoid(logits * sign)


def add_losses(rows: Rows, keys: Keys, positives: PositiveLists | None, losses: Tensor) -> None:
    """See `sigmoid.parts`."""
    for part, place, *_, log_p in _tiles(rows, keys):
        terms = focal_cross_entropy(log_p, rows.options.gamma) if rows.options.gamma else -log_p
        losses[0, part] += terms.sum(1)
        if len(losses) == 2:
            losses[1, place] += terms.sum(0)


def gradients(grad_loss: Tensor, rows: Rows, keys: Keys, wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """See `sigmoid.parts`."""
    temperature, options = rows.temperature, rows.options
    sources = rows.features, keys.features, temperature, options.bias
    totals = [
        torch.zeros(x.shape if wants else 0, dtype=temperature.dtype, device=x.device)
        for x, wants in zip(sources, wanted, strict=True)
    ]
    for part, place, x, y, products, sign, log_p in _tiles(rows, keys):
        weight = grad_loss[0, part, None]
        if len(grad_loss) == 2:
            weight = weight + grad_loss[1, None, place]
        # 1 - p of what is right, times -w(p) dlog p / ds
        gradient = torch.expm1(log_p).mul_(sign).mul_(weight)
        if options.gamma:
            gradient *= focal_weight(log_p, options.gamma)
        of_products = gradient / temperature
        if wanted[0]:
            totals[0][part].addmm_(of_products, y)
        if wanted[1]:
            totals[1][place].addmm_(of_products.T, x)
        if wanted[2]:
            totals[2] -= (gradient * products).sum() / temperature**2
        if wanted[3]:
            totals[3] += gradient.sum()
    return tuple(total.to(x.dtype) for total, x in zip(totals, sources, strict=True))

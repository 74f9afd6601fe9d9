"""loss="sigmoid" on the CPU: products of the framework, tile by tile; csrc/cpu/focal_itc_sigmoid.cpp for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops.focal_itc.cpp import add_gradients, inverse_of, tiles_of
from softmask_fast.ops.focal_itc.positives import PositiveLists, positive_lists
from softmask_fast.ops.focal_itc.state import Keys, Rows, expansion_order


def _arguments(
    rows: Rows, keys: Keys, positives: PositiveLists | None = None
) -> tuple[tuple[float, float], tuple[Tensor | int | float | None, ...]]:
    """Of the kernels, before and after the place of a tile."""
    options = rows.options
    if positives is None and rows.ids is not None:
        positives = positive_lists(rows.ids, keys)
    focal = options.row_offset, options.gamma, expansion_order(options.gamma)
    return (inverse_of(rows.temperature), float(options.bias)), (keys.first, *(positives or (None,) * 3), *focal)


def add_losses(rows: Rows, keys: Keys, positives: PositiveLists | None, losses: Tensor) -> None:
    """See `sigmoid.parts`."""
    numbers, options = _arguments(rows, keys, positives)
    for part, place, _, _, products in tiles_of(rows.features, None, keys.features):
        torch.ops.softmask_fast_cpp.focal_itc_sigmoid(products[0], *numbers, part.start, place.start, *options, losses)


def gradients(grad_loss: Tensor, rows: Rows, keys: Keys, wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """See `sigmoid.parts`."""
    arguments, options = _arguments(rows, keys)
    grad_loss, temperature = grad_loss.contiguous(), rows.temperature
    totals = torch.zeros(2, grad_loss.shape[1], dtype=torch.float64)  # of the gradient times products, and alone

    def run(products: tuple[Tensor | None, ...], first_row: int, first_key: int) -> None:
        torch.ops.softmask_fast_cpp.focal_itc_sigmoid_gradient(
            products[0], *arguments, first_row, first_key, *options, grad_loss, totals
        )

    features = add_gradients(run, rows, keys, False, wanted[:2])
    with_products, alone = totals.sum(1)
    numbers = -with_products / temperature.double() ** 2, alone
    return *features, *(number.to(temperature.dtype) for number in numbers)

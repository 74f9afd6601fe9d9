"""The loss on the CPU of a batch that is its own keys and fits one tile: its gradient comes with it, in one C++ call.

What surrounds a call costs the host more than such a tile takes. So the forward leaves the gradient of the products,
(B, B), and the backward only multiplies: nothing is computed twice, and few operators are dispatched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops.checks import without_autocast
from softmask_fast.ops.focal_itc import cpp
from softmask_fast.ops.focal_itc.positives import positive_lists
from softmask_fast.ops.focal_itc.state import TENSORS, Keys, Problem, expansion_order


def covers(problem: Problem) -> bool:
    """Whether the batch fits."""
    return problem.image.shape[0] <= cpp.TILE_ROWS


def loss(problem: Problem, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`scale` times the sum of the losses of both directions, statistics and hard negatives, see `state.Outputs`."""
    return _Tile.apply(problem, scale, torch.is_grad_enabled(), problem.image, problem.text, problem.temperature)


@without_autocast
def _forward(image: Tensor, problem: Problem, scale: float, wants_gradient: bool) -> tuple[Tensor | None, ...]:
    """Loss, statistics, hard negatives, and the gradients of the products and the temperature, None if not wanted."""
    ids, options, new = problem.ids, problem.options, problem.temperature.new_empty
    counted = image.shape[0] if options.stats else 0
    lists = (None,) * 3 if ids is None else positive_lists(ids, Keys(problem.text, ids))
    outputs = new(()), new(2, 3, counted), new(2, counted, dtype=torch.int64)
    products, of_temperature = torch.mm(image.float(), problem.text.float().t()), new(()) if wants_gradient else None
    torch.ops.softmask_fast_cpp.focal_itc_tile(
        products, cpp.inverse_of(problem.temperature), *lists, options.row_offset, options.gamma,
        expansion_order(options.gamma), options.any_positive, options.stats, options.first_negative,
        options.last_negative, int(options.seed) if options.stats else 0, scale, outputs[0], of_temperature,
        *outputs[1:],
    )  # fmt: skip
    return *outputs, products if wants_gradient else None, of_temperature


@without_autocast
def _times(gradient: Tensor, features: Tensor) -> Tensor:
    return torch.mm(gradient, features.float()).to(features.dtype)


class _Tile(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, scale, grad_enabled, image, text, temperature):
        wants_gradient = grad_enabled and any(ctx.needs_input_grad)
        *outputs, gradient, of_temperature = _forward(image, problem, scale, wants_gradient)
        ctx.options, ctx.scale = problem[TENSORS:], scale
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, of_temperature, *problem[:TENSORS])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        wanted = ctx.needs_input_grad[3:]
        if grad_loss is None or not any(wanted):
            return (None,) * 6
        gradient, of_temperature, *inputs = ctx.saved_tensors
        problem = Problem(*inputs, *ctx.options)
        if torch.is_grad_enabled():  # to be differentiated again: the registered operator knows what to say
            with torch.no_grad():  # autograd within the user's graph would count what the inputs share twice
                _, *state, _, _ = torch.ops.softmask_fast.focal_itc(*problem._replace(seed=None))
            of_rows = (grad_loss * ctx.scale).expand(2, len(problem.image))
            places = wanted[0], wanted[1], False, False, wanted[2], False
            found = torch.ops.softmask_fast.focal_itc_backward(of_rows, *state, places, *problem)
            return None, None, None, *(found[place] if places[place] else None for place in (0, 1, 4))
        gradient = gradient * grad_loss
        grad_image = _times(gradient, problem.text) if wanted[0] else None
        grad_text = _times(gradient.t(), problem.image) if wanted[1] else None
        return None, None, None, grad_image, grad_text, of_temperature * grad_loss if wanted[2] else None

"""Both directions of the loss as one operator: the forward stores row sums, the backward recomputes tiles.

Every streaming implementation has two parts for each loss: "forward", a class derived from `BlockwiseForward`, and
"backward", a function with the arguments of `Backward`. One that can compute each product <x_i, y_j> of a batch that
is its own keys once for both directions has two more, "symmetric_forward" and "symmetric_backward", and
"symmetric_covers", which says for what, unless it is for everything. Those of the sigmoid's loss are "sigmoid_forward"
and so on. "whole" is a function for small batches of that kind, those of which "whole_covers" is true. It takes a
problem and a factor, and returns the sum of all losses times the factor, the statistics and the hard negatives.

In eager mode an autograd.Function calls the implementation, which costs the host less than the registered operator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softmask_fast.ops import registry
from softmask_fast.ops.checks import without_autocast
from softmask_fast.ops.focal_itc.positives import PositiveLists, positive_lists
from softmask_fast.ops.focal_itc.state import (
    DIFFERENTIABLE,
    SECOND_DERIVATIVE,
    TENSORS,
    Keys,
    Outputs,
    Problem,
    Rows,
    check_every_row_has_positive,
)

_ARGUMENTS = (
    "Tensor image, Tensor text, Tensor? image_keys, Tensor? text_keys, Tensor temperature, Tensor? bias, "
    "Tensor? teacher_image, Tensor? teacher_text, Tensor? ids, Tensor? key_ids, Tensor? alpha, Tensor? seed, "
    "float gamma, bool any_positive, SymInt row_offset, SymInt first_negative, SymInt last_negative, str? impl"
)
torch.library.define(
    "softmask_fast::focal_itc",
    f"({_ARGUMENTS}) -> (Tensor loss, Tensor row_state, Tensor dominant, Tensor statistics, Tensor hard_negative)",
)
torch.library.define(
    "softmask_fast::focal_itc_backward",
    f"(Tensor grad_loss, Tensor row_state, Tensor dominant, bool[] wanted, {_ARGUMENTS}) -> (Tensor grad_image, "
    "Tensor grad_text, Tensor grad_image_keys, Tensor grad_text_keys, Tensor grad_temperature, "
    "Tensor grad_bias)",
)
# (grad_loss (B,), rows, keys, (row_state, dominant), (rows, keys, temperature, with the sigmoid bias: whether wanted))
# -> their gradients, empty where not wanted
Backward = Callable[[Tensor, Rows, Keys, tuple[Tensor, Tensor], tuple[bool, ...]], tuple[Tensor, ...]]


def focal_itc(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics and hard negatives of both directions, by a streaming implementation.

    Gradients reach features, keys, temperature and bias.
    """
    tensors = problem[:TENSORS]
    if registry.plain_eager(*tensors):
        loss, statistics, hard_negative = _Eager.apply(problem, *problem[:DIFFERENTIABLE])
        return loss, statistics, hard_negative
    loss, _, _, statistics, hard_negative = torch.ops.softmask_fast.focal_itc(*problem)
    return loss, statistics, hard_negative


def whole(problem: Problem) -> Callable[[Problem, float], tuple[Tensor, Tensor, Tensor]] | None:
    """What takes the problem as a whole, from the features to the reduced loss; None where nothing does."""
    if problem.bias is not None or not registry.plain_eager(*problem[:TENSORS]):
        return None
    run = resolve(problem.impl, problem.image)
    return run["whole"] if "whole" in run and together(run, problem) and run["whole_covers"](problem) else None


class BlockwiseForward:
    """The forward of one direction, to which the keys come in blocks, from one tensor or from other processes.

    `add` every block of keys once per pass, in any order, then `finish`. Nothing of size (B, M) is held in between.
    """

    passes = 2

    def __init__(self, rows: Rows) -> None:
        self.rows, self.teacher_rows, self.ids, self.temperature, self.options = rows
        self.count = None  # with ids: (B,) positives seen so far
        if self.ids is not None:
            self.count = torch.zeros_like(self.ids, memory_format=torch.contiguous_format)

    def add(self, keys: Keys, second_pass: bool) -> None:
        """Takes a block of keys in pass one or two."""
        positives = None if self.ids is None else positive_lists(self.ids, keys)
        if positives is not None and not second_pass:
            self.count += positives.count
        self._add(keys, second_pass, positives)

    def finish(self, out: Outputs) -> None:
        """Writes the results. Raises ValueError for a row whose id no key has (on a GPU: a device-side assertion)."""
        if self.ids is not None:
            check_every_row_has_positive(self.count > 0, self.ids)
        self._finish(out)

    def _add(self, keys: Keys, second_pass: bool, positives: PositiveLists | None) -> None:
        raise NotImplementedError

    def _finish(self, out: Outputs) -> None:
        raise NotImplementedError


def streaming(
    name: str, softmax: dict[str, Callable], sigmoid: dict[str, Callable], **keywords
) -> registry.Implementation:
    """An `Implementation` of the parts that stream, of both losses."""
    return registry.Implementation(
        name, softmax | {f"sigmoid_{part}": run for part, run in sigmoid.items()}, **keywords
    )


def resolve(impl: str | None, rows: Tensor) -> registry.Implementation:
    return registry.resolve("focal_itc", impl, rows.device, rows.dtype, rows.shape[1])


def part_of(problem: Problem, part: str) -> str:
    """The name of that part for the loss of the problem."""
    return part if problem.bias is None else f"sigmoid_{part}"


def together(run: registry.Implementation, problem: Problem) -> bool:
    """Whether the implementation does both directions together. Forward and backward must agree, so no more decides."""
    if not problem.own_keys or problem.alpha is not None or part_of(problem, "symmetric_forward") not in run:
        return False
    covers = part_of(problem, "symmetric_covers")
    return covers not in run or run[covers](problem)


@without_autocast
def _forward(*arguments):
    problem = Problem(*arguments)
    if problem.bias is not None and problem.seed is not None:  # the statistics are those of the softmax
        return (*_forward(*problem._replace(seed=None))[:3], *_forward(*problem._replace(bias=None))[3:])
    directions = problem.directions()
    outputs = Outputs.empty(directions[0][0], 2)
    run = resolve(problem.impl, problem.image)
    if together(run, problem):
        run[part_of(problem, "symmetric_forward")](problem, outputs)
        return tuple(outputs)
    for (rows, keys), out in zip(directions, outputs.directions(), strict=True):
        forward = run[part_of(problem, "forward")](rows)
        for second_pass in range(forward.passes):
            forward.add(keys, bool(second_pass))
        forward.finish(out)
    return tuple(outputs)


@without_autocast
def _backward(grad_loss, row_state, dominant, wanted, *arguments):
    problem = Problem(*arguments)
    run = resolve(problem.impl, problem.image)
    gradients, numbers = [None] * DIFFERENTIABLE, (4,) if problem.bias is None else (4, 5)
    if together(run, problem):
        places = 0, 1, *numbers
        found = run[part_of(problem, "symmetric_backward")](
            grad_loss, problem, row_state, dominant, tuple(wanted[place] for place in places)
        )
        for place, gradient in zip(places, found, strict=True):
            gradients[place] = gradient
    else:
        key_places = (1, 0) if problem.image_keys is None else (3, 2)
        for i, (rows, keys) in enumerate(problem.directions()):
            places = i, key_places[i], *numbers
            found = run[part_of(problem, "backward")](
                grad_loss[i], rows, keys, (row_state[i], dominant[i]), tuple(wanted[place] for place in places)
            )
            for place, gradient in zip(places, found, strict=True):
                gradients[place] = gradient if gradients[place] is None else gradients[place] + gradient
    return gradients


def _backward_operator(grad_loss, row_state, dominant, wanted, *arguments):
    """The operator returns tensors: empty ones, which eager mode need not make, where no gradient is wanted."""
    gradients = zip(_backward(grad_loss, row_state, dominant, wanted, *arguments), wanted, strict=True)
    return tuple(gradient if wants else row_state.new_empty(0) for gradient, wants in gradients)


torch.library.impl("softmask_fast::focal_itc", "CompositeExplicitAutograd", _forward)
torch.library.impl("softmask_fast::focal_itc_backward", "CompositeExplicitAutograd", _backward_operator)


@torch.library.register_fake("softmask_fast::focal_itc")
def _forward_fake(*arguments):
    problem = Problem(*arguments)
    return tuple(Outputs.empty(problem.directions()[0][0], 2))


@torch.library.register_fake("softmask_fast::focal_itc_backward")
def _backward_fake(grad_loss, row_state, dominant, wanted, *arguments):
    inputs = zip(arguments[:DIFFERENTIABLE], wanted, strict=True)
    return tuple(x.new_empty(x.shape) if wants else row_state.new_empty(0) for x, wants in inputs)


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[TENSORS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:3], *inputs[:TENSORS])


def _gradients(run, ctx, wanted, grad_loss):
    """The gradients that are wanted, by `run`: the backward or its operator."""
    if grad_loss is None or not any(wanted):
        return [None] * DIFFERENTIABLE
    row_state, dominant, *inputs = ctx.saved_tensors
    found = run(grad_loss, row_state, dominant, list(wanted), *inputs, *ctx.options)
    return [gradient if wants else None for gradient, wants in zip(found, wanted, strict=True)]


def _differentiate(ctx, grad_loss, *_):
    wanted = ctx.needs_input_grad[:DIFFERENTIABLE]
    gradients = _gradients(torch.ops.softmask_fast.focal_itc_backward, ctx, wanted, grad_loss)
    return (*gradients, *[None] * (len(Problem._fields) - DIFFERENTIABLE))


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(SECOND_DERIVATIVE)


torch.library.register_autograd("softmask_fast::focal_itc", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("softmask_fast::focal_itc_backward", _no_second_derivative)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, *differentiable):
        loss, row_state, dominant, statistics, hard_negative = _forward(*problem)
        ctx.options = problem[TENSORS:]
        ctx.mark_non_differentiable(statistics, hard_negative)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(row_state, dominant, *problem[:TENSORS])
        return loss, statistics, hard_negative

    @staticmethod
    def backward(ctx, grad_loss, *_):
        # what is differentiated again, or seen by a mode, goes through the operator, which knows what to say
        plain = not torch.is_grad_enabled() and registry.plain_eager(grad_loss)
        run = _backward if plain else torch.ops.softmask_fast.focal_itc_backward
        return None, *_gradients(run, ctx, ctx.needs_input_grad[1:], grad_loss)

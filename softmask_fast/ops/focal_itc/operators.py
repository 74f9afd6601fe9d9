"""One direction of the loss as torch.library operators: the forward stores row sums, the backward recomputes tiles.

Every streaming implementation has two parts: "forward", a class derived from ``BlockwiseForward``, and "backward", a
function with the arguments of the operator, the options in an ``Options``, and ``first_key``. ``impl`` travels as an
argument, so a compiled graph holds one opaque call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops import registry
from softmask_fast.ops.focal_itc.positives import PositiveLists, positive_lists
from softmask_fast.ops.focal_itc.reference import SECOND_DERIVATIVE, Options, RowResult, check_every_row_has_positive

# What the forward leaves for the backward: the rows of `row_state` (9, B), in the dtype of the sums.
# log p_ij = (<x_i, y_j> - MAX) / tau - LOG_SUM. The two are kept apart, and the maximum in units of the product, so
# that differences of large logits stay exact and log p near 0 keeps its precision.
MAX, LOG_SUM = 0, 1
TEACHER_MAX, TEACHER_LOG_SUM = 2, 3
WEIGHT = 4  # W_i
HARD = 5  # factor of the hard target: (1 - alpha) / number of positives, or (1 - alpha) w(P_i) for positives="any"
POSITIVE_MAX, POSITIVE_LOG_SUM = 6, 7  # log of the sum of e^s over the positives, in the same two parts
DOMINANT_GRADIENT = 8  # dloss_i / ds_ij of the most probable key; `streamed` has no use for it
ROW_STATES = 9

OPTIONS = (
    "float gamma, bool any_positive, SymInt row_offset, SymInt first_negative, "
    "SymInt last_negative, int direction, str? impl"
)
torch.library.define(
    "softmask_fast::focal_itc",
    "(Tensor rows, Tensor keys, Tensor temperature, Tensor? teacher_rows, Tensor? ids, Tensor? key_ids, Tensor? alpha, "
    f"Tensor? seed, {OPTIONS}) -> (Tensor loss, Tensor row_state, Tensor dominant, Tensor statistics, "
    "Tensor hard_negative)",
)
torch.library.define(
    "softmask_fast::focal_itc_backward",
    "(Tensor grad_loss, Tensor rows, Tensor keys, Tensor temperature, Tensor? teacher_rows, Tensor? ids, "
    "Tensor? key_ids, Tensor? alpha, Tensor? seed, Tensor row_state, Tensor dominant, bool wants_rows, "
    f"bool wants_keys, bool wants_temperature, {OPTIONS}) -> (Tensor grad_rows, Tensor grad_keys, "
    "Tensor grad_temperature)",
)
_INPUTS = 8  # tensors before the options


def focal_itc_direction(
    rows: Tensor,  # (B, d)
    keys: Tensor,  # (M, d)
    temperature: Tensor,  # () float32 or float64
    teacher_rows: Tensor | None,  # (B, d)
    ids: Tensor | None,  # (B,) int64
    key_ids: Tensor | None,  # (M,) int64
    options: Options,
    *,
    impl: str | None,
) -> RowResult:
    """One direction of the loss by a streaming implementation; gradients to rows, keys and temperature."""
    loss, _, _, statistics, hard_negative = torch.ops.softmask_fast.focal_itc(
        rows, keys, temperature, teacher_rows, ids, key_ids, *options, impl
    )
    return RowResult(loss, *statistics.unbind(0), hard_negative) if options.stats else RowResult(loss, *[None] * 4)


class BlockwiseForward:
    """The forward of one direction, to which the keys come in blocks, from one tensor or from other processes.

    ``add`` every block of keys once per pass, in any order, then ``finish``. Nothing of size (B, M) is held in between.
    """

    passes = 2

    def __init__(
        self, rows: Tensor, temperature: Tensor, teacher_rows: Tensor | None, ids: Tensor | None, options: Options
    ):
        self.rows, self.temperature, self.teacher_rows = rows, temperature, teacher_rows
        self.ids, self.options = ids, options
        self.count = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)  # positives seen so far

    def add(self, keys: Tensor, key_ids: Tensor | None, first_key: int, second_pass: bool) -> None:
        """Takes a block of keys (m, d), numbered from ``first_key``, in pass one or two."""
        positives = positive_lists(self.rows, self.ids, keys, key_ids, self.options.row_offset, first_key)
        if not second_pass:
            self.count += positives.count
        self._add(keys, key_ids, first_key, second_pass, positives)

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """loss (B,), row_state (9, B), dominant (B,), statistics (3, B), hard_negative (B,): the operator's outputs.

        Raises ValueError for a row whose id no key has (on a GPU: a device-side assertion).
        """
        if self.ids is not None:
            check_every_row_has_positive(self.count > 0, self.ids)
        return self._finish()

    def _add(
        self, keys: Tensor, key_ids: Tensor | None, first_key: int, second_pass: bool, positives: PositiveLists
    ) -> None:
        raise NotImplementedError

    def _finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        raise NotImplementedError


def streaming(
    name: str, forward: type[BlockwiseForward], backward, symmetric=None, **keywords
) -> registry.Implementation:
    """An ``Implementation`` made of the two parts that stream, and where it has them of the three of symmetric.py."""
    parts = {"forward": forward, "backward": backward}
    if symmetric is not None:
        parts["symmetric_covers"], parts["symmetric_forward"], parts["symmetric_backward"] = symmetric
    return registry.Implementation(name, parts, **keywords)


def resolve(impl: str | None, rows: Tensor) -> registry.Implementation:
    return registry.resolve("focal_itc", impl, rows.device, rows.dtype, rows.shape[1])


@torch.library.impl("softmask_fast::focal_itc", "CompositeExplicitAutograd")
def _forward(rows, keys, temperature, teacher_rows, ids, key_ids, *options_and_impl):
    *options, impl = options_and_impl
    with torch.autocast(rows.device.type, enabled=False):
        run = resolve(impl, rows)
        return stream_forward(run, rows, keys, temperature, teacher_rows, ids, key_ids, Options(*options))


def stream_forward(
    run: registry.Implementation,
    rows: Tensor,
    keys: Tensor,
    temperature: Tensor,
    teacher_rows: Tensor | None,
    ids: Tensor | None,
    key_ids: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the operator, from keys that are one block."""
    forward = run["forward"](rows, temperature, teacher_rows, ids, options)
    for second_pass in range(forward.passes):
        forward.add(keys, key_ids, 0, bool(second_pass))
    return forward.finish()


@torch.library.impl("softmask_fast::focal_itc_backward", "CompositeExplicitAutograd")
def _backward(
    grad_loss, rows, keys, temperature, teacher_rows, ids, key_ids, alpha, seed, row_state, dominant, wants_rows,
    wants_keys, wants_temperature, *options_and_impl,
):  # fmt: skip
    *options, impl = options_and_impl
    run = resolve(impl, rows)["backward"]
    with torch.autocast(rows.device.type, enabled=False):
        return run(
            grad_loss, rows, keys, temperature, teacher_rows, ids, key_ids, row_state, dominant, wants_rows, wants_keys,
            wants_temperature, Options(alpha, seed, *options),
        )  # fmt: skip


@torch.library.register_fake("softmask_fast::focal_itc")
def _forward_fake(rows, keys, temperature, teacher_rows, ids, key_ids, *options_and_impl):
    return fake_outputs(temperature, Options(*options_and_impl[:-1]), rows.shape[:1])


def fake_outputs(temperature: Tensor, options: Options, size: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The outputs of a forward for rows of this size, (B,), or (2, B) of both directions."""
    *directions, batch = size
    counted = batch if options.stats else 0
    return (
        temperature.new_empty(*directions, batch),
        temperature.new_empty(*directions, ROW_STATES, batch),
        temperature.new_empty(*directions, batch, dtype=torch.int64),
        temperature.new_empty(*directions, 3, counted),
        temperature.new_empty(*directions, counted, dtype=torch.int64),
    )


@torch.library.register_fake("softmask_fast::focal_itc_backward")
def _backward_fake(
    grad_loss, rows, keys, temperature, teacher_rows, ids, key_ids, alpha, seed, row_state, dominant, wants_rows,
    wants_keys, wants_temperature, *options_and_impl,
):  # fmt: skip
    return fake_gradients((rows, keys, temperature), (wants_rows, wants_keys, wants_temperature))


def fake_gradients(inputs: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """The outputs of a backward: gradients, empty where not wanted."""
    return tuple(x.new_empty(x.shape if wants else 0) for x, wants in zip(inputs, wanted, strict=True))


def setup_context(tensors: int):
    """Saves the first so many arguments of the forward, the options behind them, and the row state."""

    def setup(ctx, inputs, output):
        loss, row_state, dominant, statistics, hard_negative = output
        ctx.options = inputs[tensors:]
        ctx.mark_non_differentiable(row_state, dominant, statistics, hard_negative)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], row_state, dominant)

    return setup


def autograd(tensors: int, backward):
    """Calls the operator ``backward`` for what is wanted of the first three arguments."""

    def run(ctx, grad_loss, *_):
        none = (None,) * (tensors - 3 + len(ctx.options))
        wanted = ctx.needs_input_grad[:3]
        if grad_loss is None or not any(wanted):
            return (None, None, None, *none)
        grads = backward(grad_loss, *ctx.saved_tensors, *wanted, *ctx.options)
        return (*(grad if wants else None for grad, wants in zip(grads, wanted, strict=True)), *none)

    return run


def no_second_derivative(ctx, *grads):
    raise RuntimeError(SECOND_DERIVATIVE)


torch.library.register_autograd(
    "softmask_fast::focal_itc",
    autograd(_INPUTS, torch.ops.softmask_fast.focal_itc_backward),
    setup_context=setup_context(_INPUTS),
)
torch.library.register_autograd("softmask_fast::focal_itc_backward", no_second_derivative)

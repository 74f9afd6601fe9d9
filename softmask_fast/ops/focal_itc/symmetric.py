"""Both directions of a batch that is its own keys, as operators: a product <x_i, y_j> is of image row i and text row j.

An implementation with the parts "symmetric_forward" and "symmetric_backward" computes each tile of products once for
both directions, half of the matrix products of two directions, where its "symmetric_covers"(image, ids, options) says
so; else, and with another implementation, these operators are just the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops.focal_itc import operators
from softmask_fast.ops.focal_itc.operators import OPTIONS, no_second_derivative, resolve, stream_forward
from softmask_fast.ops.focal_itc.reference import Options, RowResult
from softmask_fast.ops.registry import Implementation

torch.library.define(
    "softmask_fast::focal_itc_symmetric",
    "(Tensor image, Tensor text, Tensor temperature, Tensor? ids, Tensor? alpha, Tensor? seed, "
    f"{OPTIONS}) -> (Tensor loss, Tensor row_state, Tensor dominant, Tensor statistics, Tensor hard_negative)",
)
torch.library.define(
    "softmask_fast::focal_itc_symmetric_backward",
    "(Tensor grad_loss, Tensor image, Tensor text, Tensor temperature, Tensor? ids, Tensor? alpha, Tensor? seed, "
    "Tensor row_state, Tensor dominant, bool wants_image, bool wants_text, bool wants_temperature, "
    f"{OPTIONS}) -> (Tensor grad_image, Tensor grad_text, Tensor grad_temperature)",
)
_INPUTS = 6  # tensors before the options


def focal_itc_directions(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    temperature: Tensor,  # () float32 or float64
    ids: Tensor | None,  # (B,) int64
    options: Options,  # its direction does not matter; without a teacher, so alpha is 0
    *,
    impl: str | None,
) -> list[RowResult]:
    """Image rows against text keys, and text rows against image keys; gradients to image, text and temperature."""
    loss, _, _, statistics, hard_negative = torch.ops.softmask_fast.focal_itc_symmetric(
        image, text, temperature, ids, *options, impl
    )
    if not options.stats:
        return [RowResult(loss[direction], *[None] * 4) for direction in range(2)]
    return [RowResult(loss[i], *statistics[i].unbind(0), hard_negative[i]) for i in range(2)]


def _together(run: Implementation, image: Tensor, ids: Tensor | None, options: Options) -> bool:
    """Whether the implementation does both directions together. Forward and backward must agree, so no more decides."""
    return "symmetric_covers" in run and run["symmetric_covers"](image, ids, options)


@torch.library.impl("softmask_fast::focal_itc_symmetric", "CompositeExplicitAutograd")
def _forward(image, text, temperature, ids, *options_and_impl):
    *options, impl = options_and_impl
    options = Options(*options)
    with torch.autocast(image.device.type, enabled=False):
        run = resolve(impl, image)
        if _together(run, image, ids, options):
            return run["symmetric_forward"](image, text, temperature, ids, options)
        results = (
            stream_forward(run, rows, keys, temperature, None, ids, ids, options._replace(direction=direction))
            for direction, (rows, keys) in enumerate(((image, text), (text, image)))
        )
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


@torch.library.impl("softmask_fast::focal_itc_symmetric_backward", "CompositeExplicitAutograd")
def _backward(
    grad_loss, image, text, temperature, ids, alpha, seed, row_state, dominant, wants_image, wants_text,
    wants_temperature, *options_and_impl,
):  # fmt: skip
    *options, impl = options_and_impl
    options = Options(alpha, seed, *options)
    with torch.autocast(image.device.type, enabled=False):
        run = resolve(impl, image)
        if _together(run, image, ids, options):
            return run["symmetric_backward"](
                grad_loss, image, text, temperature, ids, row_state, dominant, wants_image, wants_text,
                wants_temperature, options,
            )  # fmt: skip
        of_image, of_text = (
            run["backward"](
                grad_loss[direction], rows, keys, temperature, None, ids, ids, row_state[direction],
                dominant[direction], *wanted, wants_temperature, options._replace(direction=direction),
            )
            for direction, (rows, keys, *wanted) in enumerate(
                ((image, text, wants_image, wants_text), (text, image, wants_text, wants_image))
            )
        )  # fmt: skip
        return of_image[0] + of_text[1], of_image[1] + of_text[0], of_image[2] + of_text[2]


@torch.library.register_fake("softmask_fast::focal_itc_symmetric")
def _forward_fake(image, text, temperature, ids, *options_and_impl):
    return operators.fake_outputs(temperature, Options(*options_and_impl[:-1]), (2, image.shape[0]))


@torch.library.register_fake("softmask_fast::focal_itc_symmetric_backward")
def _backward_fake(
    grad_loss, image, text, temperature, ids, alpha, seed, row_state, dominant, wants_image, wants_text,
    wants_temperature, *options_and_impl,
):  # fmt: skip
    return operators.fake_gradients((image, text, temperature), (wants_image, wants_text, wants_temperature))


torch.library.register_autograd(
    "softmask_fast::focal_itc_symmetric",
    operators.autograd(_INPUTS, torch.ops.softmask_fast.focal_itc_symmetric_backward),
    setup_context=operators.setup_context(_INPUTS),
)
torch.library.register_autograd("softmask_fast::focal_itc_symmetric_backward", no_second_derivative)

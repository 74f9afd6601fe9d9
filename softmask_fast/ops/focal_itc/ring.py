"""The loss of the joined batch, whose keys travel around a ring of the ranks: memory does not grow with their number.

Each rank computes with the keys it holds while the next ones travel. In the backward pass the gradient of the keys
follows one step behind them, so that it too travels during computation, and ends up at their owner.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softmask_fast.ops.collectives import JoinedBatch
from softmask_fast.ops.focal_itc import operators
from softmask_fast.ops.focal_itc.feature_queue import Features
from softmask_fast.ops.focal_itc.reference import Options, RowResult


def ring_rows(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    ids: Tensor | None,  # (B,) int64
    temperature: Tensor,  # () float32 or float64
    teachers: tuple[Tensor | None, Tensor | None],  # of image and text, each (B, d)
    queued: Features | None,  # without gradient
    joined: JoinedBatch,
    options: list[Options],  # of image rows and text rows
    impl: str | None,
) -> tuple[RowResult, RowResult]:
    """Both directions, per row of this rank, against the joined batch and the queued features.

    Image, text (as rows and as keys) and temperature get gradients.
    """
    implementation = operators.resolve(impl, image)
    if "forward" not in implementation or "backward" not in implementation:
        raise ValueError(f"impl: expected one that takes keys in blocks for gather='ring', got {implementation.name!r}")
    queue = queued or (None, None, None)
    outputs = _Ring.apply(image, text, temperature, *teachers, ids, *queue, joined, options, implementation)
    results = []
    for loss, statistics, hard_negative in (outputs[:3], outputs[3:]):
        columns = (*statistics.unbind(0), hard_negative) if options[0].stats else [None] * 4
        results.append(RowResult(loss, *columns))
    return tuple(results)


def _blocks(
    joined: JoinedBatch, image: Tensor, text: Tensor, ids: Tensor | None, queue: tuple[Tensor | None, ...]
) -> Iterator[tuple[int, tuple[Tensor, Tensor], Tensor | None]]:
    """(first key, (image keys, text keys), their ids) of every rank, starting with this one, then of the queue."""
    block = [joined.pad(image), joined.pad(text)]
    if ids is not None:
        block.append(joined.pad(ids))
    for rank, parts in joined.ring(block):
        image_keys, text_keys, *key_ids = (part[: joined.sizes[rank]] for part in parts)
        yield joined.offsets[rank], (image_keys, text_keys), key_ids[0] if key_ids else None
    if queue[0] is not None:
        yield joined.total, queue[:2], None if ids is None else queue[2]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, image, text, temperature, teacher_image, teacher_text, ids, queue_image, queue_text, queue_ids, joined,
        options, implementation,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        queue = queue_image, queue_text, queue_ids
        with torch.autocast(image.device.type, enabled=False):
            runs = [
                implementation["forward"](rows, temperature, teacher, ids, option)
                for rows, teacher, option in zip((image, text), (teacher_image, teacher_text), options, strict=True)
            ]
            for second_pass in range(runs[0].passes):
                for first_key, keys, key_ids in _blocks(joined, image, text, ids, queue):
                    for run, other_keys in zip(runs, reversed(keys), strict=True):
                        run.add(other_keys, key_ids, first_key, bool(second_pass))
            results = [run.finish() for run in runs]
        ctx.joined, ctx.options, ctx.implementation = joined, options, implementation
        states = [state for result in results for state in result[1:3]]
        ctx.save_for_backward(image, text, temperature, teacher_image, teacher_text, ids, *queue, *states)
        outputs = [(loss, statistics, hard_negative) for loss, _, _, statistics, hard_negative in results]
        ctx.mark_non_differentiable(*(tensor for output in outputs for tensor in output[1:]))
        return *outputs[0], *outputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Any, ...]:
        image, text, temperature, teacher_image, teacher_text, ids, *saved = ctx.saved_tensors
        queue, states = saved[:3], saved[3:]
        joined, needs_temperature = ctx.joined, ctx.needs_input_grad[2]
        needs_grad = ctx.needs_input_grad[:2]  # of image and text, each as rows of one direction and keys of the other
        grad_rows = [temperature.new_zeros(image.shape) if needed else None for needed in needs_grad]
        grad_temperature = torch.zeros_like(temperature)

        def add_gradients(
            first_key: int, keys: tuple[Tensor, Tensor], key_ids: Tensor | None, needs_keys: bool
        ) -> list[Tensor]:
            """Adds the gradients of the rows and the temperature; returns those of the keys that are needed."""
            grad_keys = [None, None]
            for row, (rows, teacher) in enumerate(((image, teacher_image), (text, teacher_text))):
                column = 1 - row
                of_rows, grad_keys[column], of_temperature = ctx.implementation["backward"](
                    grads[3 * row], rows, keys[column], temperature, teacher, ids, key_ids, states[2 * row],
                    states[2 * row + 1], needs_grad[row], needs_keys and needs_grad[column], needs_temperature,
                    ctx.options[row], first_key,
                )  # fmt: skip
                if needs_grad[row]:
                    grad_rows[row] += of_rows
                if needs_temperature:
                    grad_temperature.add_(of_temperature)
            return [joined.pad(grad_keys[i].to(temperature.dtype)) for i in range(2) if needs_keys and needs_grad[i]]

        with torch.autocast(image.device.type, enabled=False):
            arriving = None
            for first_key, keys, key_ids in _blocks(joined, image, text, ids, queue):
                of_keys = add_gradients(first_key, keys, key_ids, first_key < joined.total)
                if not of_keys:
                    continue
                if arriving is not None:  # what the earlier ranks computed for these keys
                    of_keys = [mine + theirs for mine, theirs in zip(of_keys, arriving(), strict=True)]
                arriving = joined.pass_on(of_keys)
            own_grads = arriving() if arriving is not None else []
        results = [None, None]
        for i in range(2):
            if needs_grad[i]:
                results[i] = (grad_rows[i] + own_grads.pop(0)[: joined.rows]).to(image.dtype)
        return *results, grad_temperature if needs_temperature else None, *[None] * 9

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
from softmask_fast.ops.focal_itc.state import DIFFERENTIABLE, TENSORS, Keys, Outputs, Problem


def ring_rows(problem: Problem, queued: Features | None, joined: JoinedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Both directions, per row of this rank, against the joined batch and the queued features, without gradient.

    The problem has no keys. Returns loss (2, B), statistics and hard negatives, see `Outputs`. Image, text (as rows
    and as keys), temperature and bias get gradients.
    """
    if problem.bias is not None and problem.seed is not None:  # the statistics are those of the softmax
        loss = ring_rows(problem._replace(seed=None), queued, joined)[0]
        return loss, *ring_rows(problem._replace(bias=None), queued, joined)[1:]
    run = operators.resolve(problem.impl, problem.image)
    if "forward" not in run or "backward" not in run:
        raise ValueError(f"impl: expected one that takes keys in blocks for gather='ring', got {run.name!r}")
    return _Ring.apply(*problem[:DIFFERENTIABLE], queued or Features(None, None, None), joined, problem, run)


def _blocks(problem: Problem, queued: Features, joined: JoinedBatch) -> Iterator[tuple[Keys, Keys]]:
    """Text keys and image keys of every rank, starting with this one, then of the queue."""
    block = [joined.pad(problem.text), joined.pad(problem.image)]
    if problem.ids is not None:
        block.append(joined.pad(problem.ids))
    for rank, parts in joined.ring(block):
        text_keys, image_keys, *key_ids = (part[: joined.sizes[rank]] for part in parts)
        key_ids = key_ids[0] if key_ids else None
        yield tuple(Keys(keys, key_ids, joined.offsets[rank]) for keys in (text_keys, image_keys))
    if queued.image is not None:
        key_ids = None if problem.ids is None else queued.ids
        yield tuple(Keys(keys, key_ids, joined.total) for keys in (queued.text, queued.image))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, image_keys, text_keys, temperature, bias, queued, joined, problem, run):
        rows = [rows for rows, _ in problem.directions()]
        outputs = Outputs.empty(rows[0], 2)
        with torch.autocast(image.device.type, enabled=False):
            forwards = [run[operators.part_of(problem, "forward")](its_rows) for its_rows in rows]
            for second_pass in range(forwards[0].passes):
                for keys in _blocks(problem, queued, joined):
                    for forward, its_keys in zip(forwards, keys, strict=True):
                        forward.add(its_keys, bool(second_pass))
            for forward, out in zip(forwards, outputs.directions(), strict=True):
                forward.finish(out)
        ctx.queued, ctx.joined, ctx.run, ctx.options = queued, joined, run, problem[TENSORS:]
        ctx.save_for_backward(*problem[:TENSORS], outputs.row_state, outputs.dominant)
        ctx.mark_non_differentiable(outputs.statistics, outputs.hard_negative)
        return outputs.loss, outputs.statistics, outputs.hard_negative

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        *tensors, row_state, dominant = ctx.saved_tensors
        problem, joined = Problem(*tensors, *ctx.options), ctx.joined
        directions, dtype = problem.directions(), problem.temperature.dtype
        wanted, numbers = ctx.needs_input_grad[:2], slice(4, 5 if problem.bias is None else 6)  # temperature, bias
        wants_numbers = ctx.needs_input_grad[numbers]
        # of image and text, each as rows of one direction and keys of the other
        grad_rows = [torch.zeros_like(problem[i], dtype=dtype) if wants else None for i, wants in enumerate(wanted)]
        grad_numbers = [
            torch.zeros_like(number) if wants else None
            for number, wants in zip(problem[numbers], wants_numbers, strict=True)
        ]

        def add_gradients(keys: tuple[Keys, Keys], wants_keys: bool) -> list[Tensor]:
            """Adds the gradients of the rows and the numbers; returns those of the keys that are needed."""
            grad_keys = [None, None]
            for i, (rows, _) in enumerate(directions):
                wants = wanted[i], wants_keys and wanted[1 - i], *wants_numbers
                of_rows, grad_keys[1 - i], *of_numbers = ctx.run[operators.part_of(problem, "backward")](
                    grad_loss[i], rows, keys[i], (row_state[i], dominant[i]), wants
                )
                for total, found in zip((grad_rows[i], *grad_numbers), (of_rows, *of_numbers), strict=True):
                    if total is not None:
                        total += found
            return [joined.pad(grad_keys[i].to(dtype)) for i in range(2) if wants_keys and wanted[i]]

        with torch.autocast(problem.image.device.type, enabled=False):
            arriving = None
            for keys in _blocks(problem, ctx.queued, joined):
                of_keys = add_gradients(keys, keys[0].first < joined.total)
                if not of_keys:
                    continue
                if arriving is not None:  # what the earlier ranks computed for these keys
                    of_keys = [mine + theirs for mine, theirs in zip(of_keys, arriving(), strict=True)]
                arriving = joined.pass_on(of_keys)
            own_grads = arriving() if arriving is not None else []
        results = [None, None]
        for i in range(2):
            if wanted[i]:
                results[i] = (grad_rows[i] + own_grads.pop(0)[: joined.rows]).to(problem.image.dtype)
        grad_numbers += [None] * (2 - len(grad_numbers))
        return *results, None, None, *grad_numbers, None, None, None, None

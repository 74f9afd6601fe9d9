"""FocalITCLoss: the loss as a module, with the batches of all ranks and a queue of earlier features as keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from softmask_fast.ops.checks import (
    as_scalar,
    check_choice,
    check_gamma,
    check_integer,
    check_seed,
    check_teachers,
    check_tensor,
)
from softmask_fast.ops.collectives import JoinedBatch, exchange, world_size
from softmask_fast.ops.focal_itc import FocalITCStats, check_loss, focal_itc_loss, statistics
from softmask_fast.ops.focal_itc.feature_queue import FeatureQueue, Features
from softmask_fast.ops.focal_itc.ring import ring_rows
from softmask_fast.ops.focal_itc.state import Problem
from softmask_fast.ops.registry import refuse_transforms

GATHERS = ("momentum", "with_grad", "ring")
NEGATIVES = ("keys", "batch", "rank")
_QUEUE_BUFFERS = ("image_queue", "text_queue", "queue_ids", "queue_position")


class FocalITCLoss(nn.Module):
    """`focal_itc_loss` with the joined batch of all ranks and a queue of earlier features as keys.

    The keys are the features of the joined batch (all ranks, in rank order), followed by those in the queue. `gather`
    decides what travels between the ranks:

    - `"momentum"`: the teacher's features of all ranks, without gradient (ALBEF, MoCo).
    - `"with_grad"`: the features of all ranks, with gradient. Each rank compares its own rows with all columns, and the
      gradients of the columns are reduce-scattered to their owners (CLIP; open_clip's `local_loss` and
      `gather_with_grad`).
    - `"ring"`: the same result as "with_grad". The features travel around a ring in blocks of one rank's batch, so that
      memory does not grow with the number of ranks.

    Scale: a rank's loss is the sum over its rows, times the number of ranks, divided by the rows of the joined batch.
    If all ranks have equally many rows, this is the mean over its rows. So the mean over the ranks is the loss of the
    joined batch. Gradients averaged over the ranks, as DistributedDataParallel and DeepSpeed do, equal those of the
    joined batch on one process. The averages in `FocalITCStats` scale the same way. Each rank needs at least one row.

    The module's own queue, a `FeatureQueue`, is its attribute `queue` (None for `queue_size=0`) and part of its
    `state_dict`. In training mode each forward pass replaces the oldest entries with the joined batch.

    Args:
        width: d, the number of columns of the features; required with a queue.
        queue_size: number of entries in the queue; 0: no queue.
        gamma, positives, loss, impl: as in `focal_itc_loss`.
        gather: "momentum", "with_grad" or "ring", see above.
        group: the ranks that share a batch; None: all.
        seed: seed of the queue's initial entries.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        width: int | None = None,
        queue_size: int = 0,
        *,
        gamma: float = 2.0,
        positives: str = "mean",
        loss: str = "softmax",
        gather: str = "momentum",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        check_integer("queue_size", queue_size, 0, None)
        if width is not None or queue_size:
            check_integer("width", width, 1, None)
        check_choice("positives", positives, ("mean", "any"))
        check_choice("loss", loss, ("softmax", "sigmoid"))
        check_choice("gather", gather, GATHERS)
        self.gamma, self.positives, self.gather = check_gamma(gamma), positives, gather
        self.loss, self.group, self.impl = loss, group, impl
        self.queue = FeatureQueue(width, queue_size, seed) if queue_size else None

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, gather={self.gather!r}"

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        *,
        temperature: float | Tensor,
        bias: float | Tensor | None = None,
        teacher_image: Tensor | None = None,
        teacher_text: Tensor | None = None,
        alpha: float | Tensor = 0.0,
        ids: Tensor | None = None,
        queue: FeatureQueue | None = None,
        use_queue: bool = True,
        return_stats: bool = False,
        negatives: str = "keys",
        seed: int | Tensor = 0,
    ) -> Tensor | tuple[Any, ...]:
        """Computes the loss of this rank's rows. A collective if there are several ranks.

        Args:
            image, text: (B, d) unit vectors of this rank's pairs, dtypes as in `focal_itc_loss`.
            temperature, bias: as in `focal_itc_loss`.
            teacher_image, teacher_text: (B, d) features of the same pairs by the momentum teacher, treated as
                constants. Required for `gather="momentum"`, which uses them as keys, and for alpha > 0. They enter the
                queue; without them, `image` and `text` do.
            alpha: weight in [0, 1] of the teacher's soft targets, a number or a tensor as in `focal_itc_loss`.
            ids: (B,) int64 ids of the images; all keys with a row's id are its positives. Without ids, the only
                positive is the row's own pair. Features in the queue keep their ids; those without one match no image.
            queue: use this queue instead of the module's own; the caller then updates it.
            use_queue: whether the features in the queue are keys. The queue is updated either way.
            return_stats: also return `FocalITCStats`. Its hard negatives are key numbers: a row of the joined batch, or
                the number of its rows plus a slot of the queue.
            negatives: where hard negatives come from: "keys" (all), "batch" (the joined batch), "rank" (this rank's).
            seed: seed of the hard negatives, a number or a tensor. The same seed on all ranks gives those of the joined
                batch.

        Returns:
            The loss, 0-dim, float32 (float64 for float64 inputs). With `return_stats`, (loss, stats). If `queue` is
            given, one more element follows: the `Features` of the joined batch for the caller to enqueue, or None in
            eval mode or for a queue of size 0.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came. If the ranks disagree on sizes
                or options, or one has no rows, every rank raises.
            RuntimeError: in forward-mode autograd and under `torch.func` transforms.
        """
        refuse_transforms(
            "FocalITCLoss", image, text, temperature, bias, teacher_image, teacher_text, alpha, ids, seed
        )  # fmt: skip
        own_queue = queue is None
        queue = self.queue if own_queue else queue
        if queue is not None and queue.size == 0:
            queue = None
        rows = Features(image, text, ids)
        alpha = self._check(rows, teacher_image, teacher_text, alpha, queue)
        check_choice("negatives", negatives, NEGATIVES)
        check_seed(seed, image, False)
        temperature = as_scalar("temperature", temperature, image, above=0)
        ring_bias = check_loss(self.loss, bias, self.positives, alpha, image)
        teacher = None if teacher_image is None else Features(teacher_image, teacher_text, ids)
        joined = self._join(rows, teacher, queue)
        ring = self.gather == "ring" and joined.world > 1

        # Gather
        updates_queue = self.training and queue is not None
        newest = queued = None
        if updates_queue or self.gather == "momentum":
            newest = Features(*(None if x is None else joined.gather(x) for x in teacher or rows))
        if use_queue and queue is not None:  # for a ring a copy, as its backward runs after the queue has moved on
            queued = queue.keys(image, copy=ring)

        # Contrast
        keys = joined.total + (0 if queued is None else queue.size)
        ranges = {"keys": (0, keys), "batch": (0, joined.total), "rank": (joined.offset, joined.offset + joined.rows)}
        options = dict(negative_range=ranges[negatives], return_stats=return_stats, seed=seed)
        if ring:
            loss, stats = self._ring(joined, rows, teacher, queued, temperature, ring_bias, alpha=alpha, **options)
        else:
            image_keys, text_keys, key_ids = self._gather_keys(joined, rows, newest, queued)
            result = focal_itc_loss(
                image, text, image_keys, text_keys, key_ids=key_ids, temperature=temperature, bias=bias, loss=self.loss,
                gamma=self.gamma,
                teacher_image=teacher_image, teacher_text=teacher_text, ids=ids, positives=self.positives,
                row_offset=joined.offset, impl=self.impl, alpha=0.0 if alpha is None else alpha, **options,
            )  # fmt: skip
            loss, stats = result if return_stats else (result, None)
        if joined.total != joined.rows * joined.world:
            scale = joined.rows * joined.world / joined.total
            loss = loss * scale
            if stats is not None:
                stats = FocalITCStats(*(average * scale for average in stats[:6]), *stats[6:])

        # Enqueue
        if updates_queue and own_queue:
            queue.enqueue(*newest)
        results = (loss, stats) if return_stats else (loss,)
        if not own_queue:
            results += (newest if updates_queue else None,)
        return results if len(results) > 1 else loss

    def _gather_keys(
        self, joined: JoinedBatch, rows: Features, newest: Features | None, queued: Features | None
    ) -> Features | tuple[None, None, None]:
        """Image keys, text keys and their ids; None of each if the keys are just this rank's batch."""
        if self.gather == "momentum":
            batch = newest
        elif joined.world == 1 and queued is None:
            return None, None, None
        else:
            ids = None if rows.ids is None else joined.gather(rows.ids) if newest is None else newest.ids
            batch = Features(joined.gather_with_grad(rows.image), joined.gather_with_grad(rows.text), ids)
        if queued is None:
            return batch
        key_ids = None if batch.ids is None else torch.cat([batch.ids, queued.ids])
        return Features(torch.cat([batch.image, queued.image]), torch.cat([batch.text, queued.text]), key_ids)

    def _ring(
        self, joined: JoinedBatch, rows: Features, teacher: Features | None, queued: Features | None,
        temperature: Tensor, bias: Tensor | None, *, alpha: Tensor | None, negative_range: tuple[int, int],
        return_stats: bool, seed: int | Tensor,
    ) -> tuple[Tensor, FocalITCStats | None]:  # fmt: skip
        """`focal_itc_loss` with keys that travel from rank to rank."""
        teachers = (None, None) if alpha is None else (teacher.image.detach(), teacher.text.detach())
        problem = Problem(
            rows.image, rows.text, None, None, temperature, bias, *teachers, rows.ids, None, alpha,
            check_seed(seed, rows.image, return_stats), self.gamma, self.positives == "any", joined.offset,
            *negative_range, self.impl,
        )  # fmt: skip
        loss, *figures = ring_rows(problem, queued, joined)
        return loss.mean(), statistics(*figures) if return_stats else None

    def _check(
        self, rows: Features, teacher_image: Tensor | None, teacher_text: Tensor | None, alpha: float | Tensor,
        queue: FeatureQueue | None,
    ) -> Tensor | None:  # fmt: skip
        """Checks what one rank can check by itself, before anything travels. Returns alpha as `check_teachers` does."""
        image, text, ids = rows
        check_tensor("image", image, ("B", "d" if queue is None else queue.width))
        check_tensor("text", text, tuple(image.shape), like=("image", image), same_dtype=True)
        alpha = check_teachers(image, teacher_image, teacher_text, alpha)
        if (teacher_image is None) != (teacher_text is None):
            missing, other = ("image", "text") if teacher_image is None else ("text", "image")
            raise ValueError(f"teacher_{missing}: expected a tensor along with teacher_{other}, got None")
        if teacher_image is None and self.gather == "momentum":
            raise ValueError("teacher_image: expected the teacher's features, the keys of gather='momentum', got None")
        if ids is not None:
            check_tensor("ids", ids, (len(image),), dtypes=(torch.int64,), like=("image", image))
        if queue is not None and queue.queue_ids.device != image.device:
            raise ValueError(f"image: expected device {queue.queue_ids.device}, as the queue, got {image.device}")
        return alpha

    def _join(self, rows: Features, teacher: Features | None, queue: FeatureQueue | None) -> JoinedBatch:
        """Exchanges the sizes of all ranks. If they do not fit together, every rank raises ValueError."""
        image, text, ids = rows
        if world_size(self.group) == 1:
            return JoinedBatch([len(image)])
        facts = {
            "rows": len(image),
            "width": image.shape[1],
            "bits of a feature": torch.finfo(image.dtype).bits,
            "ids": ids is not None,
            "teachers": teacher is not None,
            "gradient of image": image.requires_grad,
            "gradient of text": text.requires_grad,
            "gather": GATHERS.index(self.gather),
            "queue size": 0 if queue is None else queue.size,
            "training mode": self.training,
        }
        sizes, *others = exchange(list(map(int, facts.values())), self.group).T.tolist()
        for name, values in zip(list(facts)[1:], others, strict=True):
            if len(set(values)) > 1:
                raise ValueError(f"FocalITCLoss: expected the same on every rank, got {name} {values}")
        if min(sizes) == 0:
            raise ValueError(f"image: expected at least one row on every rank, got {sizes}")
        return JoinedBatch(sizes, self.group)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Also loads older state dicts, from before the queue was a module, whose names lack "queue."."""
        for name in _QUEUE_BUFFERS:
            buffer = state_dict.pop(prefix + name, None)
            if buffer is not None and self.queue is not None:
                state_dict[f"{prefix}queue.{name}"] = buffer
        super()._load_from_state_dict(state_dict, prefix, *args)

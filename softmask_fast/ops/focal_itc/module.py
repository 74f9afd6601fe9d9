"""FocalITCLoss: the loss as a module, with its queues and with the batches of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_fast.ops.checks import as_scalar, check_choice, check_gamma, check_integer, check_teachers, check_tensor
from softmask_fast.ops.collectives import JoinedBatch, exchange, world_size
from softmask_fast.ops.focal_itc import FocalITCStats, focal_itc_loss, statistics
from softmask_fast.ops.focal_itc.reference import Options
from softmask_fast.ops.focal_itc.ring import ring_rows

GATHERS = ("momentum", "with_grad", "ring")
NEGATIVES = ("keys", "batch", "rank")
_NO_IMAGE = torch.iinfo(torch.int64).min  # ids from here on, one for each place of the queue, belong to no image


class FocalITCLoss(nn.Module):
    """``focal_itc_loss`` against the joined batch of all ranks and queues of earlier features.

    The keys are the features of the joined batch (all ranks in rank order), then the queue. What travels between ranks:

    - ``gather="momentum"``: the momentum features of all ranks, without gradient (ALBEF, MoCo).
    - ``gather="with_grad"``: the features of all ranks with gradient; each rank compares its own rows with all columns,
      and the gradients of the columns are reduce-scattered to their owners (CLIP; open_clip's ``local_loss`` and
      ``gather_with_grad``).
    - ``gather="ring"``: the same result as "with_grad", but the features go around a ring of the ranks in blocks of
      one rank's batch, so that memory does not grow with the ranks.

    Scale: a rank's loss is the sum over its rows, times ranks / rows of the joined batch (with equally many rows on
    every rank: the mean over its rows). So the mean over the ranks is the loss of the joined batch; and where the
    gradients of the parameters are averaged over the ranks, as DistributedDataParallel and DeepSpeed do, they are those
    of the joined batch on one process. The averages in ``FocalITCStats`` have the same scale. Ranks may have different
    numbers of rows, but at least one each.

    Every rank holds the same queues. They are buffers, so ``state_dict`` has them; places not yet filled hold random
    directions. In training mode each forward pass puts the joined batch in place of the oldest entries.

    Args:
        width: d; needed with a queue.
        queue_size: entries of each queue.
        gamma, positives, impl: as for ``focal_itc_loss``.
        gather: see above.
        group: the ranks that share a batch; None: all.
        seed: of the queues' first content.
    """

    def __init__(
        self,
        width: int | None = None,
        queue_size: int = 0,
        *,
        gamma: float = 2.0,
        positives: str = "mean",
        gather: str = "momentum",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        impl: str | None = None,
    ):
        super().__init__()
        check_integer("queue_size", queue_size, 0, None)
        if width is not None or queue_size:
            check_integer("width", width, 1, None)
        check_choice("positives", positives, ("mean", "any"))
        check_choice("gather", gather, GATHERS)
        self.gamma, self.positives, self.gather = check_gamma(gamma), positives, gather
        self.group, self.impl = group, impl
        generator = torch.Generator().manual_seed(seed)
        for name in ("image_queue", "text_queue"):
            directions = torch.randn(queue_size, width or 0, generator=generator)
            self.register_buffer(name, F.normalize(directions, dim=-1))
        self.register_buffer("queue_ids", _NO_IMAGE + torch.arange(queue_size))
        self.register_buffer("queue_position", torch.zeros((), dtype=torch.int64))  # of the oldest entry

    def extra_repr(self) -> str:
        size, width = self.image_queue.shape
        return f"width={width}, queue_size={size}, gamma={self.gamma}, gather={self.gather!r}"

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        *,
        temperature: float | Tensor,
        teacher_image: Tensor | None = None,
        teacher_text: Tensor | None = None,
        alpha: float = 0.0,
        ids: Tensor | None = None,
        use_queue: bool = True,
        return_stats: bool = False,
        negatives: str = "keys",
        seed: int = 0,
    ) -> Tensor | tuple[Tensor, FocalITCStats]:
        """The loss of this rank's rows, a scalar; a collective where there are several ranks.

        Args:
            image, text: (B, d) unit vectors of this rank's pairs.
            temperature: as for ``focal_itc_loss``.
            teacher_image, teacher_text: (B, d) momentum features of the same pairs, constants. Needed for
                ``gather="momentum"``, whose keys they are, and where alpha > 0. They enter the queues; without them the
                features themselves do.
            alpha: weight in [0, 1] of the teacher's soft targets.
            ids: (B,) int64 identities of the images; all keys of a row's id are its positives. Without ids it is the
                row's own pair alone. Queued features keep their ids; those that came without are of no image.
            use_queue: whether the queued features are keys. New ones enter the queue in any case.
            return_stats: also return ``FocalITCStats``. A hard negative is the number of a key: a row of the joined
                batch, or their number + a place in the queue.
            negatives: where hard negatives come from: "keys" (all), "batch" (the joined batch), "rank" (this rank's).
            seed: of the hard negatives. With the same seed on all ranks they are those of the joined batch.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came. Where the ranks do not agree on
                sizes and options, or one has no rows: on every rank.
        """
        self._check(image, text, teacher_image, teacher_text, alpha, ids)
        check_choice("negatives", negatives, NEGATIVES)
        joined = self._join(image, text, teacher_image, ids)
        ring = self.gather == "ring" and joined.world > 1
        new = (image, text) if teacher_image is None else (teacher_image, teacher_text)
        if self.gather == "momentum" or self._enqueues:
            new = [joined.gather(features) for features in new]
        new_ids = None if ids is None or ring and not self._enqueues else joined.gather(ids)
        queue = None
        if use_queue and len(self.queue_ids):  # for a ring a copy, as its backward comes after the queue has moved on
            queue = [self.image_queue.to(image, copy=ring), self.text_queue.to(image, copy=ring)]
            queue.append(self.queue_ids.to(self.queue_ids, copy=ring))

        keys = joined.total + (0 if queue is None else len(queue[0]))
        ranges = {"keys": (0, keys), "batch": (0, joined.total), "rank": (joined.offset, joined.offset + joined.rows)}
        common = dict(alpha=alpha, negative_range=ranges[negatives], return_stats=return_stats, seed=seed)
        if ring:
            teachers = teacher_image, teacher_text
            loss, stats = self._ring(joined, image, text, temperature, teachers, ids, queue, **common)
        else:
            given = {}  # where the batch of this rank is all there is, it is its own keys
            if self.gather == "momentum" or joined.world > 1 or queue is not None:
                batch = new if self.gather == "momentum" else [joined.gather_with_grad(x) for x in (image, text)]
                key_ids = new_ids
                if queue is not None:
                    batch = [torch.cat(parts) for parts in zip(batch, queue[:2], strict=True)]
                    key_ids = None if ids is None else torch.cat([new_ids, queue[2]])
                given = dict(image_keys=batch[0], text_keys=batch[1], key_ids=key_ids)
            result = focal_itc_loss(
                image, text, **given, temperature=temperature, gamma=self.gamma, teacher_image=teacher_image,
                teacher_text=teacher_text, ids=ids, positives=self.positives, row_offset=joined.offset, impl=self.impl,
                **common,
            )  # fmt: skip
            loss, stats = result if return_stats else (result, None)
        if self._enqueues:
            self.enqueue(*new, new_ids)
        if joined.total != joined.rows * joined.world:
            share = joined.rows * joined.world / joined.total
            loss = loss * share
            if stats is not None:
                stats = FocalITCStats(*(average * share for average in stats[:6]), *stats[6:])
        return (loss, stats) if return_stats else loss

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, ids: Tensor | None = None) -> None:
        """Replaces the oldest entries by features (M, d) with these ids (M,), M of any size. The same on every rank."""
        size = len(self.queue_ids)
        newest = slice(max(len(image) - size, 0), None)
        slots = torch.arange(min(len(image), size), device=image.device)
        slots = (self.queue_position + slots) % size
        self.image_queue[slots] = image[newest].to(self.image_queue.dtype)
        self.text_queue[slots] = text[newest].to(self.text_queue.dtype)
        self.queue_ids[slots] = _NO_IMAGE + slots if ids is None else ids[newest]
        self.queue_position.copy_((self.queue_position + len(slots)) % size)

    @property
    def _enqueues(self) -> bool:
        return self.training and len(self.queue_ids) > 0

    def _check(self, image, text, teacher_image, teacher_text, alpha, ids) -> None:
        """All that one rank can see alone, before anything travels."""
        check_tensor("image", image, ("B", self.image_queue.shape[1] if len(self.queue_ids) else "d"))
        check_tensor("text", text, tuple(image.shape), like=("image", image), same_dtype=True)
        check_teachers(image, teacher_image, teacher_text, alpha)
        if (teacher_image is None) != (teacher_text is None):
            missing, other = ("image", "text") if teacher_image is None else ("text", "image")
            raise ValueError(f"teacher_{missing}: expected a tensor along with teacher_{other}, got None")
        if teacher_image is None and self.gather == "momentum":
            raise ValueError("teacher_image: expected the momentum features, the keys of gather='momentum', got None")
        if ids is not None:
            check_tensor("ids", ids, (len(image),), dtypes=(torch.int64,), like=("image", image))
        if len(self.queue_ids) and self.queue_ids.device != image.device:
            raise ValueError(f"image: expected device {self.queue_ids.device} as the queues, got {image.device}")

    def _join(self, image: Tensor, text: Tensor, teacher_image: Tensor | None, ids: Tensor | None) -> JoinedBatch:
        """The sizes of all ranks. Raises ValueError on all of them where they do not fit together."""
        if world_size(self.group) == 1:
            return JoinedBatch([len(image)])
        facts = {
            "rows": len(image),
            "width": image.shape[1],
            "bits of a feature": torch.finfo(image.dtype).bits,
            "ids": ids is not None,
            "teachers": teacher_image is not None,
            "gradient of image": image.requires_grad,
            "gradient of text": text.requires_grad,
            "gather": GATHERS.index(self.gather),
            "queue size": len(self.queue_ids),
            "training mode": self.training,
        }
        sizes, *others = exchange(list(map(int, facts.values())), self.group).T.tolist()
        for name, values in zip(list(facts)[1:], others, strict=True):
            if len(set(values)) > 1:
                raise ValueError(f"FocalITCLoss: expected the same on every rank, got {name} {values}")
        if min(sizes) == 0:
            raise ValueError(f"image: expected at least one row on every rank, got {sizes}")
        return JoinedBatch(sizes, self.group)

    def _ring(
        self, joined, image, text, temperature, teachers, ids, queue, *, alpha, negative_range, return_stats, seed
    ) -> tuple[Tensor, FocalITCStats | None]:
        """``focal_itc_loss`` with keys from a ring."""
        check_integer("seed", seed, -(2**63), 2**63 - 1)
        shared = self.gamma, float(alpha), self.positives == "any", joined.offset, return_stats, *negative_range, seed
        options = [Options(*shared, direction) for direction in range(2)]
        teachers = [teacher.detach() if alpha > 0 else None for teacher in teachers]
        temperature = as_scalar(temperature, image)
        results = ring_rows(image, text, temperature, teachers, ids, queue, joined, options, self.impl)
        loss = ((results[0].loss + results[1].loss) / 2).mean()
        return loss, statistics(*results) if return_stats else None

"""The joined batch of all ranks: its rows gathered, with gradient or without, fetched one by one, or sent in a ring.

Every function is a collective: all ranks of the group call it. Without `torch.distributed` there is one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_alone = False  # whether `one_rank` is on


@contextmanager
def one_rank() -> Iterator[None]:
    """Within it every group has one rank, this one, and nothing travels."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """The number of ranks in the group (None: the default one); 1 without `torch.distributed` and in `one_rank`."""
    return 1 if _alone or not dist.is_available() or not dist.is_initialized() else dist.get_world_size(group)


def exchange(values: Sequence[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Integers of this rank, as many on each -> those of all ranks, (ranks, values) int64 on the CPU.

    They stay on the host if the group takes CPU tensors ("gloo", "cpu:gloo,cuda:nccl"). With "nccl" alone they go
    through the GPU, and the host waits for it.
    """
    own = torch.tensor([values], dtype=torch.int64)
    if world_size(group) == 1:
        return own
    group = dist.group.WORLD if group is None else group
    if "cpu:" not in str(dist.get_backend_config(group)):
        own = own.to(torch.accelerator.current_accelerator())
    of_all = own.new_empty(world_size(group), len(values))
    dist.all_gather_into_tensor(of_all, own, group=group)
    return of_all.cpu()


class JoinedBatch:
    """The rows of all ranks in rank order: `sizes[r]` of rank r, starting at row `offsets[r]`.

    Ranks may hold different numbers of rows. What travels is padded to the largest.
    """

    def __init__(self, sizes: Sequence[int], group: dist.ProcessGroup | None = None) -> None:
        self.sizes, self.group, self.world = list(sizes), group, len(sizes)
        self.rank = dist.get_rank(group) if self.world > 1 else 0
        self.offsets = [sum(self.sizes[:rank]) for rank in range(self.world)]
        self.total, self.largest = sum(self.sizes), max(self.sizes)

    @property
    def rows(self) -> int:
        """Number of rows of this rank."""
        return self.sizes[self.rank]

    @property
    def offset(self) -> int:
        """First row of this rank."""
        return self.offsets[self.rank]

    def pad(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (largest, ...), contiguous, padded with zeros."""
        if len(x) == self.largest:
            return x.contiguous()
        return torch.cat([x, x.new_zeros(self.largest - len(x), *x.shape[1:])])

    def gather(self, x: Tensor) -> Tensor:
        """x (rows, ...) of every rank -> (total, ...), without gradient."""
        x = x.detach()
        if self.world == 1:
            return x
        padded = x.new_empty(self.world * self.largest, *x.shape[1:])
        dist.all_gather_into_tensor(padded, self.pad(x), group=self.group)
        if len(padded) == self.total:
            return padded
        return torch.cat([part[:size] for part, size in zip(padded.chunk(self.world), self.sizes, strict=True)])

    def gather_with_grad(self, x: Tensor) -> Tensor:
        """`gather` with gradient: its owner gets the sum of the gradients that all ranks have for a row."""
        return x if self.world == 1 else _Gather.apply(x, self)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """x (total, ...) -> this rank's rows (rows, ...), summed over the ranks in float32 or better."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        if self.world * self.largest > self.total:
            wide = torch.cat([self.pad(part) for part in wide.split(self.sizes)])
        own = wide.new_empty(self.largest, *wide.shape[1:])
        dist.reduce_scatter_tensor(own, wide, group=self.group)
        return own[: self.rows].to(x.dtype)

    def pass_on(self, block: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Starts sending a block to the next rank and receiving one of the same sizes from the previous rank.

        Returns a function that waits for both and returns the received block.
        """
        arriving = [torch.empty_like(part) for part in block]
        operations = []
        for operation, parts, peer in ((dist.isend, block, self.rank + 1), (dist.irecv, arriving, self.rank - 1)):
            for part in parts:
                operations.append(dist.P2POp(operation, part, group=self.group, group_peer=peer % self.world))
        works = dist.batch_isend_irecv(operations)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            block.clear()  # had to stay alive until it was sent
            return arriving

        return wait

    def ring(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """(rank, its block) for this rank, then around the ring all others; the next block travels in the meantime."""
        for step in range(self.world):
            last = step == self.world - 1
            wait = None if last else self.pass_on(list(block))
            yield (self.rank - step) % self.world, block
            if not last:
                block = wait()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: JoinedBatch) -> Tensor:
        ctx.joined = joined
        return joined.gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.joined.scatter_sum(grad), None


def index_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` for x (B, ...) and index (S,) int64 -> (S, ...), with the same gradient in every run.

    Rows that occur several times add up in the order of the index. The gradient of `x[index]` itself adds by atomics on
    a CPU with several threads, in any order.
    """
    if not x.requires_grad or x.ndim < 2:
        return x[index]
    return F.embedding(index, x.flatten(1)).unflatten(1, x.shape[1:])


def take_rows(x: Tensor, index: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows of the joined batch, fetched from the ranks that own them; their gradients go back there.

    Args:
        x: (B, ...), this rank's rows of the joined batch; B may differ from rank to rank.
        index: (S,) int64, rows of the joined batch that this rank needs; S may differ from rank to rank.
        group: the ranks that share a batch; None: all.

    Returns:
        (S, ...), the rows.

    Raises:
        ValueError: on every rank, if the size of a row differs between ranks or an index of any rank is out of range.
    """
    if world_size(group) == 1:
        return index_rows(x, index)
    sizes, lengths, counts = exchange([len(x), x[:1].numel(), len(index)], group).unbind(1)
    if len(set(lengths[sizes > 0].tolist())) > 1:
        raise ValueError(f"x: expected rows of one size on every rank, got {lengths.tolist()} elements per row")
    joined = JoinedBatch(sizes.tolist(), group)
    wanted = exchange(index.tolist() + [0] * (int(counts.max()) - len(index)), group)
    valid = torch.arange(wanted.shape[1]) < counts[:, None]  # the rest is padding
    if bool((valid & ((wanted < 0) | (wanted >= joined.total))).any()):
        raise ValueError(
            f"index: expected rows from 0 to {joined.total - 1} of the joined batch, "
            f"got {int(wanted[valid].min())} to {int(wanted[valid].max())}"
        )
    mine = valid & (wanted >= joined.offset) & (wanted < joined.offset + joined.rows)
    owner = torch.bucketize(wanted[joined.rank, : len(index)], torch.tensor(joined.offsets[1:]), right=True)
    arrival = torch.argsort(owner, stable=True).argsort()  # position of each wanted row among those that arrive
    rows = index_rows(x, (wanted[mine] - joined.offset).to(x.device))
    received = torch.bincount(owner, minlength=joined.world).tolist()
    return _AllToAll.apply(rows, mine.sum(1).tolist(), received, group)[arrival.to(x.device)]


class _AllToAll(torch.autograd.Function):
    """Sends `sent[r]` rows to rank r and receives `received[r]` from there; gradients take the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.arguments = received, sent, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, *ctx.arguments), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result

"""The joined batch of all ranks: its rows gathered, with gradient or without, fetched singly, or passed around a ring.

Every function here is a collective: all ranks of the group call it. Without ``torch.distributed`` there is one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """The number of ranks in the group (None: the default one); 1 where nothing is distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def exchange(values: Sequence[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Integers of every rank, equally many on each -> (ranks, values) int64 on the CPU.

    They stay on the host where the group takes CPU tensors ("gloo", "cpu:gloo,cuda:nccl"); with "nccl" alone they go
    through the GPU, for which the host then waits.
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
    """The rows of all ranks in rank order: ``sizes[r]`` of rank r, which begin at row ``offsets[r]``.

    Ranks may hold different numbers of rows. What travels is padded to the largest.
    """

    def __init__(self, sizes: Sequence[int], group: dist.ProcessGroup | None = None):
        self.sizes, self.group, self.world = list(sizes), group, len(sizes)
        self.rank = dist.get_rank(group) if self.world > 1 else 0
        self.offsets = [sum(self.sizes[:rank]) for rank in range(self.world)]
        self.total, self.largest = sum(self.sizes), max(self.sizes)

    @property
    def rows(self) -> int:
        """Rows of this rank."""
        return self.sizes[self.rank]

    @property
    def offset(self) -> int:
        """Where this rank's rows begin."""
        return self.offsets[self.rank]

    def pad(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (largest, ...), contiguous, the rest zeros."""
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
        """As ``gather``; the gradient of a row is the sum of what all ranks have for it, and goes to its owner."""
        return x if self.world == 1 else _Gather.apply(x, self)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """x (total, ...) -> the sum over the ranks of this rank's rows (rows, ...), in float32 or better."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        if self.world * self.largest > self.total:
            wide = torch.cat([self.pad(part) for part in wide.split(self.sizes)])
        own = wide.new_empty(self.largest, *wide.shape[1:])
        dist.reduce_scatter_tensor(own, wide, group=self.group)
        return own[: self.rows].to(x.dtype)

    def pass_on(self, block: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Starts to send a block to the next rank and to receive one of the same sizes from the rank before.

        Returns a function that waits for both and gives the received block.
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
            block.clear()  # was kept from being freed until it was sent
            return arriving

        return wait

    def ring(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """(rank, its block) for this rank and, around the ring, all others; the next one travels meanwhile."""
        for step in range(self.world):
            last = step == self.world - 1
            wait = None if last else self.pass_on(list(block))
            yield (self.rank - step) % self.world, block
            if not last:
                block = wait()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, joined: JoinedBatch) -> Tensor:
        ctx.joined = joined
        return joined.gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.joined.scatter_sum(grad), None


def take_rows(x: Tensor, index: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows of the joined batch, fetched from the ranks that own them; their gradients go back there.

    Args:
        x: (B, ...), this rank's rows of the joined batch; B may differ from rank to rank.
        index: (S,) int64, rows of the joined batch that this rank wants; S may differ from rank to rank.

    Returns:
        (S, ...)

    Raises:
        ValueError: on every rank, where rows have not the same size everywhere, or an index of any rank is no row of
            the joined batch.
    """
    if world_size(group) == 1:
        return x[index]
    sizes, lengths, counts = exchange([len(x), x[:1].numel(), len(index)], group).unbind(1)
    if len(set(lengths[sizes > 0].tolist())) > 1:
        raise ValueError(f"x: expected rows of one size on every rank, got {lengths.tolist()} numbers a row")
    joined = JoinedBatch(sizes.tolist(), group)
    wanted = exchange(index.tolist() + [0] * (int(counts.max()) - len(index)), group)
    asked = torch.arange(wanted.shape[1]) < counts[:, None]  # the rest is padding
    if bool((asked & ((wanted < 0) | (wanted >= joined.total))).any()):
        raise ValueError(
            f"index: expected rows from 0 to {joined.total - 1} of the joined batch, "
            f"got {int(wanted[asked].min())} to {int(wanted[asked].max())}"
        )
    mine = asked & (wanted >= joined.offset) & (wanted < joined.offset + joined.rows)
    owner = torch.bucketize(wanted[joined.rank, : len(index)], torch.tensor(joined.offsets[1:]), right=True)
    arrival = torch.argsort(owner, stable=True).argsort()  # where each wanted row comes among those that arrive
    rows = x[(wanted[mine] - joined.offset).to(x.device)]
    received = torch.bincount(owner, minlength=joined.world).tolist()
    return _AllToAll.apply(rows, mine.sum(1).tolist(), received, group)[arrival.to(x.device)]


class _AllToAll(torch.autograd.Function):
    """``sent[r]`` rows go to rank r, ``received[r]`` come from there; gradients take the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group) -> Tensor:
        ctx.arguments = received, sent, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _all_to_all(grad, *ctx.arguments), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result

"""Samplers: the order in which a rank visits the samples. It depends only on the seed, the epoch and the data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from softmask_fast.data.seeding import hash_names, keyed_generator, splitmix64, visiting_order

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment: spreads consecutive numbers

Piece = list[tuple[int, int, int]]  # ranges of consecutive samples: shard, first, end


class HashSampler:
    """Permutes the whole source by a hash of each key and deals the samples to the ranks one by one.

    Attributes:
        fingerprint: changes when the order does.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._hashes = hash_names(keys)
        self.fingerprint = _fingerprint(self._hashes)

    def indices(self, seed: int, epoch: int, rank: int, world_size: int, start: int = 0) -> Iterator[int]:
        """The samples that a rank visits in an epoch, from its `start`-th visit on.

        Every rank visits `len(range(rank, n, world_size))` of the n samples.
        """
        order = visiting_order(self._hashes, seed, epoch)[rank::world_size]
        return map(int, order[start:])

    def reshard(self, positions: Sequence[tuple[int, int]], rank: int, world_size: int) -> tuple[int, int, int]:
        """Where a rank continues after a run with another number of ranks.

        No sample is left out. None is repeated if all ranks had visited equally many.

        Args:
            positions: (epoch, visits in it) at which each rank of the previous run stopped, in rank order.
            rank: This rank of the new run.
            world_size: Ranks of the new run.

        Returns:
            The epoch, this rank's position in it, and about how many samples of it all ranks together visit twice.
        """
        total, before = len(self._hashes), len(positions)
        ahead = [
            (epoch, position * before + r) if position * before + r < total else (epoch + 1, r)
            for r, (epoch, position) in enumerate(positions)
        ]
        epoch, first = min(ahead)  # all samples before this one have been visited by some rank
        visited = [
            position if e == epoch else len(range(r, total, before)) if e > epoch else 0
            for r, (e, position) in enumerate(positions)
        ]
        return epoch, max(0, -(-(first - rank) // world_size)), sum(visited) - first


class WindowedSampler:
    """Shuffles whole shards, deals them to the ranks, and mixes their samples within a sliding window.

    The shuffled shards are taken in rounds of one shard per rank. A round is cut into one piece per rank, so that all
    ranks visit equally many samples in every epoch; neighboring ranks share shards of unequal size. A sample of a
    rank's k-th piece is visited at "time" k + window * u, where u in [0, 1) is a hash of (seed, epoch, shard, number in
    it). So at any time a rank reads from window + 1 pieces, and needs one more piece for each that it has finished.

    It needs only the names and sample counts of the shards, and memory for one window.

    Attributes:
        fingerprint: changes when the order does.
    """

    def __init__(
        self, names: Sequence[str], counts: Sequence[int], window: int, *, ahead: int = 0,
        announce: Callable[[list[int]], None] = lambda shards: None,
    ) -> None:  # fmt: skip
        """Prepares an order.

        Args:
            names: Of the shards.
            counts: Samples in each shard.
            window: Pieces that a rank mixes.
            ahead: Pieces to announce before they are read.
            announce: Called with the shards that a rank needs now and for the next `ahead` pieces.
        """
        self._hashes = hash_names(names)
        self._counts = np.asarray(counts, np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self._window, self._ahead, self._announce = window, ahead, announce
        self.fingerprint = _fingerprint(self._hashes, self._counts, np.array([window]))

    def indices(self, seed: int, epoch: int, rank: int, world_size: int, start: int = 0) -> Iterator[int]:
        """Like `HashSampler.indices`."""
        pieces = self._pieces(seed, epoch, rank, world_size)
        n_pieces = len(pieces)
        # also those of the next epoch, to announce them in time
        upcoming = pieces + self._pieces(seed, epoch + 1, rank, world_size)[: self._ahead + 1]
        salt = keyed_generator(seed, epoch, "window").integers(0, 2**64, dtype=np.uint64)
        waiting, times = np.empty(0, np.int64), np.empty(0)
        announced = 0  # pieces; if the start is skipped, the whole window is announced at once
        for step in range(n_pieces):
            shards, numbers = _samples(pieces[step])
            waiting = np.concatenate([waiting, self._starts[shards] + numbers])
            spread = splitmix64((self._hashes[shards] + numbers.astype(np.uint64) * _GOLDEN) ^ salt)
            times = np.concatenate([times, step + self._window * ((spread >> np.uint64(11)) * 2.0**-53)])
            due = times < step + 1 if step < n_pieces - 1 else np.ones(len(times), bool)
            now = waiting[due][np.argsort(times[due], kind="stable")]
            waiting, times = waiting[~due], times[~due]
            if start >= len(now):
                start -= len(now)
                continue
            first = max(announced, step - self._window)
            announced = step + 1 + self._ahead
            self._announce(list(dict.fromkeys(shard for piece in upcoming[first:announced] for shard, _, _ in piece)))
            yield from map(int, now[start:])
            start = 0

    def reshard(self, positions: Sequence[tuple[int, int]], rank: int, world_size: int) -> tuple[int, int, int]:
        """Like `HashSampler.reshard`, but approximate, as the pieces depend on the number of ranks.

        Continues where the slowest rank was in the epoch. About as many samples are repeated as are left out.
        """
        epoch = min(epoch for epoch, _ in positions)
        position = min(position for e, position in positions if e == epoch) * len(positions) // world_size
        return epoch, position, position * world_size

    def _pieces(self, seed: int, epoch: int, rank: int, world_size: int) -> list[Piece]:
        """This rank's piece of each round."""
        shards = visiting_order(self._hashes, seed, epoch)
        ends = np.cumsum(self._counts[shards])
        ranks = np.arange(rank + 1)
        pieces = []
        for first in range(0, len(shards), world_size):
            last = min(first + world_size, len(shards)) - 1
            begin, end = ends[first] - self._counts[shards[first]], ends[last]
            # as many as the numbers p in [begin, end) with p % world_size == rank: equal over the whole epoch
            sizes = _multiples(end - ranks, world_size) - _multiples(begin - ranks, world_size)
            low, high = begin + sizes[:-1].sum(), begin + sizes.sum()
            piece = []
            for i in range(first, last + 1):
                offset = ends[i] - self._counts[shards[i]]
                inside = max(low, offset) - offset, min(high, ends[i]) - offset
                if inside[0] < inside[1]:
                    piece.append((int(shards[i]), int(inside[0]), int(inside[1])))
            pieces.append(piece)
        return pieces


def local_ranks() -> int:
    """The number of ranks of this job on this machine."""
    # torchrun sets the first, DeepSpeed's launcher the second
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _multiples(below: np.ndarray, divisor: int) -> np.ndarray:
    """The number of 0, divisor, 2 * divisor, ... that are smaller than `below`."""
    return np.maximum(0, -(-below // divisor))


def _samples(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    """The shard of every sample of a piece, and its number in that shard: two int64 arrays."""
    shards = np.concatenate([np.empty(0, np.int64), *(np.full(end - first, shard) for shard, first, end in piece)])
    numbers = np.concatenate([np.empty(0, np.int64), *(np.arange(first, end) for _, first, end in piece)])
    return shards, numbers


def _fingerprint(*arrays: np.ndarray) -> str:
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays), digest_size=8).hexdigest()

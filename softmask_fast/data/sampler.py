"""In which order a rank visits the samples: a function of the seed, the epoch and the data, never of a state."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from softmask_fast.data.seeding import hash_names, keyed_generator, splitmix64, visiting_order

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment: neighbouring numbers end far apart


class Order(Protocol):
    """Which samples a rank visits in an epoch. Every rank has `len(range(rank, n, world_size))` of the n samples."""

    fingerprint: str  # differs when the order does

    def indices(self, seed: int, epoch: int, rank: int, world_size: int, start: int = 0) -> Iterator[int]:
        """Indices of the samples, from the rank's `start`-th visit of the epoch on."""
        ...

    def reshard(self, places: Sequence[tuple[int, int]], rank: int, world_size: int) -> tuple[int, int, int]:
        """Where a rank goes on after a run of len(places) ranks that stopped, in rank order, at these (epoch,
        position): epoch, position, and about how many samples of the epoch all ranks together will visit twice."""
        ...


class HashSampler:
    """A permutation of the whole source by a hash of each key, dealt to the ranks one by one."""

    def __init__(self, keys: Sequence[str]):
        self._hashes = hash_names(keys)
        self.fingerprint = _fingerprint(self._hashes)

    def indices(self, seed: int, epoch: int, rank: int, world_size: int, start: int = 0) -> Iterator[int]:
        order = visiting_order(self._hashes, seed, epoch)[rank::world_size]
        return map(int, order[start:])

    def reshard(self, places: Sequence[tuple[int, int]], rank: int, world_size: int) -> tuple[int, int, int]:
        """Nothing is left out; nothing comes twice where all ranks had visited equally many."""
        total, before = len(self._hashes), len(places)
        ahead = [
            (epoch, position * before + r) if position * before + r < total else (epoch + 1, r)
            for r, (epoch, position) in enumerate(places)
        ]
        epoch, first = min(ahead)  # all samples in front of this one were visited, by whichever rank
        visited = [
            position if e == epoch else len(range(r, total, before)) if e > epoch else 0
            for r, (e, position) in enumerate(places)
        ]
        return epoch, max(0, -(-(first - rank) // world_size)), sum(visited) - first


class WindowedSampler:
    """An order that reads shards as wholes: they are shuffled, dealt to the ranks, and mixed within a sliding window.

    The shuffled shards are taken in rounds, one shard per rank; a round is cut into pieces, one per rank, such that all
    ranks have equally much in every epoch (shards of unequal size are shared by neighbouring ranks). A sample of a
    rank's k-th piece is visited at "time" k + window * u, u in [0, 1) by a hash of (seed, epoch, shard, number in it).
    So at any time a rank reads from window + 1 pieces, and needs one more piece for each that it has finished.

    Only the shards' names and their numbers of samples are needed, and memory for one window.
    """

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[int],
        window: int,
        *,
        ahead: int = 0,
        announce: Callable[[list[int]], None] = lambda shards: None,
    ):
        """names, counts: of the shards; announce: called with the shards of the `ahead` pieces that come next."""
        self._hashes = hash_names(names)
        self._counts = np.asarray(counts, np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self._window, self._ahead, self._announce = window, ahead, announce
        self.fingerprint = _fingerprint(self._hashes, self._counts, np.array([window]))

    def indices(self, seed: int, epoch: int, rank: int, world_size: int, start: int = 0) -> Iterator[int]:
        pieces = self._pieces(seed, epoch, rank, world_size)
        n_pieces = len(pieces)
        # read ahead over the end of the epoch
        upcoming = pieces + self._pieces(seed, epoch + 1, rank, world_size)[: self._ahead + 1]
        salt = keyed_generator(seed, epoch, "window").integers(0, 2**64, dtype=np.uint64)
        waiting, times = np.empty(0, np.int64), np.empty(0)
        announced = 0  # pieces; behind a skip the whole window is yet to be read
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

    def reshard(self, places: Sequence[tuple[int, int]], rank: int, world_size: int) -> tuple[int, int, int]:
        """The pieces are cut for a number of ranks, so another number goes on as far in the epoch as the slowest rank
        was, and meets about as many samples again as it leaves out."""
        epoch = min(epoch for epoch, _ in places)
        position = min(position for e, position in places if e == epoch) * len(places) // world_size
        return epoch, position, position * world_size

    def _pieces(self, seed: int, epoch: int, rank: int, world_size: int) -> list[list[tuple[int, int, int]]]:
        """Of each round this rank's piece, as (shard, first, end) of consecutive samples."""
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
            for place in range(first, last + 1):
                offset = ends[place] - self._counts[shards[place]]
                inside = max(low, offset) - offset, min(high, ends[place]) - offset
                if inside[0] < inside[1]:
                    piece.append((int(shards[place]), int(inside[0]), int(inside[1])))
            pieces.append(piece)
        return pieces


def local_ranks() -> int:
    """How many ranks of this job run on this machine."""
    # torchrun sets the first name, the DeepSpeed launcher the second
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _multiples(below: np.ndarray, divisor: int) -> np.ndarray:
    """How many of 0, divisor, 2 * divisor, ... are smaller."""
    return np.maximum(0, -(-below // divisor))


def _samples(piece: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Shard and number in it of every sample of a piece, two int64 arrays."""
    shards = np.concatenate([np.empty(0, np.int64), *(np.full(end - first, shard) for shard, first, end in piece)])
    numbers = np.concatenate([np.empty(0, np.int64), *(np.arange(first, end) for _, first, end in piece)])
    return shards, numbers


def _fingerprint(*arrays: np.ndarray) -> str:
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays), digest_size=8).hexdigest()

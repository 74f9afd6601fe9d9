"""Samplers: every sample once, equally many per rank, shards as wholes, determined by names and counts alone."""

import numpy as np
import pytest

from softmask_fast.data.sampler import HashSampler, WindowedSampler

COUNTS = [7, 12, 1, 10, 10, 0, 25, 10, 9, 10, 11, 3]
NAMES = [f"s-{i}" for i in range(len(COUNTS))]
TOTAL = sum(COUNTS)
SHARD = np.repeat(np.arange(len(COUNTS)), COUNTS)


def indices(rank=0, world_size=1, *, seed=3, epoch=0, start=0, window=3, **options):
    return list(WindowedSampler(NAMES, COUNTS, window, **options).indices(seed, epoch, rank, world_size, start))


@pytest.mark.parametrize("world_size", [1, 2, 5, 12, 30])
@pytest.mark.parametrize("window", [1, 3, 50])
def test_every_sample_once_and_equal_shares(world_size, window):
    ranks = [indices(rank, world_size, window=window) for rank in range(world_size)]
    assert sorted(index for rank in ranks for index in rank) == list(range(TOTAL))
    assert [len(rank) for rank in ranks] == [len(range(rank, TOTAL, world_size)) for rank in range(world_size)]


@pytest.mark.parametrize("start", [1, 20, 41, 53])
def test_starting_late_gives_the_same_rest(start):
    assert indices(1, 2, start=start) == indices(1, 2)[start:]
    keyed = HashSampler([str(i) for i in range(TOTAL)])
    assert list(keyed.indices(3, 0, 1, 2, start)) == list(keyed.indices(3, 0, 1, 2))[start:]


def test_seed_epoch_and_window_change_the_order():
    assert indices() == indices()
    for other in ({"seed": 4}, {"epoch": 1}, {"window": 2}):
        assert indices(**other) != indices()
    prints = {WindowedSampler(NAMES, COUNTS, window).fingerprint for window in (1, 2)}
    assert len(prints) == 2 and WindowedSampler(NAMES, COUNTS[::-1], 1).fingerprint not in prints


def test_shards_come_and_go_within_the_window():
    """With equal shards, a rank has at most window + 1 of them begun and not finished."""
    order = WindowedSampler([f"s-{i}" for i in range(40)], [50] * 40, window=4)
    for rank in range(2):
        shards = np.array(list(order.indices(0, 0, rank, 2))) // 50
        first = {shard: int(np.argmax(shards == shard)) for shard in set(shards)}
        last = {shard: len(shards) - 1 - int(np.argmax(shards[::-1] == shard)) for shard in set(shards)}
        assert len(first) == 20
        active = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(shards))]
        assert 4 <= max(active) <= 5
        assert np.mean(shards[1:] == shards[:-1]) < 0.5  # and they are mixed


def test_shards_are_announced_before_they_are_read_once_an_epoch():
    announced = []
    order = WindowedSampler(NAMES, COUNTS, 2, ahead=2, announce=announced.append)
    for index in order.indices(0, 0, 0, 1):
        assert SHARD[index] in [shard for shards in announced for shard in shards]
    everything = [shard for shards in announced for shard in shards]
    assert len(announced[0]) >= 2  # the piece that is read, and those behind it
    of_next_epoch = len(everything) - sum(count > 0 for count in COUNTS)
    assert 1 <= of_next_epoch <= 3
    announced.clear()
    rest = list(order.indices(0, 0, 0, 1, 60))
    assert {SHARD[i] for i in rest} <= {shard for shards in announced for shard in shards}
    assert sum(count > 0 for count in COUNTS) > len({SHARD[i] for i in rest})

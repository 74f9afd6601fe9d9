"""The loader: bad samples cost nothing but themselves, order and pixels depend on names alone, resume is exact."""

import json
import logging
import math
import threading

import numpy as np
import pytest
import torch
from sample_files import BAD, GOOD, SHAPES
from shard_files import encode, write_shard
from small_loaders import TOKENIZER, loader, same

from softmask_fast.data import preparing
from softmask_fast.data.augment import AugmentConfig
from softmask_fast.data.loader import BadDataError
from softmask_fast.data.pixels import evaluation_pixels
from softmask_fast.data.seeding import hash_names, image_ids, visiting_order
from softmask_fast.data.sources import open_source
from softmask_fast.data.synthetic import ShapesSource
from softmask_fast.data.types import BadSample, Batch, Sample


def visits(batches: list[Batch]) -> list[tuple]:
    """(key, pixels, caption ids, masked ids, word index, masked positions) of every sample, without padding."""
    found = []
    for batch in batches:
        length = batch.input_ids.shape[1]
        for row, key in enumerate(batch.keys):
            n = int(batch.attention_mask[row].sum())
            positions = batch.mlm_positions[batch.mlm_positions // length == row] % length
            tokens = [tuple(ids[row, :n].tolist()) for ids in (batch.input_ids, batch.masked_ids)]
            pixels = batch.pixels[row].cpu().numpy().tobytes()
            found.append((key, pixels, *tokens, int(batch.word_index[row]), tuple(positions.tolist())))
    return found


def take(n: int, **options) -> list[tuple]:
    with loader(**options) as batches:
        return visits([next(batches) for _ in range(n)])


def test_a_batch_is_what_it_says(device):
    with loader(device=device) as batches:
        batch = next(batches)
    tokens = batch.attention_mask.sum(dim=1)
    assert batch.pixels.shape == (8, 3, 16, 16) and batch.pixels.dtype == torch.float32
    assert all(value.device.type == device.type for value in vars(batch).values() if isinstance(value, torch.Tensor))
    assert batch.token_count == int(batch.attention_mask.sum())
    assert batch.input_ids.shape == batch.masked_ids.shape == batch.attention_mask.shape == (8, int(tokens.max()))
    assert (batch.input_ids[:, 0] == TOKENIZER.cls_token_id).all()
    assert (batch.input_ids[torch.arange(8), tokens - 1] == TOKENIZER.sep_token_id).all()
    assert (batch.input_ids[~batch.attention_mask] == TOKENIZER.pad_token_id).all()
    restored = batch.masked_ids.clone()
    restored.view(-1)[batch.mlm_positions] = batch.mlm_labels
    assert torch.equal(restored, batch.input_ids)
    assert batch.mlm_positions.div(restored.shape[1], rounding_mode="floor").unique().numel() == 8
    assert ((batch.word_index > 0) & (batch.word_index < tokens - 1)).all()
    for row, key in enumerate(batch.keys):
        index = SHAPES.keys.index(key)
        assert batch.ids[row] == SHAPES.image_ids[index]
        text = TOKENIZER.decode(batch.input_ids[row], skip_special_tokens=True)
        assert text in SHAPES.read(index).captions


def test_without_augmentation_the_pixels_are_those_of_evaluation(device):
    with loader(augment=AugmentConfig.none(), device=device) as batches:
        batch = next(batches)
    images = [SHAPES.read(SHAPES.keys.index(key)).image for key in batch.keys]
    assert torch.equal(batch.pixels, evaluation_pixels(images, 16, device=device, impl="dali"))


def test_a_sample_does_not_depend_on_the_batch_the_ranks_or_the_threads():
    reference = take(10)
    assert take(5, batch_size=16, num_threads=1) == reference
    ranks = [take(5, batch_size=8, rank=rank, world_size=2) for rank in range(2)]
    first_epoch = [visit for pair in zip(*ranks, strict=True) for visit in pair][:40]
    assert first_epoch == reference[:40]


def test_two_ranks_share_every_epoch():
    ranks = [[visit[0] for visit in take(10, batch_size=5, rank=rank, world_size=2)] for rank in range(2)]
    for epoch in range(2):
        halves = [set(keys[20 * epoch : 20 * epoch + 20]) for keys in ranks]
        assert len(halves[0]) == len(halves[1]) == 20 and halves[0] | halves[1] == set(SHAPES.keys)


def test_order_and_augmentation_differ_by_epoch_and_seed():
    two_epochs, other = take(10), take(5, seed=4)
    first, second = two_epochs[:40], two_epochs[40:]
    for one, another in [(first, second), (first, other)]:
        keys = [[visit[0] for visit in part] for part in (one, another)]
        assert keys[0] != keys[1] and set(keys[0]) == set(keys[1])
        pixels = [{visit[0]: visit[1] for visit in part} for part in (one, another)]
        assert sum(pixels[0][key] == pixels[1][key] for key in pixels[0]) == 0
        assert sum(visit[2] in [v[2] for v in another if v[0] == visit[0]] for visit in one) < 25  # captions are drawn
    assert take(5) == first


def test_no_class_order_survives():
    hashes = hash_names(f"class-{i // 1000}/{i}" for i in range(10_000))
    orders = [visiting_order(hashes, seed=0, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(10_000))
        classes = order // 1000
        assert np.mean(classes[1:] == classes[:-1]) == pytest.approx(0.1, abs=0.02)
        assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
        assert max(np.bincount(classes[:1000], minlength=10)) < 140
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.05


def test_order_of_the_others_stays_when_one_is_left_out():
    hashes = hash_names(map(str, range(500)))
    kept = np.delete(np.arange(500), [3, 77, 400])
    order = visiting_order(hashes, 5, 2)
    assert (kept[visiting_order(hashes[kept], 5, 2)] == order[np.isin(order, kept)]).all()


@pytest.mark.parametrize("steps", [0, 2, 5, 7])
def test_resume_is_bit_identical(steps):
    """7 batches of 7 out of 40: the epoch ends within a batch."""
    with loader(batch_size=7) as batches:
        for _ in range(steps):
            next(batches)
        state = json.loads(json.dumps(batches.state_dict()))
        epoch = batches.epoch
        expected = [next(batches) for _ in range(4)]
        end = batches.state_dict()
    with loader(batch_size=7) as batches:
        next(batches)
        batches.load_state_dict(state)
        assert batches.epoch == epoch
        assert all(same(next(batches), batch) for batch in expected)
        assert batches.state_dict() == end


def test_a_state_of_other_data_is_refused():
    with loader() as batches:
        next(batches)
        state = batches.state_dict()
    for other in (loader(seed=4), loader(ShapesSource(num=41, image_size=24))):
        with other, pytest.raises(ValueError, match="state: expected .* got a state saved with"):
            other.load_state_dict(state)
    with (
        loader(world_size=2) as batches,
        pytest.raises(ValueError, match="expected world_size 2, got a state saved with 1"),
    ):
        batches.load_state_dict(state)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_another_number_of_ranks_shares_what_is_left_of_the_epoch(before, after):
    def continued(states: list[dict], batch_size: int, n: int) -> list[list[str]]:
        found = []
        for rank in range(after):
            with loader(rank=rank, world_size=after, batch_size=batch_size) as batches:
                batches.load_state_dict(batches.redistributed(states))
                found.append([visit[0] for visit in visits([next(batches) for _ in range(n)])])
        return found

    reference = [visit[0] for visit in take(10)]
    states = []
    for rank in range(before):
        with loader(rank=rank, world_size=before, batch_size=6 // before) as batches:
            for _ in range(8):  # 48 samples: in the second epoch of 40
                next(batches)
            states.append(batches.state_dict())
    if before in (1, 2):  # 40 is a multiple: the ranks crossed the epochs together
        rows = continued(states, 6 // after, 4)
        assert sorted(key for row in rows for key in row) == sorted(reference[48:72])
    second = [key for row in continued(states, 1, -(-34 // after)) for key in row]
    assert set(second) | set(reference[40:48]) == set(SHAPES.keys), "something was left out"


def test_ranks_that_were_apart_go_on_behind_the_slowest(caplog):
    reference = [visit[0] for visit in take(5)]
    states = []
    for rank, batches_done in enumerate((1, 3)):
        with loader(rank=rank, world_size=2, batch_size=4) as batches:
            for _ in range(batches_done):
                next(batches)
            states.append(batches.state_dict() | {"truncated_captions": 5, "bad": {f"bad-{rank}": "why"}})
    with loader() as batches, caplog.at_level(logging.WARNING):
        batches.load_state_dict(state := batches.redistributed(states))
        assert "about 8 of 40" in caplog.text and "for 2 ranks, this run has 1" in caplog.text
        assert state["truncated_captions"] == 10 and state["bad"] == {"bad-0": "why", "bad-1": "why"}
        assert [visit[0] for visit in visits([next(batches)])] == reference[8:16]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """200 samples, 12 of them bad in different ways."""
    folder = tmp_path_factory.mktemp("shards")
    names = list(GOOD)
    mixed = {}
    for number, (name, files) in enumerate(BAD.items()):
        for good in names[number * 15 : number * 15 + 15]:
            mixed[good] = GOOD[good]
        mixed[name] = files
    mixed |= {name: GOOD[name] for name in names[180:]}
    shards = list(mixed)
    for part in range(2):
        write_shard(folder / f"s-{part}.tar", {name: mixed[name] for name in shards[part::2]})
    return open_source(f"{folder}/s-{{0..1}}.tar")


SMALL = {"max_pixels": 100 * 100, "batch_size": 10}


def test_bad_samples_are_skipped_counted_and_named(damaged, caplog):
    with loader(damaged, max_bad_fraction=0.1, **SMALL) as batches, caplog.at_level(logging.WARNING):
        two_epochs = visits([next(batches) for _ in range(38)])
    bad_keys = {key for key in damaged.keys if key.split("/")[1] in BAD}
    assert len(bad_keys) == 12 and set(batches.bad) == bad_keys
    for key in bad_keys:
        assert caplog.text.count(f"skipped {key}: ") == 1 and len(batches.bad[key]) > 10
    assert [visit[0] for visit in two_epochs[:188]] == [
        damaged.keys[i] for i in visiting_order(hash_names(damaged.keys), 3, 0) if damaged.keys[i] not in bad_keys
    ]
    assert set(visit[0] for visit in two_epochs[188:376]) == set(damaged.keys) - bad_keys


def test_other_samples_are_the_same_without_the_bad_ones(damaged, tmp_path):
    for part in range(2):
        good = [key.split("/")[1] for key in damaged.keys if key.startswith(f"s-{part}/")]
        write_shard(tmp_path / f"s-{part}.tar", {name: GOOD[name] for name in good if name in GOOD})
    clean = open_source(f"{tmp_path}/s-{{0..1}}.tar")
    assert len(clean) == 188
    with loader(clean, **SMALL) as first, loader(damaged, max_bad_fraction=0.1, **SMALL) as second:
        expected = visits([next(first) for _ in range(18)])
        got = visits([next(second) for _ in range(18)])
    assert got == expected


def test_too_many_bad_samples_stop_and_ten_are_named(damaged):
    with loader(damaged, **SMALL) as batches:
        with pytest.raises(BadDataError) as error:
            for _ in range(100):
                next(batches)
        assert "more than 2 of 200" in str(error.value)
        named = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]]
        assert len(set(named)) == 10 and {key.split("/")[1] for key in named} <= set(BAD)
        with pytest.raises(BadDataError):
            next(batches)


def test_resume_with_bad_samples_is_bit_identical(damaged):
    options = {"max_bad_fraction": 0.1, **SMALL}
    with loader(damaged, **options) as batches:
        for _ in range(9):
            next(batches)
        state = batches.state_dict()
        expected = [next(batches) for _ in range(12)]
        end = batches.state_dict()
    with loader(damaged, **options) as batches:
        batches.load_state_dict(state)
        assert all(same(next(batches), batch) for batch in expected)
        assert batches.state_dict() == end and list(batches.bad) == list(end["bad"])


class ListSource:
    """Samples given in Python."""

    encoded = False

    def __init__(self, captions: list[list[str]], images=None, skipped=0):
        self.captions, self.skipped = captions, skipped
        self.images = images or [SHAPES.read(i).image for i in range(len(captions))]
        self.encoded = isinstance(self.images[0], bytes)
        self.keys = [f"sample-{i}" for i in range(len(captions))]
        self.image_ids = image_ids(self.keys)
        self.reads = 0

    def __len__(self):
        return len(self.keys)

    def read(self, index):
        self.reads += 1
        if not self.captions[index]:
            raise BadSample("nothing here")
        return Sample(self.keys[index], self.images[index], self.captions[index], skipped_captions=self.skipped)


def test_over_long_captions_are_cut_and_counted():
    source = ListSource(
        [["a red circle " * 30], ["a red circle"], ["a red circle left of a large ring"], ["a"]], skipped=2
    )
    with loader(source, batch_size=4, max_tokens=14) as batches:
        batch = next(batches)
        assert (batches.truncated_captions, batches.skipped_captions) == (1, 8)
        next(batches)
        assert batches.state_dict()["truncated_captions"] == batches.truncated_captions == 2
    assert batch.input_ids.shape == (4, 14)
    long = batch.input_ids[batch.keys.index("sample-0")]
    assert long[0] == TOKENIZER.cls_token_id and long[-1] == TOKENIZER.sep_token_id
    assert (batch.input_ids == TOKENIZER.sep_token_id).sum() == 4


def test_nothing_but_bad_samples_ends():
    with loader(ListSource([[]] * 5), max_bad_fraction=1.0) as batches, pytest.raises(BadDataError, match="no sample"):
        next(batches)


def test_what_dali_alone_refuses_is_a_bad_sample(monkeypatch):
    """Passes an undecodable file by PIL, as if PIL had decoded it."""
    images = [encode(SHAPES.read(i).image) for i in range(12)]
    broken = images[:5] + [b"\xff\xd8\xff" + b"no jpeg" * 9] + images[6:]
    check = preparing.check_image
    monkeypatch.setattr(
        preparing, "check_image", lambda image, limit: check(images[5] if image == broken[5] else image, limit)
    )
    captions = [SHAPES.read(i).captions for i in range(12)]
    with loader(ListSource(captions, images), batch_size=4) as batches:
        expected = visits([next(batches) for _ in range(3)])
    with loader(ListSource(captions, broken), batch_size=4, max_bad_fraction=0.5) as batches:
        got = visits([next(batches) for _ in range(4)])
        assert list(batches.bad) == ["sample-5"] and "DALI" in batches.bad["sample-5"]
    assert got[:11] == [visit for visit in expected if visit[0] != "sample-5"]


def test_an_image_is_decoded_for_checking_once(monkeypatch):
    counted = []
    check = preparing.check_image
    monkeypatch.setattr(preparing, "check_image", lambda image, limit: counted.append(1) or check(image, limit))
    with loader() as batches:
        for _ in range(10):
            next(batches)
        assert len(SHAPES) <= len(counted) < 2 * len(SHAPES)  # more: those visited again while on their way
        counted.clear()
        for _ in range(10):
            next(batches)
    assert not counted


def test_closing_ends_all_threads():
    before = threading.active_count()
    batches = loader()
    next(batches)
    assert threading.active_count() > before
    batches.close()
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@pytest.mark.parametrize("wrong", [
    {"batch_size": 0}, {"max_tokens": 2}, {"rank": 2, "world_size": 2}, {"world_size": 41}, {"max_bad_fraction": 1.5},
])  # fmt: skip
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        loader(**wrong)


def test_epochs_are_counted():
    with loader(batch_size=9, world_size=2) as batches:
        assert batches.epoch == 0
        for _ in range(5):
            next(batches)
        assert math.isclose(batches.epoch, 45 / 20)

"""Shapes: what the captions say is what is drawn, boxes are exact, validation shares no content with training."""

import numpy as np
import pytest

from softmask_fast.data.sources import open_source
from softmask_fast.data.synthetic import COLORS, OUTLINES, SIZES, ShapesSource, relation
from softmask_fast.errors import UsageError

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def test_a_scene_depends_on_its_names_alone():
    first, more = ShapesSource(num=4, seed=1), ShapesSource(num=400, seed=1)
    for i in range(4):
        assert (first.read(i).image == more.read(i).image).all() and first.read(i).captions == more.read(i).captions
    assert first.read(0).captions != first.read(1).captions
    assert first.read(0).captions != ShapesSource(num=4, seed=2).read(0).captions
    assert (ShapesSource(num=4, seed=1, image_size=96).scene(0)) == first.scene(0)


@pytest.mark.parametrize("objects", ["2", "3"])
def test_boxes_hold_exactly_what_the_phrase_names(objects):
    source = open_source(f"shapes:num=40,objects={objects}", image_size=128)
    for i in range(len(source)):
        sample = source.read(i)
        assert sample.image.shape == (128, 128, 3) and sample.image.dtype == np.uint8
        for phrase in sample.phrases:
            assert phrase.caption in sample.captions
            words = phrase.caption.split()[phrase.first_word : phrase.first_word + phrase.n_words]
            assert " ".join(words) == phrase.text
            _, _, color, _ = words
            # noise adds up to 15 to each channel
            near = (np.abs(sample.image.astype(int) - COLORS[color] - 7) <= 10).all(axis=2)
            (x1, y1, x2, y2), size = phrase.boxes[0], sample.image.shape[0]
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
            if len({thing.color for thing in source.scene(i)}) < int(objects):
                continue  # another object has the same color
            rows, columns = np.nonzero(near)
            # the tips of a star are thinner than a pixel
            assert abs(rows.min() - y1 * size) <= 3 and abs(rows.max() + 1 - y2 * size) <= 3
            assert abs(columns.min() - x1 * size) <= 3 and abs(columns.max() + 1 - x2 * size) <= 3


def test_captions_tell_the_relation_that_is_drawn():
    source = ShapesSource(num=60)
    for i in range(60):
        first, second = source.scene(i)
        said = relation(first, second)
        assert source.read(i).captions[0] == f"a {first.name} {said} a {second.name}"
        assert source.read(i).captions[1] == f"a {second.name} {INVERSE[said]} a {first.name}"
        x, y = first.x - second.x, first.y - second.y
        assert {"left of": -x, "right of": x, "above": -y, "below": y}[said] >= 1.5 * min(abs(x), abs(y))
        apart = max(abs(x), abs(y))
        assert apart > SIZES[first.size] + SIZES[second.size]  # no overlap
        assert len(set(source.read(i).captions)) == 4


def test_validation_has_other_contents_than_training():
    def contents(split):
        source = ShapesSource(num=1500, split=split)
        return {frozenset(source.read(i).captions[:2]) for i in range(1500)}

    train, val = contents("train"), contents("val")
    assert len(train & val) == 0 and len(train) > 1200 and len(val) > 1200


def test_unseen_scenes_are_told_apart_and_varied():
    source = ShapesSource(split="val")
    scenes = [source.scene(i) for i in range(256)]
    captions = [f"{a.name} {relation(a, b)} {b.name}" for a, b in scenes]
    assert len(set(captions)) >= 250
    for values, attribute in [(SIZES, "size"), (COLORS, "color"), (OUTLINES, "shape")]:
        counts = [sum(getattr(thing, attribute) == value for scene in scenes for thing in scene) for value in values]
        assert min(counts) > 0.4 * 512 / len(values)
    inside = [any(x1 <= 0.5 <= x2 and y1 <= 0.5 <= y2 for x1, y1, x2, y2 in [thing.box]) for s in scenes for thing in s]
    assert np.mean(inside) < 0.15  # pointing at the centre finds little


def test_options_and_their_errors():
    assert len(open_source("shapes")) == 65_536
    assert len(open_source("shapes", split="val")) == 4096
    source = open_source("shapes:num=30,objects=2-3")
    assert {len(source.scene(i)) for i in range(30)} == {2, 3}
    assert len(set(source.keys)) == len(set(source.image_ids.tolist())) == 30
    for option in ("colors=4", "colours=4", "colors=4,names=color", "colours=4,names=colour"):
        source = open_source(f"shapes:num=30,{option}")
        assert (source.colors, source.names) == (4, "color" if "names" in option else "full")
    for options in ("shapes:nmu=3", "shapes:num=many", "shapes:num=0", "shapes:objects=4", "shapes:objects=3-2"):
        with pytest.raises(UsageError, match="shapes"):
            open_source(options)
    with pytest.raises(UsageError, match="image_size"):
        ShapesSource(image_size=8)
    with pytest.raises(IndexError, match="outside"):
        source.read(30)

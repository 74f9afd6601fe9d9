"""Augmentation: drawn arguments follow the settings and their definitions; what is off draws nothing."""

import math

import numpy as np
import pytest

from softmask_fast.data import augment
from softmask_fast.data.augment import GEOMETRIC, NEUTRAL, AugmentConfig, draw_parameters
from softmask_fast.data.seeding import keyed_generator
from softmask_fast.errors import UsageError

SIZE = 32


def test_drawn_arguments_follow_the_settings():
    drawn = [draw_parameters(AugmentConfig(), keyed_generator(1, i), 300, 200, SIZE) for i in range(600)]
    for values in drawn:
        assert values.keys() == NEUTRAL.keys()
        assert all(values[name].dtype == NEUTRAL[name].dtype for name in NEUTRAL)
        height, width = (values["roi_end"] - values["roi_start"]) * (200, 300)
        assert (values["roi_start"] >= 0).all() and (values["roi_end"] <= 1 + 1e-6).all()
        assert 0.2 - 1e-4 <= height * width / 60_000 <= 1 and 3 / 4 - 1e-4 <= width / height <= 4 / 3 + 1e-4
        assert 0 <= values["blur"] <= 2 * SIZE / 256
    assert 0.4 < np.mean([values["mirror"] for values in drawn]) < 0.6
    assert 0.4 < np.mean([values["blur"] > 0 for values in drawn]) < 0.6
    changed = {name: np.mean([(v[name] != NEUTRAL[name]).any() for v in drawn]) for name in NEUTRAL}
    # 2 of 11 operations; five of them share the matrix
    assert changed["equalize"] == pytest.approx(1 - (10 / 11) ** 2, abs=0.05)
    assert changed["matrix"] == pytest.approx(1 - (6 / 11) ** 2, abs=0.06)
    assert changed["saturation"] == pytest.approx(0.8, abs=0.05)


def test_the_same_seed_draws_what_it_always_drew():
    generator = keyed_generator(3, 1, "c")
    values = draw_parameters(AugmentConfig(), generator, 300, 200, 64)
    expected = NEUTRAL | {
        "roi_start": [0.04172929, 0.22271417], "roi_end": [0.85920763, 0.92574382],
        "matrix": [[1, 0.21, -6.72], [0, 1, 0]], "equalize": True, "blur": 0.49603087,
        "brightness": 0.71113074, "contrast": 1.25103104, "saturation": 0.83229476,
    }  # fmt: skip
    for name, value in values.items():
        assert value == pytest.approx(np.asarray(expected[name]), rel=1e-6), name
    assert generator.random() == pytest.approx(0.7546328743329432)


def test_what_is_switched_off_is_not_in_the_graph():
    assert AugmentConfig.none().arguments() == frozenset()
    assert AugmentConfig(crop=False, rand_augment=False, color=False, blur=False).arguments() == {"mirror"}
    assert AugmentConfig().arguments() == NEUTRAL.keys()
    off = draw_parameters(AugmentConfig.none(), keyed_generator(0), 30, 20, SIZE)
    assert all((off[name] == NEUTRAL[name]).all() for name in NEUTRAL)


def test_a_crop_that_never_fits_is_the_largest_central_one():
    config = AugmentConfig(crop_scale=1.0, rand_augment=False, color=False, blur=False, flip=False)
    values = draw_parameters(config, keyed_generator(0), 1000, 10, SIZE)
    width = (values["roi_end"] - values["roi_start"])[1] * 1000
    assert width == pytest.approx(10 * 4 / 3, rel=1e-3)
    assert values["roi_start"][1] + values["roi_end"][1] == pytest.approx(1)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_move_pixels_as_named(name, monkeypatch):
    monkeypatch.setattr(augment, "RAND_AUGMENT_OPS", (name,))
    monkeypatch.setattr(augment, "RAND_AUGMENT_N", 1)
    config = AugmentConfig(crop=False, flip=False, color=False, blur=False)
    matrix = draw_parameters(config, keyed_generator(0), SIZE, SIZE, SIZE)["matrix"]
    a, s, c = 0.3 * 0.7, 0.1 * 0.7 * SIZE, math.cos(math.radians(21))
    center = SIZE / 2
    expected = {"shear_x": [[1, a, -a * center], [0, 1, 0]], "shear_y": [[1, 0, 0], [a, 1, -a * center]],
                "translate_x": [[1, 0, s], [0, 1, 0]], "translate_y": [[1, 0, 0], [0, 1, s]]}  # fmt: skip
    if name == "rotate":
        assert matrix[0, 0] == matrix[1, 1] == pytest.approx(c, rel=1e-5) and matrix[0, 1] == -matrix[1, 0] != 0
        assert matrix[:, :2] @ [center, center] + matrix[:, 2] == pytest.approx([center, center], rel=1e-5)
    else:
        signs = [np.array(expected[name]), 2 * np.eye(2, 3) - expected[name]]
        assert any(np.allclose(matrix, sign, atol=1e-4) for sign in signs)


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_wrong_settings_are_named(scale):
    with pytest.raises(UsageError, match="crop_scale"):
        AugmentConfig(crop_scale=scale)

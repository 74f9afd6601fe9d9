"""Warm-ups in steps and as shares of the run, and what a run that is too short for them says."""

import pytest

from softmask_fast.training.options import make_config
from softmask_fast.training.schedule import Schedule


def schedule(steps, preset="tiny", **options):
    return Schedule.of(make_config(preset, **options), steps, steps_per_epoch=50)


def test_a_share_of_the_run_is_so_many_steps():
    shares = dict(warmup_steps=0.1, queue_warmup_steps=0.4, distill_ramp_steps=0.8)
    counts = dict(warmup_steps=20, queue_warmup_steps=80, distill_ramp_steps=160)
    share, count = schedule(200, **shares), schedule(200, **counts)
    for step in range(200):
        assert share.learning_rate(step) == count.learning_rate(step)
        assert share.settings(step, 0, 0) == count.settings(step, 0, 0)
    assert share.learning_rate(19) == 1e-3 > share.learning_rate(20 + 90)
    assert [share.settings(step, 0, 0).use_queue for step in (79, 80)] == [False, True]
    assert share.alpha(160) == 0.4 == 2 * share.alpha(80)


def test_the_soft_targets_come_in_over_an_epoch_by_default():
    assert schedule(200, distill_ramp_steps=None).alpha(25) == pytest.approx(0.2)


def test_a_run_says_which_warm_ups_it_does_not_get_through():
    assert schedule(10).unfinished() is None is schedule(1000).unfinished()
    steps = dict(warmup_steps=100, queue_warmup_steps=101, distill_ramp_steps=None)
    assert schedule(100, **steps).unfinished() == (
        "the run ends at step 100, inside a warm-up: warmup_steps is 100, queue_warmup_steps is 101 "
        "(0.1: a tenth of the run)"
    )
    assert "distill_ramp_steps is 50" in schedule(40, **steps).unfinished()
    without = dict(warmup_steps=0, queue_size=0, distill_alpha=0.0)
    assert schedule(40, queue_warmup_steps=90, **without).unfinished() is None


def test_what_sets_in_on_the_way_has_its_step():
    options = dict(queue_warmup_steps=0.25, distill_ramp_steps=0.5)
    assert schedule(200, **options).events() == {"queue enters": 50, "soft targets at full weight": 100}
    hard = dict(hard_negatives=True, hard_negatives_start=0.4, queue_size=0, distill_alpha=0.0)
    assert schedule(200, **options | hard).events() == {"negatives turn hard": 80}
    assert schedule(200, **options | hard | {"hard_negatives": False}).events() == {}
    assert schedule(10, queue_warmup_steps=10, distill_ramp_steps=0).events() == {}

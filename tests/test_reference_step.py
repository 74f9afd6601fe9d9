"""The fast pretraining step against the reference step: every loss and gradient, in fp32, by the tolerance policy.

The truth is the reference step in float64, "PyTorch's error" that of the reference step in fp32.
"""

import copy
import itertools

import pytest
import torch
from compare import assert_as_accurate
from small_steps import make_batch, make_model

from softmask_fast.config import ObjectiveConfig
from softmask_fast.model.momentum import StepSettings
from softmask_fast.model.pretraining import PretrainingStep, draw_any_other
from softmask_fast.model.pretraining_reference import ReferenceStep, draw, update_teacher


def in_float64(model, teacher, batch):
    wide = copy.deepcopy(batch)
    wide.pixels = batch.pixels.double()
    return copy.deepcopy(model).double(), copy.deepcopy(teacher).double(), wide


def run(step, *arguments):
    """The losses by name and the gradients by parameter."""
    loss, metrics = step(*arguments)
    parameters = dict(step.model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    losses = {name: metrics[name] for name in ("itc", "itm", "mlm")} | {"loss": loss.detach()}
    return losses | dict(zip(parameters, gradients, strict=True))


def run_fast(model, teacher, batch, objectives, settings):
    """The fast step's results, and the negatives it drew: (images, texts)."""
    step, drawn = PretrainingStep(model, objectives), []
    step.itc.register_forward_hook(lambda module, inputs, output: drawn.append(output[1]))
    results = run(step, batch, copy.deepcopy(teacher), settings)
    [stats] = drawn
    return results, (stats.text_hard_negative, stats.image_hard_negative)


SETTINGS = list(itertools.product((True, False), (0.0, 2.0), (True, False), (0.0, 0.4), (True, False)))


@pytest.mark.parametrize("soft_mask, gamma, masked_captions, alpha, use_queue", SETTINGS)
def test_the_fast_step_is_the_reference_step(soft_mask, gamma, masked_captions, alpha, use_queue):
    objectives = ObjectiveConfig(
        soft_mask=soft_mask, focal_gamma=gamma, masked_captions=masked_captions, itm_weight=0.7, mlm_weight=1.3
    )
    model, teacher = make_model(gamma)
    batch = make_batch()
    settings = StepSettings(alpha, 11, use_queue)
    fast, negatives = run_fast(model, teacher, batch, objectives, settings)
    wide_model, wide_teacher, wide_batch = in_float64(model, teacher, batch)

    def reference(model, teacher, batch):
        return run(ReferenceStep(model, objectives), batch, teacher, settings, negatives)

    truth = reference(wide_model, wide_teacher, wide_batch)
    baseline = reference(model, copy.deepcopy(teacher), batch)
    assert_same_step(fast, baseline, truth)


@pytest.mark.parametrize("hard_negatives", [True, False])
def test_the_demo_is_the_reference_step_too(hard_negatives):
    """Soft-masked negatives, a contrast on layers of its own, matching through the words."""
    objectives = ObjectiveConfig(soft_masked_negatives=True, hard_negatives=hard_negatives)
    branch = dict(text_layers=2, vision_contrast_blocks=1, text_contrast_layers=1, contrast_pooling="mean")
    model, teacher = make_model(match_through_words=True, **branch)
    batch, settings = make_batch(), StepSettings(0.4, 11)
    fast, negatives = run_fast(model, teacher, batch, objectives, settings)
    if not hard_negatives:
        generator = torch.Generator().manual_seed(settings.seed)
        other_text, other_image = (draw_any_other(batch.ids, generator) for _ in range(2))
        negatives = other_image, other_text
    wide_model, wide_teacher, wide_batch = in_float64(model, teacher, batch)
    reference = ReferenceStep(wide_model, objectives), ReferenceStep(model, objectives)
    truth = run(reference[0], wide_batch, wide_teacher, settings, negatives)
    baseline = run(reference[1], batch, copy.deepcopy(teacher), settings, negatives)
    assert_same_step(fast, baseline, truth)


def assert_same_step(results, baseline, truth):
    for name, expected in truth.items():
        assert (results[name] is None) == (expected is None), name
        if expected is None:
            continue
        assert_as_accurate(results[name], baseline[name], expected, torch.float32, name)


def test_it_draws_other_pairs_in_proportion_to_their_probability():
    logits = torch.tensor([[9.0, 1.0, 0.0, -1.0, 5.0]] * 4).repeat(500, 1)
    positive = torch.zeros(2000, 5)
    positive[:, 0] = 1
    drawn = draw(logits, positive)
    fraction = torch.bincount(drawn, minlength=5)[:5] / 2000
    weight = logits[0].softmax(0) + 1e-4
    weight[0] = 0
    torch.testing.assert_close(fraction, weight / weight.sum(), rtol=0, atol=0.04)


def test_both_averages_move_alike():
    model, teacher = make_model()
    other = copy.deepcopy(teacher)
    before = teacher.model.match_head.weight.clone()
    teacher.update(model.named_parameters())
    update_teacher(other, model)
    assert not torch.equal(before, teacher.model.match_head.weight)
    for ours, theirs in zip(teacher.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)

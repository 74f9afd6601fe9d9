"""The momentum copy and its checkpoints; the queue is tested in test_focal_itc_module.py."""

import pytest
import torch
import torch.nn.functional as F

from softmask_fast.config import ObjectiveConfig
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.state import load_own_state, own_state
from softmask_fast.model.vision_language import VisionLanguageModel, clamped
from softmask_fast.training.options import make_config


@pytest.fixture
def model():
    torch.manual_seed(2)
    return VisionLanguageModel(make_config("tiny", vocab_size=50, image_size=32, hidden_dropout=0.1).model)


def test_update_is_the_exponential_moving_average(model):
    teacher = MomentumTeacher(model, ObjectiveConfig(queue_size=0, momentum=0.9))
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        teacher.update((name, weight.detach()) for name, weight in model.named_parameters())
        expected = {name: 0.9 * expected[name] + 0.1 * weight for name, weight in model.named_parameters()}
    for name, average in teacher.model.named_parameters():
        torch.testing.assert_close(average, expected[name])
        assert not average.requires_grad


def test_update_refuses_a_part_of_the_weights(model):
    teacher = MomentumTeacher(model, ObjectiveConfig(queue_size=0, momentum=0.9))
    with pytest.raises(ValueError, match="log_temperature"):
        teacher.update((n, w.detach()) for n, w in model.named_parameters() if n != "log_temperature")


def test_the_copy_never_trains(model):
    teacher = MomentumTeacher(model, ObjectiveConfig(queue_size=0, momentum=0.9)).train()
    assert not any(module.training for module in teacher.model.modules())


def test_unfilled_queue_entries_belong_to_no_image(model):
    queue = MomentumTeacher(model, ObjectiveConfig(queue_size=6)).queue
    assert (queue.queue_ids < 0).all() and len(set(queue.queue_ids.tolist())) == 6
    torch.testing.assert_close(queue.text_queue.norm(dim=-1), torch.ones(6))


def test_the_queue_is_in_the_state_that_checkpoints_keep(model):
    first, second = (MomentumTeacher(model, ObjectiveConfig(queue_size=6), seed) for seed in range(2))
    new = F.normalize(torch.randn(2, 4, model.config.embed_dim), dim=-1)
    first.queue.enqueue(*new, torch.arange(4))
    load_own_state(second, own_state(first))
    assert torch.equal(second.queue.image_queue[:4], new[0]) and int(second.queue.queue_position) == 4
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


@pytest.mark.parametrize("queue_size", [0, 6])
def test_checkpoints_from_before_the_queue_was_a_module_load(model, queue_size):
    """They name its buffers "contrast.image_queue" and so on, also if it is empty."""
    first, second = (MomentumTeacher(model, ObjectiveConfig(queue_size=queue_size), seed) for seed in range(2))
    old = {name.replace("queue.", "contrast.", 1): tensor for name, tensor in own_state(first).items()}
    names = {"contrast.image_queue", "contrast.text_queue", "contrast.queue_ids", "contrast.queue_position"}
    assert {name for name in old if not name.startswith("model.")} == names
    load_own_state(second, old)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


@pytest.mark.parametrize(
    "value, gradient, passed",
    [(0.3, 1.0, 1.0), (-0.1, 1.0, 0.0), (-0.1, -1.0, -1.0), (1.2, -1.0, 0.0), (1.2, 1.0, 1.0)],
)
def test_clamped_parameter_can_come_back_but_not_leave(value, gradient, passed):
    parameter = torch.tensor(value, requires_grad=True)
    inside = clamped(parameter, 0.0, 1.0)
    torch.testing.assert_close(inside.item(), min(1.0, max(0.0, value)))
    inside.backward(torch.tensor(gradient))
    assert parameter.grad.item() == passed

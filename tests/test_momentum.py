"""The momentum copy and its queues."""

import pytest
import torch
import torch.nn.functional as F

from softmask_fast.config import make_config
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.vision_language import VisionLanguageModel, clamped


@pytest.fixture
def model():
    torch.manual_seed(2)
    return VisionLanguageModel(make_config("tiny", vocab_size=50, image_size=32, hidden_dropout=0.1).model)


def test_update_is_the_exponential_moving_average(model):
    teacher = MomentumTeacher(model, queue_size=0, momentum=0.9)
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
    teacher = MomentumTeacher(model, queue_size=0, momentum=0.9)
    with pytest.raises(ValueError, match="log_temperature"):
        teacher.update((n, w.detach()) for n, w in model.named_parameters() if n != "log_temperature")


def test_the_copy_never_trains(model):
    teacher = MomentumTeacher(model, queue_size=0, momentum=0.9).train()
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [5, 8, 1, 7], [20], [2, 25, 4]])
def test_queue_holds_the_newest_features_whatever_the_batch_sizes(model, sizes):
    teacher = MomentumTeacher(model, queue_size=8, momentum=0.9)
    width = model.config.embed_dim
    images, texts, ids = torch.empty(0, width), torch.empty(0, width), torch.empty(0, dtype=torch.int64)
    for size in sizes:
        new = F.normalize(torch.randn(2, size, width), dim=-1)
        new_ids = torch.randint(0, 1000, (size,))
        teacher.enqueue(*new, new_ids)
        images, texts, ids = torch.cat([images, new[0]]), torch.cat([texts, new[1]]), torch.cat([ids, new_ids])
    assert sum(sizes) >= 8
    for queue, seen in ((teacher.image_queue, images), (teacher.text_queue, texts), (teacher.queue_ids, ids)):
        order = (int(teacher.queue_position) + torch.arange(8)) % 8
        if max(sizes) <= 8:
            assert torch.equal(queue[order], seen[-8:])
        assert sorted(map(str, queue.tolist())) == sorted(map(str, seen[-8:].tolist()))


def test_unfilled_queue_entries_belong_to_no_image(model):
    teacher = MomentumTeacher(model, queue_size=6, momentum=0.9)
    assert (teacher.queue_ids < 0).all() and len(set(teacher.queue_ids.tolist())) == 6
    torch.testing.assert_close(teacher.text_queue.norm(dim=-1), torch.ones(6))


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

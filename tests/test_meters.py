"""The meters of a training step: they count and time it, and change nothing of it."""

import copy
from dataclasses import replace

import pytest
import torch
from small_models import small_model, small_tokenizer
from small_steps import make_batch, make_model
from torch.utils.flop_counter import FlopCounterMode

from softmask_fast.config import ObjectiveConfig
from softmask_fast.model.momentum import MomentumCopy, StepSettings
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.tasks.base import TaskStep
from softmask_fast.tasks.datasets import TaskBatch
from softmask_fast.tasks.entailment import EntailmentModel
from softmask_fast.tasks.nlvr2 import NLVR2Model
from softmask_fast.tasks.vqa import VQAModel
from softmask_fast.training import meters, step_times
from softmask_fast.training.meters import FlopCount, matmul_rate
from softmask_fast.training.step_times import BEFORE, STEPS, StepTimes

CPU = torch.device("cpu")
SETTINGS = StepSettings(0.4, 11)


def counted_by_pytorch(step, teacher, batch) -> int:
    """The operations of a real step; PyTorch's counter lacks formulas for ours and for the CPU's attention."""
    formulas = {}
    for operator, formula in meters.other_formulas().items():
        formula._get_raw = True
        formulas[operator] = formula
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        loss, _ = step(batch, teacher, SETTINGS)
        loss.backward()
    return counter.get_total_flops()


def count(step, teacher, batch) -> int:
    """Counted with the modules on the CPU, as they are before DeepSpeed takes them."""
    flops = FlopCount(step.cpu(), teacher, batch.pixels.device)
    flops.note(batch, SETTINGS)
    flops.count()
    first = flops.operations
    flops.note(None)
    flops.count()
    assert flops.operations == first
    return first


def on_device(batch, device):
    return replace(batch, **{n: x.to(device) for n, x in vars(batch).items() if isinstance(x, torch.Tensor)})


def pretraining(checkpointing: bool = False, dropout: float = 0.1):
    model, teacher = make_model(hidden_dropout=dropout)
    for network in (model, teacher.model):
        network.set_execution(checkpointing=checkpointing)
    return PretrainingStep(model, ObjectiveConfig(), bf16=True), teacher


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_of_a_real_step(device, checkpointing):
    step, teacher = pretraining(checkpointing)
    teacher.to(device)
    batch = on_device(make_batch(), device)
    batch.attention_mask = torch.ones_like(batch.attention_mask)
    assert count(step, teacher, batch) == counted_by_pytorch(step.to(device), teacher, batch)
    batch = on_device(make_batch(), device)  # captions that the step draws count as padded ones, as a GPU computes them
    batch.token_count = int(batch.attention_mask.sum())
    assert 1 <= count(step, teacher, batch) / counted_by_pytorch(step.to(device), teacher, batch) < 1.1


@pytest.mark.parametrize(
    "kind, targets",
    [
        (EntailmentModel, [0, 1, 2]),
        (VQAModel, [[("red", 1.0)], [("a blue circle", 0.5), ("red", 0.5)], [("blue", 1.0)]]),
        (NLVR2Model, [0, 1, 1]),
    ],
)
def test_operations_of_fine_tuning_are_those_of_a_real_step(kind, targets):
    tokenizer = small_tokenizer()
    base = small_model(tokenizer, hidden_dropout=0.1)
    model = kind(base, tokenizer, ["red", "blue"]) if kind is VQAModel else kind(base, tokenizer)
    step, teacher = TaskStep(model), MomentumCopy(model, 0.99)
    pixels = torch.randn(3 * kind.images_per_example, 3, 32, 32)
    ids = torch.randint(5, len(tokenizer), (3, 7))
    mask = torch.arange(7) < torch.tensor([7, 4, 6])[:, None]
    batch = TaskBatch(pixels, ids * mask, mask, targets, ["a", "b", "c"], int(mask.sum()))
    assert count(step, teacher, batch) == counted_by_pytorch(step, teacher, batch)


def test_counting_changes_nothing():
    step, teacher = pretraining()
    batch, before = make_batch(), copy.deepcopy((step, teacher))
    random = torch.get_rng_state()
    assert count(step, teacher, batch) > 1e6
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(batch.pixels, make_batch().pixels)
    for module, old in zip((step, teacher), before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(*(m.state_dict().values() for m in (module, old)), strict=True))
        assert all(parameter.grad is None for parameter in module.parameters())


def test_the_product_rate_leaves_random_numbers_alone():
    random = torch.get_rng_state()
    assert matmul_rate(CPU, torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), random)


class Machine:
    """A host's clock, and a GPU that works off what it is given; both count milliseconds."""

    def __init__(self, monkeypatch):
        self.now = self.free = 0.0  # when the GPU is done with all of its work
        machine = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(machine.now, machine.free) + 5.0  # its clock shows another time

            def query(self):
                return machine.now >= self.at - 5.0

            def elapsed_time(self, other):
                return other.at - self.at

        monkeypatch.setattr(step_times.time, "perf_counter", lambda: self.now / 1000)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def wait(self):
        self.now = max(self.now, self.free)

    def host(self, milliseconds):
        self.now += milliseconds

    def launch(self, milliseconds):
        self.free = max(self.now, self.free) + milliseconds


def run_steps(times, step, steps=BEFORE + STEPS + 3):
    texts = []
    for _ in range(steps):
        times.begin()
        step()
        texts.append(times.finish())
    return [(number, text) for number, text in enumerate(texts, 1) if text]


def gpu_step(machine, times, data, host, gpu, waits):
    """A step whose host takes `data` and `host` milliseconds; its GPU gets two halves of the work."""

    def step():
        machine.host(data)
        times.end("data")
        for _ in range(2):
            machine.host(host / 2)
            machine.launch(gpu / 2)
            times.end("forward and backward")
        if waits:
            machine.wait()
        times.end("waiting for the GPU")

    return step


@pytest.mark.parametrize("data, host, gpu, waits, expected", [
    (10, 100, 20, False, "(110 ms, 10 steps): data 9%, forward and backward 91%; the GPU has work queued for 18% of a "
                         "step and waits up to 82% for its host"),
    (150, 50, 20, False, "data 75%, forward and backward 25%; the GPU has work queued for 10% of a step and waits up "
                         "to 70% for data and up to 20% for its host"),
    (1, 10, 200, True, "the GPU has work queued for 97% of a step, so it limits the run"),
    (1, 10, 200, False, "the GPU has work queued for 100% of a step, so it limits the run"),
])  # fmt: skip
def test_the_text_names_what_holds_a_run_back(monkeypatch, data, host, gpu, waits, expected):
    machine = Machine(monkeypatch)
    times = StepTimes(torch.device("cuda"))
    ((number, text),) = run_steps(times, gpu_step(machine, times, data, host, gpu, waits), 400)
    assert expected in text, text
    assert number >= BEFORE + STEPS and (gpu > host or number == BEFORE + STEPS + 1)


def test_on_a_cpu_parts_are_told_and_slow_data_named(monkeypatch):
    machine = Machine(monkeypatch)
    times = StepTimes(CPU)

    def step(data):
        machine.host(7)  # of no part
        times.begin()
        for part, milliseconds in (("data", data), ("forward and backward", 80), ("optimizer", 10)):
            machine.host(milliseconds)
            times.end(part)

    ((number, text),) = run_steps(times, lambda: step(10))
    assert number == BEFORE + STEPS
    assert text == "where a step's time goes (100 ms, 10 steps): data 10%, forward and backward 80%, optimizer 10%"
    times = StepTimes(CPU)
    ((_, text),) = run_steps(times, lambda: step(30))
    assert text.endswith("; the data limit the run")

"""The two ways to move the weights, on one rank: they agree, read each other's checkpoints, and take no NaN."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from softmask_fast.config import TrainConfig
from softmask_fast.model.momentum import MomentumCopy, StepSettings
from softmask_fast.training.deepspeed_engine import create_engine
from softmask_fast.training.step_times import StepTimes
from softmask_fast.training.updates import DirectUpdates, EngineUpdates, FiniteWatch

MICRO_STEPS = 2
pytestmark = pytest.mark.usefixtures("one_rank")


@dataclass
class Rows:
    values: torch.Tensor
    keys: list[str] = field(default_factory=lambda: ["a row"])


class Regression(nn.Module):
    """A step with matrices, vectors and a weight that has no gradient; large gradients, so that they are clipped."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 1))
        self.model.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))

    def forward(self, rows, teacher, settings):
        error = self.model(rows.values) - teacher.model(rows.values).sin() - 3
        loss = error.pow(2).mean() * 10
        return loss, {"loss": loss.detach()}


class Run:
    """A small training."""

    def __init__(self, stage, path):
        self.train = TrainConfig(gradient_accumulation_steps=MICRO_STEPS, gradient_clipping=0.5, batch_size=4)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": MICRO_STEPS,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": stage},
        }
        step = Regression()
        self.teacher, self.watch, self.done = MomentumCopy(step.model, 0.9), FiniteWatch(), 0
        self.engine = create_engine(step, config, self.train)
        assert DirectUpdates.refusal(config) is None
        times = StepTimes(torch.device("cpu"))
        if path == "direct":
            self.updates = DirectUpdates(self.engine, self.teacher, self.watch, times)
        else:
            self.updates = EngineUpdates(self.engine, self.teacher, self.watch, times)

    def step(self, poisoned=False):
        rate = 1e-2 / (1 + self.done)
        for micro_step in range(MICRO_STEPS):
            seed = 10 * self.done + micro_step
            values = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
            if poisoned and micro_step == 0:
                values[0] = torch.nan
            self.updates.step(Rows(values), StepSettings(0.0, seed), self.done + 1, rate)
        self.done += 1

    def save(self, folder):
        self.updates.before_saving()
        self.engine.save_checkpoint(str(folder), tag="saved", save_latest=False)
        return copy.deepcopy(self.teacher.state_dict()), self.done

    def load(self, folder, saved):
        self.engine.load_checkpoint(str(folder), tag="saved")
        self.updates.after_loading()
        self.teacher.load_state_dict(saved[0])
        self.done = saved[1]

    def weights(self):
        networks = {"model": self.engine.module.model, "teacher": self.teacher.model}
        return {f"{of}.{n}": w.detach().clone() for of, m in networks.items() for n, w in m.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_paths_agree_and_read_each_others_checkpoints(stage, tmp_path):
    runs = {path: Run(stage, path) for path in ("direct", "engine")}
    saved = {}
    for path, run in runs.items():
        for _ in range(3):
            run.step()
        saved[path] = run.save(tmp_path / path)
        run.step()
    direct, engine = (run.weights() for run in runs.values())
    first = Regression().model.state_dict()
    for name, weight in direct.items():
        # a weight without gradient decays under ZeRO and in the direct path, not under stage 0
        if "unused" not in name:
            torch.testing.assert_close(weight, engine[name], rtol=1e-6, atol=1e-6, msg=name)
            assert not torch.equal(weight, first[name.split(".", 1)[1]]), name
    for of in ("direct", "engine"):
        for by in ("direct", "engine"):
            resumed = Run(stage, by)
            resumed.load(tmp_path / of, saved[of])
            resumed.step()
            for name, weight in resumed.weights().items():
                if by == of:
                    assert torch.equal(weight, runs[of].weights()[name]), (of, by, name)
                elif "unused" not in name:
                    torch.testing.assert_close(weight, engine[name], rtol=1e-6, atol=1e-6, msg=f"{of} {by} {name}")
            assert resumed.engine.global_steps == 4


def test_no_hook_of_the_engine_is_left():
    run = Run(1, "direct")
    assert not any(p._post_accumulate_grad_hooks or p._backward_hooks for p in run.engine.module.parameters())
    assert any(p._post_accumulate_grad_hooks for p in Run(1, "engine").engine.module.parameters())


@pytest.mark.parametrize("stage", [0, 1])
def test_a_loss_that_is_not_finite_moves_nothing(stage):
    run = Run(stage, "direct")
    run.step()
    before = run.weights()
    run.step(poisoned=True)
    run.step()  # the host has not looked yet
    after = run.weights()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model."))
    run.watch.check(before_step=2)
    run.watch.saved_step = 1
    with pytest.raises(FloatingPointError, match=r"step 2: the loss is not finite .loss nan.*a row.*from step 1\."):
        run.watch.check()


def test_a_gradient_that_is_not_finite_moves_nothing():
    run = Run(1, "direct")
    run.step()
    before = run.weights()
    run.engine.module.model[0].weight.register_hook(lambda gradient: gradient * torch.inf)
    run.step()
    after = run.weights()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model."))
    with pytest.raises(FloatingPointError, match="step 2: the gradient is not finite .loss [0-9.]+"):
        run.watch.check()


def test_what_goes_through_the_engine():
    base = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5}, "steps_per_print": 9}
    assert DirectUpdates.refusal(base) is None and DirectUpdates.refusal({}) is None
    assert DirectUpdates.refusal(base | {"bf16": {"enabled": True}}) == "the DeepSpeed configuration has bf16"
    assert "optimizer" in DirectUpdates.refusal(base | {"optimizer": {"type": "Adam"}})
    assert "offload_optimizer" in DirectUpdates.refusal({"zero_optimization": {"offload_optimizer": {}}})
    assert DirectUpdates.refusal({"zero_optimization": {"stage": 3}}) == "ZeRO stage 3"

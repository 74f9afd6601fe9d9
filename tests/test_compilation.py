"""When a run compiles its layers, that the log says why, and what compiled runs log."""

import logging
import shutil

import pytest
from runs import metrics, run_cases

from softmask_fast.training import compilation


@pytest.fixture
def gpu(monkeypatch):
    """A machine where everything is at hand, as one rank of two sees it."""
    monkeypatch.setattr(compilation, "get_accelerator", lambda: type("Gpu", (), {"device_name": lambda self: "cuda"})())
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compilation, "gather_objects", lambda reason: [None, reason])


@pytest.mark.parametrize(
    "chosen, stage, decided", [(None, 0, True), (None, 2, True), (None, 3, False), (False, 1, False)]
)
def test_layers_are_compiled_on_a_gpu_below_stage_3(gpu, caplog, chosen, stage, decided):
    with caplog.at_level(logging.DEBUG):
        assert compilation.decide_compilation(chosen, {"zero_optimization": {"stage": stage}}) == decided
    expected = {True: "compile: on, which takes up to a minute", False: "compile: off"}[decided]
    assert caplog.messages[0].startswith(expected) and ("stage 3" in caplog.text) == (stage == 3)


@pytest.mark.parametrize(
    "missing, reason", [("torch.utils._triton.has_triton", "Triton is unavailable"), ("shutil.which", "no C compiler")]
)
def test_one_rank_that_lacks_something_keeps_all_from_it(gpu, monkeypatch, missing, reason):
    monkeypatch.setattr(missing, lambda *_: None)
    assert reason in compilation.reason_against({})
    assert not compilation.decide_compilation(None, {})
    assert compilation.decide_compilation(True, {})


def test_a_cpu_does_not_compile_by_itself():
    if compilation.get_accelerator().device_name() != "cuda":
        assert compilation.reason_against({}) == "the device is not a GPU"


# nothing that depends on the length of the run, which a cut one gets told twice
WHOLE = dict(stage=1, compile=True, hidden_dropout=0.1, max_steps=3, checkpoint_steps=1, keep_checkpoints=3)
WHOLE |= dict(learning_rate=1e-3, final_learning_rate=1e-3, queue_warmup_steps=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    plain = {"stage": 0, "max_steps": 2, "checkpoint_steps": 2, "hidden_dropout": 0}
    run_cases({"plain": plain, "compiled": plain | {"stage": 1, "compile": True}, "whole": WHOLE}, folder)
    return folder


@pytest.mark.gpu
def test_a_compiled_run_begins_as_the_others_do(folder):
    """Later, its rounding errors occasionally choose another hard negative. Compiled code draws its own dropout."""
    plain, compiled = metrics(folder / "plain"), metrics(folder / "compiled")
    assert len(plain) == 2
    for step, expected in plain.items():
        assert compiled[step] == pytest.approx(expected, abs=1e-5), step


def test_a_compiled_run_resumes_to_the_last_bit(folder):
    """Dropout included, in a process that compiles at another batch."""
    shutil.copytree(folder / "whole", folder / "cut")  # as a run that was killed after its first step leaves it
    shutil.rmtree(folder / "cut" / "model")
    for step in (2, 3):
        shutil.rmtree(folder / "cut" / "checkpoints" / f"step-{step:08d}")
    run_cases({"cut": WHOLE | {"resume": True}}, folder)
    whole, cut = metrics(folder / "whole"), metrics(folder / "cut")
    assert len(whole) == 3 and whole == cut

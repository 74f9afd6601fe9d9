"""When a run compiles its layers, and that the log says why."""

import logging

import pytest

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
    with caplog.at_level(logging.INFO):
        assert compilation.decide_compilation(chosen, {"zero_optimization": {"stage": stage}}) == decided
    expected = {True: "compile: on, which takes up to a minute", False: "compile: off"}[decided]
    assert caplog.messages[0].startswith(expected) and ("stage 3" in caplog.text) == (stage == 3)


@pytest.mark.parametrize(
    "missing, reason", [("torch.utils._triton.has_triton", "Triton cannot be used"), ("shutil.which", "no C compiler")]
)
def test_one_rank_that_lacks_something_keeps_all_from_it(gpu, monkeypatch, missing, reason):
    monkeypatch.setattr(missing, lambda *_: None)
    assert reason in compilation.reason_against({})
    assert not compilation.decide_compilation(None, {})
    assert compilation.decide_compilation(True, {})


def test_a_cpu_does_not_compile_by_itself():
    if compilation.get_accelerator().device_name() != "cuda":
        assert compilation.reason_against({}) == "the device is no GPU"

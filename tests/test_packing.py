"""Packed captions, activation checkpointing and compilation: other ways to run the layers, the same numbers."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_as_accurate
from small_steps import make_batch, make_model
from torch._subclasses.fake_tensor import FakeTensorMode

from softmask_fast.config import ObjectiveConfig
from softmask_fast.errors import UsageError
from softmask_fast.model import packing as packing_module
from softmask_fast.model.momentum import StepSettings
from softmask_fast.model.packing import Packing, choose_attention, self_attention
from softmask_fast.model.pretraining import PretrainingStep

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from memory import activations  # noqa: E402

LENGTHS = (5, 1, 7, 3)


def make_packing(device="cpu", **bounds) -> Packing:
    lengths = torch.tensor(LENGTHS, device=device)
    return Packing.of(torch.arange(7, device=device) < lengths[:, None], **bounds)


def attention_by_sequence(query, key, value):
    """The definition: one sequence at a time."""
    parts = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True):
        weight = (torch.einsum("lhd,nhd->hln", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        parts.append(torch.einsum("hln,nhd->lhd", weight, v))
    return torch.cat(parts)


def test_packing_and_padding_are_inverse():
    packing = make_packing()
    assert packing.boundaries.tolist() == [0, 5, 6, 13, 16]
    rows = torch.randn(16, 3, requires_grad=True)
    padded = packing.pad(rows)
    assert padded.shape == (4, 7, 3) and (padded[~packing.mask] == 0).all()
    assert torch.equal(packing.pack(padded), rows)
    assert torch.equal(rows[packing.rows_of(torch.tensor([7, 14, 16]))], rows[[5, 6, 8]])
    padded.sum().backward()
    assert (rows.grad == 1).all()


@pytest.mark.parametrize(
    "name, dtype", [("padded", torch.float32), ("varlen", torch.bfloat16), ("xformers", torch.bfloat16)]
)
def test_attention_among_the_tokens_of_a_sequence(device, name, dtype):
    try:
        choose_attention(name, device, dtype)
    except UsageError as error:
        pytest.skip(str(error))
    inputs = [torch.randn(16, 2, 64, device=device).to(dtype).requires_grad_() for _ in range(3)]
    weight = torch.randn(16, 2, 64, device=device)

    def run(function, dtype):
        cast = [x.detach().to(dtype).requires_grad_() for x in inputs]
        output = function(*cast)
        return output, *torch.autograd.grad(output, cast, weight.to(dtype))

    packing = make_packing(device, fewest=16, most=16)
    results = run(lambda *x: self_attention(torch.stack(x, 1), packing, name), dtype)
    for actual, baseline, truth in zip(
        results, run(attention_by_sequence, dtype), run(attention_by_sequence, torch.float64), strict=True
    ):
        assert_as_accurate(actual, baseline, truth, dtype)


def test_the_mask_of_xformers_is_ours():
    pytest.importorskip("xformers")
    packing = make_packing()
    bias = packing.block_diagonal.materialize((1, 1, 16, 16))[0, 0]
    sequence = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    assert torch.equal(bias == 0, sequence[:, None] == sequence) and (bias[bias != 0] == -torch.inf).all()


def test_what_cannot_run_says_why():
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu, torch.bfloat16) == "padded"
    for name in ("varlen", "xformers"):
        with pytest.raises(ValueError, match=f"attention: '{name}' cannot run here: it has no kernel for cpu tensors"):
            choose_attention(name, cpu, torch.bfloat16)
    with pytest.raises(ValueError, match="it takes bfloat16 and float16, got torch.float32"):
        choose_attention("varlen", torch.device("cuda"), torch.float32)


def test_xformers_without_kernels_is_refused_before_it_is_needed():
    """As a wheel for another torch is: it imports, and has no kernel, here for the CPU."""
    pytest.importorskip("xformers")
    reason = packing_module._xformers_unavailable_reason(torch.device("cpu"), torch.bfloat16)
    assert reason == "xformers has no kernel for torch.bfloat16 on cpu; python -m xformers.info shows what it has"


def test_bounds_on_the_number_of_tokens_need_no_waiting_and_cover_every_row():
    """On a GPU no value may be read: a fake one raises then."""
    with FakeTensorMode():
        packing = make_packing("cuda", fewest=13, most=20)
        assert packing.positions.shape == (28,) and packing.boundaries.shape == (4 + 3 + 1,)
        packing = Packing.of(torch.ones(40, 7, dtype=torch.bool, device="cuda"), fewest=200, most=220)
        assert packing.positions.shape == (256,) and packing.boundaries.shape == (40 + 8 + 1,)
        assert make_packing("cuda").positions.shape == (28,)


def run_step(dropout=0.0, dtype=torch.float32, **execution):
    model, teacher = (module.to(dtype) for module in make_model(hidden_dropout=dropout))
    batch = make_batch()
    batch.pixels = batch.pixels.to(dtype)
    for network in (model, teacher.model):
        network.set_execution(**execution)
    torch.manual_seed(8)
    loss, metrics = PretrainingStep(model, ObjectiveConfig())(batch, teacher, StepSettings(0.4, 11))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: metrics[name] for name in ("itc", "itm", "mlm")} | gradients


def test_checkpointing_changes_no_bit_dropout_included():
    kept, again = run_step(dropout=0.1), run_step(dropout=0.1, checkpointing=True)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_compiled_and_not_compiled_agree():
    torch._dynamo.reset()
    plain, compiled, truth = run_step(), run_step(compile=True), run_step(dtype=torch.float64)
    for name, value in truth.items():
        assert_as_accurate(compiled[name], plain[name], value, torch.float32, name)
    model, _ = make_model()
    names = list(model.state_dict())
    model.set_execution(compile=True)
    assert list(model.state_dict()) == names and list(copy.deepcopy(model).state_dict()) == names


def test_a_step_reads_no_value_on_the_host_and_checkpointing_saves_memory():
    """On fake tensors, which raise when a value is read."""
    kept, again = (activations("tiny", 32, checkpointing) for checkpointing in (False, True))
    assert 0 < again < 0.6 * kept

"""A batch that is its own keys: its two directions computed together are the two, and the reference."""

from collections import Counter
from unittest import mock

import itc_cases
import pytest
import torch
from compare import assert_as_accurate, thin_out
from itc_cases import device_of, inputs

from softmask_fast.ops import focal_itc_loss
from softmask_fast.ops.focal_itc import cpp, cpp_tile

impl, small_tiles = itc_cases.impl, itc_cases.small_tiles  # fixtures
NAMES = ("loss", "grad image", "grad text", "grad temperature")
GAMMAS, POSITIVES = (0.0, 0.5, 1.0, 2.0, 3.0), ("own", "mean", "any")


@pytest.fixture
def one_tile(monkeypatch):
    """Tiles that hold every batch, so that C++ takes a reduced loss as a whole, as the test has to make it do."""
    monkeypatch.setattr(cpp, "TILE_ROWS", 64)
    monkeypatch.setattr(cpp, "TILE_KEYS", 64)
    with mock.patch.object(cpp_tile, "_forward", wraps=cpp_tile._forward) as forward:
        yield
    forward.assert_called()


def run(impl, tensors, dtype, temperature, positives="own", copies=False, **options):
    """loss per row, gradients and statistics, in ``dtype``; copies: the keys are copies, so each direction is alone."""
    device = device_of(impl)
    leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in tensors]
    tau = torch.tensor(temperature).to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
    ids = {} if positives == "own" else {"ids": torch.arange(len(tensors[0]), device=device) % 7}
    if copies:
        options |= {"image_keys": leaves[0].clone(), "text_keys": leaves[1].clone()}
        options |= {} if positives == "own" else {"key_ids": ids["ids"].clone()}
    loss, stats = focal_itc_loss(
        *leaves, temperature=tau, positives="any" if positives == "any" else "mean", reduction="none",
        return_stats=True, seed=3, impl=impl, **ids, **options,
    )  # fmt: skip
    (loss * torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=device)).sum().backward()
    return [result.cpu() for result in (loss.detach(), *(leaf.grad for leaf in leaves), tau.grad)], stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_as_accurate_as_pytorch_and_the_two_directions(impl, gamma, positives, dtype):
    thin_out(impl, GAMMAS.index(gamma), POSITIVES.index(positives), int(dtype == torch.bfloat16))
    tensors = inputs(50, 50, 24, dtype)[:2]
    actual, stats = run(impl, tensors, dtype, 0.1, positives, gamma=gamma)
    baseline, _ = run("reference", tensors, dtype, 0.1, positives, gamma=gamma)
    truth, true_stats = run("reference", tensors, torch.float64, 0.1, positives, gamma=gamma)
    for name, *results in zip(NAMES, actual, baseline, truth, strict=True):
        assert_as_accurate(*results, torch.float32 if results[0].dim() < 2 else dtype, name)
    _, apart = run(impl, tensors, dtype, 0.1, positives, gamma=gamma, copies=True)
    for name, mine, theirs, true in zip(stats._fields, stats, apart, true_stats, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, msg=name)
        if "negative" in name:
            assert torch.equal(mine.cpu(), true), name


@pytest.mark.parametrize("size", [1, 2, 16, 24, 25])
def test_any_number_of_pairs(impl, size):
    tensors = inputs(size, size, 9, torch.float32)[:2]
    actual, _ = run(impl, tensors, torch.float32, 0.1)
    expected, _ = run(impl, tensors, torch.float32, 0.1, copies=True)
    for name, *results in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("tile", [16, 64])  # 20 rows in tiles, and in C++ as a whole
def test_any_subset_of_gradients(monkeypatch, impl, tile):
    monkeypatch.setattr(cpp, "TILE_ROWS", tile)

    def gradients(chosen):
        values = [*inputs(20, 20, 24, torch.float32)[:2], torch.tensor(0.1)]
        values = [value.to(device_of(impl), copy=True) for value in values]
        leaves = [values[i].requires_grad_() for i in chosen]
        return torch.autograd.grad(focal_itc_loss(*values[:2], temperature=values[2], impl=impl), leaves)

    everything = gradients(range(3))
    for chosen in ([0], [1], [2], [0, 1], [1, 2]):
        assert all(torch.equal(mine, everything[i]) for i, mine in zip(chosen, gradients(chosen), strict=True)), chosen


@pytest.mark.parametrize("reduction, products", [("mean", 3), ("none", 4)])
def test_every_product_is_computed_once(monkeypatch, reduction, products):
    """The forward makes one matrix product, the backward two of a reduced loss, else three, for all pairs of a tile."""
    monkeypatch.setattr(cpp, "TILE_ROWS", 64)
    monkeypatch.setattr(cpp, "TILE_KEYS", 64)
    image, text = (tensor.requires_grad_() for tensor in inputs(40, 40, 24, torch.float32)[:2])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        focal_itc_loss(image, text, temperature=0.1, reduction=reduction, impl="cpp").sum().backward()
    calls = Counter({event.key: event.count for event in profile.key_averages()})
    assert calls["aten::mm"] + calls["aten::addmm_"] == products


def reduced(impl, tensors, dtype, **options):
    """Loss and gradients of its fourfold, with statistics."""
    leaves = [*(tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors)]
    leaves.append(torch.tensor(0.1, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_())
    loss, stats = focal_itc_loss(*leaves[:2], temperature=leaves[2], return_stats=True, seed=3, impl=impl, **options)
    return [loss.detach(), *torch.autograd.grad(4 * loss, leaves)], stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("gamma", [*GAMMAS, 2.5])
def test_one_tile_is_as_accurate_as_pytorch_and_has_the_statistics_of_its_rows(one_tile, gamma, positives, dtype):
    tensors = inputs(45, 45, 24, dtype)[:2]
    options = {} if positives == "own" else {"ids": torch.arange(45) % 7, "positives": positives}
    options |= {"gamma": gamma, "reduction": "mean" if gamma < 2 else "sum"}
    actual, stats = reduced("cpp", tensors, dtype, **options)
    baseline, truth = (reduced("reference", tensors, kind, **options)[0] for kind in (dtype, torch.float64))
    for name, *results in zip(NAMES, actual, baseline, truth, strict=True):
        assert_as_accurate(*results, torch.float32 if results[0].dim() < 2 else dtype, name)
    _, of_rows = focal_itc_loss(
        *tensors, temperature=0.1, return_stats=True, seed=3, impl="cpp", **options | {"reduction": "none"}
    )
    assert all(torch.equal(*pair) for pair in zip(stats, of_rows, strict=True))


@pytest.mark.parametrize(
    "text_of",
    [
        pytest.param(None, id="a leaf"),
        pytest.param(lambda rows: rows, id="the image"),
        pytest.param(lambda rows: rows.flip(0) * 1.5, id="made of the image"),
    ],
)
def test_a_batch_of_one_tile_may_be_a_penalty_on_its_gradient_alone(one_tile, text_of):
    """The gradient that is to be differentiated again is the same, and raises only where it is. A hook runs once."""
    image, text = inputs(20, 20, 24, torch.float32)[:2]
    leaves = [tensor.requires_grad_() for tensor in (image, text, torch.zeros(()))]
    rows, calls = 2 * image, []
    rows.register_hook(calls.append)
    keys = text if text_of is None else text_of(rows)
    loss = focal_itc_loss(rows, keys, temperature=leaves[2].exp(), impl="cpp")
    expected = torch.autograd.grad(3 * loss, leaves, retain_graph=True, materialize_grads=True)
    calls.clear()
    found = torch.autograd.grad(3 * loss, leaves, create_graph=True, materialize_grads=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        found[0].square().sum().backward()

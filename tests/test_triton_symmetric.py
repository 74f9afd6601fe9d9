"""The Triton kernels of a batch that is its own keys, of two-byte elements: they have the two directions as one."""

import importlib

import itc_cases
import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate, thin_out
from itc_cases import device_of, inputs

from softmask_fast.ops import focal_itc_loss
from softmask_fast.ops.focal_itc.state import Problem
from softmask_fast.ops.triton_support import INTERPRETED

if "triton" not in itc_cases.IMPLEMENTATIONS:
    pytest.skip("needs a GPU, or the interpreter", allow_module_level=True)

NAMES = ("loss", "grad image", "grad text", "grad temperature")


@pytest.fixture(autouse=True)
def triton_launch(monkeypatch):
    """The launches, with chunks of a few tiles, so that there are several."""
    launch = importlib.import_module("softmask_fast.ops.focal_itc.triton_symmetric_launch")
    tile = 32 if INTERPRETED else 128
    for name, size in (("CHUNK_ROWS", 2 * tile), ("CHUNK_COLUMNS", tile), ("PARTIAL_SUMS", 1)):
        monkeypatch.setattr(launch, name, size)
    return launch


def run(impl, tensors, dtype, temperature, **options):
    """loss per row and gradients, in ``dtype``, on the CPU."""
    device = device_of(impl)
    leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in tensors]
    tau = torch.tensor(temperature).to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
    loss = focal_itc_loss(*leaves, temperature=tau, reduction="none", seed=3, impl=impl, **options)
    (loss * torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=device)).sum().backward()
    return [result.cpu() for result in (loss.detach(), *(leaf.grad for leaf in leaves), tau.grad)]


CASES = ("unit", "low temperature", "opposite", "long", "short", "one long", "equal")


def pairs(case, width, dtype):
    """Features of a few tiles of pairs, and a temperature."""
    size = 41 if INTERPRETED else 300
    generator = torch.Generator().manual_seed(width)
    image, noise = (torch.randn(size, width, generator=generator, dtype=torch.float64) for _ in range(2))
    temperature = {"low temperature": 0.001, "opposite": 0.01}.get(case, 0.07)
    if case == "opposite":  # all point one way but one image, which no sum of the others' reference sees
        image = image[:1] + 0.1 * image
        noise = 0.3 * image + 0.1 * noise
        image[size // 2] *= -1
    text = (0.3 if temperature < 0.01 else 0.6) * image + noise  # losses that differ from 0 in float64, too
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    if case in ("long", "short"):
        image, text = (tensor * (30.0 if case == "long" else 0.01) for tensor in (image, text))
    elif case == "one long":
        image[3] *= 50
    elif case == "equal":
        image, text = image[:1].expand(size, -1), image[:1].expand(size, -1)
    return (image.to(dtype), text.to(dtype)), temperature


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gamma", [0.0, 2.0, 2.5])
def test_lengths_and_temperatures(gamma, case, dtype):
    """Where the sums relative to the common reference serve, where they do not, and where both meet in a tile."""
    thin_out("triton", int(2 * gamma), CASES.index(case), int(dtype == torch.float16))
    tensors, temperature = pairs(case, 40, dtype)
    actual = run("triton", tensors, dtype, temperature, gamma=gamma)
    baseline = run("reference", tensors, dtype, temperature, gamma=gamma)
    truth = run("reference", tensors, torch.float64, temperature, gamma=gamma)
    for name, *results in zip(NAMES, actual, baseline, truth, strict=True):
        if (case, name) != ("equal", "grad temperature"):  # there it is 0, a sum of what cancels, in PyTorch by luck
            assert_as_accurate(*results, torch.float32 if results[0].dim() < 2 else dtype, name)


@pytest.mark.parametrize("shape", [(1, 16), (2, 9), (16, 33), (33, 1), (65, 130)])
def test_odd_sizes(shape):
    tensors = inputs(shape[0], shape[0], shape[1], torch.bfloat16)[:2]
    actual = run("triton", tensors, torch.bfloat16, 0.1)
    baseline = run("reference", tensors, torch.bfloat16, 0.1)
    truth = run("reference", tensors, torch.float64, 0.1)
    for name, *results in zip(NAMES, actual, baseline, truth, strict=True):
        assert_as_accurate(*results, torch.float32 if results[0].dim() < 2 else torch.bfloat16, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value):
    image, text = inputs(20, 20, 24, torch.bfloat16)[:2]
    image[3, 2] = value
    loss, *gradients = run("triton", (image, text), torch.bfloat16, 0.07)
    assert not loss[3].isfinite() and not gradients[0][3].isfinite().any()
    assert not gradients[1].isfinite().any() and not gradients[2].isfinite()


def test_any_strides():
    image, text = inputs(40, 40, 24, torch.bfloat16)[:2]
    device = device_of("triton")
    wide = torch.zeros(40, 51, dtype=torch.bfloat16, device=device)[:, 1:25]
    strided = wide.copy_(image), text.to(device).T.contiguous().T
    results = []
    for tensors in ((image.to(device), text.to(device)), strided):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        loss = focal_itc_loss(*leaves, temperature=0.07, impl="triton")
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


def test_any_subset_of_gradients(nan_filled_empty):
    """And the same bits every time."""

    def gradients(chosen):
        values = [*inputs(50, 50, 24, torch.bfloat16)[:2], torch.tensor(0.1)]
        values = [value.to(device_of("triton"), copy=True) for value in values]
        leaves = [values[i].requires_grad_() for i in chosen]
        return torch.autograd.grad(focal_itc_loss(*values[:2], temperature=values[2], impl="triton"), leaves)

    everything = gradients(range(3))
    assert all(gradient.isfinite().all() for gradient in everything)
    for chosen in ([0, 1, 2], [0], [1], [2], [0, 1], [1, 2]):
        assert all(torch.equal(mine, everything[i]) for i, mine in zip(chosen, gradients(chosen), strict=True)), chosen


def test_few_launches(triton_launch, monkeypatch):
    """The two directions as one, where that is covered, and G in chunks: never all of it."""
    launched = []
    forward, backward = triton_launch.forward, triton_launch.backward
    monkeypatch.setattr(triton_launch, "forward", lambda *inputs: launched.append("forward") or forward(*inputs))
    monkeypatch.setattr(triton_launch, "backward", lambda *inputs: launched.append("backward") or backward(*inputs))
    image, text = (x.to(device_of("triton")).requires_grad_() for x in inputs(20, 20, 16, torch.bfloat16)[:2])
    focal_itc_loss(image, text, temperature=0.1, impl="triton").backward()
    assert launched == ["forward", "backward"]
    focal_itc_loss(image, text, temperature=0.1, ids=torch.arange(20, device=image.device), impl="triton").backward()
    focal_itc_loss(image, text, temperature=0.1, return_stats=True, impl="triton")[0].backward()
    assert launched == ["forward", "backward"]
    problem = Problem(image, text, None, None, torch.tensor(0.1), *[None] * 7, 2.0, False, 0, 0, 20, None)
    assert triton_launch.covers(problem)
    assert not triton_launch.covers(problem._replace(image=image.float()))


def test_opcheck_and_compile():
    device = device_of("triton")
    image, text = (tensor.to(device).requires_grad_() for tensor in inputs(18, 18, 24, torch.bfloat16)[:2])
    temperature = torch.tensor(0.1, device=device, requires_grad=True)
    torch.library.opcheck(
        torch.ops.softmask_fast.focal_itc.default,
        (image, text, None, None, temperature, *[None] * 7, 2.0, False, 0, 0, 18, "triton"),
    )

    def loss(*inputs):
        return focal_itc_loss(*inputs[:2], temperature=inputs[2], impl="triton")

    leaves = (image, text, temperature)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(*leaves), leaves), expected))

"""The implementations of focal_itc_loss that stream: accuracy, autograd, compilation, memory, determinism."""

import dataclasses
import functools
import importlib
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import itc_cases
import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate, require, thin_out
from itc_cases import IMPLEMENTATIONS, device_of, inputs

from softmask_fast.ops import checks, registry
from softmask_fast.ops.focal_itc import cpp, focal_itc_loss, operators, reference, state, streamed
from softmask_fast.ops.focal_itc.state import Keys, Options, Outputs, Problem, Rows
from softmask_fast.ops.triton_support import INTERPRETED

impl, small_tiles = itc_cases.impl, itc_cases.small_tiles  # fixtures
NAMES = ("loss", "grad image", "grad text", "grad image_keys", "grad text_keys", "grad temperature")


def run(impl, tensors, dtype, temperature, **keywords):
    """loss per row, gradients and statistics, computed in ``dtype`` from the values of ``tensors``; on the CPU."""
    device = device_of(impl)
    leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in tensors[:4]]
    teachers = [tensor.to(device, dtype) for tensor in tensors[4:]]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tau = torch.tensor(temperature).to(device, wide).requires_grad_()  # the same float32 number for all dtypes
    ids = {name: value.to(device) for name, value in keywords.items() if isinstance(value, torch.Tensor)}
    loss, stats = focal_itc_loss(
        *leaves, temperature=tau, teacher_image=teachers[0], teacher_text=teachers[1], reduction="none",
        return_stats=True, impl=impl, **keywords | ids,
    )  # fmt: skip
    (loss * torch.linspace(0.5, 1.5, loss.shape[0], dtype=loss.dtype, device=device)).sum().backward()
    results = [loss.detach(), *(leaf.grad for leaf in leaves), tau.grad]
    return [result.cpu() for result in results], type(stats)(*(statistic.cpu() for statistic in stats))


GAMMAS, ALPHAS, POSITIVES = (0.0, 0.5, 1.0, 2.0, 2.5, 3.0), (0.0, 0.4, 1.0), ("offset", "mean", "any")


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("temperature", [0.2, 0.001])
def test_as_accurate_as_pytorch(impl, gamma, alpha, positives, temperature):
    places = (GAMMAS.index(gamma), ALPHAS.index(alpha), POSITIVES.index(positives), int(temperature < 0.1))
    interpreted = impl == "triton" and INTERPRETED
    if interpreted and (places[0] + 2 * places[1] + 4 * places[2] + 5 * places[3]) % 9:
        pytest.skip("another case covers it in the interpreter")
    batch, keys = (19, 37) if interpreted else (45, 83)
    tensors = inputs(batch, keys, 24, torch.float32)
    keywords = {"gamma": gamma, "alpha": alpha, "seed": 3}
    if positives == "offset":
        keywords["row_offset"] = 7
    else:
        ids = torch.arange(batch) % (batch // 2)
        key_ids = torch.cat([ids, torch.arange(keys - batch) % 30])
        keywords |= {"positives": positives, "ids": ids, "key_ids": key_ids}
    actual, stats = run(impl, tensors, torch.float32, temperature, **keywords)
    baseline, _ = run("reference", tensors, torch.float32, temperature, **keywords)
    truth, true_stats = run("reference", tensors, torch.float64, temperature, **keywords)
    for name, *results in zip(NAMES, actual, baseline, truth, strict=True):
        assert_as_accurate(*results, torch.float32, name)
    for name, value, expected in zip(stats._fields, stats, true_stats, strict=True):
        if "negative" in name:
            assert torch.equal(value, expected), name
        else:  # a product rounded to float32 is off by 1e-7, so p by 1e-7 / temperature
            torch.testing.assert_close(value, expected.float(), rtol=1e-6 / temperature, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(impl, dtype):
    require("focal_itc", impl, device_of(impl), dtype, 24)
    tensors = inputs(*((17, 35) if INTERPRETED else (33, 50)), 24, dtype)
    actual, _ = run(impl, tensors, dtype, 0.07, alpha=0.4)
    baseline, _ = run("reference", tensors, dtype, 0.07, alpha=0.4)
    truth, _ = run("reference", tensors, torch.float64, 0.07, alpha=0.4)
    for name, *results in zip(NAMES, actual, baseline, truth, strict=True):
        assert results[0].dtype == results[1].dtype
        if dtype == torch.float64:  # the truth is of this dtype as well
            torch.testing.assert_close(results[0], results[2], rtol=1e-12, atol=1e-12)
            continue
        assert_as_accurate(*results, torch.float32 if results[0].dim() < 2 else dtype, name)


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="needs a GPU, or the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positives", POSITIVES)
def test_gradients_in_chunks(positives, dtype, monkeypatch):
    """More columns than one tile has: G goes through memory, here in chunks of a few tiles."""
    if INTERPRETED and (torch.float32, torch.float16, torch.bfloat16).index(dtype) != POSITIVES.index(positives):
        pytest.skip("another case covers it in the interpreter")
    launch = importlib.import_module("softmask_fast.ops.focal_itc.triton_launch")
    chunks, (batch, keys, width) = [], (33, 50, 40) if INTERPRETED else (300, 700, 320)
    tile = 32 if INTERPRETED else 128
    monkeypatch.setattr(launch, "CHUNK_ROWS", tile)
    monkeypatch.setattr(launch, "CHUNK_COLUMNS", tile)
    whole = launch.add_product
    monkeypatch.setattr(launch, "add_product", lambda total, *rest: chunks.append(total.shape) or whole(total, *rest))
    tensors = inputs(batch, keys, width, dtype)
    gamma = {"offset": 2.0, "mean": 2.5, "any": 3.0}[positives]
    keywords = {"gamma": gamma, "alpha": 0.0 if positives == "mean" else 0.4, "seed": 3, "row_offset": 7}
    if positives != "offset":
        ids = torch.arange(batch) % (batch // 2)
        key_ids = torch.cat([ids, torch.arange(keys - batch) % 30])
        keywords |= {"positives": positives, "ids": ids, "key_ids": key_ids, "row_offset": 0}
    actual, _ = run("triton", tensors, dtype, 0.07, **keywords)
    assert len(chunks) >= 2 * 2 * 2 * 2  # directions, rows and keys, chunks of each
    baseline, _ = run("reference", tensors, dtype, 0.07, **keywords)
    truth, _ = run("reference", tensors, torch.float64, 0.07, **keywords)
    for name, *results in zip(NAMES, actual, baseline, truth, strict=True):
        assert_as_accurate(*results, torch.float32 if results[0].dim() < 2 else dtype, name)


@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 9, 16), (3, 3, 5), (17, 25, 1), (16, 24, 33), (2, 49, 130)])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_odd_sizes(impl, shape, gamma):
    thin_out(impl, sum(shape) - int(gamma))
    tensors = inputs(*shape, torch.float32)
    actual, stats = run(impl, tensors, torch.float32, 0.1, gamma=gamma, alpha=0.4)
    baseline, _ = run("reference", tensors, torch.float32, 0.1, gamma=gamma, alpha=0.4)
    truth, true_stats = run("reference", tensors, torch.float64, 0.1, gamma=gamma, alpha=0.4)
    for name, *results in zip(NAMES, actual, baseline, truth, strict=True):
        assert_as_accurate(*results, torch.float32, name)
    assert torch.equal(stats.image_hard_negative, true_stats.image_hard_negative)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("case", ["saturated", "p to 0", "equal keys", "outliers"])
def test_extremes(impl, case, gamma):
    """p -> 1 for rows, teachers and targets alike; p -> 0 at the target; all keys equal; logits 20 times too large."""
    thin_out(impl, int(2 * gamma), len(case))
    width = 64 if case == "saturated" else 24  # many rows equally saturated, so that no single product decides
    tensors = inputs(64, 80, width, torch.float32, scale=20.0 if case == "outliers" else 1.0)
    if case == "saturated":
        tensors[2][:64], tensors[3][:64] = tensors[1], tensors[0]
        tensors[4], tensors[5] = tensors[0], tensors[1]
    if case == "p to 0":
        tensors[2][:64], tensors[3][:64] = -tensors[1], -tensors[0]
    if case == "equal keys":
        tensors[2], tensors[3] = (keys[:1].expand(80, width).clone() for keys in tensors[2:4])
    temperature = 0.05 if case == "saturated" else 0.07
    actual, stats = run(impl, tensors, torch.float32, temperature, gamma=gamma, alpha=0.4)
    baseline, _ = run("reference", tensors, torch.float32, temperature, gamma=gamma, alpha=0.4)
    truth, _ = run("reference", tensors, torch.float64, temperature, gamma=gamma, alpha=0.4)
    for name, *results in zip(NAMES, actual, baseline, truth, strict=True):
        assert bool(results[0].isfinite().all()), name
        if case == "equal keys" and name == "grad temperature":  # terms that cancel: to the rounding of one of them
            error = (results[0].double() - results[2]).abs()
            assert error <= torch.finfo(torch.float32).eps / temperature**2
            continue
        assert_as_accurate(*results, torch.float32, name)
    assert all(bool(statistic.isfinite().all()) for statistic in stats)


def test_strided_inputs(impl):
    tensors = inputs(18, 40, 24, torch.float32)
    strided = [tensor.T.contiguous().T for tensor in tensors]
    padded = [F.pad(tensor, (0, 3))[:, :24] for tensor in tensors]
    expected, _ = run(impl, tensors, torch.float32, 0.1, alpha=0.4)
    for changed in (strided, padded):
        actual, _ = run(impl, changed, torch.float32, 0.1, alpha=0.4)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_clip_keys_get_both_gradients(impl):
    """Keys that default to the batch: each feature is a row and a key."""
    image, text = inputs(37, 37, 24, torch.float32)[:2]
    results = []
    for name, dtype in ((impl, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaves = [tensor.to(device_of(name), dtype, copy=True).requires_grad_() for tensor in (image, text)]
        loss = focal_itc_loss(*leaves, temperature=0.05, impl=name)
        results.append([result.cpu() for result in (loss.detach(), *torch.autograd.grad(loss, leaves))])
    for name, *values in zip(("loss", "image", "text"), *results, strict=True):
        assert_as_accurate(*values, torch.float32, name)


@pytest.mark.parametrize("width", [24, 40])  # the interpreter has tiles of at most 32 columns
@pytest.mark.parametrize(
    "options", [{}, {"own": True}, {"loss": "sigmoid", "bias": -1.0}], ids=["keys", "own", "sigmoid"]
)
def test_a_loss_of_no_weight_has_gradients_of_zero(impl, options, width):
    """Gradients of logits are relative to the largest incoming one, which may be 0 or too small to be divided by."""
    own, dtype = options.get("own"), torch.bfloat16 if options.get("own") else torch.float32
    options = {name: value for name, value in options.items() if name != "own"}
    tensors = inputs(9, 12, width, dtype, device=device_of(impl))[: 2 if own else 4]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    loss = focal_itc_loss(*leaves, temperature=0.1, reduction="none", impl=impl, **options)
    for weight in (0.0, 1e-36):
        for gradient in torch.autograd.grad((loss * weight).sum(), leaves, retain_graph=True):
            assert float(gradient.abs().max()) <= 100 * weight


def test_a_gradient_that_is_not_finite_is_its_own_rows(impl):
    width = 40  # in the interpreter more than a tile has
    tensors = inputs(9, 12, width, torch.float32, device=device_of(impl))[:4]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    loss = focal_itc_loss(*leaves, temperature=0.1, reduction="none", impl=impl)
    weights = torch.ones_like(loss)
    weights[..., 3] = float("inf")
    gradient = torch.autograd.grad(loss, leaves[0], weights)[0]
    assert gradient.isfinite().all(1).tolist() == [row != 3 for row in range(9)]


@pytest.mark.parametrize("wanted", [(0,), (2,), (4,), (0, 3), (1, 4)])
@pytest.mark.parametrize("width", [24, 40])  # the interpreter has tiles of at most 32 columns
def test_each_subset_of_gradients(impl, wanted, width):
    tensors = inputs(19, 30, width, torch.float32, device=device_of(impl))

    def gradients(chosen):
        values = [*(tensor.clone() for tensor in tensors[:4]), torch.tensor(0.1, device=device_of(impl))]
        leaves = [values[i].requires_grad_() for i in chosen]
        loss = focal_itc_loss(*values[:4], temperature=values[4], impl=impl)
        return torch.autograd.grad(loss, leaves)

    everything = gradients(range(5))
    torch.testing.assert_close(gradients(wanted), tuple(everything[i] for i in wanted), rtol=0, atol=0)


def test_bitwise_reproducible(impl, nan_filled_empty):
    tensors = inputs(50, 90, 24, torch.float32)
    first, first_stats = run(impl, tensors, torch.float32, 0.05, alpha=0.4)
    second, second_stats = run(impl, tensors, torch.float32, 0.05, alpha=0.4)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(*pair) for pair in zip(first_stats, second_stats, strict=True))
    assert all(bool(tensor.isfinite().all()) for tensor in first)


KEYS = ("own", "other", "ids", "own ids", "own, teacher", "sigmoid", "own, sigmoid")


@pytest.mark.parametrize("keys", KEYS)
def test_opcheck(impl, keys):
    thin_out(impl, KEYS.index(keys))  # the operator is the same in every implementation
    device = device_of(impl)
    image, text, image_keys, text_keys, *teachers = inputs(18, 30, 24, torch.float32, device=device)
    temperature = torch.tensor(0.1, device=device)
    if keys.startswith("own"):
        image_keys = text_keys = None
    ids = torch.arange(18, device=device) % 5 if "ids" in keys else None
    key_ids = torch.arange(30, device=device) % 6 if keys == "ids" else None
    alpha = torch.tensor(0.4, dtype=torch.float64, device=device) if keys in ("other", "own, teacher") else None
    teachers = [None, None] if alpha is None else teachers
    bias = torch.tensor(-1.0, device=device) if "sigmoid" in keys else None
    seed = None if keys == "own" else torch.tensor(1, device=device)
    last = 18 if image_keys is None else 30
    problem = Problem(
        image, text, image_keys, text_keys, temperature, bias, *teachers, ids, key_ids, alpha, seed, 2.0, False, 0, 0,
        last, impl,
    )  # fmt: skip
    with torch.no_grad():
        loss, row_state, dominant, _, _ = torch.ops.softmask_fast.focal_itc(*problem)
    for wanted in ([True] * 6, [True] + [False] * 5, [False, True, False, True, True, True]):
        wanted = [wants and x is not None for wants, x in zip(wanted, problem, strict=False)]
        torch.library.opcheck(
            torch.ops.softmask_fast.focal_itc_backward.default,
            (torch.ones_like(loss), row_state, dominant, wanted, *problem),
        )
    leaves = (x if x is None else x.requires_grad_() for x in problem[:6])
    torch.library.opcheck(torch.ops.softmask_fast.focal_itc.default, (*leaves, *problem[6:]))


def test_compiles_as_one_graph(impl):
    device = device_of(impl)
    tensors = inputs(18, 30, 24, torch.float32, device=device)
    ids, key_ids = torch.arange(18, device=device) % 5, torch.arange(30, device=device) % 6

    def step(image, text, image_keys, text_keys, temperature, alpha, seed):
        loss, stats = focal_itc_loss(
            image, text, image_keys, text_keys, temperature=temperature, teacher_image=tensors[4],
            teacher_text=tensors[5], alpha=alpha, ids=ids, key_ids=key_ids, return_stats=True, seed=seed, impl=impl,
        )  # fmt: skip
        return loss, stats.image_accuracy, stats.text_hard_negative

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for alpha, seed in ((0.4, 0), (0.3, 1), (0.2, 2)):
        results = []
        for function in (step, compiled):
            leaves = [
                *(tensor.clone().requires_grad_() for tensor in tensors[:4]),
                torch.tensor(0.1, requires_grad=True, device=device),
            ]
            loss, accuracy, negatives = function(*leaves, alpha, seed)
            results.append((loss.detach(), accuracy, negatives, *torch.autograd.grad(loss, leaves)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "reference"])
def test_alpha_and_seed_may_be_tensors(name, monkeypatch):
    """The same bits as by the numbers, also compiled; only the C++ implementation reads them on the host."""
    as_on_gpus = lambda value: None if isinstance(value, torch.Tensor) else value  # noqa: E731
    monkeypatch.setattr(checks, "host_value", as_on_gpus)
    device = device_of(name)
    tensors = inputs(18, 30, 24, torch.float32, device=device)

    def step(image, text, alpha, seed):
        loss, stats = focal_itc_loss(
            image, text, *tensors[2:4], temperature=0.1, teacher_image=tensors[4], teacher_text=tensors[5], alpha=alpha,
            return_stats=True, seed=seed, impl=name,
        )  # fmt: skip
        return loss, stats.image_hard_negative, stats.text_hard_negative

    def results(function, *numbers):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:2]]
        loss, *negatives = function(*leaves, *numbers)
        return loss.detach(), *negatives, *torch.autograd.grad(loss, leaves)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for alpha, seed in ((0.4, -(2**40) - 7), (0.0, 2**33 + 5), (1.0, 3)):
        expected = results(step, alpha, seed)
        given = torch.tensor(alpha, dtype=torch.float64, device=device), torch.tensor(seed, device=device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            actual = results(step, *given)
        for found in (actual, results(compiled, *given)):
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        read = any(event.key == "aten::_local_scalar_dense" for event in profile.key_averages())
        assert not read or name == "cpp" or INTERPRETED
    single = torch.tensor(0.25, device=device)
    for found, expected in zip(results(step, single, 3), results(step, 0.25, 3), strict=True):
        assert torch.equal(found, expected)


def test_without_a_kernel_small_matrices_are_the_definitions_and_large_ones_are_streamed(monkeypatch):
    """No kernel takes float64."""
    taken, definition, tiles = [], reference.direction, streamed.spans
    monkeypatch.setattr(reference, "direction", lambda *rest: (taken.append("reference"), definition(*rest))[1])
    monkeypatch.setattr(streamed, "spans", lambda *rest: (taken.append("streamed"), tiles(*rest))[1])
    image, text, *keys = inputs(6, 20, 8, torch.float64)[:4]

    def run(bytes_, compiled=False, **options):
        known = next(i for i in registry.implementations("focal_itc") if i.name == "streamed")
        taken.clear()
        with registry.registered("focal_itc", dataclasses.replace(known, automatic_from=bytes_)):
            loss = functools.partial(focal_itc_loss, temperature=0.1, seed=3, return_stats=True, **options)
            loss = torch.compile(loss, fullgraph=True, backend="eager") if compiled else loss
            value, stats = loss(image.requires_grad_(), text, *keys)
            (gradient,) = torch.autograd.grad(value, image)
        return set(taken), (value, gradient, *stats)

    largest = image.shape[0] * keys[0].shape[0] * 8
    small, large = run(largest + 1), run(largest)
    assert small[0] == {"reference"} and large[0] == {"streamed"}
    for mine, other in zip(small[1], large[1], strict=True):
        torch.testing.assert_close(mine, other)
    assert run(largest + 1, loss="sigmoid", bias=-1.0)[0] == {"reference"}
    assert run(largest + 1, impl="streamed")[0] == {"streamed"}
    assert run(largest + 1, compiled=True)[0] == {"streamed"}  # the registered operator


def test_second_derivatives_are_refused(impl):
    image, text = (tensor.requires_grad_() for tensor in inputs(8, 8, 24, torch.float32, device=device_of(impl))[:2])
    loss = focal_itc_loss(image, text, temperature=0.1, impl=impl)
    (grad,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        grad.sum().backward()


def test_id_without_key_raises(impl):
    if device_of(impl).type == "cuda":
        pytest.skip("a device-side assertion there, which ends the process")
    image, text, image_keys, text_keys = inputs(8, 20, 24, torch.float32)[:4]
    with pytest.raises(ValueError, match=r"key_ids: expected a key .* got none for ids\[7\] = 7"):
        focal_itc_loss(
            image, text, image_keys, text_keys, temperature=0.1, ids=torch.arange(8), key_ids=torch.arange(20) % 7,
            impl=impl,
        )  # fmt: skip


def test_autocast_changes_nothing(impl):
    tensors = inputs(18, 30, 24, torch.float32)
    expected, _ = run(impl, tensors, torch.float32, 0.05, alpha=0.4)
    with torch.autocast(device_of(impl).type, dtype=torch.bfloat16):
        actual, _ = run(impl, tensors, torch.float32, 0.05, alpha=0.4)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x.expand(2, -1, -1)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused_by_name(impl, transform):
    image, text = inputs(8, 8, 24, torch.float32, device=device_of(impl))[:2]
    what = "forward mode" if transform == "jvp" else "torch.func"
    with pytest.raises(RuntimeError, match=f"^focal_itc_loss: {what} is not supported; use torch.autograd.grad$"):
        TRANSFORMS[transform](lambda x: focal_itc_loss(x, text, temperature=0.1, impl=impl), image)


def test_every_implementation_names_the_same_rows_of_the_row_state():
    """The layout of state.py in C++; the Triton kernels take it from there."""
    header = (Path(__file__).parent.parent / "csrc" / "cpu" / "focal_itc.h").read_text()
    names = re.search(r"enum StateRow \{(.*?)\}", header, re.DOTALL)[1].replace(",", " ").split()
    assert {name: place for place, name in enumerate(names)} == {
        name: value for name, value in vars(state).items() if name.startswith("ROW_")
    }


def test_the_compiled_operator_refuses_counts_apart():
    require("focal_itc", "cpp", torch.device("cpu"), torch.float32, 16)
    sums, places = torch.zeros(1, 4, cpp.SUMS, dtype=torch.float64), torch.zeros(1, 4, cpp.PLACES, dtype=torch.int64)
    count, results = torch.ones(8, dtype=torch.int64)[::2], [torch.empty(0)] * 5
    with pytest.raises(RuntimeError, match="count: expected a contiguous tensor"):
        torch.ops.softmask_fast_cpp.focal_itc_finish(
            sums, places, count, 1.0, 2.0, 2, 0.0, False, False, *results
        )  # fmt: skip


@pytest.mark.parametrize("batch", [16, 48])
def test_small_inputs_wake_no_threads(batch):
    """Under load a pool of threads is waited for much longer than the work takes."""
    code = f"""
import os, torch
from softmask_fast.ops import focal_itc_loss
torch.set_num_threads(8)
before = len(os.listdir("/proc/self/task"))
image, text = (torch.nn.functional.normalize(torch.randn({batch}, 64), dim=1).requires_grad_() for _ in range(2))
keys = {{"image_keys": image, "text_keys": text}}
for options in ({{}}, {{"ids": torch.arange({batch})}}, keys, {{"loss": "sigmoid"}}):
    focal_itc_loss(image, text, temperature=torch.tensor(0.1), return_stats=True, impl="cpp", **options)[0].backward()
print(len(os.listdir("/proc/self/task")) - before)
"""
    require("focal_itc", "cpp", torch.device("cpu"), torch.float32, 64)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(process.stdout) == 0


PEAK = """
import resource, sys, torch
from softmask_fast.ops.focal_itc import focal_itc_loss
def step(batch, keys, width=32):
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(batch, width), dim=1).requires_grad_() for _ in range(2))
    queue = torch.nn.functional.normalize(torch.randn(keys, width), dim=1).requires_grad_()
    loss, _ = focal_itc_loss(image, text, queue, queue, temperature=0.1, alpha=0.4, teacher_image=image.detach(),
                             teacher_text=text.detach(), ids=torch.arange(batch), key_ids=torch.arange(keys),
                             return_stats=True, impl=sys.argv[1])
    loss.backward()
step(64, 128)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(2048, 16384)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_nothing_of_the_size_of_the_logits_is_allocated(impl):
    """One (B, M) float32 matrix is 128 MiB here; inputs, gradients and tiles together take less than half of that."""
    if impl == "triton":
        pytest.skip("test_large_on_a_gpu measures it; the interpreter would take hours")
    process = subprocess.run([sys.executable, "-c", PEAK, impl], capture_output=True, text=True, check=True)
    assert float(process.stdout) < 64


def blockwise(impl, tensors, gamma, ids, key_ids, borders):
    """The outputs and gradients of one direction, with the keys in the blocks between ``borders``."""
    image, _, _, text_keys, teacher, _ = tensors
    numbers = torch.tensor(0.4, dtype=torch.float64, device=image.device), torch.tensor(5, device=image.device)
    options = Options(*numbers, gamma, False, 2, 0, text_keys.shape[0])
    rows = Rows(image, teacher, ids, torch.tensor(0.1, device=image.device), options)
    parts = [slice(*pair) for pair in itertools.pairwise(borders)]
    blocks = [Keys(text_keys[part], None if key_ids is None else key_ids[part], part.start) for part in parts]
    implementation = operators.resolve(impl, image)
    forward, out = implementation["forward"](rows), Outputs.empty(rows)
    for second_pass in range(forward.passes):
        for block in blocks:
            forward.add(block, bool(second_pass))
    forward.finish(out)
    ones, saved = torch.ones_like(out.loss), (out.row_state, out.dominant)
    gradients = [implementation["backward"](ones, rows, block, saved, (True, True, True)) for block in blocks]
    of_rows, of_keys, of_temperature = zip(*gradients, strict=True)
    results = [out.loss, out.statistics, sum(of_rows), torch.cat(of_keys), sum(of_temperature)]
    return results, out.hard_negative


@pytest.mark.parametrize("gamma", [2.0, 0.5])
@pytest.mark.parametrize("with_ids", [False, True])
def test_blocks_of_keys_add_up(impl, gamma, with_ids):
    """Keys that arrive in blocks, in any order of size, give what one block gives."""
    device = device_of(impl)
    tensors = inputs(19, 61, 24, torch.float32, device=device)
    ids = torch.arange(19, device=device) % 8 if with_ids else None
    key_ids = torch.arange(61, device=device) % 11 if with_ids else None
    whole, negative = blockwise(impl, tensors, gamma, ids, key_ids, (0, 61))
    blocks, its_negative = blockwise(impl, tensors, gamma, ids, key_ids, (0, 1, 39, 61))
    torch.testing.assert_close(blocks, whole, rtol=2e-5, atol=2e-6)
    assert torch.equal(negative, its_negative)


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU, or the interpreter")
@pytest.mark.parametrize("temperature", [0.07, 0.01, 0.2])
def test_triton_scales_float32_logits_without_rounding(temperature):
    """One float32 number is off by up to 6e-8, for all logits in the same direction."""
    temperature = torch.tensor(temperature, device=device_of("triton"))
    scales = temperature.new_empty(2)
    importlib.import_module("scale_kernel").write_scales[(1,)](temperature, scales)
    exact = math.log2(math.e) / temperature.double()
    assert abs(scales[0].double() / exact - 1) > 1e-8  # alone, it would not do
    assert abs(scales.double().sum() / exact - 1) < 1e-14


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [100, 256, 520])
def test_large_on_a_gpu(dtype, width):
    """Several splits and every tile size; one (B, M) float32 matrix would take 128 MiB."""
    tensors = inputs(2048, 16384, width, dtype)
    keywords = {"alpha": 0.4, "ids": torch.arange(2048) % 1500, "key_ids": torch.arange(16384) % 9000}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    actual, _ = run("triton", tensors, dtype, 0.07, **keywords)
    inputs_and_gradients = 2 * sum(tensor.nbytes for tensor in tensors)
    assert torch.cuda.max_memory_allocated() - before < inputs_and_gradients + 64 * 2**20
    again, _ = run("triton", tensors, dtype, 0.07, **keywords)
    assert all(torch.equal(*pair) for pair in zip(actual, again, strict=True))
    baseline, _ = run("reference", tensors, dtype, 0.07, **keywords)
    truth, _ = run("reference", tensors, torch.float64, 0.07, **keywords)
    for name, *results in zip(NAMES, actual, baseline, truth, strict=True):
        assert_as_accurate(*results, torch.float32 if results[0].dim() < 2 else dtype, name)

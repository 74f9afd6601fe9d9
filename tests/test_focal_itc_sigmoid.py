"""focal_itc_loss with loss="sigmoid": against open_clip's SigLipLoss and float64, gradients, arguments, memory."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate, thin_out
from itc_cases import IMPLEMENTATIONS, device_of, inputs
from largest_tensor import LargestTensor

from softmask_fast.ops import FocalITCLoss, focal_itc_loss
from softmask_fast.ops.focal_itc import streamed
from softmask_fast.ops.triton_support import INTERPRETED

NAMES = ("loss", "grad image", "grad text", "grad temperature", "grad bias", "grad image_keys", "grad text_keys")
KEYS = ("own", "own, ids", "given", "given, ids")
GAMMAS = (0.0, 1.5, 2.0)


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request, monkeypatch):
    monkeypatch.setattr(streamed, "TILE_ROWS", 16)
    monkeypatch.setattr(streamed, "TILE_KEYS", 24)
    if request.param == "triton":  # several chunks
        sigmoid = importlib.import_module("softmask_fast.ops.focal_itc.triton_sigmoid")
        tile = 32 if INTERPRETED else 128
        for name, size in (("CHUNK_ROWS", 2 * tile), ("CHUNK_COLUMNS", tile), ("PARTIAL_SUMS", 1)):
            monkeypatch.setattr(sigmoid, name, size)
    return request.param


def run(impl, tensors, dtype, keys, temperature=0.1, bias=-2.0, **options):
    """Loss per row and gradients, computed in ``dtype``, on the CPU."""
    device, wide = device_of(impl), torch.promote_types(dtype, torch.float32)
    leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in tensors[:4]]
    numbers = [torch.tensor(number).to(device, wide).requires_grad_() for number in (temperature, bias)]
    image, text, image_keys, text_keys = leaves
    rows, columns = len(image), len(image_keys)
    if keys.startswith("given"):
        options |= {"image_keys": image_keys, "text_keys": text_keys}
    else:
        leaves = leaves[:2]
    if keys.endswith("ids"):
        options["ids"] = torch.arange(rows, device=device) % 7
        options |= {"key_ids": torch.arange(columns, device=device) % 9} if keys == "given, ids" else {}
    elif keys == "given":
        options["row_offset"] = 5
    loss = focal_itc_loss(
        image, text, temperature=numbers[0], bias=numbers[1], loss="sigmoid", reduction="none", impl=impl, **options
    )
    weight = torch.linspace(0.5, 1.5, rows, dtype=loss.dtype, device=device)
    gradients = torch.autograd.grad((loss * weight).sum(), (*leaves[:2], *numbers, *leaves[2:]))
    return [result.cpu() for result in (loss.detach(), *gradients)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_as_accurate_as_pytorch(impl, gamma, keys, dtype):
    thin_out(impl, GAMMAS.index(gamma), KEYS.index(keys), int(dtype == torch.bfloat16))
    tensors = inputs(50, 61, 24, dtype)
    actual = run(impl, tensors, dtype, keys, gamma=gamma)
    baseline = run("reference", tensors, dtype, keys, gamma=gamma)
    truth = run("reference", tensors, torch.float64, keys, gamma=gamma)
    for name, *results in zip(NAMES, actual, baseline, truth, strict=False):
        assert_as_accurate(*results, torch.float32 if results[0].dim() < 2 else dtype, name)
    assert all(map(torch.equal, actual, run(impl, tensors, dtype, keys, gamma=gamma)))


@pytest.mark.parametrize("case", ["saturated", "cold", "one pair"])
def test_extremes(impl, case):
    """Logits of hundreds on the right and on the wrong side, and the smallest batch."""
    tensors = inputs(1 if case == "one pair" else 33, 40, 24, torch.float32, scale=20.0 if case == "saturated" else 1.0)
    options = {"temperature": 0.01, "bias": 3.0} if case == "cold" else {}
    actual = run(impl, tensors, torch.float32, "own", **options)
    baseline = run("reference", tensors, torch.float32, "own", **options)
    truth = run("reference", tensors, torch.float64, "own", **options)
    for name, *results in zip(NAMES, actual, baseline, truth, strict=False):
        assert bool(results[0].isfinite().all()), name
        assert_as_accurate(*results, torch.float32, name)


def test_open_clip(impl):
    """gamma 0 without ids is SigLipLoss, scale and bias included."""
    open_clip = pytest.importorskip("open_clip.loss")
    tensors = inputs(33, 40, 24, torch.float32, device=device_of(impl))[:2]
    results = []
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        scale, bias = (torch.tensor(x, device=device_of(impl), requires_grad=True) for x in (10.0, -10.0))
        if ours:
            loss = focal_itc_loss(*leaves, temperature=1 / scale, bias=bias, gamma=0, loss="sigmoid", impl=impl)
        else:
            loss = open_clip.SigLipLoss()(*leaves, scale, bias)
        results.append((loss, *torch.autograd.grad(loss, (*leaves, scale, bias))))
    torch.testing.assert_close(*results, rtol=2e-5, atol=1e-6)


def test_gradients_of_the_definition_by_finite_differences():
    image, text, image_keys, text_keys, *_ = inputs(3, 5, 4, torch.float64)
    ids, key_ids = torch.tensor([7, 8, 7]), torch.tensor([7, 8, 7, 9, 7])
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (0.3, -1.0))

    def loss(image, text, image_keys, text_keys, temperature, bias):
        return focal_itc_loss(
            image, text, image_keys, text_keys, temperature=temperature, bias=bias, gamma=1.5, loss="sigmoid", ids=ids,
            key_ids=key_ids, reduction="none", impl="reference",
        )  # fmt: skip

    leaves = [x.requires_grad_() for x in (image, text, image_keys, text_keys, *numbers)]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_each_subset_of_gradients(impl, wanted):
    def gradients(chosen):
        values = [*inputs(19, 30, 24, torch.float32)[:2], torch.tensor(0.1), torch.tensor(-1.0)]
        values = [value.to(device_of(impl), copy=True) for value in values]
        leaves = [values[i].requires_grad_() for i in chosen]
        loss = focal_itc_loss(*values[:2], temperature=values[2], bias=values[3], loss="sigmoid", impl=impl)
        return torch.autograd.grad(loss, leaves)

    everything = gradients(range(4))
    assert all(torch.equal(mine, everything[i]) for i, mine in zip(wanted, gradients(wanted), strict=True))


def test_statistics_are_those_of_the_softmax(impl):
    image, text = inputs(20, 20, 24, torch.float32, device=device_of(impl))[:2]
    options = dict(temperature=0.1, return_stats=True, seed=3, impl=impl)
    stats = focal_itc_loss(image, text, loss="sigmoid", bias=-10, **options)[1]
    assert all(map(torch.equal, stats, focal_itc_loss(image, text, **options)[1]))


def test_compiles_as_one_graph_and_refuses_second_derivatives(impl):
    image, text = (x.requires_grad_() for x in inputs(18, 18, 24, torch.float32, device=device_of(impl))[:2])
    numbers = [torch.tensor(x, device=device_of(impl), requires_grad=True) for x in (0.1, -1.0)]

    def loss(image, text, temperature, bias):
        return focal_itc_loss(image, text, temperature=temperature, bias=bias, loss="sigmoid", impl=impl)

    leaves = (image, text, *numbers)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(map(torch.equal, torch.autograd.grad(compiled(*leaves), leaves), expected))
    (gradient,) = torch.autograd.grad(loss(*leaves), image, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        gradient.sum().backward()


def test_the_module_takes_a_queue_and_own_keys():
    image, text, image_keys, text_keys, *_ = inputs(6, 6, 24, torch.float32)
    own = FocalITCLoss(gather="with_grad", loss="sigmoid", gamma=0.0)(image, text, temperature=0.1, bias=-3.0)
    assert torch.equal(own, focal_itc_loss(image, text, temperature=0.1, bias=-3.0, loss="sigmoid", gamma=0.0))
    queued = FocalITCLoss(24, 8, loss="sigmoid").eval()
    teachers = {"teacher_image": image_keys, "teacher_text": text_keys}
    found = queued(image, text, temperature=0.1, bias=-3.0, ids=torch.arange(6) % 4, **teachers)
    keys = queued.queue.keys(image)
    expected = focal_itc_loss(
        image, text, torch.cat([image_keys, keys.image]), torch.cat([text_keys, keys.text]), temperature=0.1,
        bias=-3.0, loss="sigmoid", ids=torch.arange(6) % 4, key_ids=torch.cat([torch.arange(6) % 4, keys.ids]),
    )  # fmt: skip
    assert torch.equal(found, expected)


def test_chunks_have_a_bound_in_bytes(impl, monkeypatch):
    if impl != "triton":
        pytest.skip("the others have tiles, not chunks")
    sigmoid = importlib.import_module("softmask_fast.ops.focal_itc.triton_sigmoid")
    size, sizes, add_product = sigmoid.CHUNK_COLUMNS, [], sigmoid.add_product

    def observed(total, left, right, first):
        sizes.append(left.untyped_storage().nbytes())
        add_product(total, left, right, first)

    monkeypatch.setattr(sigmoid, "CHUNK_ROWS", size)
    monkeypatch.setattr(sigmoid, "add_product", observed)
    run(impl, inputs(size, size, 16, torch.float32), torch.float32, "own")
    assert set(sizes) == {2 * size * size}


def test_nothing_of_the_size_of_the_logits_is_held(monkeypatch):
    monkeypatch.setattr(streamed, "TILE_ROWS", 32)
    monkeypatch.setattr(streamed, "TILE_KEYS", 32)
    image, text = (F.normalize(torch.randn(400, 16), dim=1).requires_grad_() for _ in range(2))
    largest = LargestTensor()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        focal_itc_loss(image, text, temperature=0.1, loss="sigmoid", impl="streamed").backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 400 * 400 * 4 / 4
    with largest:
        focal_itc_loss(image, text, temperature=0.1, loss="sigmoid", impl="reference")
    assert largest.elements >= 400 * 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss: expected 'softmax' or 'sigmoid', got 'hinge'"),
        ({"loss": "softmax", "bias": 0.0}, "bias: expected None with loss='softmax'"),
        ({"positives": "any"}, "positives: expected 'mean' with loss='sigmoid', got 'any'"),
        ({"alpha": 0.4}, "alpha: expected 0 with loss='sigmoid'"),
        ({"bias": torch.zeros(2)}, r"bias: expected size \(\), got \(2,\)"),
        (
            {"ids": torch.arange(4), "key_ids": torch.arange(1, 5)},
            r"key_ids: .* got none for ids\[0\] = 0",
        ),
    ],
)
def test_error_messages(options, message):
    x = inputs(4, 4, 8, torch.float32)
    keys = {"image_keys": x[2], "text_keys": x[3]} if "ids" in options else {}
    teachers = {"teacher_image": x[4], "teacher_text": x[5]} if "alpha" in options else {}
    with pytest.raises(ValueError, match=message):
        focal_itc_loss(x[0], x[1], temperature=0.1, **{"loss": "sigmoid", **options}, **keys, **teachers)

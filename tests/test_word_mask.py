import mmap
import resource

import pytest
import torch
from compare import assert_as_accurate, require
from word_masks import DTYPES, IMPLS, SIZES, draw, full_maps, keep_from_map, of_word

from softmask_fast.ops import attention_output_gradient, registry, word_gradcam, word_soft_mask

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
def test_map_matches_full_attention_maps(impl, sizes, dtype, masked, device):
    require("word_mask", impl, device, dtype, sizes[-1])
    inputs, word_index = draw(sizes, dtype, device)
    key_mask = (torch.rand(sizes[0], sizes[3]) > 0.4).to(device) if masked else None
    truth = full_maps(*(tensor.double() for tensor in inputs), key_mask)
    baseline = full_maps(*inputs, key_mask)
    every = word_gradcam(*inputs, key_mask=key_mask, impl=impl)
    one = word_gradcam(*inputs, word_index, key_mask=key_mask, impl=impl)
    assert every.dtype == one.dtype == torch.float32
    assert_as_accurate(every, baseline, truth, dtype, "all words")
    assert_as_accurate(one, of_word(baseline, word_index), of_word(truth, word_index), dtype, "one word")


@pytest.mark.parametrize("impl", IMPLS)
def test_saturated_softmax(impl, device):
    require("word_mask", impl, device, torch.float32, 16)
    inputs, word_index = draw((2, 2, 3, 19, 16), torch.float32, device, spread=20.0)
    truth = of_word(full_maps(*(tensor.double() for tensor in inputs), scale=1.0), word_index)
    baseline = of_word(full_maps(*inputs, scale=1.0), word_index)
    assert_as_accurate(word_gradcam(*inputs, word_index, scale=1.0, impl=impl), baseline, truth, torch.float32)


def test_map_equals_hooked_attention_maps():
    """dS/dA by autograd through a nonlinear score gives the same maps as the partial backward and the identity."""
    (query, key, value, _), _ = draw((2, 3, 5, 11, 8), torch.float64, "cpu")
    weight = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)

    def score(output):
        return (output @ weight).tanh().square().sum((1, 2, 3))

    attention = (query @ key.mT * 8**-0.5).softmax(-1).requires_grad_()
    (attention_gradient,) = torch.autograd.grad(score(attention @ value).sum(), attention)
    hooked = (attention * attention_gradient.relu()).mean(1).detach()

    with torch.no_grad():
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        gradient = attention_output_gradient(score, output)
    assert not gradient.requires_grad and weight.grad is None
    torch.testing.assert_close(word_gradcam(query, key, value, gradient), hooked, rtol=1e-12, atol=1e-14)


def test_attention_output_gradient_needs_a_score_of_its_argument():
    weight = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="score_function: .* without a gradient"):
        attention_output_gradient(lambda output: torch.zeros(()), torch.ones(2))
    with pytest.raises(ValueError, match="score_function: .* does not use it"):
        attention_output_gradient(lambda output: 2 * weight, torch.ones(2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_soft_mask(impl, dtype, prefix, masked, device):
    require("word_mask", impl, device, dtype, 16)
    batch, tokens, channels = 4, 37, 21
    inputs, word_index = draw((batch, 3, 5, tokens, 16), dtype, device)
    features = torch.randn(batch, tokens, channels, dtype=dtype, device=device)
    key_mask = (torch.rand(batch, tokens) > 0.4).to(device) if masked else None
    truth = keep_from_map(
        of_word(full_maps(*(tensor.double() for tensor in inputs), key_mask), word_index), prefix, key_mask
    )
    baseline = keep_from_map(of_word(full_maps(*inputs, key_mask), word_index), prefix, key_mask)
    options = {"prefix_tokens": prefix, "key_mask": key_mask, "impl": impl}
    masked_features, keep = word_soft_mask(*inputs, word_index, features, **options)
    assert keep.dtype == torch.float32 and masked_features.dtype == dtype
    assert keep.min() >= 0 and keep.max() <= 1
    assert_as_accurate(keep, baseline, truth, dtype, "keep")
    assert_as_accurate(
        masked_features, baseline[:, :, None] * features, truth[:, :, None] * features.double(), dtype, "features"
    )
    alone = word_soft_mask(*inputs, word_index, **options)
    assert torch.equal(alone, keep)
    assert torch.equal(word_soft_mask(*inputs, word_index, **options), keep), "not reproducible"


@pytest.mark.parametrize("impl", IMPLS)
def test_maps_without_a_spread_keep_everything(impl, device):
    require("word_mask", impl, device, torch.float32, 16)
    (query, key, value, grad_output), word_index = draw((3, 2, 4, 9, 16), torch.float32, device)
    ones = torch.ones(3, 9, device=device)
    same = key[:, :, :1].expand_as(key), value[:, :, :1].expand_as(value)
    assert torch.equal(word_soft_mask(query, *same, grad_output, word_index, impl=impl), ones), "constant map"
    against = -grad_output[:, :, :1].expand_as(value)  # the gradient of the first word is negative at every token
    keep = word_soft_mask(query, key, against, grad_output, torch.zeros_like(word_index), impl=impl)
    assert torch.equal(keep, ones), "negative gradient everywhere"
    one_patch = [query, key[:, :, :2], value[:, :, :2], grad_output]
    assert torch.equal(word_soft_mask(*one_patch, word_index, impl=impl), ones[:, :2])
    assert torch.equal(word_soft_mask(*one_patch, word_index, prefix_tokens=2, impl=impl), ones[:, :2])


@pytest.mark.parametrize("impl", IMPLS)
def test_images_of_padding_only(impl, device):
    require("word_mask", impl, device, torch.float32, 16)
    inputs, word_index = draw((2, 2, 4, 9, 16), torch.float32, device)
    key_mask = torch.tensor([[False] * 9, [True] * 9], device=device)
    features = torch.randn(2, 9, 5, device=device)
    cam = word_gradcam(*inputs, word_index, key_mask=key_mask, impl=impl)
    masked, keep = word_soft_mask(*inputs, word_index, features, key_mask=key_mask, impl=impl)
    assert torch.equal(cam[0], torch.zeros_like(cam[0])) and cam[1].max() > 0
    assert torch.equal(masked[0], features[0]) and keep[1].min() == 0
    every = word_gradcam(*inputs, key_mask=key_mask, impl=impl)
    assert torch.equal(every[0], torch.zeros_like(every[0])) and torch.isfinite(every).all()


@pytest.mark.parametrize("every_word", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_nan_and_padding_is_not_read(impl, every_word, device):
    """A key reaches the whole map through the softmax, a value only its own token; padding reaches none."""
    require("word_mask", impl, device, torch.float32, 16)
    (query, key, value, grad_output), word_index = draw((4, 2, 4, 9, 16), torch.float32, device)
    key_mask = torch.ones(4, 9, dtype=torch.bool, device=device)
    key_mask[:, 8] = False
    key[0, 1, 3], value[1, 1, 3], key[2, 1, 8], value[3, 1, 8] = (float("nan"),) * 4
    index = None if every_word else word_index
    maps = word_gradcam(query, key, value, grad_output, index, key_mask=key_mask, impl=impl)
    nan = maps.isnan() if every_word else maps.isnan()[:, None]
    assert nan[0, :, :8].all() and nan[1, :, 3].all() and nan[1].sum() == len(nan[1]) and not nan[2:].any()
    assert torch.equal(maps[..., 8], torch.zeros_like(maps[..., 8]))
    if not every_word:
        keep = word_soft_mask(query, key, value, grad_output, word_index, key_mask=key_mask, impl=impl)
        assert torch.equal(keep.isnan(), maps.isnan())


@pytest.mark.parametrize("tokens", [257, 577, 1025, 4096])
@pytest.mark.parametrize("impl", IMPLS)
def test_many_tokens(impl, tokens, device):
    require("word_mask", impl, device, torch.float32, 16)
    inputs, word_index = draw((1, 2, 2, tokens, 16), torch.float32, device)
    key_mask = torch.rand(1, tokens, device=device) > 0.3
    truth, baseline = (
        keep_from_map(of_word(full_maps(*cast, key_mask), word_index), 1, key_mask)
        for cast in ([tensor.double() for tensor in inputs], inputs)
    )
    keep = word_soft_mask(*inputs, word_index, key_mask=key_mask, impl=impl)
    assert keep.min() == 0 and keep.max() == 1
    assert_as_accurate(keep, baseline, truth, torch.float32)


def test_keep_alone_takes_no_pass_over_features(monkeypatch, device):
    require("word_mask", "triton", device, torch.float32, 16)
    from softmask_fast.ops.word_mask import triton_kernels

    monkeypatch.setattr(triton_kernels, "mask_features", None)
    inputs, word_index = draw((2, 2, 3, 5, 16), torch.bfloat16, device)
    empty, keep = torch.ops.softmask_fast.word_soft_mask(*inputs, word_index, None, 1, None, 0.25, "triton")
    assert keep.shape == (2, 5) and empty.numel() == 0 and empty.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="subscriptable"):
        word_soft_mask(*inputs, word_index, torch.ones(2, 5, 3, device=device), impl="triton")


@pytest.mark.parametrize("channels", [768, 767])
def test_features_larger_than_the_caches(monkeypatch, channels):
    """Written past the caches where rows are aligned, into memory that is fresh every time, in large pages if any."""
    require("word_mask", "cpp", torch.device("cpu"), torch.float32, 16)
    inputs, word_index = draw((8, 1, 2, 2048, 16), torch.float32, "cpu")
    features = torch.randn(8, 2048, channels)  # 48 MiB
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # or it is fresh no more
    word_soft_mask(*inputs, word_index, features, impl="cpp")
    (masked, keep), faults = with_page_faults(lambda: word_soft_mask(*inputs, word_index, features, impl="cpp"))
    assert torch.equal(masked, keep[:, :, None] * features)
    content = masked.numpy().tobytes()
    with mmap.mmap(-1, masked.nbytes, flags=mmap.MAP_PRIVATE) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        _, attainable = with_page_faults(lambda: memory.write(content))
    small_pages = masked.nbytes / mmap.PAGESIZE
    assert faults < small_pages / 4 or attainable > small_pages / 4, (faults, attainable)


def with_page_faults(function):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return function(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl, device):
    require("word_mask", impl, device, torch.float32, 16)
    inputs, word_index = draw((2, 3, 5, 11, 16), torch.float32, device)
    features = torch.randn(2, 11, 6, device=device)
    expected = word_soft_mask(*inputs, word_index, features, impl="reference")

    def as_projection(tensor):  # (B, L, H, D) seen as (B, H, L, D), the usual view of a linear layer's output
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    def reversed_dimensions(tensor):
        return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))

    def every_second(tensor):
        return torch.stack((tensor, tensor), -1).flatten(-2)[..., ::2]

    for layout in (as_projection, reversed_dimensions, every_second):
        strided = [layout(tensor) for tensor in inputs]
        strided_features = features if layout is as_projection else layout(features)
        actual = word_soft_mask(*strided, word_index, strided_features, impl=impl)
        for result, reference in zip(actual, expected, strict=True):
            torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5, msg=layout.__name__)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_flows_to_features_alone(impl, device):
    require("word_mask", impl, device, torch.float32, 16)
    inputs, word_index = draw((2, 2, 4, 9, 16), torch.float32, device)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    features = torch.randn(2, 9, 5, device=device, requires_grad=True)
    masked, keep = word_soft_mask(*inputs, word_index, features, impl=impl)
    assert not keep.requires_grad and not word_gradcam(*inputs, word_index, impl=impl).requires_grad
    grad = torch.randn_like(masked)
    masked.backward(grad)
    torch.testing.assert_close(features.grad, grad * keep[:, :, None], rtol=0, atol=0)
    assert all(tensor.grad is None for tensor in inputs)


def test_features_pass_gradcheck():
    inputs, word_index = draw((2, 2, 3, 5, 4), torch.float64, "cpu")
    features = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: word_soft_mask(*inputs, word_index, x)[0], features)
    assert torch.autograd.gradgradcheck(lambda x: word_soft_mask(*inputs, word_index, x)[0], features)


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_on_a_gpu_a_word_out_of_range_gives_nan(impl, device):
    """There nobody reads the indices on the host, so the kernel says it, and the other images are right."""
    require("word_mask", impl, device, torch.float32, 16)
    run = registry.resolve("word_mask", impl, device)
    inputs, _ = draw((3, 2, 4, 9, 16), torch.float32, device)
    index = torch.tensor([4, 1, -1], device=device)
    features = torch.ones(3, 9, 5, device=device)
    masked, keep = run["word_soft_mask"](*inputs, index, features, 1, None, 0.25)
    assert keep[[0, 2], 1:].isnan().all() and masked[[0, 2], 1:].isnan().all()
    expected = word_soft_mask(*(tensor[1:2] for tensor in inputs), index[1:2], scale=0.25, impl="reference")
    torch.testing.assert_close(keep[1:2], expected, rtol=1e-4, atol=1e-5)
    assert run["word_gradcam"](*inputs, index, None, None, None, 0.25)[[0, 2]].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch(impl, device):
    require("word_mask", impl, device, torch.float32, 16)
    inputs, word_index = draw((0, 2, 3, 5, 16), torch.float32, device)
    masked, keep = word_soft_mask(*inputs, word_index.view(0), torch.ones(0, 5, 7, device=device), impl=impl)
    assert masked.shape == (0, 5, 7) and keep.shape == (0, 5)
    assert word_gradcam(*inputs, impl=impl).shape == (0, 3, 5)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("query", [1.0], TypeError, r"query: expected a tensor, got list"),
        (
            "query",
            torch.ones(2, 2, 3, 4, dtype=torch.int32),
            TypeError,
            r"query: expected dtype .*float32.*, got int32",
        ),
        ("key", torch.ones(2, 2, 0, 4), ValueError, r"key: expected at least one token, got size \(2, 2, 0, 4\)"),
        ("key", torch.ones(2, 5, 4), ValueError, r"key: expected size \(2, Hk, N, 4\), got \(2, 5, 4\)"),
        ("key", torch.ones(2, 3, 5, 4), ValueError, r"key: expected a number of heads that divides the 2 .*, got 3"),
        ("key", torch.ones(2, 2, 5, 4).double(), TypeError, r"key: expected dtype float32 as query, got float64"),
        ("value", torch.ones(2, 2, 6, 4), ValueError, r"value: expected size \(2, 2, 5, 4\), got \(2, 2, 6, 4\)"),
        ("grad_output", torch.ones(2, 2, 4, 4), ValueError, r"grad_output: expected size \(2, 2, 3, 4\)"),
        ("word_index", torch.tensor([0, 3]), ValueError, r"word_index: expected values from 0 to 2, got 3"),
        ("word_index", torch.tensor([-1, 0]), ValueError, r"word_index: expected values from 0 to 2, got -1"),
        ("word_index", torch.zeros(2), TypeError, r"word_index: expected dtype int64, got float32"),
        ("word_index", None, TypeError, r"word_index: expected a tensor, got NoneType"),
        ("features", torch.ones(2, 5, 3).double(), TypeError, r"features: expected dtype .*float32, got float64"),
        ("features", torch.ones(2, 4, 3), ValueError, r"features: expected size \(2, 5, C\), got \(2, 4, 3\)"),
        (
            "features",
            torch.ones(2, 5, 3, device="meta"),
            ValueError,
            r"features: expected device cpu as query, got meta",
        ),
        ("key_mask", torch.ones(2, 5), TypeError, r"key_mask: expected dtype bool, got float32"),
        ("key_mask", torch.ones(1, 5).bool(), ValueError, r"key_mask: expected size \(2, 5\), got \(1, 5\)"),
        ("prefix_tokens", 6, ValueError, r"prefix_tokens: expected a number from 0 to 5, got 6"),
        ("prefix_tokens", 1.0, TypeError, r"prefix_tokens: expected an integer, got float"),
        ("scale", "1", TypeError, r"scale: expected a number, got str"),
        ("impl", "fast", ValueError, r"impl: word_mask has the implementations .*reference.*; got 'fast'"),
    ],
)
def test_errors_name_the_argument(argument, value, error, message):
    (query, key, other, grad_output), _ = draw((2, 2, 3, 5, 4), torch.float32, "cpu")
    arguments = {"query": query, "key": key, "value": other, "grad_output": grad_output}
    arguments |= {"word_index": torch.tensor([0, 2]), "features": torch.ones(2, 5, 3)}
    with pytest.raises(error, match=message):
        word_soft_mask(**(arguments | {argument: value}))


def test_an_implementation_that_cannot_run_says_why():
    broken = registry.Implementation("broken", {}, lambda device, dtype, width: "it needs a moon")
    inputs, word_index = draw((1, 1, 2, 3, 4), torch.float32, "cpu")
    before = registry.implementations("word_mask")
    with registry.registered("word_mask", broken):
        with pytest.raises(ValueError, match="impl: word_mask cannot run 'broken' here: it needs a moon"):
            word_gradcam(*inputs, word_index, impl="broken")
        assert registry.describe()["word_mask"]["cpu"] != "broken"
    assert registry.implementations("word_mask") == before


def test_autocast_casts_like_attention():
    inputs, word_index = draw((2, 2, 3, 5, 16), torch.float32, "cpu")
    features = torch.randn(2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        masked, keep = word_soft_mask(*inputs, word_index, features, impl="reference")
    expected = word_soft_mask(*(tensor.bfloat16() for tensor in inputs), word_index, impl="reference")
    assert torch.equal(keep, expected) and masked.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS[:2])
def test_opcheck(impl):
    require("word_mask", impl, torch.device("cpu"), torch.float32, 16)
    inputs, word_index = draw((2, 2, 3, 5, 16), torch.float32, "cpu")
    key_mask = torch.rand(2, 5) > 0.3
    features = torch.randn(2, 5, 3, requires_grad=True)
    for mask in (None, key_mask):
        for index in (None, word_index):
            for extra in ((None, None), (torch.ones(2, 2, 3), 2.0)):
                torch.library.opcheck(torch.ops.softmask_fast.word_gradcam, (*inputs, index, mask, *extra, 0.25, impl))
        for x in (None, features):
            torch.library.opcheck(torch.ops.softmask_fast.word_soft_mask, (*inputs, word_index, x, 1, mask, 0.25, impl))


def test_compiles_in_one_graph_with_dynamic_sizes():
    compiled = torch.compile(
        lambda *args: word_soft_mask(*args)[0].square(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for sizes in ((2, 2, 3, 5, 16), (3, 2, 4, 9, 16)):
        inputs, word_index = draw(sizes, torch.float32, "cpu")
        features = torch.randn(sizes[0], sizes[3], 6, requires_grad=True)
        masked, keep = word_soft_mask(*inputs, word_index, features)
        compiled(*inputs, word_index, features).sum().backward()
        torch.testing.assert_close(features.grad, 2 * masked.detach() * keep[:, :, None])


def test_what_is_observed_takes_the_registered_operator():
    """Counting, fake tensors and autograd give what a plain call gives."""
    inputs, word_index = draw((2, 2, 3, 5, 16), torch.float32, "cpu")
    features, grad = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    seen = []

    class Observer(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    masked, keep = word_soft_mask(*inputs, word_index, features)
    (gradient,) = torch.autograd.grad(masked, features, grad)
    with Observer():
        observed, again = word_soft_mask(*inputs, word_index, features)
        (same_gradient,) = torch.autograd.grad(observed, features, grad)
    assert "softmask_fast::word_soft_mask" in seen
    assert torch.equal(masked, observed) and torch.equal(keep, again) and torch.equal(gradient, same_gradient)

import mmap
import resource

import pytest
import torch
import word_mask_cases as cases
from compare import assert_as_accurate, each_implementation, require, thin_out
from word_masks import DTYPES, SIZES, draw, full_maps, keep_from_map, of_word

from softmask_fast.ops import attention_output_gradient, registry, word_gradcam, word_soft_mask

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
EACH = each_implementation("word_mask")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@EACH
def test_map_matches_full_attention_maps(impl, sizes, dtype, masked, device):
    thin_out(impl, SIZES.index(sizes), DTYPES.index(dtype), masked)
    cases.map_matches_full_attention_maps(impl, sizes, dtype, masked, device)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@EACH
def test_soft_mask(impl, dtype, prefix, masked, device):
    thin_out(impl, DTYPES.index(dtype), prefix, masked)
    cases.soft_mask(impl, dtype, prefix, masked, device)


@pytest.mark.parametrize("every_word", [False, True])
@EACH
def test_nan_stays_nan_and_padding_is_not_read(impl, every_word, device):
    cases.nan_stays_nan_and_padding_is_not_read(impl, every_word, device)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.__name__)
@EACH
def test_case(impl, case, device):
    case(impl, device)


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


@pytest.mark.parametrize("tokens", [257, 577, 1025, 4096])
@EACH
def test_many_tokens(impl, tokens, device):
    inputs, word_index = draw((1, 2, 2, tokens, 16), torch.float32, device)
    key_mask = torch.rand(1, tokens, device=device) > 0.3
    truth, baseline = (
        keep_from_map(of_word(full_maps(*cast, key_mask), word_index), 1, key_mask)
        for cast in ([tensor.double() for tensor in inputs], inputs)
    )
    keep = word_soft_mask(*inputs, word_index, key_mask=key_mask, impl=impl)
    assert keep.min() == 0 and keep.max() == 1
    assert_as_accurate(keep, baseline, truth, torch.float32)


@each_implementation("word_mask", "triton")
def test_keep_alone_takes_no_pass_over_features(monkeypatch, impl, device):
    from softmask_fast.ops.word_mask import triton_kernels

    monkeypatch.setattr(triton_kernels, "mask_features", None)
    inputs, word_index = draw((2, 2, 3, 5, 16), torch.bfloat16, device)
    empty, keep = torch.ops.softmask_fast.word_soft_mask(*inputs, word_index, None, 1, None, 0.25, impl)
    assert keep.shape == (2, 5) and empty.numel() == 0 and empty.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="subscriptable"):
        word_soft_mask(*inputs, word_index, torch.ones(2, 5, 3, device=device), impl=impl)


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


def test_features_pass_gradcheck():
    inputs, word_index = draw((2, 2, 3, 5, 4), torch.float64, "cpu")
    features = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: word_soft_mask(*inputs, word_index, x)[0], features)
    assert torch.autograd.gradgradcheck(lambda x: word_soft_mask(*inputs, word_index, x)[0], features)


@each_implementation("word_mask", "triton", "cuda")
def test_on_a_gpu_a_word_out_of_range_gives_nan(impl, device):
    """There nobody reads the indices on the host, so the kernel says it, and the other images are right."""
    run = registry.resolve("word_mask", impl, device)
    inputs, _ = draw((3, 2, 4, 9, 16), torch.float32, device)
    index = torch.tensor([4, 1, -1], device=device)
    features = torch.ones(3, 9, 5, device=device)
    masked, keep = run["word_soft_mask"](*inputs, index, features, 1, None, 0.25)
    assert keep[[0, 2], 1:].isnan().all() and masked[[0, 2], 1:].isnan().all()
    expected = word_soft_mask(*(tensor[1:2] for tensor in inputs), index[1:2], scale=0.25, impl="reference")
    torch.testing.assert_close(keep[1:2], expected, rtol=1e-4, atol=1e-5)
    assert run["word_gradcam"](*inputs, index, None, None, None, 0.25)[[0, 2]].isnan().all()


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


@pytest.mark.parametrize("impl", ["reference", "cpp"])
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

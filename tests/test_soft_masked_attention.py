import itertools

import pytest
import torch
from compare import assert_as_accurate, each_implementation, require, thin_out
from masked_attention import DTYPES, NAMES, SIZES, draw, plain, with_gradients

from softmask_fast.ops import plan_image_index, registry, soft_masked_attention

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
EACH = each_implementation("soft_masked_attention")


def compare(tensors, dtype, impl, **options):
    grad_output = torch.randn_like(tensors["query"])
    truth = with_gradients(plain, tensors, grad_output, torch.float64, **options)
    baseline = with_gradients(plain, tensors, grad_output, dtype, **options)
    actual = with_gradients(soft_masked_attention, tensors, grad_output, impl=impl, **options)
    for name, tensor in actual.items():
        assert tensor.dtype == tensors.get(name, tensors["query"]).dtype
        assert_as_accurate(tensor, baseline[name], truth[name], dtype, name)
    return actual


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@EACH
def test_matches_masked_and_gathered_keys(impl, sizes, dtype, masked, device):
    thin_out(impl, SIZES.index(sizes), DTYPES.index(dtype), masked)
    tensors, image_index = draw(sizes, dtype, device)
    key_mask = None
    if masked:
        key_mask = (torch.rand(sizes[1], sizes[4]) > 0.4).to(device)
        key_mask[:, :2] = True  # one token alone gives logits without a gradient: test_single_token
    compare(tensors, dtype, impl, image_index=image_index, key_mask=key_mask)
    del tensors["keep"], tensors["value_bias"]
    compare(tensors, dtype, impl, image_index=image_index, key_mask=key_mask)


@EACH
def test_every_order_of_sequences(impl, device):
    """One image for all, one sequence each, images without any sequence, none given."""
    for order in ([2, 2, 2, 2], [3, 1, 0, 2], [1, 0, 1, 0], [0, 3, 3, 3], None):
        tensors, _ = draw((4, 4, 2, 3, 19, 16), torch.float32, device)
        image_index = None if order is None else torch.tensor(order, device=device)
        compare(tensors, torch.float32, impl, image_index=image_index)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@EACH
def test_images_of_few_and_of_many_rows(impl, dtype, device):
    """In one call: none, one sequence, exactly a tile of rows, one sequence more, several tiles."""
    length = 32 if device.type == "cuda" else 4  # the Triton kernels take tiles of 128 rows, interpreted of 16
    image_index = torch.arange(5).repeat_interleave(torch.tensor([0, 1, 4, 5, 9]))[torch.randperm(19)].to(device)
    tensors, _ = draw((19, 5, 1, length, 35, 16), dtype, device)
    compare(tensors, dtype, impl, image_index=image_index)
    del tensors["keep"], tensors["value_bias"]
    actual = compare(tensors, dtype, impl, image_index=image_index)
    for name in ("key", "value"):
        assert torch.equal(actual[name][0], torch.zeros_like(actual[name][0])), name


@each_implementation("soft_masked_attention", "triton")
def test_keys_that_nobody_sees_may_be_nan(impl, device):
    """An image without a sequence has zero gradients whatever is in it."""
    tensors, _ = draw((4, 3, 1, 3, 9, 16), torch.bfloat16, device)
    tensors["key"][1], tensors["value"][1] = (float("nan"),) * 2
    options = {"image_index": torch.tensor([2, 0, 2, 2], device=device), "impl": impl}
    actual = with_gradients(soft_masked_attention, tensors, torch.ones_like(tensors["query"]), **options)
    for name, tensor in actual.items():
        assert tensor.isfinite().all(), name
    assert not actual["key"][1].any() and not actual["value"][1].any()


@EACH
def test_saturated_softmax(impl, device):
    tensors, image_index = draw((3, 2, 2, 5, 21, 16), torch.float32, device, spread=20.0)
    compare(tensors, torch.float32, impl, image_index=image_index, scale=1.0)


@EACH
def test_bitwise_reproducible(impl, device):
    tensors, image_index = draw((9, 3, 2, 7, 65, 32), torch.float32, device)
    grad_output = torch.randn_like(tensors["query"])
    first, second = (
        with_gradients(soft_masked_attention, tensors, grad_output, image_index=image_index, impl=impl)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@EACH
def test_every_subset_of_gradients(impl, device):
    tensors, image_index = draw((5, 2, 2, 3, 11, 16), torch.float32, device)
    grad_output = torch.randn_like(tensors["query"])
    full = with_gradients(soft_masked_attention, tensors, grad_output, image_index=image_index, impl=impl)
    for wanted in itertools.product((False, True), repeat=len(NAMES)):
        leaves = {name: tensors[name].detach().requires_grad_(want) for name, want in zip(NAMES, wanted, strict=True)}
        output = soft_masked_attention(**leaves, image_index=image_index, impl=impl)
        assert output.requires_grad == any(wanted)
        if any(wanted):
            output.backward(grad_output)
        for name, want in zip(NAMES, wanted, strict=True):
            assert (leaves[name].grad is not None) == want, (name, wanted)
            assert not want or torch.equal(leaves[name].grad, full[name]), (name, wanted)


def test_gradcheck():
    tensors, image_index = draw((4, 2, 2, 2, 5, 3), torch.float64, "cpu")
    key_mask = torch.tensor([[True, True, False, True, True], [True] * 5])
    leaves = [tensors[name].requires_grad_() for name in NAMES]

    def run(*args):
        arguments = dict(zip(NAMES, args, strict=True))
        return soft_masked_attention(**arguments, image_index=image_index, key_mask=key_mask)

    assert torch.autograd.gradcheck(run, leaves)


def test_equals_attention_over_masked_features():
    """Keys and values projected from keep * x, with their biases, through PyTorch's own attention."""
    features = torch.randn(2, 7, 6, dtype=torch.float64)
    key_layer, value_layer = (torch.nn.Linear(6, 8).double() for _ in range(2))
    query, keep = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64)

    def heads(projected):
        return projected.unflatten(-1, (2, 4)).transpose(1, 2)

    masked = features * keep[:, :, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, heads(key_layer(masked)), heads(value_layer(masked))
    )
    key, value = (heads(features @ layer.weight.mT) for layer in (key_layer, value_layer))
    actual = soft_masked_attention(query, key, value, keep, value_bias=value_layer.bias.view(2, 4))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@EACH
def test_images_of_padding_only(impl, device):
    """Their sequences give the value bias, and no gradient but the bias's own."""
    tensors, _ = draw((3, 2, 2, 5, 9, 16), torch.float32, device)
    image_index = torch.tensor([1, 0, 1], device=device)
    key_mask = torch.tensor([[False] * 9, [True] * 9], device=device)
    grad_output = torch.randn_like(tensors["query"])
    options = {"image_index": image_index, "key_mask": key_mask, "impl": impl}
    actual = with_gradients(soft_masked_attention, tensors, grad_output, **options)
    assert torch.equal(actual["output"][1], tensors["value_bias"][:, None].expand(2, 5, 16))
    for name in ("query", "keep"):
        assert torch.equal(actual[name][1], torch.zeros_like(actual[name][1])), name
    for name in ("key", "value"):
        assert torch.equal(actual[name][0], torch.zeros_like(actual[name][0])), name
    torch.testing.assert_close(actual["value_bias"], grad_output.sum((0, 2)))
    del tensors["value_bias"]
    actual = with_gradients(soft_masked_attention, tensors, grad_output, **options)
    assert torch.equal(actual["output"][1], torch.zeros_like(actual["output"][1]))
    assert all(torch.isfinite(tensor).all() for tensor in actual.values())


@EACH
def test_nan_reaches_what_attends_to_it(impl, device):
    """In the keys of tokens that are not attended it reaches no output; as in PyTorch, in their values it does."""
    tensors, image_index = draw((4, 4, 2, 3, 9, 16), torch.float32, device)
    key_mask = torch.ones(4, 9, dtype=torch.bool, device=device)
    key_mask[:, 8] = False
    tensors["key"][0, :, 3], tensors["value"][1, :, 3], tensors["key"][2, :, 8] = (float("nan"),) * 3
    output = soft_masked_attention(**tensors, image_index=image_index, key_mask=key_mask, impl=impl)
    nan = output[image_index.argsort()].isnan().flatten(1)  # of the sequence of image 0, 1, 2, 3
    assert nan.all(1).tolist() == nan.any(1).tolist() == [True, True, False, False]


@EACH
def test_any_strides(impl, device):
    tensors, image_index = draw((4, 2, 3, 5, 11, 16), torch.float32, device)
    grad_output = torch.randn_like(tensors["query"])
    expected = with_gradients(soft_masked_attention, tensors, grad_output, image_index=image_index, impl="reference")

    def as_projection(tensor):  # (B, L, H, D) seen as (B, H, L, D), the usual view of a linear layer's output
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2) if tensor.dim() == 4 else tensor

    def reversed_dimensions(tensor):
        return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))

    def every_second(tensor):
        return torch.stack((tensor, tensor), -1).flatten(-2)[..., ::2]

    for layout in (as_projection, reversed_dimensions, every_second):
        strided = {name: layout(tensor) for name, tensor in tensors.items()}
        actual = with_gradients(soft_masked_attention, strided, layout(grad_output), image_index=image_index, impl=impl)
        for name, tensor in actual.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=f"{layout.__name__} {name}")


@EACH
def test_empty_sizes(impl, device):
    for sizes in ((0, 0, 2, 3, 5, 16), (2, 2, 2, 0, 5, 16)):
        tensors, _ = draw(sizes, torch.float32, device)
        actual = with_gradients(soft_masked_attention, tensors, torch.zeros_like(tensors["query"]), impl=impl)
        assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in actual.values())
    tensors, _ = draw((1, 2, 2, 3, 5, 16), torch.float32, device)
    nobody = {name: tensor[:0] if name in ("query", "keep") else tensor for name, tensor in tensors.items()}
    index = torch.zeros(0, dtype=torch.int64, device=device)
    actual = with_gradients(soft_masked_attention, nobody, nobody["query"], image_index=index, impl=impl)
    assert actual["output"].shape == (0, 2, 3, 16) and torch.equal(actual["key"], torch.zeros_like(tensors["key"]))


@EACH
def test_single_token(impl, device):
    """All attention is on it: the output is keep * value + bias, and the logits have no gradient."""
    tensors, image_index = draw((3, 2, 2, 5, 1, 16), torch.float32, device)
    grad_output = torch.randn_like(tensors["query"])
    actual = with_gradients(soft_masked_attention, tensors, grad_output, image_index=image_index, impl=impl)
    expected = tensors["value"][image_index] * tensors["keep"][:, None, :, None] + tensors["value_bias"][:, None]
    torch.testing.assert_close(actual["output"], expected.expand_as(grad_output))
    for name in ("query", "key"):  # PyTorch gives zero here; a difference of two rounded numbers may remain
        assert actual[name].abs().max() < 1e-5


@each_implementation("soft_masked_attention", "triton")
def test_on_a_gpu_a_sequence_without_an_image_gives_nan(impl, device):
    """There nobody reads the indices on the host, so the kernel says it, and the other sequences are right."""
    from softmask_fast.ops.soft_masked_attention import triton_launch

    tensors, _ = draw((4, 2, 2, 3, 9, 16), torch.float32, device)
    query, key, value, keep, bias = (tensors[name] for name in NAMES)
    index = torch.tensor([1, 2, 0, -1], device=device)
    output, statistics = triton_launch.forward(query, key, value, keep, index, None, None, bias, None, 0.25)
    assert output[[1, 3]].isnan().all()
    expected = plain(query[[0, 2]], key, value, keep[[0, 2]], bias, index[[0, 2]])
    torch.testing.assert_close(output[[0, 2]], expected)
    gradients = triton_launch.backward(
        torch.ones_like(query), query, key, value, keep, index, None, None, bias, None, output, statistics, 0.25,
        True, True, True,
    )  # fmt: skip
    d_query, d_key, d_value, d_keep = gradients
    assert d_query[[1, 3]].isnan().all() and d_keep[[1, 3]].isnan().all()
    assert all(tensor.isfinite().all() for tensor in (d_query[[0, 2]], d_keep[[0, 2]], d_key, d_value))


def test_second_derivative_raises():
    tensors, image_index = draw((2, 2, 1, 2, 3, 4), torch.float64, "cpu")
    query = tensors.pop("query").requires_grad_()
    output = soft_masked_attention(query, **tensors, image_index=image_index)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="soft_masked_attention: second derivatives are not implemented"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("query", torch.ones(4, 2, 3), ValueError, r"query: expected size \(S, H, L, D\), got \(4, 2, 3\)"),
        ("key", torch.ones(2, 2, 0, 4), ValueError, r"key: expected at least one token, got size \(2, 2, 0, 4\)"),
        ("key", torch.ones(2, 3, 5, 4), ValueError, r"key: expected size \(B, 2, N, 4\), got \(2, 3, 5, 4\)"),
        ("value", torch.ones(2, 2, 6, 4), ValueError, r"value: expected size \(2, 2, 5, 4\), got \(2, 2, 6, 4\)"),
        ("value", torch.ones(2, 2, 5, 4).half(), TypeError, r"value: expected dtype float32 as query, got float16"),
        ("keep", torch.ones(2, 5), ValueError, r"keep: expected size \(4, 5\), got \(2, 5\)"),
        ("keep", torch.ones(4, 5).bool(), TypeError, r"keep: expected dtype .*float32.*, got bool"),
        ("image_index", None, ValueError, r"image_index: expected a tensor for 4 sequences of 2 images, got None"),
        ("image_index", torch.tensor([0, 1, 2, 0]), ValueError, r"image_index: expected values from 0 to 1, got 2"),
        ("image_index", torch.zeros(4).int(), TypeError, r"image_index: expected dtype int64, got int32"),
        ("value_bias", torch.ones(8), ValueError, r"value_bias: expected size \(2, 4\), got \(8,\)"),
        ("key_mask", torch.ones(4, 5).bool(), ValueError, r"key_mask: expected size \(2, 5\), got \(4, 5\)"),
        ("key_mask", torch.ones(2, 5, device="meta").bool(), ValueError, r"key_mask: expected device cpu .*, got meta"),
        ("scale", None.__class__, TypeError, r"scale: expected a number, got type"),
        ("boundaries", torch.ones(0).int(), ValueError, r"query: expected size \(T, H, D\), got \(4, 2, 3, 4\)"),
        ("impl", "fast", ValueError, r"impl: soft_masked_attention has the implementations .*; got 'fast'"),
    ],
)
def test_errors_name_the_argument(argument, value, error, message):
    tensors, _ = draw((4, 2, 2, 3, 5, 4), torch.float32, "cpu")
    tensors["image_index"] = torch.tensor([0, 1, 1, 0])
    with pytest.raises(error, match=message):
        soft_masked_attention(**(tensors | {argument: value}))


def test_packed_rows_need_a_boundary():
    rows, keys = torch.ones(4, 2, 3), torch.ones(1, 2, 5, 3)
    with pytest.raises(ValueError, match="^boundaries: expected at least one element, got none$"):
        soft_masked_attention(rows, keys, keys, boundaries=torch.ones(0, dtype=torch.int32))


def test_autocast_casts_like_attention():
    tensors, image_index = draw((4, 2, 2, 3, 5, 16), torch.float32, "cpu")
    grad_output = torch.randn_like(tensors["query"]).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        output = soft_masked_attention(**leaves, image_index=image_index, impl="reference")
        output.backward(grad_output.to(output.dtype))
    cast = {name: tensor.bfloat16() if name in NAMES[:3] else tensor for name, tensor in tensors.items()}
    expected = with_gradients(soft_masked_attention, cast, grad_output, image_index=image_index, impl="reference")
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected.pop("output"))
    for name, gradient in expected.items():
        assert leaves[name].grad.dtype == torch.float32 and torch.equal(leaves[name].grad, gradient.float()), name


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_opcheck(impl):
    require("soft_masked_attention", impl, torch.device("cpu"), torch.float32, 16)
    tensors, image_index = draw((4, 2, 2, 3, 5, 16), torch.float32, "cpu")
    query, key, value, keep, bias = (tensors[name].requires_grad_() for name in NAMES)
    key_mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    forward = torch.ops.softmask_fast.soft_masked_attention
    torch.library.opcheck(forward, (query[:2], key, value, *(None,) * 6, 0.25, impl))
    boundaries = torch.tensor([0, 3, 3, 5, 10], dtype=torch.int32)
    rows = query.detach().transpose(1, 2).flatten(0, 1).requires_grad_()
    for rows_or_query, *sequences in (
        (query, image_index, None, None),
        (query, image_index, None, plan_image_index(image_index, 2).table),
        (rows, image_index, boundaries, plan_image_index(image_index, 2, boundaries=boundaries, rows=12).table),
    ):
        arguments = (rows_or_query, key, value, keep, *sequences, bias, key_mask)
        torch.library.opcheck(forward, (*arguments, 0.25, impl))
        output, statistics = (tensor.detach() for tensor in forward(*arguments, 0.25, impl))
        plain_arguments = [None if tensor is None else tensor.detach() for tensor in arguments]
        for wanted in ((True, True, True), (True, False, False), (False, True, False)):
            torch.library.opcheck(
                torch.ops.softmask_fast.soft_masked_attention_backward,
                (torch.randn_like(output), *plain_arguments, output, statistics, 0.25, *wanted, impl),
            )


def test_compiles_in_one_graph_with_dynamic_sizes():
    compiled = torch.compile(
        lambda index, **tensors: soft_masked_attention(**tensors, image_index=index).square(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for sizes in ((4, 2, 2, 3, 5, 16), (9, 3, 2, 4, 7, 16)):
        tensors, image_index = draw(sizes, torch.float32, "cpu")
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        compiled(image_index, **leaves).sum().backward()
        compiled_gradients = {name: leaf.grad.clone() for name, leaf in leaves.items()}
        output = soft_masked_attention(**leaves, image_index=image_index)
        expected = torch.autograd.grad(output.square().sum(), list(leaves.values()))
        for (name, actual), gradient in zip(compiled_gradients.items(), expected, strict=True):
            torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["query", "value", "keep"])
def test_forward_mode_and_transforms_are_refused(name):
    tensors, image_index = draw((4, 2, 2, 3, 5, 4), torch.float32, "cpu")
    x = tensors[name]

    def run(x):
        return soft_masked_attention(**(tensors | {name: x}), image_index=image_index).sum()

    for what, transform in (("forward mode", torch.func.jacfwd(run)), ("torch.func", torch.func.grad(run))):
        message = f"^soft_masked_attention: {what} is not supported; use torch.autograd.grad$"
        with pytest.raises(RuntimeError, match=message):
            transform(x)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_what_is_observed_takes_the_registered_operator(impl):
    """It gives the bits of a plain call, and is what counts operations."""
    require("soft_masked_attention", impl, torch.device("cpu"), torch.float32, 16)
    tensors, image_index = draw((4, 2, 2, 3, 5, 16), torch.float32, "cpu")
    grad_output, seen = torch.randn_like(tensors["query"]), []

    class Observer(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    options = {"image_index": image_index, "impl": impl}
    plainly = with_gradients(soft_masked_attention, tensors, grad_output, **options)
    with Observer():
        observed = with_gradients(soft_masked_attention, tensors, grad_output, **options)
    assert {"softmask_fast::soft_masked_attention", "softmask_fast::soft_masked_attention_backward"} <= set(seen)
    assert all(torch.equal(plainly[name], observed[name]) for name in plainly)


def test_the_choice_of_implementation_is_described():
    runnable = registry.runnable("soft_masked_attention", torch.device("cpu"))
    assert registry.describe()["soft_masked_attention"]["cpu"] == ("cpp" if "cpp" in runnable else "reference")

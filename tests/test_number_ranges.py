"""What no operator computes with is refused alike by every implementation; what is not a number stays so in all."""

import math

import pytest
import torch

from softmask_fast.ops import FocalITCLoss, focal_itc_loss, registry, word_gradcam, word_soft_mask
from softmask_fast.ops.soft_masked_attention import soft_masked_attention

IMPLS = (None, *dict.fromkeys(i.name for operator in registry.operators() for i in registry.implementations(operator)))
FOCAL = registry.runnable("focal_itc", torch.device("cpu"))
FINITE, SMALLEST = "expected a finite number of size at most 1e\\+12, got", "expected a number of at least 1e-12, got"
IMAGE, TEXT = torch.nn.functional.normalize(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)), dim=-1)


def one_message(call, expected, known=IMPLS) -> None:
    """Every implementation, those that cannot run here too, refuses the call in the same line."""
    messages = set()
    for impl in known:
        with pytest.raises((ValueError, TypeError), match=f"^{expected}") as caught:
            call(impl=impl)
        messages.add(str(caught.value))
    assert len(messages) == 1 and "\n" not in messages.pop()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2e12, 10**40])
def test_numbers_that_are_not_finite_or_too_large(value):
    x = torch.randn(1, 1, 2, 4)
    one_message(lambda **o: focal_itc_loss(IMAGE, TEXT, temperature=value, **o), f"temperature: {FINITE}")
    one_message(lambda **o: focal_itc_loss(IMAGE, TEXT, temperature=1, gamma=value, **o), f"gamma: {FINITE}")
    one_message(
        lambda **o: focal_itc_loss(
            IMAGE, TEXT, temperature=1, alpha=value, teacher_image=IMAGE, teacher_text=TEXT, **o
        ),
        f"alpha: {FINITE}",
    )
    one_message(
        lambda **o: focal_itc_loss(IMAGE, TEXT, temperature=1, loss="sigmoid", bias=value, **o), f"bias: {FINITE}"
    )
    one_message(lambda **o: word_gradcam(x, x, x, x, scale=value, **o), f"scale: {FINITE}")
    one_message(lambda **o: word_gradcam(x, x, x, x, soft_cap=value, **o), f"soft_cap: {FINITE}")
    one_message(lambda **o: soft_masked_attention(x, x, x, scale=value, **o), f"scale: {FINITE}")
    with pytest.raises(ValueError, match=f"temperature: {FINITE}"):
        FocalITCLoss(8, 0, gather="with_grad")(IMAGE, TEXT, temperature=value)


@pytest.mark.parametrize("value", [1e-13, 5e-324, 1e-40])
def test_numbers_that_vanish(value):
    x = torch.randn(1, 1, 2, 4)
    one_message(lambda **o: focal_itc_loss(IMAGE, TEXT, temperature=value, **o), f"temperature: {SMALLEST}")
    one_message(lambda **o: word_gradcam(x, x, x, x, soft_cap=value, **o), f"soft_cap: {SMALLEST}")
    one_message(
        lambda **o: focal_itc_loss(IMAGE, TEXT, temperature=1, gamma=1001, **o), "gamma: expected a number of at"
    )


@pytest.mark.parametrize("value", [math.inf, math.nan, -0.07, 0.0, 1e-20])
def test_a_tensor_on_the_cpu_is_checked_as_a_number_is(value):
    number = torch.tensor(value, requires_grad=True)
    one_message(lambda **o: focal_itc_loss(IMAGE, TEXT, temperature=number, **o), "temperature: expected a ")
    if not math.isfinite(value):
        one_message(
            lambda **o: focal_itc_loss(IMAGE, TEXT, temperature=1, loss="sigmoid", bias=number, **o), f"bias: {FINITE}"
        )
    if not 0 <= value <= 1:
        teachers = dict(teacher_image=IMAGE, teacher_text=TEXT)
        one_message(lambda **o: focal_itc_loss(IMAGE, TEXT, temperature=1, alpha=number, **teachers, **o), "alpha: exp")
    compiled = torch.compile(focal_itc_loss, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="^temperature: expected a "):  # when the graph runs
        compiled(IMAGE, TEXT, temperature=number)


def test_the_ends_of_the_ranges_are_computed():
    for temperature in (1e-12, 1e12):
        losses = [focal_itc_loss(IMAGE, TEXT, temperature=temperature, impl=i).item() for i in FOCAL]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5) and math.isfinite(losses[0])
    x = torch.randn(2, 1, 3, 4)
    for number in (1e-12, 1e12):
        for options in ({"scale": number}, {"scale": -number}, {"soft_cap": number}):
            maps = [word_gradcam(x, x, x, x, **options, impl=impl) for impl in ("reference", "cpp")]
            torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 0, 3, 4), (2, 1, 3, 0), (0, 0, 3, 4), (1, 1, 0, 0)])
def test_no_heads_and_no_columns(sizes):
    x, index = torch.zeros(sizes), torch.zeros(sizes[0], dtype=torch.int64)
    expected = f"query: expected at least one {'head' if sizes[1] == 0 else 'column'}, got size"
    one_message(lambda **o: word_gradcam(x, x, x, x, **o), expected)
    one_message(lambda **o: word_soft_mask(x, x, x, x, index, **o), expected)
    one_message(lambda **o: soft_masked_attention(x, x, x, **o), expected)


def test_other_kinds_of_tensors():
    x = torch.randn(1, 2, 3, 4)
    kinds = [
        (x.to_sparse(), "query: expected a dense tensor, got layout sparse_coo"),
        (x[0, 0].to_sparse_csr(), "query: expected a dense tensor, got layout sparse_csr"),
        (x.to_mkldnn(), "query: expected a dense tensor, got layout _mkldnn"),
        (x.to("meta"), "query: expected a tensor with data, got one on the meta device"),
        (x.to(torch.complex64), "query: expected dtype float16 or .*, got complex64"),
        (x.to(torch.int8), "query: expected dtype float16 or .*, got int8"),
        (torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "query: expected dtype float16 or .*, got qint8"),
        (x.to(torch.float8_e4m3fn), "query: expected dtype float16 or .*, got float8_e4m3fn"),
        (torch.tensor(1.0), "query: expected size .*, got \\(\\)"),
        (x.numpy(), "query: expected a tensor, got ndarray"),
    ]
    for tensor, expected in kinds:
        one_message(lambda t=tensor, **o: word_gradcam(t, x, x, x, **o), expected)
        one_message(lambda t=tensor, **o: word_soft_mask(t, x, x, x, torch.zeros(1, dtype=torch.int64), **o), expected)
        one_message(lambda t=tensor, **o: soft_masked_attention(t, x, x, **o), expected)
        one_message(
            lambda t=tensor, **o: focal_itc_loss(t, TEXT, temperature=1, **o), expected.replace("query", "image")
        )
    for name, tensor in (("key", x.to("meta")), ("value", x.to_sparse()), ("key", x.double())):
        arguments = dict(query=x, key=x, value=x, grad_output=x) | {name: tensor}
        one_message(lambda a=arguments, **o: word_gradcam(**a, **o), f"{name}: expected ")


def test_a_view_with_the_negative_bit_is_read_as_its_values():
    plain = torch.randn(2, 3, 4, 5)
    view = torch.complex(plain, -plain).conj().imag
    assert view.is_neg() and torch.equal(view, plain)
    for call in (lambda x: word_gradcam(x, x, x, x), lambda x: soft_masked_attention(x, x, x)):
        assert torch.equal(call(view), call(plain))


def not_finite(where: str, value: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = dict(image=5, text=5, image_keys=9, text_keys=9, teacher_image=5, teacher_text=5)
    tensors = {name: torch.randn(rows, 6, generator=generator) for name, rows in sizes.items()}
    tensors = {name: torch.nn.functional.normalize(x, dim=-1) for name, x in tensors.items()}
    tensors[where][3] = 0.0  # a product of 0 with the value below is NaN, others infinite of both signs
    tensors[where][3, 2] = value
    return tensors


@pytest.mark.parametrize("impl", FOCAL)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["image", "text_keys", "teacher_text"])
def test_a_row_with_a_product_that_is_not_finite_has_no_loss(where, value, impl):
    tensors = not_finite(where, value)
    lost = torch.zeros(2, 5, dtype=torch.bool)
    lost[{"image": 0, "teacher_text": 1, "text_keys": 0}[where], slice(None) if where == "text_keys" else 3] = True
    for gamma in (0, 2, 0.5):
        for options in ({"positives": "mean"}, {"positives": "any", "alpha": 0.4}):
            if "teacher" in where and "alpha" not in options:
                continue
            inputs = {name: x.clone().requires_grad_("teacher" not in name) for name, x in tensors.items()}
            if "alpha" not in options:
                inputs = {name: x for name, x in inputs.items() if "teacher" not in name}
            loss, stats = focal_itc_loss(
                **inputs, **options, temperature=0.1, gamma=gamma, reduction="none", return_stats=True, impl=impl
            )
            assert torch.equal(loss.isnan(), lost.any(0)), (gamma, options)
            if "teacher" not in where:  # the statistics are the model's own
                assert torch.equal(torch.stack([stats.image_hard_negative, stats.text_hard_negative]) == -1, lost)
                found = [x.isnan().item() for x in (stats.image_accuracy, stats.text_accuracy)]
                assert found == lost.any(1).tolist()
            gradients = torch.autograd.grad(loss[3], [inputs["image"], inputs["text"]])
            assert [bool(x[3].isnan().any()) for x in gradients] == lost[:, 3].tolist()


@pytest.mark.parametrize("impl", FOCAL)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_batch_that_is_its_own_keys_has_no_loss_with_an_infinite_feature(loss, value, impl):
    tensors = not_finite("text", value)
    inputs = [tensors[name].clone().requires_grad_() for name in ("image", "text")]
    for gamma in (0, 2, 0.5):
        result = focal_itc_loss(*inputs, temperature=0.1, gamma=gamma, loss=loss, reduction="none", impl=impl)
        assert result.isnan().all()
        assert all(x.isnan().any() for x in torch.autograd.grad(result.sum(), inputs))


@pytest.mark.parametrize("impl", registry.runnable("word_mask", torch.device("cpu")))
def test_a_map_with_an_infinite_logit_is_not_a_number(impl):
    query, grad_output = torch.ones(2, 1, 1, 2, 4)
    key, value = torch.ones(2, 1, 1, 3, 4)
    value = value * torch.tensor([1.0, -1.0, 1.0])[:, None]
    key[0, 0, 1, 0] = math.inf
    assert word_gradcam(query, key, value, grad_output, impl=impl).isnan().all()
    given = word_gradcam(query, key, value, grad_output, log_sum_exp=torch.full((1, 1, 2), 3.0), impl=impl)
    assert given.isnan().tolist() == [[[False, True, False]] * 2]
    low = torch.full((1, 1, 2), -99.0)  # no sum of these keys
    given = word_gradcam(query, key.clamp(max=1), value, grad_output, log_sum_exp=low, impl=impl)
    assert given.isinf().tolist() == [[[True, False, True]] * 2]

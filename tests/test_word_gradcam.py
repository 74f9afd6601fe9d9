"""word_gradcam beyond the usual attention: a part of the keys, capped logits, fewer heads of keys; no derivatives."""

import pytest
import torch
from compare import each_implementation, thin_out
from word_mask_cases import OPTIONS, attention_of_other_models
from word_masks import DTYPES, draw, full_maps, of_word

from softmask_fast.ops import attention_output_gradient, word_gradcam, word_soft_mask

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
EACH = each_implementation("word_mask")


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
@pytest.mark.parametrize(
    ("spread", "dtype"), [(1.0, DTYPES[0]), (20.0, DTYPES[0]), (1.0, DTYPES[1]), (20.0, DTYPES[2])]
)
@EACH
def test_attention_of_other_models(impl, spread, dtype, options, device):
    thin_out(impl, OPTIONS.index(options), 2 * DTYPES.index(dtype), spread > 1)
    attention_of_other_models(impl, spread, dtype, options, device)


def test_maps_of_a_part_of_the_keys():
    """With the log-sum-exp over all keys they are the part of the maps of all."""
    (query, key, value, grad_output), word_index = draw((2, 6, 4, 37, 24), torch.float64, "cpu")
    part, log_sum_exp = slice(5, 30), (query @ key.mT * 24**-0.5).logsumexp(-1)
    inputs = (query, key[:, :, part], value[:, :, part], grad_output)
    expected = full_maps(query, key, value, grad_output)[..., part]
    torch.testing.assert_close(word_gradcam(*inputs, log_sum_exp=log_sum_exp), expected, rtol=1e-12, atol=1e-14)
    one = word_gradcam(*inputs, word_index, log_sum_exp=log_sum_exp)
    torch.testing.assert_close(one, of_word(expected, word_index), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("log_sum_exp", torch.ones(2, 2, 5), ValueError, r"log_sum_exp: expected size \(2, 2, 3\), got \(2, 2, 5\)"),
        ("log_sum_exp", torch.ones(2, 2, 3).half(), TypeError, r"log_sum_exp: expected dtype float32, got float16"),
        ("log_sum_exp", 1.0, TypeError, r"log_sum_exp: expected a tensor, got float"),
        ("soft_cap", 0.0, ValueError, r"soft_cap: expected a number above 0, got 0.0"),
        ("soft_cap", "50", TypeError, r"soft_cap: expected a number, got str"),
    ],
)
def test_errors_name_the_argument_of_maps_alone(argument, value, error, message):
    inputs, _ = draw((2, 2, 3, 5, 4), torch.float32, "cpu")
    with pytest.raises(error, match=message):
        word_gradcam(*inputs, **{argument: value})


TRANSFORMS = {
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "grad": lambda function, x: torch.func.grad(lambda y: function(y).sum())(x),
    "vmap": lambda function, x: torch.vmap(function)(x[None]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_derivative_is_silently_zero(name):
    (query, key, value, grad_output), word_index = draw((2, 2, 3, 5, 4), torch.float32, "cpu")
    features = torch.randn(2, 5, 3)
    functions = {
        "word_gradcam": (lambda x: word_gradcam(query, x, value, grad_output), key),
        "word_soft_mask": (lambda x: word_soft_mask(query, key, value, grad_output, word_index, x)[0], features),
        "attention_output_gradient": (lambda x: attention_output_gradient(lambda o: o.square().sum(), x), query),
    }
    what = "forward mode" if name.startswith("j") else "torch.func"
    for operator, (function, x) in functions.items():
        with pytest.raises(RuntimeError, match=f"^{operator}: {what} is not supported; use torch.autograd.grad$"):
            TRANSFORMS[name](function, x)


def test_dual_tensors_are_refused():
    (query, key, value, grad_output), _ = draw((2, 2, 3, 5, 4), torch.float32, "cpu")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(key, key)
        with pytest.raises(RuntimeError, match="^word_gradcam: forward mode is not supported"):
            word_gradcam(query, dual, value, grad_output)

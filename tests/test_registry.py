"""When an operator may skip its registration, and which derivatives are refused by name."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from softmask_fast.ops import (
    FocalITCLoss,
    attention_output_gradient,
    focal_itc_loss,
    soft_masked_attention,
    triton_support,
    word_gradcam,
    word_soft_mask,
)
from softmask_fast.ops.registry import generation_reason, plain_eager, refuse_transforms, resolve


class Subclass(torch.Tensor):
    pass


def test_plain_eager_is_for_plain_tensors_alone():
    x = torch.randn(3)
    assert plain_eager(x, None, nn.Parameter(x))
    assert not plain_eager(x, x.as_subclass(Subclass))
    with FlopCounterMode(display=False):
        assert not plain_eager(x)
    with forward_ad.dual_level():
        assert not plain_eager(x)
    seen = []

    def look(y):
        seen.append(plain_eager(y))
        return y + 1

    make_fx(look, tracing_mode="fake")(x)
    torch.func.grad(lambda y: look(y).sum())(x)
    torch.jit.trace(look, x, check_trace=False)
    assert seen and not any(seen)
    compiled = torch.compile(lambda y: y + (1 if plain_eager(y) else 2), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), x + 2)


@pytest.mark.parametrize("operator", ["soft_masked_attention", "focal_itc", "word_mask"])
def test_triton_refuses_gpus_that_are_too_old(operator, monkeypatch):
    capabilities = [(7, 5), (8, 0), (9, 0)]
    generation_reason.cache_clear()
    monkeypatch.setattr(triton_support, "_missing", lambda: False)
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    old, *others = (torch.device("cuda", index) for index in range(3))
    try:
        reason = "it needs an NVIDIA GPU of sm_80 or later, cuda:0 is sm_75"
        with pytest.raises(ValueError, match=f"^impl: {operator} cannot run 'triton' here: {reason}$"):
            resolve(operator, "triton", old)
        assert resolve(operator, None, old).name != "triton"
        assert [resolve(operator, None, device).name for device in others] == ["triton"] * 2
    finally:
        generation_reason.cache_clear()


TRANSFORMS = {
    "jvp": ("forward mode", lambda f, x: torch.func.jvp(f, (x,), (x,))),
    "jacfwd": ("forward mode", lambda f, x: torch.func.jacfwd(f)(x)),
    "jvp of grad": ("forward mode", lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x,))),
    "grad": ("torch.func", lambda f, x: torch.func.grad(f)(x)),
    "jacrev": ("torch.func", lambda f, x: torch.func.jacrev(f)(x)),
    "vmap": ("torch.func", lambda f, x: torch.func.vmap(f)(x)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(transform):
    def operator(x):
        refuse_transforms("operator", None, x)
        return x.sum()

    what, apply = TRANSFORMS[transform]
    with pytest.raises(RuntimeError, match=f"^operator: {what} is not supported; use torch.autograd.grad$"):
        apply(operator, torch.randn(3))


def test_forward_mode_is_refused_where_there_is_a_tangent():
    x = torch.randn(3)
    with forward_ad.dual_level():
        refuse_transforms("operator", x)
        with pytest.raises(RuntimeError, match="^operator: forward mode is not supported"):
            refuse_transforms("operator", x, forward_ad.make_dual(x, x))
    torch.func.grad(lambda y: (refuse_transforms("operator", x), y.sum())[1])(x)  # not an input of the transform


def compiled(f):
    """In one graph: otherwise Dynamo goes on to try every inner frame, which takes seconds."""
    return torch.compile(f, backend="eager", fullgraph=True)


def in_dual_numbers(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


# with torch.compile inside of a transform and around it
COMPILED = {
    "jvp": ("forward mode", lambda f, x: compiled(lambda y: torch.func.jvp(f, (y,), (y,)))(x)),
    "grad": ("torch.func", lambda f, x: compiled(torch.func.grad(f))(x)),
    "dual numbers": ("forward mode", lambda f, x: in_dual_numbers(compiled(f), x)),
}
FEATURES, TEXT = torch.eye(3, 4), torch.eye(3, 4).roll(1, 1)
HEADS = torch.arange(24.0).view(1, 2, 3, 4).cos()
WORD = torch.tensor([1])
OPERATORS = {
    "focal_itc_loss": (lambda x: focal_itc_loss(x, TEXT, temperature=0.5), FEATURES),
    "soft_masked_attention": (lambda x: soft_masked_attention(HEADS, x, HEADS).sum(), HEADS),
    "word_gradcam": (lambda x: word_gradcam(HEADS, x, HEADS, HEADS).sum(), HEADS),
    "word_soft_mask": (lambda x: word_soft_mask(HEADS, HEADS, HEADS, HEADS, WORD, x)[0].sum(), FEATURES[None]),
    "attention_output_gradient": (lambda x: attention_output_gradient(torch.Tensor.sum, x).sum(), HEADS),
}


@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_operator_loses_a_derivative_under_torch_compile(operator, transform):
    torch.compiler.reset()
    what, apply = COMPILED[transform]
    with pytest.raises(RuntimeError, match=f"{operator}: {what} is not supported; use torch.autograd.grad"):
        apply(*OPERATORS[operator])


TEACHERS = {"teacher_image": FEATURES, "teacher_text": TEXT, "temperature": 0.5}
# arguments that are constants of backward
CONSTANTS = {
    "focal_itc_loss, alpha": (lambda x: focal_itc_loss(FEATURES, TEXT, alpha=x, **TEACHERS), torch.tensor(0.3)),
    "focal_itc_loss, teacher": (
        lambda x: focal_itc_loss(FEATURES, TEXT, alpha=0.3, **TEACHERS | {"teacher_image": x}),
        FEATURES,
    ),
    "FocalITCLoss, alpha": (lambda x: FocalITCLoss()(FEATURES, TEXT, alpha=x, **TEACHERS), torch.tensor(0.3)),
    "word_gradcam, log_sum_exp": (lambda x: word_gradcam(*[HEADS] * 4, log_sum_exp=x).sum(), HEADS[..., 0]),
    "word_gradcam, grad_output": (lambda x: word_gradcam(*[HEADS] * 3, x).sum(), HEADS),
    "word_soft_mask, value": (lambda x: word_soft_mask(*[HEADS] * 2, x, HEADS, WORD, FEATURES[None])[0].sum(), HEADS),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_constants_have_no_tangent_and_no_gradient(case):
    """In no mode is a derivative that a caller asked for zero."""
    function, x = CONSTANTS[case]
    message = case.split(",")[0] + ": {} is not supported"
    for transform in ("dual numbers", "jvp", "grad"):
        what, apply = TRANSFORMS.get(transform, ("forward mode", in_dual_numbers))
        with pytest.raises(RuntimeError, match=message.format(what)):
            apply(function, x)
    assert not function(x.clone().requires_grad_()).requires_grad

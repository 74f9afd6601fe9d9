"""word_gradcam and word_soft_mask: the relevance of every image token for a word, and the soft mask made from it.

The operators live in `torch.ops.softmask_fast`; the public functions check their arguments and call them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops import registry, triton_support
from softmask_fast.ops.checks import (
    FLOAT_DTYPES,
    cast_for_autocast,
    check_has_tokens,
    check_index_range,
    check_number,
    check_tensor,
)
from softmask_fast.ops.extension import cpu_unavailable_reason, cuda_unavailable_reason
from softmask_fast.ops.word_mask import cpp, reference

_TRITON = "softmask_fast.ops.word_mask.triton_launch"
_COMPILED = {"word_gradcam": cpp.word_gradcam, "word_soft_mask": cpp.word_soft_mask}
registry.register(
    "word_mask",
    registry.Implementation(
        "triton",
        {name: registry.lazily(_TRITON, name) for name in ("word_gradcam", "word_soft_mask")},
        triton_support.unavailable_reason,
        automatic_on=("cuda",),
    ),
    registry.Implementation("cpp", _COMPILED, cpu_unavailable_reason, automatic_on=("cpu",)),
    registry.Implementation(
        "reference",
        {"word_gradcam": reference.word_gradcam, "word_soft_mask": reference.word_soft_mask},
    ),
    # After the reference, which runs everywhere, so only impl="cuda" chooses it: no GPU has run its three kernels yet.
    # Once benchmarks/bench_word_mask.py shows it no slower than "triton" at N = 257, 577 and 1,025, move it before
    # "triton", as its one call takes a fraction of the host's time.
    registry.Implementation("cuda", _COMPILED, cuda_unavailable_reason, automatic_on=("cuda",)),
)


def word_gradcam(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    word_index: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    log_sum_exp: Tensor | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Grad-CAM of an attention layer for each word: the mean over heads of `A * relu(dS/dA)`, without storing A.

    A are the attention probabilities, S is the score to explain. `ops/word_mask/reference.py` has the derivation.
    Source: SoftMask++ (Park & Han, CVPR 2023), after Grad-CAM (Selvaraju et al., ICCV 2017).

    Args:
        query: (B, H, L, D) queries of the text tokens, float16, bfloat16, float32 or float64. All arguments may have
            any strides.
        key, value: (B, Hk, N, D) keys and values of the image tokens; dtype and device of `query`. Hk divides H: each
            of these heads serves H / Hk consecutive query heads (GQA).
        grad_output: (B, H, L, D) gradient of the score with respect to the attention output, as
            `attention_output_gradient` returns it.
        word_index: (B,) int64, the token of each caption to map; None: all tokens.
        key_mask: (B, N) bool, False for image tokens to ignore. If all are ignored, the map is zero.
        log_sum_exp: (B, H, L) float32 (float64 for float64 inputs), the log-sum-exp of each row's logits over all keys
            that the model saw. Needed if `key` and `value` are only some of them: A = exp(logit - log_sum_exp). A row
            whose value is infinite gets a map of zeros.
        soft_cap: turns logits into soft_cap * tanh(logit / soft_cap), as in Gemma 2.
        scale: factor of the logits; default: D ** -0.5.
        impl: "triton", "cpp", "cuda" or "reference"; None: the best one that runs here.

    Returns:
        The map, float32 (float64 for float64 inputs), at least 0, without gradient: (B, N), or (B, L, N) without
        `word_index`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. On a GPU, `word_index` is not read
            on the host: a word out of range gives a map of NaN.
        RuntimeError: in forward-mode autograd and under `torch.func` transforms.
    """
    registry.refuse_transforms("word_gradcam", query, key, value, grad_output, word_index, key_mask, log_sum_exp)
    query, key, value, grad_output = _checked(query, key, value, grad_output, word_index, key_mask)
    scale = query.shape[3] ** -0.5 if scale is None else check_number("scale", scale)
    if log_sum_exp is not None:
        dtype = reference.compute_dtype(query.dtype)
        check_tensor("log_sum_exp", log_sum_exp, query.shape[:3], dtypes=(dtype,), like=("query", query))
        log_sum_exp = log_sum_exp.detach()
    soft_cap = None if soft_cap is None else check_number("soft_cap", soft_cap, above=0)
    tensors = (query, key, value, grad_output, word_index, key_mask, log_sum_exp)
    if registry.plain_eager(*tensors):
        return _word_gradcam(*tensors, soft_cap, scale, impl)
    return torch.ops.softmask_fast.word_gradcam(*tensors, soft_cap, scale, impl)


def word_soft_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    word_index: Tensor,
    features: Tensor | None = None,
    *,
    prefix_tokens: int = 1,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Soft mask of one word per image: `keep = 1 - m`, where m is its Grad-CAM, min-max normalized over the patches.

    Multiplying the image features by `keep` hides what the word refers to (SoftMask++, Park & Han, CVPR 2023). If the
    map is constant (up to rounding, see `reference.CONSTANT_SPREAD`), keep is 1 everywhere. Where the map is NaN, keep
    is NaN; the other tokens are normalized without it.

    Args:
        query, key, value, grad_output, key_mask, scale, impl: as for `word_gradcam`.
        word_index: (B,) int64, the token of each caption to mask out of the image.
        features: (B, N, C) image features to mask, any floating dtype (float64 only with a float64 `query`); None:
            return `keep` alone.
        prefix_tokens: number of leading tokens that are not patches (the image's [CLS]). For them and for padding, keep
            is 1.

    Returns:
        (masked features, keep), or keep alone without `features`. The masked features are (B, N, C) in the dtype of
        `features`. keep is (B, N), float32 (float64 for float64 inputs), a constant: gradients flow only to `features`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. On a GPU, a word out of range gives
            NaN.
        RuntimeError: in forward-mode autograd and under `torch.func` transforms.
    """
    registry.refuse_transforms("word_soft_mask", query, key, value, grad_output, word_index, features, key_mask)
    query, key, value, grad_output = _checked(query, key, value, grad_output, word_index, key_mask)
    if word_index is None:
        raise TypeError("word_index: expected a tensor, got NoneType")
    batch, _, tokens, width = key.shape
    if features is not None:
        dtypes = FLOAT_DTYPES if query.dtype == torch.float64 else FLOAT_DTYPES[:3]
        check_tensor("features", features, (batch, tokens, "C"), dtypes=dtypes, like=("query", query))
    if isinstance(prefix_tokens, bool) or not isinstance(prefix_tokens, int | torch.SymInt):
        raise TypeError(f"prefix_tokens: expected an integer, got {type(prefix_tokens).__name__}")
    if not 0 <= prefix_tokens <= tokens:
        raise ValueError(f"prefix_tokens: expected a number from 0 to {tokens}, got {prefix_tokens}")
    scale = width**-0.5 if scale is None else check_number("scale", scale)
    inputs = (query, key, value, grad_output, word_index, features)
    if registry.plain_eager(*inputs, key_mask):
        run = _SoftMask.apply if features is not None and features.requires_grad else _word_soft_mask
    else:
        run = torch.ops.softmask_fast.word_soft_mask
    masked, keep = run(*inputs, prefix_tokens, key_mask, scale, impl)
    return keep if features is None else (masked, keep)


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    word_index: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checks what both functions share; returns query, key, value, grad_output without graph, cast as autocast asks."""
    check_tensor("query", query, ("B", "H", "L", "D"))
    query, key, value, grad_output = cast_for_autocast(query, key, value, grad_output)
    batch, heads, length, width = query.shape
    same = {"like": ("query", query), "same_dtype": True}
    check_tensor("key", key, (batch, "Hk", "N", width), **same)
    check_has_tokens(query, key)
    key_heads = key.shape[1]
    if not key_heads or heads % key_heads:
        raise ValueError(f"key: expected a number of heads that divides the {heads} of query, got {key_heads}")
    check_tensor("value", value, (batch, key_heads, key.shape[2], width), **same)
    check_tensor("grad_output", grad_output, (batch, heads, length, width), **same)
    if word_index is not None:
        check_tensor("word_index", word_index, (batch,), dtypes=(torch.int64,), like=("query", query))
    if key_mask is not None:
        check_tensor("key_mask", key_mask, (batch, key.shape[2]), dtypes=(torch.bool,), like=("query", query))
    return query.detach(), key.detach(), value.detach(), grad_output.detach()


# The operators behind the public functions. `impl` travels as an argument, so a compiled graph holds one opaque call
# and the choice of the implementation happens when it runs, on the device of the tensors.

torch.library.define(
    "softmask_fast::word_gradcam",
    "(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor? word_index, Tensor? key_mask, "
    "Tensor? log_sum_exp, float? soft_cap, float scale, str? impl=None) -> Tensor",
)
torch.library.define(
    "softmask_fast::word_soft_mask",
    "(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor word_index, Tensor? features, "
    "SymInt prefix_tokens, Tensor? key_mask, float scale, str? impl=None) -> (Tensor, Tensor)",
)


def _word_gradcam(query, key, value, grad_output, word_index, key_mask, log_sum_exp, soft_cap, scale, impl=None):
    if word_index is not None:
        check_index_range("word_index", word_index, query.shape[2])
    run = registry.resolve("word_mask", impl, query.device, query.dtype, query.shape[3])["word_gradcam"]
    return run(query, key, value, grad_output, word_index, key_mask, log_sum_exp, soft_cap, scale)


def _word_soft_mask(query, key, value, grad_output, word_index, features, prefix_tokens, key_mask, scale, impl=None):
    check_index_range("word_index", word_index, query.shape[2])
    run = registry.resolve("word_mask", impl, query.device, query.dtype, query.shape[3])["word_soft_mask"]
    return run(query, key, value, grad_output, word_index, features, prefix_tokens, key_mask, scale)


torch.library.impl("softmask_fast::word_gradcam", "CompositeExplicitAutograd", _word_gradcam)
torch.library.impl("softmask_fast::word_soft_mask", "CompositeExplicitAutograd", _word_soft_mask)


@torch.library.register_fake("softmask_fast::word_gradcam")
def _word_gradcam_fake(query, key, value, grad_output, word_index, key_mask, log_sum_exp, soft_cap, scale, impl=None):
    batch, _, length, _ = query.shape
    tokens = key.shape[2]
    sizes = (batch, length, tokens) if word_index is None else (batch, tokens)
    return query.new_empty(sizes, dtype=reference.compute_dtype(query.dtype))


@torch.library.register_fake("softmask_fast::word_soft_mask")
def _word_soft_mask_fake(
    query, key, value, grad_output, word_index, features, prefix_tokens, key_mask, scale, impl=None
):
    keep = query.new_empty((query.shape[0], key.shape[2]), dtype=reference.compute_dtype(query.dtype))
    return query.new_empty(0) if features is None else torch.empty_like(features), keep


def _save_keep(ctx, inputs, output):
    keep = output[1]
    ctx.mark_non_differentiable(keep)
    ctx.save_for_backward(keep)
    ctx.set_materialize_grads(False)


def _word_soft_mask_backward(ctx, grad_masked, grad_keep):
    """masked = features * keep is linear: its gradient is the same product, in ordinary differentiable operations."""
    grad_features = None
    if ctx.needs_input_grad[5] and grad_masked is not None:
        (keep,) = ctx.saved_tensors
        grad_features = (grad_masked * keep[:, :, None]).to(grad_masked.dtype)
    return None, None, None, None, None, grad_features, None, None, None, None


torch.library.register_autograd("softmask_fast::word_soft_mask", _word_soft_mask_backward, setup_context=_save_keep)


class _SoftMask(torch.autograd.Function):
    """`word_soft_mask` without its registration, which takes the host longer than all else of a small call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _word_soft_mask(*inputs)
        _save_keep(ctx, inputs, output)
        return output

    backward = staticmethod(_word_soft_mask_backward)

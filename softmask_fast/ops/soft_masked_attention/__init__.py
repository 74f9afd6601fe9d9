"""soft_masked_attention: cross-attention to image tokens, each sequence seeing them through its own soft mask.

The operators live in `torch.ops.softmask_fast`; the public function checks its arguments and calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops import registry, triton_support
from softmask_fast.ops.checks import cast_for_autocast, check_has_tokens, check_number, check_tensor
from softmask_fast.ops.extension import cpu_unavailable_reason
from softmask_fast.ops.soft_masked_attention import cpp, reference
from softmask_fast.ops.soft_masked_attention.image_plan import ImagePlan, check_sequences, plan_image_index

__all__ = ["ImagePlan", "plan_image_index", "soft_masked_attention"]

_TRITON = "softmask_fast.ops.soft_masked_attention.triton_launch"
registry.register(
    "soft_masked_attention",
    registry.Implementation(
        "triton",
        {name: registry.lazily(_TRITON, name) for name in ("forward", "backward", "plan")},
        triton_support.unavailable_reason,
        automatic_on=("cuda",),
    ),
    registry.Implementation(
        "cpp",
        {"forward": cpp.forward, "backward": cpp.backward, "plan": reference.plan},
        cpu_unavailable_reason,
        automatic_on=("cpu",),
    ),
    registry.Implementation(
        "reference", {"forward": reference.forward, "backward": reference.backward, "plan": reference.plan}
    ),
)


def soft_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None = None,
    *,
    image_index: Tensor | ImagePlan | None = None,
    boundaries: Tensor | None = None,
    value_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention of S sequences to soft-masked tokens of B images: `softmax_n(keep_n q.K_n scale) keep_n V_n + b_v`.

    It equals attention over the masked features `keep_n x_n`, with keys and values projected from them. But it computes
    neither these features nor their projections: K and V are projected once per image, *without bias*, and all
    sequences of the image share them. `ops/soft_masked_attention/reference.py` has the derivation.

    Args:
        query: (S, H, L, D); or, with `boundaries`, packed rows (T, H, D). float16, bfloat16, float32 or float64. All
            arguments may have any strides.
        key, value: (B, H, N, D) projections of the unmasked image tokens, without bias; dtype and device of `query`.
        keep: (S, N), any floating dtype: 1 shows a token in full, 0 masks it out. The key and value of a masked token
            are zero vectors, which still take part in the softmax. None: all ones.
        image_index: (S,) int64, the image of each sequence; images may repeat, in any order. None: S == B, and sequence
            i sees image i. Or an `ImagePlan` by `plan_image_index`, which does the preparation once for all calls that
            share it.
        boundaries: (S + 1,) int32, ascending from 0: sequence i is the packed rows boundaries[i] to
            boundaries[i + 1] - 1. Rows after the last sequence attend to nothing. A plan brings its own.
        value_bias: (H, D) bias of the value projection, any floating dtype. A key bias has no effect on attention.
        key_mask: (B, N) bool, False for tokens to ignore. A row with nothing to attend to gives `value_bias` (or zero).
        scale: factor of the logits; default: D ** -0.5.
        impl: "triton", "cpp" or "reference"; None: the best one that runs here.

    Returns:
        A tensor of the size and dtype of `query`. Results are bitwise reproducible. query, key, value, keep and
        value_bias get gradients, which cannot be differentiated again.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. On a GPU, `image_index` is not read
            on the host: a sequence with an index out of range gives NaN.
        RuntimeError: in forward-mode autograd and under `torch.func` transforms.
    """
    plan = image_index if isinstance(image_index, ImagePlan) else None
    if plan is not None:
        if boundaries is not None:
            raise ValueError("boundaries: expected None with a plan, which brings its own")
        image_index, boundaries = plan.image_index, plan.boundaries
    check_tensor("query", query, ("S", "H", "L", "D") if boundaries is None else ("T", "H", "D"))
    query, key, value = cast_for_autocast(query, key, value)
    heads, width = query.shape[1], query.shape[-1]
    sequences = query.shape[0]
    if boundaries is not None:
        check_tensor("boundaries", boundaries, ("S + 1",), dtypes=(torch.int32,), like=("query", query))
        if not len(boundaries):
            raise ValueError("boundaries: expected at least one element, got none")
        sequences = boundaries.shape[0] - 1
    check_tensor("key", key, ("B", heads, "N", width), like=("query", query), same_dtype=True)
    check_has_tokens(query, key)
    images, _, tokens, _ = key.shape
    check_tensor("value", value, (images, heads, tokens, width), like=("query", query), same_dtype=True)
    if image_index is not None:
        check_tensor("image_index", image_index, (sequences,), dtypes=(torch.int64,), like=("query", query))
    elif images != sequences:
        raise ValueError(f"image_index: expected a tensor for {sequences} sequences of {images} images, got None")
    elif boundaries is not None:
        image_index = torch.arange(images, device=query.device)
    if plan is not None and (plan.images, plan.rows) != (images, query.shape[0]):
        made_for = f"{images} images and {query.shape[0]} {'sequences' if boundaries is None else 'rows'}"
        raise ValueError(f"image_index: expected a plan for {made_for}, got one for {plan.images} and {plan.rows}")
    if keep is not None:
        check_tensor("keep", keep, (sequences, tokens), like=("query", query))
    if value_bias is not None:
        check_tensor("value_bias", value_bias, (heads, width), like=("query", query))
    if key_mask is not None:
        check_tensor("key_mask", key_mask, (images, tokens), dtypes=(torch.bool,), like=("query", query))
    scale = width**-0.5 if scale is None else check_number("scale", scale)
    table = None if plan is None else plan.table
    tensors = (query, key, value, keep, image_index, boundaries, table, value_bias, key_mask)
    if registry.plain_eager(*tensors):
        return _Attention.apply(*tensors, scale, impl)[0]
    registry.refuse_transforms("soft_masked_attention", *tensors)
    return torch.ops.softmask_fast.soft_masked_attention(*tensors, scale, impl)[0]


# The operators behind the public function. `impl` is an argument, so a compiled graph holds one opaque call, and the
# implementation is chosen when it runs, for the device of the tensors.

torch.library.define(
    "softmask_fast::soft_masked_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? keep, Tensor? image_index, Tensor? boundaries, Tensor? table, "
    "Tensor? value_bias, Tensor? key_mask, float scale, str? impl=None) -> (Tensor output, Tensor statistics)",
)
torch.library.define(
    "softmask_fast::soft_masked_attention_backward",
    "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? keep, Tensor? image_index, "
    "Tensor? boundaries, Tensor? table, Tensor? value_bias, Tensor? key_mask, Tensor output, Tensor statistics, "
    "float scale, bool query_gradient, bool key_value_gradient, bool keep_gradient, str? impl=None) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)


def _forward(query, key, value, keep, image_index, boundaries, table, value_bias, key_mask, scale, impl=None):
    if image_index is not None and table is None:  # a plan has been checked
        check_sequences(image_index, key.shape[0], boundaries, query.shape[0])
    run = registry.resolve("soft_masked_attention", impl, query.device, query.dtype, query.shape[-1])["forward"]
    others = (key, value, keep, image_index, boundaries, table, value_bias, key_mask, scale)
    if boundaries is None:
        return run(query, *others)
    output, statistics = run(_as_one_sequence(query), *others)
    return _as_rows(output), statistics


def _as_one_sequence(rows: Tensor) -> Tensor:
    """Packed rows as the implementations take them: (T, H, D) -> (1, H, T, D)."""
    return rows.transpose(0, 1)[None]


def _as_rows(sequence: Tensor) -> Tensor:
    return sequence[0].transpose(0, 1)


def _backward(
    grad_output, query, key, value, keep, image_index, boundaries, table, value_bias, key_mask, output, statistics,
    scale, query_gradient, key_value_gradient, keep_gradient, impl=None,
):  # fmt: skip
    run = registry.resolve("soft_masked_attention", impl, query.device, query.dtype, query.shape[-1])["backward"]
    if boundaries is not None:
        grad_output, query, output = (_as_one_sequence(rows) for rows in (grad_output, query, output))
    d_query, *gradients = run(
        grad_output, query, key, value, keep, image_index, boundaries, table, value_bias, key_mask, output, statistics,
        scale, query_gradient, key_value_gradient, keep_gradient,
    )  # fmt: skip
    return _as_rows(d_query) if boundaries is not None and query_gradient else d_query, *gradients


torch.library.impl("softmask_fast::soft_masked_attention", "CompositeExplicitAutograd", _forward)
torch.library.impl("softmask_fast::soft_masked_attention_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("softmask_fast::soft_masked_attention")
def _forward_fake(query, key, value, keep, image_index, boundaries, table, value_bias, key_mask, scale, impl=None):
    rows = query.shape[:3] if boundaries is None else (1, query.shape[1], query.shape[0])
    return torch.empty_like(query), query.new_empty((*rows, 2), dtype=reference.compute_dtype(query.dtype))


@torch.library.register_fake("softmask_fast::soft_masked_attention_backward")
def _backward_fake(
    grad_output, query, key, value, keep, image_index, boundaries, table, value_bias, key_mask, output, statistics,
    scale, query_gradient, key_value_gradient, keep_gradient, impl=None,
):  # fmt: skip
    return (
        torch.empty_like(query) if query_gradient else query.new_empty(0),
        torch.empty_like(key) if key_value_gradient else query.new_empty(0),
        torch.empty_like(value) if key_value_gradient else query.new_empty(0),
        keep.new_empty(keep.shape) if keep_gradient else query.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, grad_output, grad_statistics, run=torch.ops.softmask_fast.soft_masked_attention_backward):
    if grad_output is None:
        return (None,) * 11
    *inputs, output, statistics = ctx.saved_tensors
    wants_query, wants_key, wants_value, wants_keep, _, _, _, wants_bias, *_ = ctx.needs_input_grad
    wants_key_value = wants_key or wants_value
    d_query = d_key = d_value = d_keep = d_bias = None
    if wants_query or wants_key_value or wants_keep:
        d_query, d_key, d_value, d_keep = run(
            grad_output, *inputs, output, statistics, ctx.scale, wants_query, wants_key_value, wants_keep, ctx.impl
        )
    if wants_bias:
        rows, bias = ((0, 2) if grad_output.dim() == 4 else 0), inputs[7]
        d_bias = grad_output.sum(rows, dtype=reference.compute_dtype(grad_output.dtype)).to(bias.dtype)
    return (
        d_query if wants_query else None, d_key if wants_key else None, d_value if wants_value else None,
        d_keep if wants_keep else None, None, None, None, d_bias, None, None, None,
    )  # fmt: skip


torch.library.register_autograd("softmask_fast::soft_masked_attention", _autograd, setup_context=_setup_context)


class _Attention(torch.autograd.Function):
    """The operator without its registration, which takes the host longer than all else of a small call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad_output, grad_statistics):
        # with create_graph the operator, which says that it has no second derivative
        return _autograd(ctx, grad_output, None, *([] if torch.is_grad_enabled() else [_backward]))


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("soft_masked_attention: second derivatives are not implemented")


torch.library.register_autograd("softmask_fast::soft_masked_attention_backward", _no_second_derivative)

"""Soft-masked attention by the compiled extension, csrc/cpu/soft_masked_attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    image_index: Tensor | None,
    boundaries: Tensor | None,
    table: Tensor | None,
    value_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(query)
    statistics = query.new_empty((*query.shape[:3], 2), dtype=torch.float32)
    if _has_rows_of_nobody(query, boundaries):
        statistics.zero_()
        output.zero_() if value_bias is None else output.copy_(value_bias[None, :, None])
    torch.ops.softmask_fast_cpp.soft_masked_attention(
        query, key, value, _half_or_float(keep), _dense(image_index), _dense(boundaries), _half_or_float(value_bias),
        key_mask, scale, output, statistics,
    )  # fmt: skip
    return output, statistics


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    image_index: Tensor | None,
    boundaries: Tensor | None,
    table: Tensor | None,
    value_bias: Tensor | None,
    key_mask: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    scale: float,
    query_gradient: bool,
    key_value_gradient: bool,
    keep_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_query = torch.empty_like(query) if query_gradient else None
    if query_gradient and _has_rows_of_nobody(query, boundaries):
        d_query.zero_()
    d_key = torch.empty_like(key) if key_value_gradient else None
    d_value = torch.empty_like(value) if key_value_gradient else None
    _, heads, tokens, _ = key.shape
    by_head = query.new_empty((len(keep), heads, tokens), dtype=torch.float32) if keep_gradient else None
    torch.ops.softmask_fast_cpp.soft_masked_attention_backward(
        grad_output, query, key, value, _half_or_float(keep), _dense(image_index), _dense(boundaries), key_mask,
        statistics, scale, d_query, d_key, d_value, by_head,
    )  # fmt: skip
    d_keep = by_head.sum(1).to(keep.dtype) if keep_gradient else None
    return tuple(query.new_empty(0) if tensor is None else tensor for tensor in (d_query, d_key, d_value, d_keep))


def _has_rows_of_nobody(rows: Tensor, boundaries: Tensor | None) -> bool:
    """The kernels do not visit them."""
    return boundaries is not None and int(boundaries[-1]) < rows.shape[2]


def _half_or_float(tensor: Tensor | None) -> Tensor | None:
    """The kernels read every floating dtype but float64."""
    return tensor.float() if tensor is not None and tensor.dtype == torch.float64 else tensor


def _dense(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()

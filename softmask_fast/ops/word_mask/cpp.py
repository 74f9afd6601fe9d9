"""Word maps and soft masks by the compiled extensions: csrc/cpu/word_mask.cpp or csrc/cuda/word_mask.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops.word_mask.reference import CONSTANT_SPREAD

OPERATORS = torch.ops.softmask_fast_cpp


def word_gradcam(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    word_index: Tensor | None,
    key_mask: Tensor | None,
    log_sum_exp: Tensor | None,
    soft_cap: float | None,
    scale: float,
) -> Tensor:
    batch, _, length, _ = query.shape
    sizes = (batch, key.shape[2]) if word_index is not None else (batch, length, key.shape[2])
    cam = query.new_empty(sizes, dtype=torch.float32)
    index = None if word_index is None else word_index.contiguous()
    OPERATORS.word_gradcam(query, key, value, grad_output, index, key_mask, log_sum_exp, soft_cap, scale, cam)
    return cam


def word_soft_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    word_index: Tensor,
    features: Tensor | None,
    prefix_tokens: int,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    keep = query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)
    masked = None if features is None else torch.empty_like(features)
    OPERATORS.word_soft_mask(
        query, key, value, grad_output, word_index.contiguous(), features, prefix_tokens, key_mask, scale,
        CONSTANT_SPREAD, masked, keep,
    )  # fmt: skip
    return query.new_empty(0) if masked is None else masked, keep

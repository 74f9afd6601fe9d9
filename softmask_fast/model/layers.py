"""The layers of the encoders as functions of their weights, which run eagerly or compiled.

Each function is one region for torch.compile: tensors in, tensors out; no modules, no hooks, no values read on the
host. All layers of a kind run the same code, so one compilation serves them all. What compiles badly stays between the
regions: attention among packed tokens and to soft-masked images. Rows are tokens: (T, C), with T the only size that
changes from step to step. The sums of a residual and the inputs of a norm have the dtype of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, ...]
# The size that regions are compiled for, whatever the first batch. So a resumed run, which starts with another batch,
# computes the same bits.
TYPICAL_ROWS = 2048


def run_region(compile: bool, function: Callable, weights: Weights, *arguments: object) -> Tensor | tuple[Tensor, ...]:
    """`function(weights, *arguments)`, compiled or not. Arguments of one or two dimensions are rows of tokens."""
    if not compile:
        return function(weights, *arguments)
    for rows in arguments:
        if isinstance(rows, Tensor) and rows.ndim <= 2 and len(rows) > 1:
            torch._dynamo.mark_dynamic(rows, 0, hint_override=TYPICAL_ROWS)
    return _compiled(function)(weights, *arguments)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(T, C) -> (T, C) in the dtype of the weights, with float32 statistics. `F.layer_norm` returns float32 under
    autocast."""
    return torch.native_layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps)[0]


def dropout(x: Tensor, probability: float) -> Tensor:
    """Dropout, or x itself if the probability is 0."""
    return torch.native_dropout(x, probability, True)[0] if probability else x


def residual(x: Tensor, text: Tensor, weights: Weights, eps: float, drop: float) -> Tensor:
    """The end of a sublayer in BERT: project x, drop, add the sublayer's input `text`, normalize."""
    weight, bias, norm_weight, norm_bias = weights
    return layer_norm(dropout(F.linear(x, weight, bias), drop) + text, norm_weight, norm_bias, eps)


def feed_forward(text: Tensor, weights: Weights, eps: float, drop: float) -> Tensor:
    """BERT's feed-forward: (T, C) -> (T, C)."""
    weight, bias, *rest = weights
    return residual(F.gelu(F.linear(text, weight, bias)), text, rest, eps, drop)


def image_block(weights: Weights, tokens: Tensor, heads: int, eps: float) -> Tensor:
    """A block of a vision transformer with pre-normalization: (B, N, C) -> (B, N, C)."""
    norm1, norm1_bias, qkv, qkv_bias, out, out_bias, norm2, norm2_bias, up, up_bias, down, down_bias = weights
    images, length, width = tokens.shape
    rows = tokens.reshape(-1, width)
    joined = F.linear(layer_norm(rows, norm1, norm1_bias, eps), qkv, qkv_bias)
    query, key, value = joined.view(images, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(rows.shape)
    rows = rows + F.linear(attended, out, out_bias)
    hidden = F.gelu(F.linear(layer_norm(rows, norm2, norm2_bias, eps), up, up_bias))
    return (rows + F.linear(hidden, down, down_bias)).view(images, length, width)


def after_attention(weights: Weights, attended: Tensor, text: Tensor, eps: float, drop: float) -> Tensor:
    """The rest of a text layer after its attention, or of a fusion layer after its cross-attention: attended, text
    (T, C) -> (T, C)."""
    return feed_forward(residual(attended, text, weights[:4], eps, drop), weights[4:], eps, drop)


def cross_query(weights: Weights, attended: Tensor, text: Tensor, eps: float, drop: float) -> tuple[Tensor, Tensor]:
    """A fusion layer between its two attentions: attended, text (T, C) -> text and the query of the cross-attention,
    both (T, C)."""
    text = residual(attended, text, weights[:4], eps, drop)
    return text, F.linear(text, *weights[4:])


def word_logits(weights: Weights, hidden: Tensor, eps: float) -> Tensor:
    """BERT's head over the vocabulary: (P, C) -> (P, V)."""
    weight, bias, norm, norm_bias, words, words_bias = weights
    return F.linear(layer_norm(F.gelu(F.linear(hidden, weight, bias)), norm, norm_bias, eps), words, words_bias)


def word_probabilities(weights: Weights, hidden: Tensor, eps: float) -> Tensor:
    """(P, C) -> probabilities over the vocabulary, (P, V) float32."""
    return word_logits(weights, hidden, eps).float().softmax(-1)


def word_losses(
    weights: Weights, hidden: Tensor, labels: Tensor, soft_labels: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of MLM. Tokens with a negative label (-100) do not count.

    Args:
        weights: those of `word_logits`.
        hidden: (P, C).
        labels: (P,) int64.
        soft_labels: (P, V) probabilities, or None.
        eps: of the norm.

    Returns:
        The mean loss against `labels`, the mean loss against `soft_labels` (0 without them), and the accuracy, all ().
    """
    logits = word_logits(weights, hidden, eps).float()
    log_probability = logits.log_softmax(-1)
    hard, scored = F.nll_loss(log_probability, labels), labels >= 0
    soft = torch.zeros_like(hard)
    if soft_labels is not None:
        soft = -(soft_labels * log_probability).sum(-1).mul(scored).sum() / scored.sum()
    return hard, soft, (logits.argmax(-1) == labels).sum() / scored.sum()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x unchanged; its gradient is multiplied by a factor."""
    if factor == 0:
        return x.detach()
    if factor != 1 and x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda gradient: gradient * factor)
    return x

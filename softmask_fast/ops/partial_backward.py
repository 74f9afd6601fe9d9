"""The gradient of a score with respect to an attention output, without a backward pass through the whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def attention_output_gradient(score_function: Callable[[Tensor], Tensor], attention_output: Tensor) -> Tensor:
    """dS/dO for ``word_gradcam`` and ``word_soft_mask``: differentiates ``score_function`` at a detached O.

    ``score_function`` continues the model from the attention output to the score: a scalar, or one score per image
    (their sum is differentiated; the score of an image depends on its own rows alone). Only the graph between O and the
    score is built, the gradients of weights are pruned, nothing is retained, and no module keeps state. Because nothing
    runs ``.backward()`` and the graph of the surrounding pass is not touched, this is the form that stays correct under
    ZeRO-3. Works under ``no_grad`` too.

    With ``attention`` any fused attention of shape (B,H,L,D), word maps take three lines::

        output = F.scaled_dot_product_attention(query, key, value)
        gradient = attention_output_gradient(lambda o: rest_of_the_model(o)[:, 1], output)
        maps = word_gradcam(query, key, value, gradient)

    Returns a tensor like ``attention_output``, without a graph. Raises ValueError when the score does not depend on it.
    """
    with torch.enable_grad():
        leaf = attention_output.detach().requires_grad_()
        score = score_function(leaf)
        if not score.requires_grad:
            raise ValueError(
                "score_function: expected a score that depends on its argument, got one without a gradient"
            )
        (gradient,) = torch.autograd.grad(score.sum(), leaf, allow_unused=True)
    if gradient is None:
        raise ValueError("score_function: expected a score that depends on its argument, got one that does not use it")
    return gradient

"""The gradient of a score with respect to an attention output, without a backward pass through the whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softmask_fast.ops.registry import refuse_transforms


def attention_output_gradient(score_function: Callable[[Tensor], Tensor], attention_output: Tensor) -> Tensor:
    """The gradient dS/dO that `word_gradcam` and `word_soft_mask` take: of a score S at a detached attention output O.

    It builds only the graph from O to the score. Weights get no gradients, nothing is retained, and no module keeps
    state. It works under `no_grad`, and under ZeRO-3, because it neither calls `.backward()` nor touches the graph of
    the surrounding pass. With any fused attention of shape (B, H, L, D), word maps take three lines:

    ```python
    output = F.scaled_dot_product_attention(query, key, value)
    gradient = attention_output_gradient(lambda o: rest_of_the_model(o)[:, 1], output)
    maps = word_gradcam(query, key, value, gradient)
    ```

    Args:
        score_function: the rest of the model, from the attention output to the score. It returns a scalar, or one score
            per image, of which the sum is differentiated. The score of an image may depend only on its own rows.
        attention_output: O, of any shape and floating dtype.

    Returns:
        dS/dO, with the shape, dtype and device of `attention_output`, without a graph.

    Raises:
        ValueError: if the score does not depend on the attention output.
        RuntimeError: in forward-mode autograd and under `torch.func` transforms.
    """
    refuse_transforms("attention_output_gradient", attention_output)
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

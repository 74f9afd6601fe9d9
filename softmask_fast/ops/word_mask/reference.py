"""Word maps and soft masks in plain PyTorch: the definition of the operators.

For one word i of an image, with attention probabilities A over the image tokens and O = A V per head, a score S has

    dS/dA_hin = <dS/dO_hi, V_hn>

so the Grad-CAM `cam_in = mean_h A_hin relu(dS/dA_hin)` needs the row q_i, K, V and dS/dO_i, and no attention map.
Where K and V are a part of the keys that the model saw, A comes from the log-sum-exp of the row over all of them.
Source: Park & Han, SoftMask++ (CVPR 2023), word-conditional Grad-CAM, after Selvaraju et al., Grad-CAM (ICCV 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops.checks import compute_dtype, without_autocast

# A map whose spread is below this fraction of its maximum is constant: what is left is rounding, which min-max
# normalisation would blow up to a full mask. Every implementation uses this number.
CONSTANT_SPREAD = 2e-6


@without_autocast
def word_gradcam(
    query: Tensor,  # (B, H, L, D)
    key: Tensor,  # (B, Hk, N, D)
    value: Tensor,  # (B, Hk, N, D)
    grad_output: Tensor,  # (B, H, L, D)
    word_index: Tensor | None,  # (B,)
    key_mask: Tensor | None,  # (B, N), True = attend
    log_sum_exp: Tensor | None,  # (B, H, L)
    soft_cap: float | None,
    scale: float,
) -> Tensor:
    """(B, N) for the chosen words, (B, L, N) without `word_index`."""
    batch, heads, _, width = query.shape
    dtype = compute_dtype(query.dtype)
    if word_index is not None:
        row = word_index.view(batch, 1, 1, 1).expand(batch, heads, 1, width)
        query, grad_output = query.gather(2, row), grad_output.gather(2, row)
        log_sum_exp = None if log_sum_exp is None else log_sum_exp.gather(2, row[..., 0])
    if log_sum_exp is not None:  # -inf: no key at all, a map of zeros
        log_sum_exp = log_sum_exp.masked_fill(log_sum_exp == float("-inf"), float("inf"))
    group = heads // max(key.shape[1], 1)
    total = torch.zeros(batch, query.shape[2], key.shape[2], dtype=dtype, device=query.device)
    # Head by head, so that nothing of size (B, H, L, N) exists even for all words.
    for head in range(heads):
        logits = query[:, head].to(dtype) @ key[:, head // group].to(dtype).mT * scale  # (B, L, N)
        if soft_cap is not None:
            logits = soft_cap * (logits / soft_cap).tanh()
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, None], float("-inf"))
        attention = logits.softmax(-1) if log_sum_exp is None else (logits - log_sum_exp[:, head, :, None]).exp()
        attention_gradient = grad_output[:, head].to(dtype) @ value[:, head // group].to(dtype).mT
        total += attention * attention_gradient.relu()
    cam = total / heads
    if key_mask is not None:  # also turns the NaN of an image without any attended key into zero
        cam = cam.masked_fill(~key_mask[:, None], 0.0)
    return cam if word_index is None else cam[:, 0]


def soft_mask(cam: Tensor, prefix_tokens: int, key_mask: Tensor | None) -> Tensor:
    """keep = 1 - (cam - min) / (max - min) over the attended patches; 1 for the prefix, padding, constant maps.

    NaN where the map is NaN, which counts for neither minimum nor maximum.
    """
    keep = torch.where(cam.isnan(), cam, 1.0)
    patches = cam[:, prefix_tokens:]
    if patches.numel() == 0:
        return keep
    attended = ~patches.isnan() if key_mask is None else key_mask[:, prefix_tokens:] & ~patches.isnan()
    low = patches.masked_fill(~attended, float("inf")).amin(1, keepdim=True)
    high = patches.masked_fill(~attended, 0.0).amax(1, keepdim=True)  # a map is never negative
    spread = high - low
    varies = spread > CONSTANT_SPREAD * high
    mask = (patches - low) / torch.where(varies, spread, 1.0)
    keep[:, prefix_tokens:] += torch.where(attended & varies, -mask, 0.0)
    return keep


def word_soft_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    word_index: Tensor,
    features: Tensor | None,  # (B, N, C)
    prefix_tokens: int,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(features * keep (B, N, C), keep (B, N)); without features the first is empty."""
    cam = word_gradcam(query, key, value, grad_output, word_index, key_mask, None, None, scale)
    keep = soft_mask(cam, prefix_tokens, key_mask)
    if features is None:
        return query.new_empty(0), keep
    return torch.mul(features, keep[:, :, None], out=torch.empty_like(features)), keep

"""The maps and masks of words the plain way, and inputs for them."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, H, L, N, D
SIZES = [(2, 3, 5, 7, 16), (1, 1, 1, 2, 8), (3, 2, 4, 65, 24), (2, 1, 3, 17, 33), (1, 2, 2, 130, 128), (2, 9, 2, 5, 16)]


def draw(sizes, dtype, device, spread=1.0):
    batch, heads, length, tokens, width = sizes
    query = spread * torch.randn(batch, heads, length, width)
    key, value = torch.randn(2, batch, heads, tokens, width)
    grad_output = torch.randn(batch, heads, length, width)
    word_index = torch.randint(0, length, (batch,)).to(device)
    return [tensor.to(device, dtype) for tensor in (query, key, value, grad_output)], word_index


def full_maps(query, key, value, grad_output, key_mask=None, scale=None, soft_cap=None, log_sum_exp=None):
    """(B, L, N) from attention maps and their gradients in full, at the dtype of the inputs."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.mT * scale
    if soft_cap is not None:
        logits = soft_cap * (logits / soft_cap).tanh()
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], float("-inf"))
    attention = logits.softmax(-1).nan_to_num(0.0)
    if log_sum_exp is not None:
        attention = (logits - log_sum_exp[..., None].to(logits.dtype)).exp()
    return (attention * (grad_output @ value.mT).relu()).mean(1)


def of_word(maps, word_index):
    return maps[torch.arange(len(maps), device=maps.device), word_index]


def keep_from_map(cam, prefix, key_mask):
    """One image at a time, the definition in words."""
    keep = torch.ones_like(cam)
    for image, row in enumerate(cam):
        places = [n for n in range(prefix, len(row)) if key_mask is None or key_mask[image, n]]
        if places and row[places].max() > row[places].min():
            low, high = row[places].min(), row[places].max()
            keep[image, places] = 1 - (row[places] - low) / (high - low)
    return keep

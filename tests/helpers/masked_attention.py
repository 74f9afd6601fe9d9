"""soft_masked_attention the plain way, and inputs for it."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# S, B, H, L, N, D
SIZES = [(2, 2, 2, 5, 7, 16), (1, 1, 1, 1, 2, 16), (7, 3, 2, 4, 65, 24), (6, 2, 1, 3, 17, 33), (5, 2, 1, 9, 40, 128)]
NAMES = ["query", "key", "value", "keep", "value_bias"]


def draw(sizes, dtype, device, spread=1.0):
    sequences, images, heads, length, tokens, width = sizes
    tensors = {
        "query": (spread * torch.randn(sequences, heads, length, width)).to(dtype),
        "key": torch.randn(images, heads, tokens, width).to(dtype),
        "value": torch.randn(images, heads, tokens, width).to(dtype),
        "keep": torch.rand(sequences, tokens).to(torch.float64 if dtype == torch.float64 else torch.float32),
        "value_bias": torch.randn(heads, width).to(dtype),
    }
    image_index = torch.randperm(sequences) % max(images, 1)
    return {name: tensor.to(device) for name, tensor in tensors.items()}, image_index.to(device)


def plain(query, key, value, keep=None, value_bias=None, image_index=None, key_mask=None, scale=None):
    """The definition: mask and gather the keys and values of every sequence, attend with full maps."""
    if image_index is not None:
        key, value = key[image_index], value[image_index]
        key_mask = None if key_mask is None else key_mask[image_index]
    if keep is not None:
        key, value = ((tensor * keep[:, None, :, None]).to(tensor.dtype) for tensor in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], float("-inf"))
    output = logits.softmax(-1) @ value
    return output if value_bias is None else output + value_bias[:, None]


def with_gradients(function, tensors, grad_output, dtype=None, **options):
    """Output and gradients, by name; ``dtype`` converts all inputs first."""
    leaves = {name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in tensors.items()}
    output = function(**leaves, **options)
    output.backward(grad_output.to(output.dtype))
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

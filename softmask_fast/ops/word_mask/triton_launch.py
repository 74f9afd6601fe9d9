"""Launches the kernels of ``triton_kernels.py``: sizes, tiles and grids."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_fast.ops.triton_support import (
    INTERPRETED,
    Machine,
    device_of,
    element_options,
    machine_of,
    next_power_of_2,
    strides,
    with_aligned_rows,
)
from softmask_fast.ops.word_mask import triton_kernels as kernels
from softmask_fast.ops.word_mask.reference import CONSTANT_SPREAD


def tiles(kernel: str, dtype: torch.dtype, width: int, tokens: int, machine: Machine) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages of a kernel, by sizes alone: the same in every run."""
    block_d = max(16, next_power_of_2(width))
    half = dtype != torch.float32
    if kernel == "word_products":
        # 32 KiB of K and V in flight per program
        block_n = 16 if INTERPRETED else 8192 // block_d if half else 4096 // block_d
        return {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": 8 if half else 4}
    if kernel == "word_map":
        block_all = max(16, next_power_of_2(tokens))
        return {
            "BLOCK_ALL": block_all, "BLOCK_T": 16, "BLOCK_C": 16 if INTERPRETED else 256,
            "num_warps": 4 if block_all <= 1024 else 8,
        }  # fmt: skip
    if kernel in ("all_words_statistics", "all_words_map"):
        wide = block_d > 64
        block_n = 64 if half and not INTERPRETED and not (wide and kernel == "all_words_map") else 32
        return {
            "BLOCK_L": 32, "BLOCK_N": block_n, "BLOCK_D": block_d,
            "BLOCK_C": block_d if half else max(16, min(block_d // 2, 32)), "num_warps": 4,
            "num_stages": 2 if half and kernel == "all_words_statistics" else 1, **machine.launch_options,
        }  # fmt: skip
    raise ValueError(f"kernel: unknown name {kernel!r}")


def word_gradcam(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    word_index: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    if word_index is not None:
        products = _word_products(query, key, value, grad_output, word_index, key_mask, scale)
        return _word_map(*products, key_mask, None, None)[1]
    query, key, value, grad_output = (with_aligned_rows(tensor, 1) for tensor in (query, key, value, grad_output))
    batch, heads, length, width = query.shape
    tokens = key.shape[2]
    cam = query.new_empty((batch, length, tokens), dtype=torch.float32)
    if cam.numel() == 0:
        return cam
    statistics = query.new_empty((batch, heads, length, 2), dtype=torch.float32)
    common = {"HAS_MASK": key_mask is not None, **element_options(query.dtype)}
    with device_of(query):
        options = tiles("all_words_statistics", query.dtype, width, tokens, machine_of(query.device))
        kernels.all_words_statistics[(-(-length // options["BLOCK_L"]), heads, batch)](
            query, key, key_mask, statistics, *query.stride(), *key.stride(), *strides(key_mask, 2),
            heads, length, tokens, width, scale, **common, **options,
        )  # fmt: skip
        options = tiles("all_words_map", query.dtype, width, tokens, machine_of(query.device))
        kernels.all_words_map[(-(-tokens // options["BLOCK_N"]), -(-length // options["BLOCK_L"]), batch)](
            query, key, value, grad_output, key_mask, statistics, cam,
            *query.stride(), *key.stride(), *value.stride(), *grad_output.stride(), *strides(key_mask, 2),
            heads, length, tokens, width, scale, **common, **options,
        )  # fmt: skip
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
    products = _word_products(query, key, value, grad_output, word_index, key_mask, scale)
    return _word_map(*products, key_mask, features, prefix_tokens)


def _word_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    word_index: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Logits and gradients of one word per image, (B, H, N) each."""
    batch, heads, length, width = query.shape
    tokens = key.shape[2]
    logits = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    gradients = torch.empty_like(logits)
    if logits.numel() == 0:
        return logits, gradients
    options = tiles("word_products", query.dtype, width, tokens, machine_of(query.device))
    with device_of(query):
        kernels.word_products[(-(-tokens // options["BLOCK_N"]), heads, batch)](
            query, key, value, grad_output, word_index.contiguous(), key_mask, logits, gradients,
            *query.stride(), *key.stride(), *value.stride(), *grad_output.stride(), *strides(key_mask, 2),
            heads, length, tokens, width, scale, HAS_MASK=key_mask is not None, **options,
        )  # fmt: skip
    return logits, gradients


def _word_map(
    logits: Tensor, gradients: Tensor, key_mask: Tensor | None, features: Tensor | None, prefix_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """(masked features or an empty tensor, map), the map normalised to keep where ``prefix_tokens`` is given."""
    batch, heads, tokens = logits.shape
    result = logits.new_empty((batch, tokens))
    masked = logits.new_empty(0) if features is None else torch.empty_like(features)
    if result.numel() == 0:
        return masked, result
    dtype = logits.dtype if features is None else features.dtype
    options = tiles("word_map", dtype, 0, tokens, machine_of(logits.device))
    with device_of(logits):
        kernels.word_map[(-(-tokens // options["BLOCK_T"]), batch)](
            logits, gradients, key_mask, features, result, masked,
            *strides(key_mask, 2), *strides(features, 3), *strides(None if features is None else masked, 3),
            heads, tokens, 0 if features is None else features.shape[2], prefix_tokens or 0, CONSTANT_SPREAD,
            HAS_MASK=key_mask is not None, NORMALISE=prefix_tokens is not None, HAS_FEATURES=features is not None,
            WIDEN=element_options(dtype)["WIDEN"], **options,
        )  # fmt: skip
    return masked, result

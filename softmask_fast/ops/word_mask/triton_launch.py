"""Launches the kernels of `triton_kernels.py`: sizes, tiles and grids."""

from __future__ import annotations

import functools

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


@functools.cache
def tiles(
    kernel: str, dtype: torch.dtype, width: int, tokens: int, machine: Machine, dense: bool = True
) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages of a kernel, by sizes and layout alone: the same in every run.

    Without `dense` the elements of a row are apart: each has its own offset, which takes registers.
    """
    half = dtype != torch.float32
    any_strides = {} if dense else machine.launch_options
    if kernel == "word_map":
        # H100, 2026-11-27, 12 heads, four at a time, the loop over them unrolled: 5.4 us at B 256, N 257 (4 warps; with
        # 8 5.5), 6.1 at B 128, N 577 (8 warps; with 4 7.0), 7.8 at B 64, N 1,025 (8 warps; with 4 14.0; two heads at a
        # time 9.0, 16 10.7). Above 2,048 tokens by the registers of that, not measured.
        block_n = max(16, next_power_of_2(tokens))
        return {
            "BLOCK_H": max(1, min(4, 16384 // block_n)),
            "BLOCK_N": block_n,
            "num_warps": 4 if block_n <= 512 else 8 if block_n <= 2048 else 16,
        }
    if kernel == "mask_features":
        # H100, 2026-11-27, C 768: 69.5 us at B 256, N 257 (2.91 TB/s, a copy 3.02), 77.8 at B 128, N 577, 69.2 at B 64,
        # N 1,025; 8 tokens, three tiles in turn: 70.6, 78.9, 70.1. float32 by the same bytes, not measured.
        return {"BLOCK_N": 16 if half else 8, "BLOCK_C": 16 if INTERPRETED else 256, "num_warps": 4, **any_strides}
    block_d = max(16, next_power_of_2(width))
    if kernel == "word_products":
        # H100, 2026-11-27, D 64: 32 keys, 2 warps 71.8 us at B 256, N 257 (2.82 TB/s, a copy 3.02), 80.1 at B 128,
        # N 577, 71.6 at B 64, N 1,025; three such tiles in turn 74.3, 82.9, 73.8. Other widths and float32 by the same
        # bytes, not measured.
        block_n = 16 if INTERPRETED else (2048 if half else 1024) // block_d
        return {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": 2, **any_strides}
    if kernel in ("all_words_statistics", "all_words_map"):
        wide = block_d > 64  # the largest that do not spill; not timed, as no training takes the maps of all words
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
    log_sum_exp: Tensor | None,
    soft_cap: float | None,
    scale: float,
) -> Tensor:
    if word_index is not None:
        return _one_word(query, key, value, grad_output, word_index, key_mask, log_sum_exp, soft_cap, scale, None)
    query, key, value, grad_output = (with_aligned_rows(tensor, 1) for tensor in (query, key, value, grad_output))
    batch, heads, length, width = query.shape
    tokens = key.shape[2]
    cam = query.new_empty((batch, length, tokens), dtype=torch.float32)
    if cam.numel() == 0:
        return cam
    statistics = None
    sizes = (heads, heads // max(key.shape[1], 1), length, tokens, width, scale, soft_cap or 0.0)
    common = {"HAS_MASK": key_mask is not None, "HAS_CAP": soft_cap is not None, **element_options(query.dtype)}
    with device_of(query):
        if log_sum_exp is None:
            statistics = query.new_empty((batch, heads, length, 2), dtype=torch.float32)
            options = tiles("all_words_statistics", query.dtype, width, tokens, machine_of(query.device))
            kernels.all_words_statistics[(-(-length // options["BLOCK_L"]) * heads * batch,)](
                query, key, key_mask, statistics, *query.stride(), *key.stride(), *strides(key_mask, 2), *sizes,
                **common, **options,
            )  # fmt: skip
        options = tiles("all_words_map", query.dtype, width, tokens, machine_of(query.device))
        kernels.all_words_map[(-(-tokens // options["BLOCK_N"]) * -(-length // options["BLOCK_L"]) * batch,)](
            query, key, value, grad_output, key_mask, log_sum_exp, statistics, cam,
            *query.stride(), *key.stride(), *value.stride(), *grad_output.stride(), *strides(key_mask, 2),
            *strides(log_sum_exp, 3), *sizes, HAS_SUM=log_sum_exp is not None, **common, **options,
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
    keep = _one_word(query, key, value, grad_output, word_index, key_mask, None, None, scale, prefix_tokens)
    if features is None:
        return query.new_empty(0), keep
    masked = torch.empty_like(features)
    if masked.numel() == 0:
        return masked, keep
    batch, tokens, channels = features.shape
    dense = features.stride(2) == masked.stride(2) == 1
    options = tiles("mask_features", features.dtype, 0, tokens, machine_of(query.device), dense)
    with device_of(query):
        kernels.mask_features[(-(-tokens // options["BLOCK_N"]) * -(-channels // options["BLOCK_C"]) * batch,)](
            features, keep, masked, *features.stride(), *masked.stride(), tokens, channels,
            WIDEN=element_options(features.dtype)["WIDEN"], **options,
        )  # fmt: skip
    return masked, keep


def _one_word(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    word_index: Tensor,
    key_mask: Tensor | None,
    log_sum_exp: Tensor | None,
    soft_cap: float | None,
    scale: float,
    prefix_tokens: int | None,
) -> Tensor:
    """(B, N): the map of one word per image, or keep where `prefix_tokens` is given."""
    batch, heads, length, width = query.shape
    tokens = key.shape[2]
    result = query.new_empty((batch, tokens), dtype=torch.float32)
    if result.numel() == 0:
        return result
    logits = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    gradients = torch.empty_like(logits)
    machine = machine_of(query.device)
    mask_strides = strides(key_mask, 2)
    given = {"HAS_MASK": key_mask is not None, "HAS_SUM": log_sum_exp is not None}
    with device_of(query):
        if heads:
            dense = key.stride(3) == value.stride(3) == 1
            options = tiles("word_products", query.dtype, width, tokens, machine, dense)
            kernels.word_products[(-(-tokens // options["BLOCK_N"]) * heads * batch,)](
                query, key, value, grad_output, word_index.contiguous(), key_mask, log_sum_exp, logits, gradients,
                *query.stride(), *key.stride(), *value.stride(), *grad_output.stride(), *mask_strides,
                *strides(log_sum_exp, 3), heads, heads // key.shape[1], length, tokens, width, scale, soft_cap or 0.0,
                HAS_CAP=soft_cap is not None, **given, **options,
            )  # fmt: skip
        kernels.word_map[(batch,)](
            logits, gradients, key_mask, result, *mask_strides, heads, tokens, prefix_tokens or 0, CONSTANT_SPREAD,
            NORMALISE=prefix_tokens is not None, **given,
            **tiles("word_map", torch.float32, 0, tokens, machine),
        )  # fmt: skip
    return result

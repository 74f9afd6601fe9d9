"""The compiled extensions for the CPU and for NVIDIA GPUs: optional, and loaded on first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from softmask_fast.ops.registry import generation_reason

_FOLDER = Path(__file__).parents[1]


@functools.cache
def missing() -> str | None:
    """Loads the extension, with its operators in `torch.ops.softmask_fast_cpp`. Returns why it is missing, or None.

    Raises OSError if the file exists but does not load: it was built for another machine or another torch, and running
    several times slower instead would hide that.
    """
    if not (_FOLDER / "_C.abi3.so").exists():
        return "the compiled extension was not built (softmask-fast doctor prints the command that builds it)"
    torch.ops.load_library(_FOLDER / "_C.abi3.so")
    return None


@functools.cache
def cuda_missing() -> str | None:
    """Loads the kernels of the same operators for NVIDIA GPUs; returns and raises as `missing`.

    They are a separate library because they need a torch built with CUDA.
    """
    if (reason := missing()) is not None:
        return reason
    if not (_FOLDER / "_cuda.abi3.so").exists():
        return "the CUDA kernels were not built (they need nvcc and a torch with CUDA at installation)"
    torch.ops.load_library(_FOLDER / "_cuda.abi3.so")
    return None


def cpu_unavailable_reason(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The unavailable_reason of the operators in csrc/cpu."""
    if device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device}"
    return _dtype_reason(dtype) or missing()


def cuda_unavailable_reason(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The unavailable_reason of the operators in csrc/cuda, with heads of up to 128 elements."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it runs on an NVIDIA GPU, the tensors are on {device}"
    if width > 128:
        return f"it takes heads of up to 128 elements, not {width}"
    return _dtype_reason(dtype) or generation_reason(device) or cuda_missing()


def _dtype_reason(dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    return None

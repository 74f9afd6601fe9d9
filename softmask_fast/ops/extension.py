"""The compiled extensions, for the CPU and for NVIDIA GPUs: loaded on first use, never needed."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_FOLDER = Path(__file__).parents[1]


@functools.cache
def missing() -> str | None:
    """Loads the extension, so that its operators are in ``torch.ops.softmask_fast_cpp``.

    Returns why they are not there, or None. A file that is there but does not load raises OSError: it was built for
    another machine or another torch, and running several times slower instead would hide that.
    """
    if not (_FOLDER / "_C.abi3.so").exists():
        return "the compiled extension was not built (install with a C++ compiler and torch at hand, see setup.py)"
    torch.ops.load_library(_FOLDER / "_C.abi3.so")
    return None


@functools.cache
def cuda_missing() -> str | None:
    """Loads the kernels for NVIDIA GPUs, the same operators for other tensors; returns and raises as ``missing``.

    They are a library of their own because they need a torch that was built with CUDA.
    """
    if (reason := missing()) is not None:
        return reason
    if not (_FOLDER / "_cuda.abi3.so").exists():
        return "the CUDA kernels were not built (install with nvcc and a torch with CUDA at hand, see setup.py)"
    torch.ops.load_library(_FOLDER / "_cuda.abi3.so")
    return None


def cpu_unavailable_reason(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The unavailable_reason of the operators in csrc/cpu."""
    if device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device}"
    return _dtype_obstacle(dtype) or missing()


def cuda_unavailable_reason(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The unavailable_reason of the operators in csrc/cuda, with heads of up to 128 elements."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it runs on an NVIDIA GPU, the tensors are on {device}"
    if width > 128:
        return f"it takes heads of up to 128 elements, not {width}"
    return _dtype_obstacle(dtype) or _generation_obstacle(device) or cuda_missing()


def _dtype_obstacle(dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    return None


@functools.cache
def _generation_obstacle(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it is compiled for sm_80 and later, {device} is sm_{major}{minor}"

"""The compiled extension: loaded on first use, never needed."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_FILE = Path(__file__).parents[1] / "_C.abi3.so"


@functools.cache
def missing() -> str | None:
    """Loads the extension, so that its operators are in ``torch.ops.softmask_fast_cpp``.

    Returns why they are not there, or None. A file that is there but does not load raises OSError: it was built for
    another machine or another torch, and running several times slower instead would hide that.
    """
    if not _FILE.exists():
        return "the compiled extension was not built (install with a C++ compiler and torch at hand, see setup.py)"
    torch.ops.load_library(_FILE)
    return None


def cpu_obstacle(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The obstacle of the operators in csrc/cpu."""
    if device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    return missing()

"""What the operators do under ``torch.autocast``: the same as PyTorch's own attention."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_CASTABLE = (torch.float16, torch.bfloat16, torch.float32)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device when autocast is on there, else as they are; float64 stays.

    Soft masks, biases and statistics do not go through here: they keep their precision, and the kernels accumulate in
    float32 in any case.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in _CASTABLE else tensor for tensor in tensors
    )


def without_autocast(function: Callable) -> Callable:
    """Decorates an implementation in plain PyTorch, whose first argument is a tensor: its products keep their dtype."""

    @functools.wraps(function)
    def run(tensor: Tensor, *args):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args)

    return run

"""The one tolerance policy: how far a result may lie from the exact one."""

from __future__ import annotations

import torch
from torch import Tensor

# Besides PyTorch's error, a result may be off by this many rounding units of its largest value: on a handful of
# elements PyTorch can be exact by luck.
ROUNDING_UNITS = 4


def errors(actual: Tensor, baseline: Tensor, truth: Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    """The largest error of `actual`, the largest one allowed, and the largest one of plain PyTorch.

    Allowed is twice the error of PyTorch plus `ROUNDING_UNITS`.

    Args:
        actual: the result to judge, not empty.
        baseline: the same computation by plain PyTorch, of the same size.
        truth: the same computation in float64, of the same size.
        dtype: dtype of the inputs.
    """
    truth = truth.double()
    error = (actual.double() - truth).abs().max().item()
    baseline_error = (baseline.double() - truth).abs().max().item()
    allowed = 2 * baseline_error + ROUNDING_UNITS * torch.finfo(dtype).eps * truth.abs().max().item()
    return error, allowed, baseline_error

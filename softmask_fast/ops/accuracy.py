"""The one tolerance policy: how far a result may be from the truth."""

from __future__ import annotations

import torch
from torch import Tensor

# In addition to PyTorch's error a result may be off by this many rounding units of its largest value: for a handful of
# elements PyTorch can be exact by luck.
ROUNDING_UNITS = 4


def errors(actual: Tensor, baseline: Tensor, truth: Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    """Largest error of `actual`, the allowed one (twice that of PyTorch and some rounding), and that of PyTorch.

    `baseline` is the same computation by plain PyTorch, `truth` in float64, all of one size and not empty. `dtype` is
    that of the inputs.
    """
    truth = truth.double()
    error = (actual.double() - truth).abs().max().item()
    baseline_error = (baseline.double() - truth).abs().max().item()
    allowed = 2 * baseline_error + ROUNDING_UNITS * torch.finfo(dtype).eps * truth.abs().max().item()
    return error, allowed, baseline_error

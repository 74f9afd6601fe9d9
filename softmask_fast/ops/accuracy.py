"""The one tolerance policy: how far from the truth a result may be."""

from __future__ import annotations

import torch
from torch import Tensor

# Beyond the error of PyTorch itself a result may be off by this many units of rounding of its largest value: with a
# handful of elements PyTorch can be exact by luck.
ROUNDING_UNITS = 4


def errors(actual: Tensor, baseline: Tensor, truth: Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    """Largest error of ``actual``, what is allowed (twice that of PyTorch and some rounding), and that of PyTorch.

    ``truth`` is the computation in float64 from the same inputs, ``baseline`` the same computation by plain PyTorch at
    ``dtype``, the dtype of the inputs. All of one size, not empty.
    """
    truth = truth.double()
    error = (actual.double() - truth).abs().max().item()
    baseline_error = (baseline.double() - truth).abs().max().item()
    allowed = 2 * baseline_error + ROUNDING_UNITS * torch.finfo(dtype).eps * truth.abs().max().item()
    return error, allowed, baseline_error

"""The one tolerance policy, and which implementations a test can run."""

import pytest
import torch
from torch import Tensor

from softmask_fast.ops import backend

# Beyond the error of PyTorch itself a result may be off by this many units of rounding of its largest value: with a
# handful of elements PyTorch can be exact by luck.
ROUNDING_UNITS = 4


def assert_as_accurate(
    actual: Tensor, baseline: Tensor, truth: Tensor, dtype: torch.dtype, what: str = "result"
) -> None:
    """The largest error of ``actual`` is at most twice that of PyTorch.

    ``truth`` is the computation in float64 from the same inputs, ``baseline`` the same computation by plain PyTorch at
    ``dtype``, the dtype of the inputs.
    """
    assert actual.shape == truth.shape, f"{what}: size {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    truth = truth.double()
    error = (actual.double() - truth).abs().max().item()
    baseline_error = (baseline.double() - truth).abs().max().item()
    allowed = 2 * baseline_error + ROUNDING_UNITS * torch.finfo(dtype).eps * truth.abs().max().item()
    assert error <= allowed, f"{what}: largest error {error:.3e}, allowed {allowed:.3e} (PyTorch {baseline_error:.3e})"


def require(operator: str, impl: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Skips the test, with the reason, where ``impl`` cannot run."""
    try:
        backend.resolve(operator, impl, device, dtype, width)
    except ValueError as obstacle:
        pytest.skip(str(obstacle))

"""The tolerance policy of all operators, and which implementations a test can run."""

import pytest
import torch
from torch import Tensor

from softmask_fast.ops import registry
from softmask_fast.ops.accuracy import errors


def assert_as_accurate(
    actual: Tensor, baseline: Tensor, truth: Tensor, dtype: torch.dtype, what: str = "result"
) -> None:
    """Asserts that the largest error of `actual` is at most twice that of PyTorch.

    `truth` is computed in float64 from the same inputs, `baseline` by plain PyTorch in `dtype`, that of the inputs.
    """
    assert actual.shape == truth.shape, f"{what}: size {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    error, allowed, baseline_error = errors(actual, baseline, truth, dtype)
    assert error <= allowed, f"{what}: largest error {error:.3e}, allowed {allowed:.3e} (PyTorch {baseline_error:.3e})"


def require(operator: str, impl: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Skips the test and says why if `impl` cannot run."""
    try:
        registry.resolve(operator, impl, device, dtype, width)
    except ValueError as unavailable_reason:
        pytest.skip(str(unavailable_reason))

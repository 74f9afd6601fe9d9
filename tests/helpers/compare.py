"""The tolerance policy of all operators, and which implementations a test can run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softmask_fast.ops import registry
from softmask_fast.ops.accuracy import errors
from softmask_fast.ops.triton_support import INTERPRETED

DEVICES = [torch.device(name) for name in ("cpu", "cuda") if name == "cpu" or torch.cuda.is_available()]


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


def each_implementation(operator: str, *names: str) -> pytest.MarkDecorator:
    """Gives a test `impl` and `device`: every implementation of an operator, or of these, where it runs here."""
    pairs = [
        pytest.param(impl, device, id=f"{device}-{impl}")
        for device in DEVICES
        for impl in registry.runnable(operator, device)
        if not names or impl in names
    ]
    return pytest.mark.parametrize(("impl", "device"), pairs)


def thin_out(impl: str, *places: int) -> None:
    """Interpreted kernels take seconds: of a product of cases they run those whose places add up to a multiple of 3."""
    if impl == "triton" and INTERPRETED and sum(places) % 3:
        pytest.skip("another case covers it in the interpreter")


def require(operator: str, impl: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Skips the test and says why if `impl` cannot run."""
    try:
        registry.resolve(operator, impl, device, dtype, width)
    except ValueError as unavailable_reason:
        pytest.skip(str(unavailable_reason))

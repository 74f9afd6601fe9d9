"""Which implementation of an operator runs.

Every operator registers its implementations in order of preference: the fastest first, the plain PyTorch `reference`
last. `resolve` takes the one that the caller names, or the first one that is automatic on the device and can run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# (device, dtype, width) -> why an implementation cannot run, or None. `width` is the innermost size, which kernels are
# specialized for: the head width of attention, the projection width of the contrastive loss.
UnavailableReason = Callable[[torch.device, torch.dtype, int], str | None]


def always_available(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The unavailable_reason of an implementation that runs everywhere."""
    return None


@functools.cache
def generation_reason(device: torch.device) -> str | None:
    """Why an NVIDIA GPU is too old for the kernels, of Triton and of CUDA; None for others, and without any."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs an NVIDIA GPU of sm_80 or later, {device} is sm_{major}{minor}"


@dataclass(frozen=True)
class Implementation:
    """One implementation of one operator.

    Each operator defines its parts ("forward", "backward", ...) and their signatures.
    """

    name: str
    functions: dict[str, Callable]  # by part; `implementation["forward"]` is one of them
    unavailable_reason: UnavailableReason = always_available
    automatic_on: tuple[str, ...] = ()  # device types on which `impl=None` may choose it; empty: all
    automatic_from: int = 0  # bytes of a matrix of the definition from which on `impl=None` may choose it

    def __getitem__(self, part: str) -> Callable:
        return self.functions[part]

    def __contains__(self, part: str) -> bool:
        return part in self.functions


def lazily(module: str, function: str) -> Callable:
    """A function that is imported at its first call, so that importing the operators needs no Triton."""

    def run(*args: Any, **options: Any) -> Any:
        return getattr(import_module(module), function)(*args, **options)

    return run


_OPERATORS: dict[str, dict[str, Implementation]] = {}


def register(operator: str, *implementations: Implementation) -> None:
    """Registers implementations of an operator, best first. Raises ValueError for a name registered twice."""
    known = _OPERATORS.setdefault(operator, {})
    for implementation in implementations:
        if implementation.name in known:
            raise ValueError(f"{operator}: implementation {implementation.name!r} is registered twice")
        known[implementation.name] = implementation


@contextmanager
def registered(operator: str, implementation: Implementation) -> Iterator[None]:
    """For tests: inside the `with` block the operator has one more implementation, or another one of that name."""
    known = _OPERATORS[operator]
    before = dict(known)
    known[implementation.name] = implementation
    try:
        yield
    finally:
        known.clear()
        known.update(before)


def resolve(
    operator: str,
    impl: str | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    width: int = 64,
    matrix: int | None = None,
) -> Implementation:
    """The implementation to run: `impl`, or the first one that is automatic on this device and can run.

    `matrix` is the size in bytes of a matrix that the definition would make; without it sizes decide nothing.

    Raises ValueError if it is unknown or cannot run here, with the reason.
    """
    known = _OPERATORS[operator]
    if impl is not None:
        if impl not in known:
            raise ValueError(f"impl: {operator} has the implementations {', '.join(known)}; got {impl!r}")
        reason = known[impl].unavailable_reason(device, dtype, width)
        if reason is not None:
            raise ValueError(f"impl: {operator} cannot run {impl!r} here: {reason}")
        return known[impl]
    reasons = []
    for implementation in known.values():
        if implementation.automatic_on and device.type not in implementation.automatic_on:
            continue
        if matrix is not None and matrix < implementation.automatic_from:
            continue
        reason = implementation.unavailable_reason(device, dtype, width)
        if reason is None:
            return implementation
        reasons.append(f"{implementation.name}: {reason}")
    raise ValueError(f"{operator}: no implementation runs on {device} with {dtype}: {'; '.join(reasons)}")


def runnable(operator: str, device: torch.device, dtype: torch.dtype = torch.float32, width: int = 64) -> list[str]:
    """Names of the implementations that can run here."""
    return [i.name for i in implementations(operator) if i.unavailable_reason(device, dtype, width) is None]


def describe(dtype: torch.dtype = torch.float32, width: int = 64) -> dict[str, dict[str, str]]:
    """Operator -> device type of this machine -> name of what `impl=None` chooses there."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    return {
        operator: {device.type: resolve(operator, None, device, dtype, width).name for device in devices}
        for operator in _OPERATORS
    }


def implementations(operator: str) -> list[Implementation]:
    """All implementations of an operator, best first."""
    return list(_OPERATORS[operator].values())


def operators() -> list[str]:
    """Names of the operators."""
    return list(_OPERATORS)


def choices(
    operator: str, device: torch.device, dtype: torch.dtype = torch.float32, width: int = 64
) -> dict[str, str | None]:
    """Name of each implementation, best first -> why `impl=None` does not choose it here; None for the chosen one."""
    reasons, taken = {}, None
    for name, implementation in _OPERATORS[operator].items():
        reason = implementation.unavailable_reason(device, dtype, width)
        if reason is None and implementation.automatic_on and device.type not in implementation.automatic_on:
            reason = f"available on {device.type}, but only if requested by name"
        if reason is None and taken is not None:
            limit = _OPERATORS[operator][taken].automatic_from
            where = f" where a matrix has {limit >> 20} MiB or more" if limit else ""
            reason = f"available, but {taken} is preferred{where}"
        if reason is None:
            taken = name
        reasons[name] = reason
    return reasons


def plain_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but this process' own call will ever see what an operator does with these tensors.

    Then a plain `autograd.Function` around the implementation does, which costs the host a fraction of a registered
    operator. False under `torch.compile`, tracing, dispatch modes (fake tensors, counting), `torch.func`, forward-mode
    differentiation and for subclasses of tensors: they need the registered operator.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    ):
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor and tensor is not None and type(tensor) is not torch.nn.Parameter:
            return False
    return True


def refuse_transforms(operator: str, *arguments: Any) -> None:
    """Raises RuntimeError where PyTorch would lose the derivative of an operator, or fail without its name.

    To be called before any argument is detached. Under `torch.compile` no tensor says what tracks it, so any transform
    will do. Unless asked for a full graph, Dynamo then calls the function eagerly, and the tensors decide.
    """
    forward_mode, transformed = forward_ad._current_level >= 0, torch._C._are_functorch_transforms_active()
    if not forward_mode and not transformed:
        return
    dual = forward_mode
    if not torch.compiler.is_compiling():
        functorch, tensors = torch._C._functorch, [x for x in arguments if isinstance(x, Tensor)]
        transformed = any(functorch.is_gradtrackingtensor(x) or functorch.is_batchedtensor(x) for x in tensors)
        dual = forward_mode and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    if transformed or dual:
        what = "forward mode" if forward_mode else "torch.func"
        raise RuntimeError(f"{operator}: {what} is not supported; use torch.autograd.grad")

"""Which implementation of an operator runs: one small resolver.

Every operator registers its implementations in order of preference (the fastest first, the plain PyTorch ``reference``
last). ``resolve`` takes the first one that is chosen automatically on the device and can run, or the one that the
caller names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

# Says why an implementation cannot run for (device, dtype, width), or None when it can. `width` is the innermost size
# the kernels are specialised on: the head width of attention, the projection width of the contrastive loss.
UnavailableReason = Callable[[torch.device, torch.dtype, int], str | None]


def always_available(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The unavailable_reason of an implementation that runs everywhere."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One implementation of one operator.

    ``functions`` maps the names of an operator's parts ("forward", "backward", ...) to functions; each operator defines
    its own parts and their signatures, and ``implementation["forward"]`` is such a function. ``automatic_on`` lists the
    device types on which ``impl=None`` may choose it (empty: all).
    """

    name: str
    functions: dict[str, Callable]
    unavailable_reason: UnavailableReason = always_available
    automatic_on: tuple[str, ...] = ()

    def __getitem__(self, part: str) -> Callable:
        return self.functions[part]

    def __contains__(self, part: str) -> bool:
        return part in self.functions


def lazily(module: str, function: str) -> Callable:
    """A function that is imported when it is first called: importing the operators needs no Triton."""

    def run(*args, **options):
        return getattr(import_module(module), function)(*args, **options)

    return run


_OPERATORS: dict[str, dict[str, Implementation]] = {}


def register(operator: str, *implementations: Implementation) -> None:
    """Registers the implementations of ``operator``, best first. Raises ValueError for a name registered twice."""
    known = _OPERATORS.setdefault(operator, {})
    for implementation in implementations:
        if implementation.name in known:
            raise ValueError(f"{operator}: implementation {implementation.name!r} is registered twice")
        known[implementation.name] = implementation


def resolve(
    operator: str, impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32, width: int = 64
) -> Implementation:
    """The implementation to run.

    ``impl=None`` picks the first registered one that is automatic on this device and can run. A name that is unknown,
    or that cannot run here, raises ValueError and says why.
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
        reason = implementation.unavailable_reason(device, dtype, width)
        if reason is None:
            return implementation
        reasons.append(f"{implementation.name}: {reason}")
    raise ValueError(f"{operator}: no implementation runs on {device} with {dtype}: {'; '.join(reasons)}")


def runnable(operator: str, device: torch.device, dtype: torch.dtype = torch.float32, width: int = 64) -> list[str]:
    """Names of the implementations that can run here."""
    known = _OPERATORS[operator].items()
    return [name for name, found in known if found.unavailable_reason(device, dtype, width) is None]


def describe(dtype: torch.dtype = torch.float32, width: int = 64) -> dict[str, dict[str, str]]:
    """operator -> device type -> what ``impl=None`` chooses there, for the device types of this machine."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    return {
        operator: {device.type: resolve(operator, None, device, dtype, width).name for device in devices}
        for operator in _OPERATORS
    }


def implementations(operator: str) -> list[Implementation]:
    """All of them, best first."""
    return list(_OPERATORS[operator].values())


def operators() -> list[str]:
    """Names of the operators that have implementations."""
    return list(_OPERATORS)


def choices(
    operator: str, device: torch.device, dtype: torch.dtype = torch.float32, width: int = 64
) -> dict[str, str | None]:
    """Each implementation, best first -> why ``impl=None`` does not take it here; None for the one that it takes."""
    reasons, taken = {}, None
    for name, implementation in _OPERATORS[operator].items():
        reason = implementation.unavailable_reason(device, dtype, width)
        if reason is None and implementation.automatic_on and device.type not in implementation.automatic_on:
            reason = f"it runs on {device.type}, but by its name alone"
        if reason is None and taken is not None:
            reason = f"it runs, but {taken} comes first"
        if reason is None:
            taken = name
        reasons[name] = reason
    return reasons

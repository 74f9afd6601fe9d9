"""Checks of the arguments that ``focal_itc_loss`` and ``FocalITCLoss`` have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softmask_fast.ops.checks import FLOAT_DTYPES, check_number, check_tensor


def check_gamma(gamma: object) -> float:
    """A finite number of at least 0."""
    gamma = check_number("gamma", gamma, at_least=0)
    if not math.isfinite(gamma):
        raise ValueError(f"gamma: expected a finite number, got {gamma}")
    return gamma


def check_teachers(image: Tensor, teacher_image: Tensor | None, teacher_text: Tensor | None, alpha: float) -> float:
    """The teachers have the size of ``image`` and are there where alpha > 0; alpha is a number from 0 to 1."""
    alpha = check_number("alpha", alpha, at_least=0)
    if alpha > 1:
        raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
    for name, teacher in (("teacher_image", teacher_image), ("teacher_text", teacher_text)):
        if teacher is not None:
            check_tensor(name, teacher, tuple(image.shape), like=("image", image), same_dtype=True)
        elif alpha > 0:
            raise ValueError(f"{name}: expected a tensor of size {tuple(image.shape)} as alpha is {alpha}, got None")
    return alpha


def check_integer(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bound = f"from {low} to {high}" if high is not None else f"of at least {low}"
        if name == "row_offset" and high is not None:
            bound += " (the number of keys less the number of rows)"
        raise ValueError(f"{name}: expected an integer {bound}, got {value}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def as_scalar(temperature: float | Tensor, image: Tensor) -> Tensor:
    """The temperature as a 0-dim tensor in the dtype of the sums; keeps the graph of a tensor."""
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    if not isinstance(temperature, Tensor):
        value = check_number("temperature", temperature, above=0)
        return torch.full((), value, dtype=dtype, device=image.device)
    check_tensor("temperature", temperature, (), dtypes=FLOAT_DTYPES, like=("image", image))
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling() and not float(temperature.detach()) > 0:
        raise ValueError(f"temperature: expected a number above 0, got {float(temperature.detach())}")
    return temperature.to(dtype)

"""Argument checks of the operators: every message names the argument, what was expected, and what came.

The checks read sizes, dtypes and devices only, never values, so they cost no synchronisation on a GPU and trace under
``torch.compile``. Checks of values (``check_index_range``) read them on the CPU only; see there for GPU tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str,
    value: object,
    sizes: Sequence[int | str],
    *,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    like: tuple[str, Tensor] | None = None,
    same_dtype: bool = False,
) -> Tensor:
    """Checks one tensor argument and returns it.

    ``sizes`` holds one entry per dimension: a number that it must equal, or a letter that only names it in the message.
    ``like`` is (name, tensor) of the argument whose device (and dtype, with ``same_dtype``) this one must share.
    Raises TypeError for something that is no tensor or has another dtype, ValueError for a wrong size or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}, got {_names([value.dtype])}")
    wrong = value.dim() != len(sizes)
    if not wrong:
        for size, expected in zip(value.shape, sizes, strict=True):
            if not isinstance(expected, str) and size != expected:
                wrong = True
    if wrong:
        expected_text = ", ".join(str(size) for size in sizes)
        raise ValueError(f"{name}: expected size ({expected_text}), got {tuple(value.shape)}")
    if like is not None:
        other_name, other = like
        if value.device != other.device:
            raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {value.device}")
        if same_dtype and value.dtype != other.dtype:
            raise TypeError(
                f"{name}: expected dtype {_names([other.dtype])} as {other_name}, got {_names([value.dtype])}"
            )
    return value


def check_has_tokens(key: Tensor) -> None:
    """Raises ValueError when there is nothing to attend to."""
    if key.shape[2] < 1:
        raise ValueError(f"key: expected at least one token, got size {tuple(key.shape)}")


def check_number(name: str, value: object, *, above: float | None = None, at_least: float | None = None) -> float:
    """Returns a Python number as a float. Raises TypeError for something else, ValueError when out of range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if above is not None and not value > above:
        raise ValueError(f"{name}: expected a number above {above}, got {value}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name}: expected a number of at least {at_least}, got {value}")
    return float(value)


def check_index_range(name: str, index: Tensor, size: int) -> None:
    """Raises ValueError unless 0 <= index < size, for CPU tensors.

    On a GPU reading the values would stop the host until the device is idle, so there the kernels guard themselves.
    """
    if index.device.type != "cpu" or index.numel() == 0:
        return
    values = index.tolist()  # quicker than a reduction, whose code is seldom in the cache
    low, high = min(values), max(values)
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected values from 0 to {size - 1}, got {low if low < 0 else high}")


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

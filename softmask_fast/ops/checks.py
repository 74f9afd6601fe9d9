"""Argument checks of the operators: every message names the argument, what was expected, and what came.

The checks read sizes, dtypes and devices only, never values, so they cost no synchronisation on a GPU and trace under
``torch.compile``. Checks of values (``check_index_range``) read them on the CPU only; see there for GPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

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

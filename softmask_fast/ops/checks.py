"""Arguments of the operators: checks, whose messages name the argument, what was expected and what came, and dtypes.

The checks read sizes, dtypes and devices, so they never synchronize with a GPU and trace under `torch.compile`. Values
(`check_index_range`, `host_value`) are only read on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST_NUMBER = 1e12  # of temperatures, scales, caps and biases
LARGEST_GAMMA = 1000.0
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _names(dtypes: Sequence[torch.dtype | torch.layout]) -> str:
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
    """Checks a tensor argument and returns it.

    `sizes` has one entry per dimension: a number that it must equal, or a letter that only names it in the message.
    `like` is (name, tensor) of the argument whose device, and with `same_dtype` whose dtype, this one must share.
    Raises TypeError if it is not a tensor or has another dtype, ValueError for a wrong size or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {_names([value.layout])}")
    if like is None and value.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}, got {_names([value.dtype])}")
    shape = value.shape
    wrong = len(shape) != len(sizes)
    if not wrong:
        for size, expected in zip(shape, sizes, strict=True):
            if type(expected) is not str and size != expected:
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


def check_has_tokens(query: Tensor, key: Tensor) -> None:
    """Raises ValueError without a head or a column, or if there is nothing to attend to. query is (..., H, [L,] D)."""
    heads, width = query.shape[1], query.shape[-1]
    if heads < 1 or width < 1:
        what = "head" if heads < 1 else "column"
        raise ValueError(f"query: expected at least one {what}, got size {tuple(query.shape)}")
    if key.shape[2] < 1:
        raise ValueError(f"key: expected at least one token, got size {tuple(key.shape)}")


def check_number(name: str, value: object, *, above: float | None = None, at_least: float | None = None) -> float:
    """Returns a Python number as a float. Raises TypeError for anything else, ValueError if it is out of range.

    Every number is finite and at most `LARGEST_NUMBER` in size, one above 0 at least the inverse of it: what is beyond
    would overflow or vanish in the sums of one implementation, and not in those of another.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
        raise ValueError(f"{name}: expected a finite number of size at most {LARGEST_NUMBER:g}, got {value!r:.40}")
    if above is not None and not value > above:
        raise ValueError(f"{name}: expected a number above {above}, got {value}")
    if above == 0 and value < 0.999999 / LARGEST_NUMBER:  # in float32 it is a little less
        raise ValueError(f"{name}: expected a number of at least {1 / LARGEST_NUMBER:g}, got {value}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name}: expected a number of at least {at_least}, got {value}")
    return float(value)


def check_index_range(name: str, index: Tensor, size: int) -> None:
    """Raises ValueError unless 0 <= index < size, for CPU tensors.

    Reading GPU values would block the host until the device is idle; there the kernels guard themselves.
    """
    if index.device.type != "cpu" or index.numel() == 0:
        return
    values = index.tolist()  # faster than a reduction for short tensors
    low, high = min(values), max(values)
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected values from 0 to {size - 1}, got {low if low < 0 else high}")


def check_gamma(gamma: object) -> float:
    """Returns gamma as a float. Raises unless it is a number from 0 to `LARGEST_GAMMA`."""
    gamma = check_number("gamma", gamma, at_least=0)
    if gamma > LARGEST_GAMMA:
        raise ValueError(f"gamma: expected a number of at most {LARGEST_GAMMA:g}, got {gamma}")
    return gamma


def check_teachers(
    image: Tensor, teacher_image: Tensor | None, teacher_text: Tensor | None, alpha: float | Tensor
) -> Tensor | None:
    """Returns alpha as a 0-dim float64 tensor on the device of `image`, None where it is the number 0.

    Raises unless it is in [0, 1] and the teachers are like `image`, or None at alpha 0.
    """
    soft = isinstance(alpha, Tensor)
    if soft:
        check_tensor("alpha", alpha, (), like=("image", image))
    value = host_value(alpha)
    if value is not None:
        value = check_number("alpha", value, at_least=0)
        if value > 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {value}")
    soft = soft or alpha > 0
    for name, teacher in (("teacher_image", teacher_image), ("teacher_text", teacher_text)):
        if teacher is not None:
            check_tensor(name, teacher, tuple(image.shape), like=("image", image), same_dtype=True)
        elif soft:
            what = "a tensor" if isinstance(alpha, Tensor) else alpha
            raise ValueError(f"{name}: expected a tensor of size {tuple(image.shape)} as alpha is {what}, got None")
    return as_device_number(alpha, torch.float64, image) if soft else None


def check_seed(seed: int | Tensor, image: Tensor, needed: bool) -> Tensor | None:
    """Returns the seed as a 0-dim int64 tensor on the device of `image`, None where it is not needed.

    Raises unless it is such a tensor or fits into one.
    """
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, (), dtypes=(torch.int64,), like=("image", image))
    else:
        check_integer("seed", seed, -(2**63), 2**63 - 1)
    return as_device_number(seed, torch.int64, image) if needed else None


def host_value(value: float | Tensor) -> float | None:
    """What the host knows of a number: of a 0-dim tensor its value on the CPU, None on a GPU and under `torch.compile`.

    Reading a GPU's value would block the host until the device is idle, so there no range is checked, and the formulas
    take the value as it is.
    """
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "cpu" or torch.compiler.is_compiling() or type(value) not in (Tensor, torch.nn.Parameter):
        return None
    return float(value.detach())


def as_device_number(value: float | Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A number as a 0-dim tensor without gradient; of a tensor the host reads nothing."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


def check_integer(name: str, value: object, low: int, high: int | None) -> None:
    """Raises TypeError for anything but an integer, ValueError unless low <= value <= high (None: no bound)."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bound = f"from {low} to {high}" if high is not None else f"of at least {low}"
        if name == "row_offset" and high is not None:
            bound += " (the number of keys minus the number of rows)"
        raise ValueError(f"{name}: expected an integer {bound}, got {value}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def as_scalar(name: str, number: float | Tensor, image: Tensor, above: float | None = None) -> Tensor:
    """A number as a 0-dim tensor in the `compute_dtype` of the image; the graph of a tensor stays."""
    dtype = compute_dtype(image.dtype)
    if isinstance(number, Tensor):
        check_tensor(name, number, (), like=("image", image))
    value = host_value(number)
    if value is not None:
        value = check_number(name, value, above=above)
    if isinstance(number, Tensor):
        return number.to(dtype)
    return torch.full((), value, dtype=dtype, device=image.device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computations on inputs of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype if autocast is enabled on their device; float64 stays.

    Not for soft masks, biases and statistics, which keep their precision. The kernels accumulate in float32 anyway.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def without_autocast(function: Callable) -> Callable:
    """Decorator of a function whose first argument is a tensor: disables autocast on the tensor's device."""

    @functools.wraps(function)
    def run(tensor: Tensor, *args: Any) -> Any:
        if not torch.is_autocast_enabled(tensor.device.type):  # the context costs more than the question
            return function(tensor, *args)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args)

    return run

"""What the launches of all Triton kernels share. It imports no Triton itself."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason(
    device: torch.device, dtype: torch.dtype, width: int, largest: int = 128, what: str = "heads"
) -> str | None:
    """The unavailable_reason of the Triton implementations, which take ``what`` of up to ``largest`` elements."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"it runs on a GPU (or, slowly, with TRITON_INTERPRET=1 in the environment), the tensors are on {device}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {dtype}"
    if width > largest:
        return f"it takes {what} of up to {largest} elements, not {width}"
    return None


@functools.cache
def element_options(dtype: torch.dtype) -> dict[str, object]:
    """Constants that depend on the dtype of the inputs.

    WIDEN: the interpreter keeps bfloat16 as integers, so there everything becomes float32 right after it is loaded.
    PRECISION: float32 products run as three products of tf32 parts, which is near float32, never as one; AMD's matrix
    cores take float32 as it is.
    """
    widen = INTERPRETED and dtype != torch.float32
    exact = INTERPRETED or dtype != torch.float32 or torch.version.hip is not None
    return {"WIDEN": widen, "PRECISION": "ieee" if exact else "tf32x3"}


class Machine(NamedTuple):
    """What the choice of tiles depends on."""

    capability: int  # NVIDIA's compute capability, 80 for 8.0; 0 for AMD
    shared_memory: int  # bytes that one program may take

    @property
    def launch_options(self) -> dict[str, int]:
        """For kernels with products. NVIDIA's assembler spills a register or two where that lets one more program run
        at a time, unless it is told how many registers it may take. For AMD some pipelines of two stages do not
        compile.
        """
        return {"maxnreg": 255} if self.capability else {"num_stages": 1}


def machine_of(device: torch.device) -> Machine:
    if INTERPRETED or torch.version.hip is not None:
        return Machine(0, 64 * 1024)
    return _nvidia(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _nvidia(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    return Machine(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin)


def strides(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def with_dense_rows(tensor: torch.Tensor | None, dims: int) -> torch.Tensor | None:
    """The tensor itself where its last dimension is dense and 32 bits hold every offset along its last ``dims``
    dimensions, else a dense copy of it: wider offsets would take the registers of the products.
    """
    if tensor is None:
        return None
    pairs = list(zip(tensor.shape[-dims:], tensor.stride()[-dims:], strict=True))
    dense = pairs[-1][0] < 2 or pairs[-1][1] == 1
    return tensor if dense and sum((size - 1) * stride for size, stride in pairs) < 2**31 else tensor.contiguous()


def with_aligned_rows(tensor: torch.Tensor | None, dims: int) -> torch.Tensor | None:
    """The tensor with dense rows that can be read 16 bytes at a time, a copy only where need be.

    Rows whose length is no multiple of 16 are continued with zeros, which changes no product. Read one element at a
    time, tiles for the tensor cores would spill registers.
    """
    if tensor is None:
        return None
    missing = -tensor.shape[-1] % 16
    if missing:
        return torch.nn.functional.pad(tensor, (0, missing)).contiguous()
    tensor = with_dense_rows(tensor, dims)
    pairs = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    aligned = tensor.data_ptr() % 16 == 0 and all(size < 2 or stride % 16 == 0 for size, stride in pairs)
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)


def device_of(tensor: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device: this makes the tensor's device the current one."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def next_power_of_2(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()

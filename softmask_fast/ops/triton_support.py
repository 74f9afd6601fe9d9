"""What the launches of all Triton kernels share. It does not import Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from softmask_fast.ops.registry import generation_reason

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason(
    device: torch.device, dtype: torch.dtype, width: int, largest: int = 128, what: str = "heads"
) -> str | None:
    """The unavailable_reason of the Triton implementations, which take `what` of up to `largest` elements."""
    if _missing():
        return "the package triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"it runs on a GPU (or, slowly, with TRITON_INTERPRET=1 in the environment), the tensors are on {device}"
    if device.type == "cuda" and not INTERPRETED and (reason := generation_reason(device)):
        return reason
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {dtype}"
    if width > largest:
        return f"it takes {what} of up to {largest} elements, not {width}"
    return None


@functools.cache
def _missing() -> bool:
    return importlib.util.find_spec("triton") is None


@functools.cache
def element_options(dtype: torch.dtype) -> dict[str, object]:
    """Constants that depend on the dtype of the inputs.

    WIDEN: convert to float32 after loading, because the interpreter represents bfloat16 as integers.
    PRECISION: of float32 products, which are float32 throughout. As three products of tf32 parts they are too small by
    1.6e-7 on average, and a contrastive loss feels what all its logits are off by ten times over.
    """
    return {"WIDEN": INTERPRETED and dtype != torch.float32, "PRECISION": "ieee"}


class Machine(NamedTuple):
    """What tile sizes depend on."""

    capability: int  # NVIDIA's compute capability, 80 for 8.0; 0 for AMD
    shared_memory: int  # bytes available to one program

    @property
    def launch_options(self) -> dict[str, int]:
        """Options for kernels with products.

        Without a register limit NVIDIA's assembler spills a few registers to fit one more program at a time. On AMD
        some pipelines of two stages do not compile.
        """
        return {"maxnreg": 255} if self.capability else {"num_stages": 1}


def machine_of(device: torch.device) -> Machine:
    """The machine that kernels on this device run on."""
    if INTERPRETED or torch.version.hip is not None:
        return Machine(0, 64 * 1024)
    return _nvidia(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _nvidia(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    return Machine(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin)


def strides(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of a tensor of that many dimensions, 0 for None."""
    return (0,) * dims if tensor is None else tensor.stride()


def with_dense_rows(tensor: torch.Tensor | None, dims: int) -> torch.Tensor | None:
    """The tensor, or a dense copy unless its last dimension is dense and offsets along its last `dims` dimensions fit
    in 32 bits: wider offsets would take registers from the products.
    """
    if tensor is None:
        return None
    pairs = list(zip(tensor.shape[-dims:], tensor.stride()[-dims:], strict=True))
    dense = pairs[-1][0] < 2 or pairs[-1][1] == 1
    return tensor if dense and sum((size - 1) * stride for size, stride in pairs) < 2**31 else tensor.contiguous()


def with_aligned_rows(tensor: torch.Tensor | None, dims: int) -> torch.Tensor | None:
    """The tensor, or a copy if needed, with dense rows that can be read 16 bytes at a time.

    Rows are padded with zeros to a multiple of 16 elements, which changes no product. Reading tiles for the tensor
    cores one element at a time would spill registers.
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
    """Makes the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def next_power_of_2(size: int) -> int:
    """The smallest power of 2 that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()

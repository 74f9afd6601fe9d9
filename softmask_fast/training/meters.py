"""Meters of a training step: operations, memory, time spent waiting for data, a trace; and copies to the host."""

from __future__ import annotations

import copy
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from softmask_fast.ops.collectives import one_rank

Item = TypeVar("Item")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the best of ten: 100 % utilization in the log.

    The numbers are random. With constant ones a GPU is faster, as it draws less power where few bits change.
    """
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def seconds() -> float:
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return 2 * size**3 / min(seconds() for _ in range(10))


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of PyTorch's allocator on a GPU, of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class FlopCount:
    """Operations of a step's forward and backward pass on this device, counted without computing anything.

    Counts matrix products, convolutions, PyTorch's attention and ours, and what activation checkpointing recomputes.
    Not counted: the contrastive loss, and what `gathered_negatives` adds for images of other ranks.

    Attributes:
        operations: None until `count` was called.
    """

    def __init__(self, step: nn.Module, teacher: nn.Module, device: torch.device) -> None:
        """Copy the modules to `device` without their values, before DeepSpeed splits the weights among ranks."""
        self.operations: int | None = None
        self._noted: tuple | None = None
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        tensors = (x for module in (step, teacher) for x in (*module.parameters(), *module.buffers()))
        self._copies = copy.deepcopy((step, teacher), {id(x): self._without_numbers(x, device) for x in tensors})

    def _without_numbers(self, tensor: Tensor, device: torch.device) -> Tensor:
        fake = FakeTensor(self._mode, torch.empty_like(tensor, device="meta", requires_grad=False), device)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def note(self, batch: Any, *settings: Any) -> None:
        """Note the arguments of the first `step(batch, teacher, *settings)`, for `count`."""
        if self._noted is None:
            tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
            tensors = {name: x for name, x in tensors.items() if isinstance(x, Tensor)}
            fake = {
                n: self._without_numbers(x, x.device) for n, x in tensors.items() if x.is_cuda or x.is_floating_point()
            }
            self._noted = replace(batch, **fake), settings

    def count(self) -> None:
        """Count the noted step; later calls do nothing."""
        if self.operations is not None:
            return
        (step, teacher), (batch, settings) = self._copies, self._noted
        with one_rank(), torch.compiler.set_stance("force_eager"), self._mode, OperationCounter() as counter:
            loss, _ = step(batch, teacher, *settings)
            loss.backward()
        self.operations, self._copies, self._noted = counter.operations, None, ()


class OperationCounter(TorchDispatchMode):
    """Counts `operations` within a FakeTensorMode.

    Operators on fake tensors and on a GPU compute nothing. Those on real CPU tensors run, so that a batch's lengths and
    indices keep their values. Reading a value from a fake tensor gives 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.formulas = 0, flop_registry | other_formulas()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        on_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if on_gpu or any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            if function is torch.ops.aten._local_scalar_dense.default:
                return 1
            result = function(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                result = function(*args, **kwargs)
        if formula := self.formulas.get(function._overloadpacket):
            self.operations += formula(*args, **kwargs, out_val=result)
        return result


def other_formulas() -> dict[Any, Callable[..., int]]:
    """operator -> its operations, for the attention operators that PyTorch's `flop_registry` lacks."""
    import torch.nn.attention.varlen  # defines its operators

    ours, aten, varlen = torch.ops.softmask_fast, torch.ops.aten, torch.ops.torch_attn
    return {
        ours.soft_masked_attention: lambda query, key, *_, **__: _attention(2, query, key),
        ours.soft_masked_attention_backward: lambda _, query, key, *__, **___: _attention(5, query, key),
        aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, *_, **__: _attention(2, query, key),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda _, query, key, *__, **___: _attention(5, query, key)
        ),
        # packed captions count as if all were as long as the longest
        varlen._varlen_attn: lambda query, *others, **__: 2 * 2 * query.numel() * others[5],
        varlen._varlen_attn_backward: lambda _, query, *others, **__: 5 * 2 * query.numel() * others[8],
    }


def _attention(products: int, query: Tensor, key: Tensor) -> int:
    """query (S, H, L, D), key (B, H, N, D)."""
    return products * 2 * query.numel() * key.shape[2]


class DataTimer:
    """Measures the fraction of the time that training waits for data."""

    def __init__(self) -> None:
        self.waited, self.since = 0.0, time.monotonic()

    def next(self, items: Iterator[Item]) -> Item:
        """The next item, timed."""
        began = time.monotonic()
        item = next(items)
        self.waited += time.monotonic() - began
        return item

    def exclude(self, seconds: float) -> None:
        """Leave the last `seconds` out of the measured time."""
        self.since += seconds

    def fraction(self) -> float:
        """The fraction in [0, 1] since the last call."""
        now = time.monotonic()
        fraction = self.waited / (now - self.since)
        self.waited, self.since = 0.0, now
        return fraction


class StepProfiler:
    """Traces `steps` steps, from the fourth on, into a file for chrome://tracing or Perfetto; 0: none."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self._profile = path, None
        if steps == 0:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        when = schedule(wait=2, warmup=1, active=steps, repeat=1)
        self._profile = profile(activities=activities, schedule=when, on_trace_ready=self._write)
        self._profile.start()

    def step(self) -> None:
        """Call this after every training step."""
        if self._profile is not None:
            self._profile.step()

    def stop(self) -> None:
        """Stop early; writes the steps traced so far."""
        if self._profile is not None:
            self._profile.stop()

    def _write(self, profiler: profile) -> None:
        temporary = self.path.with_name(self.path.stem + ".partial.json")
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, self.path)


class HostCopy:
    """A scalar on its way to the host. Reading `value` waits for it; the GPU goes on with the work queued after it."""

    def __init__(self, scalar: torch.Tensor) -> None:
        self.arrived = torch.cuda.Event() if scalar.is_cuda else None
        self.copy = torch.empty((), dtype=scalar.dtype, pin_memory=scalar.is_cuda)
        self.copy.copy_(scalar.detach(), non_blocking=True)
        if self.arrived:
            self.arrived.record()

    @property
    def value(self) -> float:
        """The number, once it has arrived."""
        if self.arrived:
            self.arrived.synchronize()
        return self.copy.item()

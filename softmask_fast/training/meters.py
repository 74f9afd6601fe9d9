"""Meters of a training step: operations, memory, time spent waiting for data, a trace; and a copy to the host."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

Item = TypeVar("Item")
Result = TypeVar("Result")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the best of ten; 100 % utilization in the log."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.ones(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return 2 * size**3 / min(seconds() for _ in range(10))


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: those of PyTorch's allocator on a GPU, resident ones of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class FlopCount:
    """Operations of a forward and backward pass on this device, counted during the first one.

    Counts matrix products, convolutions, PyTorch's attention and ours, and what activation checkpointing recomputes;
    the contrastive loss is not counted. Counting does not change the results.
    """

    def __init__(self) -> None:
        self.operations: int | None = None

    def run(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Call `work(*arguments)`, and count its operations the first time."""
        if self.operations is not None:
            return work(*arguments)
        ours = torch.ops.softmask_fast
        formulas = {
            ours.soft_masked_attention: lambda query, key, *_, **__: _attention_operations(2, query, key),
            ours.soft_masked_attention_backward: lambda _, query, key, *__, **___: _attention_operations(5, query, key),
        }
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        with torch.compiler.set_stance("force_eager"), counter:
            result = work(*arguments)
        self.operations = counter.get_total_flops()
        return result


def _attention_operations(products: int, query: torch.Size, key: torch.Size) -> int:
    sequences, heads, length, width = query
    return products * 2 * sequences * heads * length * key[2] * width


class DataTimer:
    """Measures the fraction of the time that training waits for its data."""

    def __init__(self) -> None:
        self.waited, self.since = 0.0, time.monotonic()

    def next(self, items: Iterator[Item]) -> Item:
        """The next item, timed."""
        began = time.monotonic()
        item = next(items)
        self.waited += time.monotonic() - began
        return item

    def exclude(self, seconds: float) -> None:
        """Do not count so many seconds that just passed."""
        self.since += seconds

    def fraction(self) -> float:
        """The fraction since the last call."""
        now = time.monotonic()
        fraction = self.waited / (now - self.since)
        self.waited, self.since = 0.0, now
        return fraction


class StepProfiler:
    """Traces `steps` steps after three others into a file for chrome://tracing or Perfetto; 0: nothing."""

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
        """To be called after every training step."""
        if self._profile is not None:
            self._profile.step()

    def stop(self) -> None:
        if self._profile is not None:
            self._profile.stop()

    def _write(self, profiler: profile) -> None:
        temporary = self.path.with_name(self.path.stem + ".partial.json")
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, self.path)


class HostCopy:
    """A scalar on its way to the host. `value` waits for it, while a GPU continues with the work queued after it."""

    def __init__(self, scalar: torch.Tensor) -> None:
        self.arrived = torch.cuda.Event() if scalar.is_cuda else None
        self.copy = torch.empty((), dtype=scalar.dtype, pin_memory=scalar.is_cuda)
        self.copy.copy_(scalar.detach(), non_blocking=True)
        if self.arrived:
            self.arrived.record()

    @property
    def value(self) -> float:
        if self.arrived:
            self.arrived.synchronize()
        return self.copy.item()

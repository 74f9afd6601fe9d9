"""Time and memory of variants of one computation, measured the same way in every benchmark."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronised(function: Callable, device: torch.device) -> Callable:
    """The function, waiting for the GPU at its end."""

    def run():
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def interleaved(functions: dict[str, Callable], rounds: int = 30, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that whatever else the machine does meets all of them."""
    times = {name: [] for name in functions}
    for turn in range(rounds + warmup):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def extra_memory(function: Callable, device: torch.device) -> int:
    """Most bytes that one call holds beyond what was there before it, its result included.

    On the CPU it is the resident memory of the process (Linux), on a GPU what PyTorch's allocator handed out.
    """
    if device.type == "cuda":
        function()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    function()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")

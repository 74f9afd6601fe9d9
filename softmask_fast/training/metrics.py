"""What a run writes and shows: metrics.jsonl, TensorBoard, the progress bar, the environment, its meters, a trace."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from softmask_fast.utils import installed_versions, write_text


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device, for the head of the log."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"versions": installed_versions(), "device": name, "command": sys.argv}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large matrix product, the best of ten: what the utilisation is measured against."""
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
    """Most bytes so far: of PyTorch's allocator on a GPU, resident ones of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class FlopCount:
    """Operations of one forward and backward pass on this device, counted while the first one runs.

    Matrix products, convolutions, PyTorch's attention and ours; what activation checkpointing computes again counts as
    often as it runs, the contrastive loss not at all. The pass computes the same bits as one that is not counted.
    """

    def __init__(self):
        self.operations: int | None = None

    def run(self, work: Callable[[], Any]) -> Any:
        if self.operations is not None:
            return work()
        attention = torch.ops.softmask_fast
        formulas = {
            attention.soft_masked_attention: lambda query, key, *_, **__: _attention_operations(2, query, key),
            attention.soft_masked_attention_backward: lambda _, query, key, *__, **___: _attention_operations(
                5, query, key
            ),
        }
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        with torch.compiler.set_stance("force_eager"), counter:
            result = work()
        self.operations = counter.get_total_flops()
        return result


def _attention_operations(products: int, query: torch.Size, key: torch.Size) -> int:
    sequences, heads, length, width = query
    return products * 2 * sequences * heads * length * key[2] * width


def step_profiler(path: Path, steps: int) -> AbstractContextManager:
    """Traces `steps` steps after three others and writes them to `path` for chrome://tracing or Perfetto; 0: none.
    Its `step()` is called after every step (`None` is entered when there is nothing to trace)."""
    if steps == 0:
        return nullcontext()

    def write(profiler: profile) -> None:
        temporary = path.with_name(path.stem + ".partial.json")
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, path)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    return profile(
        activities=activities, schedule=schedule(wait=2, warmup=1, active=steps, repeat=1), on_trace_ready=write
    )


def drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Leaves a log, one JSON object with "step" a line, as it was after a step, and returns its records: a resumed run
    repeats the steps after its checkpoint, and each step shall stand once. A line that is not whole goes too."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [(line, record) for line, record in whole if record["step"] <= step]
    if len(kept) < len(lines):
        write_text(path, "".join(line for line, _ in kept))
    return [record for _, record in kept]


class RunLog:
    """Metrics of a run: one JSON object per line, the same in TensorBoard, and the progress bar. For rank 0."""

    def __init__(self, directory: Path, first_step: int, steps: int, pairs_per_step: int, matmul_rate: float):
        """matmul_rate: operations per second of one device, 100 % utilisation."""
        path = directory / "metrics.jsonl"
        drop_lines_after(path, first_step)
        self.file = open(path, "a", buffering=1)
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=0.2 if terminal else 20.0
        )
        self.redirected = ExitStack()  # a line of the log stands above the bar, not within it
        self.redirected.enter_context(logging_redirect_tqdm())
        self.pairs_per_step, self.matmul_rate = pairs_per_step, matmul_rate
        self.since, self.since_step = time.monotonic(), first_step

    def write(self, step: int, figures: dict[str, float], operations: int) -> None:
        """Log the figures of a step that took so many operations on one device; pairs/s and utilisation are means since
        the last call."""
        now = time.monotonic()
        per_second = (step - self.since_step) / (now - self.since)
        figures = figures | {
            "pairs_per_second": self.pairs_per_step * per_second,
            "flops_utilisation": operations * per_second / self.matmul_rate,
        }
        self.since, self.since_step = now, step
        self.file.write(json.dumps({"step": step, **{k: float(f"{v:.8g}") for k, v in figures.items()}}) + "\n")
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)
        shown = {name: f"{figures[name]:.3f}" for name in ("loss", "itc", "itm", "mlm") if name in figures}
        meters = {
            "pairs/s": f"{figures['pairs_per_second']:.0f}",
            "flops": f"{figures['flops_utilisation']:.0%}",
            "GiB": f"{figures['peak_memory_gib']:.1f}",
            "wait": f"{figures['data_wait']:.0%}",
        }
        self.bar.set_postfix(shown | meters, refresh=False)

    def write_held_out(self, step: int, figures: dict[str, float], seconds: float) -> None:
        """Show figures of held-out data in TensorBoard; the seconds that they took do not count as training."""
        self.since += seconds
        for name, value in figures.items():
            self.board.add_scalar(f"held_out_{name.replace(' ', '_')}", value, step)

    def advance(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        self.redirected.close()
        self.board.close()
        self.file.close()

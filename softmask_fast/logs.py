"""What a run writes and shows: metrics.jsonl, TensorBoard, the progress bar, the environment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

PACKAGES = ("softmask_fast", "torch", "triton", "transformers", "timm", "deepspeed", "nvidia-dali-cuda130", "xformers")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device, for the head of the log."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"versions": versions, "device": name, "command": sys.argv}


class RunLog:
    """Metrics of a run: one JSON object per line, the same in TensorBoard, and the progress bar. For rank 0."""

    def __init__(self, directory: Path, first_step: int, steps: int, pairs_per_step: int):
        self.path = directory / "metrics.jsonl"
        self._drop_lines_after(first_step)
        self.file = open(self.path, "a", buffering=1)
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=0.2 if terminal else 20.0
        )
        self.pairs_per_step = pairs_per_step
        self.since, self.since_step = time.monotonic(), first_step

    def _drop_lines_after(self, step: int) -> None:
        """A resumed run repeats the steps after its checkpoint: their old lines go, so that each step stands once."""
        if not self.path.exists():
            return
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        temporary = self.path.with_name(self.path.name + ".partial")
        temporary.write_text("".join(kept))
        os.replace(temporary, self.path)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Log the figures of a step; pairs/s is the mean since the last call."""
        now = time.monotonic()
        pairs = self.pairs_per_step * (step - self.since_step)
        figures = figures | {"pairs_per_second": pairs / (now - self.since)}
        self.since, self.since_step = now, step
        self.file.write(json.dumps({"step": step, **{k: float(f"{v:.8g}") for k, v in figures.items()}}) + "\n")
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)
        shown = {name: f"{figures[name]:.3f}" for name in ("loss", "itc", "itm", "mlm") if name in figures}
        self.bar.set_postfix(shown | {"pairs/s": f"{figures['pairs_per_second']:.0f}"}, refresh=False)

    def advance(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        self.board.close()
        self.file.close()

"""Runs of the training script as a user starts them, only small; and of the scripts in tests/launched."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent
STEPS = 10
SMALL = {
    "data": "shapes:num=256",
    "image_size": 32, "vision_width": 32, "vision_depth": 2, "vision_contrast_blocks": 1, "vision_heads": 2,
    "text_width": 32, "text_heads": 2, "text_layers": 2, "text_contrast_layers": 1, "fusion_layers": 2,
    "embed_dim": 16, "hidden_dropout": 0.1,
    "queue_size": 24, "distill_ramp_steps": 4, "warmup_steps": 2, "eval_size": 32,
    "batch_size": 4, "max_steps": STEPS, "log_steps": 1, "checkpoint_steps": 3, "data_threads": 1,
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed(*options: str) -> list[str]:
    """DeepSpeed's launcher with its options, a free port among them."""
    return [str(TOOLS / "deepspeed"), "--master_port", str(free_port()), *options]


def torchrun(ranks: int) -> list[str]:
    """PyTorch's launcher: a process fewer, for runs that are not about the launcher."""
    return [str(TOOLS / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", str(free_port())]


def launch(
    output: Path,
    *,
    ranks: int = 1,
    script: str = "softmask_fast/train.py",
    cwd: Path,
    launcher: list[str] | None = None,
    prefix: list[str] | None = None,
    variables: dict[str, str] | None = None,
    common: dict = SMALL,
    **options,
) -> subprocess.Popen:
    """launcher: what starts the script (default: Python for one rank, DeepSpeed for several); prefix: a command before
    it; common: options of the script, which `options` may change."""
    flags = [text for name, value in (common | options).items() for text in (f"--{name}", str(value))]
    if launcher is None:
        launcher = [sys.executable] if ranks == 1 else deepspeed("--num_accelerators", str(ranks))
    command = [*(prefix or []), *launcher, str(ROOT / script)]
    command += ["--deepspeed", str(ROOT / "ds.json"), "--output_dir", str(output), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    if ranks > torch.cuda.device_count() or "--hostfile" in launcher:
        environment["DS_ACCELERATOR"] = "cpu"  # a GPU takes one rank
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment | (variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, expected: int = 0) -> str:
    text, _ = process.communicate(timeout=600)
    assert process.returncode == expected, text[-6000:]
    return text


def metrics(output: Path) -> dict[int, dict]:
    """step -> metrics that must not depend on how the run was interrupted."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for timing in ("pairs_per_second", "data_wait", "flops_utilisation", "peak_memory_gib"):
            del record[timing]
    return {record["step"]: record for record in records}


def wait_for_step(output: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        log = output / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0][-4000:]}")


def run_cases(cases: dict[str, dict], folder: Path, ranks: int = 1, **options) -> str:
    """One run in several ways, in one launch: name of the folder -> its ZeRO `stage`, and options of its own."""
    how = {"script": "tests/launched/several_runs.py", "variables": {"CASES": json.dumps(cases)}}
    launcher = torchrun(ranks) if ranks > 1 else None
    return finish(launch(folder, cwd=folder, ranks=ranks, launcher=launcher, **how, **options))

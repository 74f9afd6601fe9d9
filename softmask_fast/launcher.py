"""`softmask-fast train` and `finetune`: in this process, or on several devices through DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from softmask_fast.errors import UsageError

OPTIONS = {"train": "softmask_fast.training.options", "finetune": "softmask_fast.tasks.options"}


def start(script: str, argv: list[str], devices: int | None, shown: Sequence[argparse.ArgumentParser]) -> int:
    """Trains by a script of the package.

    If another launcher (torchrun, srun, deepspeed) started this process, it is one rank of that launcher's run.
    Otherwise one rank starts per device.

    Args:
        script: "train" or "finetune".
        argv: the script's options.
        devices: number of ranks; None: one per GPU, or one on the CPU.
        shown: parsers whose options --help shows as well.

    Returns:
        The exit status.

    Raises:
        UsageError: for wrong options, or more devices than this machine has.
        SystemExit: for --help.
    """
    name = f"softmask-fast {script}"
    if "WORLD_SIZE" in os.environ:
        if devices is not None:
            raise UsageError(f"devices: expected none, as another launcher started this process, got {devices}")
        return import_module(f"softmask_fast.{script}").main(argv, name)
    import_module(OPTIONS[script]).parse_arguments(argv, prog=name, parents=shown)  # reports wrong options at once
    gpus = count_gpus()
    if devices is not None and not 1 <= devices <= (gpus or devices):
        most = f" and at most {gpus}, the GPUs of this machine" if gpus else ""
        raise UsageError(f"devices: expected at least 1{most}, got {devices}")
    ranks = devices or gpus or 1
    if ranks > 1:
        if find_spec("deepspeed") is None:  # the launcher's own error would not say how to install it
            raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")
        return launch(name, Path(__file__).with_name(f"{script}.py"), argv, ranks, gpus)
    return import_module(f"softmask_fast.{script}").main(argv, name)


def count_gpus() -> int:
    """The GPUs that a run can use; 0 if DeepSpeed is told to use the CPU."""
    import torch

    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def launch(name: str, script: Path, argv: Sequence[str], ranks: int, gpus: int) -> int:
    """Runs the script on `ranks` devices; returns the exit status.

    The ranks get their own session, so that Ctrl-C reaches this process alone: DeepSpeed's launcher would kill ranks
    that have not saved after 30 seconds. The launcher ends the ranks if this process disappears.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",")[:ranks] if visible else list(range(ranks))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": names}).encode()).decode()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", "--log_level=critical", str(script), *argv]
    environment = os.environ | ({} if gpus else {"DS_ACCELERATOR": "cpu"})
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        import psutil

        started = psutil.Process(process.pid).children() if psutil.pid_exists(process.pid) else []
        if not started or (received and number == signal.SIGINT):
            os.killpg(process.pid, signal.SIGKILL)
        elif not received:
            for rank in started:
                rank.terminate()  # it saves
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    status = process.wait()
    if received and status:
        return 128 + received[-1]
    if status > 128:  # a rank's signal, passed on by the launcher
        killers = {256 - number: number.name for number in signal.Signals}
        ended = f"was killed by {killers[status]}" if status in killers else f"ended with status {status}"
        print(f"{name}: error: a rank {ended}", file=sys.stderr)
    return status

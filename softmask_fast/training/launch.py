"""From the launcher's command to work on every rank: options, process group, output folder, stops, exit codes."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from softmask_fast.config import RunConfig
from softmask_fast.errors import UsageError, format_error, is_user_error
from softmask_fast.options import LaunchOptions
from softmask_fast.training import deepspeed_engine
from softmask_fast.training.ranks import run_on_all_ranks


def start_distributed(launch: LaunchOptions) -> None:
    """Join the launcher's process group; alone (also: by plain python) be a group of one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":  # on a port of its own, so that several runs fit on one machine
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.setdefault("LOCAL_RANK", "0")
    if launch.local_rank >= 0:
        os.environ["LOCAL_RANK"] = str(launch.local_rank)
    if get_accelerator().device_name() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:  # its shared-memory collectives need two minutes of compilation
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def output_directory(config: RunConfig) -> Path:
    """The run's folder, agreed on by all ranks and made by the first.

    Raises UsageError when the folder already holds a run and --resume is not given, cannot be made, or not all hosts
    see it.
    """
    choice: list[str | None] = [config.train.output_dir]
    if choice[0] is None:
        number = 1
        while Path(f"runs/{config.name}-{number}").exists():
            number += 1
        choice[0] = str(Path(f"runs/{config.name}-{number}").absolute())
    dist.broadcast_object_list(choice, src=0)
    output = Path(choice[0])

    def check_free() -> None:
        if (output / "config.json").exists() and not config.train.resume:
            raise ValueError(f"output_dir: {output} holds a run; go on with --resume true, or choose another folder")

    run_on_all_ranks(check_free)  # all have looked before the first writes
    config.train.output_dir = str(output)
    run_on_all_ranks(lambda: dist.get_rank() or (output / "checkpoints").mkdir(parents=True, exist_ok=True))
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (output / "checkpoints").is_dir())
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise UsageError(f"output_dir: expected a folder that all hosts share, ranks {blind} do not see {output}")
    return output


SPEAKING_SECONDS = 30.0  # a rank with nothing to say waits so long: the launcher ends all when the first one goes


class StopRequest:
    """Notes SIGTERM, SIGINT and the launcher's death; the loop ends at the next step, on all ranks together."""

    def __init__(self):
        self.received: str | None = None
        # The launcher hands a signal of its process group on, but not one that was sent to its first process alone.
        self.launchers = [
            process for process in psutil.Process().parents()[:2] if "deepspeed" in " ".join(process.cmdline())
        ]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self.received = signal.Signals(number).name

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop. A collective: all ranks call it."""
        if self.received is None and any(has_ended(process) for process in self.launchers):
            self.received = "the launcher's end"
        if dist.get_world_size() == 1:
            return self.received is not None
        flag = torch.tensor(self.received is not None, dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def run_script(
    name: str,
    argv: list[str] | None,
    parse: Callable[[list[str] | None], tuple[RunConfig, LaunchOptions]],
    work: Callable[[RunConfig, dict[str, Any], Path, StopRequest], None],
) -> int:
    """What a script under the deepspeed launcher does around its work; returns the exit status: 2 after one rank's line
    about a mistake of the user that was found before the first step."""
    config, launch = read_options(name, argv, parse)
    start_distributed(launch)
    logging.basicConfig(level=logging.INFO if dist.get_rank() == 0 else logging.WARNING, format="%(message)s")

    def read_deepspeed_config() -> dict[str, Any]:
        found = deepspeed_engine.read_deepspeed_config(launch.deepspeed, deepspeed_engine.with_precision(config.train))
        deepspeed_engine.check_execution(config.train, found)
        return found

    try:
        deepspeed_config = run_on_all_ranks(read_deepspeed_config)
        output = output_directory(config)
        work(config, deepspeed_config, output, StopRequest())
    except UsageError as error:
        if dist.get_rank() == 0:
            print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        dist.barrier()  # the launcher ends all ranks when it sees the first one go
        dist.destroy_process_group()
        return 2
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        rank, why = dist.get_rank(), str(error).splitlines()[0]
        print(
            f"{name}: error: rank {rank} lost the connection to another rank ({why}). "
            f"When all hosts are back, go on with --output_dir {config.train.output_dir} --resume true",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # what is left of the process group would wait for the lost rank
    return 0


def read_options(
    name: str, argv: list[str] | None, parse: Callable[[list[str] | None], tuple[RunConfig, LaunchOptions]]
) -> tuple[RunConfig, LaunchOptions]:
    """The parsed options. Of several ranks of a machine the first tells what is wrong with them, or the --help, and
    the others are quiet. Raises SystemExit."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        with ExitStack() as quiet:
            for redirect in () if first else (redirect_stdout, redirect_stderr):
                quiet.enter_context(redirect(io.StringIO()))
            return parse(argv)
    except SystemExit as leaving:
        status = leaving.code
    except (ValueError, OSError) as error:
        if not is_user_error(error):
            raise
        status = 2
        if first:
            print(f"{name}: error: {format_error(error)}", file=sys.stderr, flush=True)
    if status and not first:
        time.sleep(SPEAKING_SECONDS)
    sys.exit(status)


def lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone; its own error is in that rank's output."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error)

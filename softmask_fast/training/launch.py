"""From the launcher's command to work on every rank: options, process group, output folder, signals, exit status."""

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
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from filelock import FileLock, Timeout
from tqdm import tqdm

from softmask_fast.config import RunConfig
from softmask_fast.data.workers import WorkerEnded
from softmask_fast.errors import UsageError, format_error, is_user_error
from softmask_fast.evaluation.common import gather_objects
from softmask_fast.options import LaunchOptions
from softmask_fast.training import errors_alone
from softmask_fast.training.compilation import decide_compilation
from softmask_fast.training.deepspeed_engine import check_execution, read_deepspeed_config
from softmask_fast.training.loggers import check_loggers
from softmask_fast.training.meters import HostCopy
from softmask_fast.training.ranks import AgreedUsageError, run_on_all_ranks

SILENT_SECONDS = 30.0  # silent ranks exit this much later, as the launcher kills all ranks when one exits
LOCKS: dict[Path, FileLock] = {}  # of the folders that this process writes to
Parse = Callable[[list[str] | None], tuple[RunConfig, LaunchOptions]]


def run_script(
    name: str,
    argv: list[str] | None,
    parse: Parse,
    work: Callable[[RunConfig, dict[str, Any], Path, StopRequest], None],
) -> int:
    """Run a script's work on this rank of the deepspeed launcher.

    Args:
        name: of the script, which begins its error messages.
        argv: the flags; None: those of the command line.
        parse: parses the flags.
        work: called with the configuration, DeepSpeed's configuration, the output folder and the stop request.

    Returns:
        The exit status: 0, or 2 after one line about a user error that all ranks share (an option, a checkpoint that
        cannot be written). After one line about an error of this rank alone (another file that cannot be read or
        written, a data worker that ended, a lost rank) the process exits with 1.
    """
    config, launch = read_options(name, argv, parse)
    start_distributed(launch)
    start_logging(launch.verbose)
    try:
        config, deepspeed_config, output = prepare_run(config, launch)
        work(config, deepspeed_config, output, StopRequest())
    except AgreedUsageError as error:
        if dist.get_rank() == 0:
            say(f"{name}: error: {error}")
        dist.barrier()  # the launcher kills all ranks when the first one exits
        dist.destroy_process_group()
        return 2
    except (OSError, WorkerEnded) as error:  # of this rank alone: a full disk, an unreachable shard, a killed worker
        if not (isinstance(error, WorkerEnded) or is_user_error(error)):
            raise
        folder, again = config.train.output_dir, ""
        if folder and any(Path(folder).glob("checkpoints/step-*")):
            again = f"; resume from the last checkpoint with --output_dir {folder} --resume true"
        say(f"{name}: error: {format_error(error)}{again}")
        os._exit(1)  # destroying the process group would wait for the other ranks
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        rank, reason = dist.get_rank(), str(error).splitlines()[0]
        lost = f"{name}: error: rank {rank} lost the connection to another rank ({reason})."
        resume = f"When all hosts are back, resume with --output_dir {config.train.output_dir} --resume true"
        say(f"{lost} {resume}")
        os._exit(1)  # destroying the process group would wait for the lost rank
    return 0


def say(line: str) -> None:
    """Print a line to standard error, above a progress bar if there is one."""
    with tqdm.external_write_mode(sys.stderr):
        print(line, file=sys.stderr, flush=True)


def read_options(name: str, argv: list[str] | None, parse: Parse) -> tuple[RunConfig, LaunchOptions]:
    """Parse the options. Only the first rank of each machine prints errors and --help.

    Raises:
        SystemExit: after --help, and after one line about a wrong option.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        with ExitStack() as silence:
            if not first:
                silence.enter_context(redirect_stdout(io.StringIO()))
                silence.enter_context(redirect_stderr(io.StringIO()))
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
        time.sleep(SILENT_SECONDS)
    sys.exit(status)


def start_distributed(launch: LaunchOptions) -> None:
    """Join the launcher's process group; a process without launcher (`python train.py`) makes a group of one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":  # on a free port, so that several runs fit on one machine
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.setdefault("LOCAL_RANK", "0")
    if launch.local_rank >= 0:
        os.environ["LOCAL_RANK"] = str(launch.local_rank)
    if get_accelerator().device_name() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:  # DeepSpeed would compile its shared-memory collectives for two minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def start_logging(verbose: bool) -> None:
    """Show what rank 0 does, and warnings of other ranks and libraries (errors of DeepSpeed).

    Args:
        verbose: also show each decision of rank 0 and DeepSpeed's warnings.
    """
    logging.basicConfig(format="%(message)s")
    if dist.get_rank() == 0:
        logging.getLogger("softmask_fast").setLevel(logging.DEBUG if verbose else logging.INFO)
    if verbose:
        logging.getLogger("DeepSpeed").removeFilter(errors_alone)


def prepare_run(config: RunConfig, launch: LaunchOptions) -> tuple[RunConfig, dict[str, Any], Path]:
    """Decide what the options leave open (bf16, compile, the output folder), read DeepSpeed's configuration and make
    the folder. A collective.

    Returns:
        The configuration with nothing left open, DeepSpeed's configuration, and the output folder.

    Raises:
        AgreedUsageError: for options that this machine cannot run, and as in `output_directory`.
    """
    bf16 = config.train.bf16
    if bf16 is None:
        bf16 = get_accelerator().device_name() == "cuda" and torch.cuda.is_bf16_supported()
    train = replace(config.train, bf16=bf16)

    def read() -> dict[str, Any]:
        deepspeed_config = read_deepspeed_config(launch.deepspeed, train)
        check_execution(train, deepspeed_config)
        check_loggers(train)
        return deepspeed_config

    deepspeed_config = run_on_all_ranks(read)
    train = replace(train, compile=decide_compilation(train.compile, deepspeed_config))
    output = output_directory(config)
    return replace(config, train=replace(train, output_dir=str(output))), deepspeed_config, output


def output_directory(config: RunConfig) -> Path:
    """The run's output folder: chosen by rank 0, checked by all ranks, made by rank 0. A collective.

    Raises:
        AgreedUsageError: when the folder holds a run but --resume is not given, or the other way round; when another
            run is writing to it; when it cannot be made; when some hosts do not see it.
    """
    first = dist.get_rank() == 0
    choice = [config.train.output_dir]
    if choice[0] is None:
        choice[0] = run_on_all_ranks(lambda: new_folder(config.name) if first else None)
    dist.broadcast_object_list(choice, src=0)
    output = Path(choice[0])

    def check_free() -> None:
        if (output / "config.json").exists() and not config.train.resume:
            raise UsageError(f"output_dir: {output} holds a run; resume it with --resume true or choose another folder")
        if not (output / "config.json").exists() and config.train.resume is True:
            raise UsageError(
                f"resume: expected the folder of a run, got {output}, which holds none; --resume auto starts one"
            )

    def make() -> None:
        if first:
            (output / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock_folder(output)
            check_free()  # another run may have ended since

    run_on_all_ranks(check_free)  # all ranks check before rank 0 writes
    run_on_all_ranks(make)
    blind = [rank for rank, sees in enumerate(gather_objects((output / "checkpoints").is_dir())) if not sees]
    if blind:
        raise AgreedUsageError(f"output_dir: expected a folder shared by all hosts, ranks {blind} do not see {output}")
    return output


def new_folder(name: str) -> str:
    """Make runs/<name>-<number> with the first free number. Runs that start together get different ones."""
    number = 1
    while True:
        folder = Path(f"runs/{name}-{number}").absolute()
        try:
            folder.mkdir(parents=True)
            return str(folder)
        except FileExistsError:
            number += 1


def lock_folder(output: Path) -> None:
    """Keep other runs from writing to a folder until this process ends, however it ends.

    Raises:
        UsageError: when another run holds the lock.
    """
    lock = LOCKS.setdefault(output.absolute(), FileLock(output / "lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UsageError(f"output_dir: another run is writing to {output}") from None


class StopRequest:
    """Notes SIGTERM, SIGINT and the launcher's end. Training then stops after the step, on all ranks together.

    Attributes:
        received: name of the signal, or what else asked for the stop; None if nothing did.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._rank = dist.get_rank()  # now, as a signal may come after the process group is gone
        self._exchanged: HostCopy | None = None  # at the last call
        # DeepSpeed's launcher and its parent: a signal sent only to one of them does not reach this process.
        parents = psutil.Process().parents()[:2]
        self.launchers = parents if parents and "deepspeed.launcher" in " ".join(parents[0].cmdline()) else []
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def end(self) -> None:
        """Restore the signals' earlier handlers: training has ended, and nothing is left to save."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(128 + number)  # the second Ctrl-C
        if self.received is None and self._rank == 0:  # not by print, which the signal may have interrupted
            os.write(sys.stderr.fileno(), b"\nThe run stops after this step and saves; Ctrl-C again ends it at once.\n")
        self.received = signal.Signals(number).name

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; with several ranks, before the previous call. A collective.

        Ranks read what they exchange only at the next call, so that no host waits for its GPU at every step.
        """
        if self.received is None and any(has_ended(process) for process in self.launchers):
            self.received = "the launcher's end"
        if dist.get_world_size() == 1:
            return self.received is not None
        before = self._exchanged
        flag = torch.full((), float(self.received is not None), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self._exchanged = HostCopy(flag)
        return before is not None and before.value > 0


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has exited, even if its parent has not collected it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone. That rank's output holds its own error."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error)

"""Several ranks over gloo on this machine, each in a process of its own."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing


def results_of_ranks(compute: Callable[[int], object], world_size: int, folder: Path, minutes: float = 5) -> list:
    """compute(rank) in a process group of so many ranks, in rank order; the results are tensors and plain containers.

    A rank that waits longer for others is a failure, not a hang.
    """
    multiprocessing.spawn(_run, (compute, world_size, folder, timedelta(minutes=minutes)), world_size)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run(rank: int, compute: Callable[[int], object], world_size: int, folder: Path, timeout: timedelta) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world_size, timeout=timeout)
    torch.save(compute(rank), folder / f"rank-{rank}.pt")
    dist.destroy_process_group()

"""What all ranks do together: errors of one raised on all, means and lists over all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from softmask_fast.data.loader import SampleLoader
from softmask_fast.errors import UsageError, format_error, is_user_error

Result = TypeVar("Result")


def run_on_all_ranks(work: Callable[[], Result]) -> Result:
    """What `work` returns on this rank. Where it meets a mistake of the user on any rank, all raise that of the first.

    A collective, so that no rank waits for one that has found a mistake. Raises UsageError.
    """
    result, mistake = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        if not is_user_error(error):
            raise
        mistake = format_error(error)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mistake)
    told = [(rank, text) for rank, text in enumerate(found) if text is not None]
    if told:
        rank, text = told[0]
        raise UsageError(text if len(told) == len(found) or rank == 0 else f"{text} (found by rank {rank})")
    return result


def mean_over_ranks(figures: dict, device: torch.device) -> dict[str, float]:
    """The figures' means over all ranks, in one reduction."""
    values = torch.stack([value.to(device, torch.float64).reshape(()) for value in figures.values()])
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return {name: value / dist.get_world_size() for name, value in zip(figures, values.tolist(), strict=True)}


def bad_samples(loader: SampleLoader) -> dict[str, str]:
    """key -> reason of the samples that any rank had to skip so far, each once. A collective: all ranks call it."""
    found: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, loader.bad)
    return {key: reason for of_rank in found for key, reason in of_rank.items()}

"""Agreement between ranks: a user error of one is raised by all, and metrics are averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from softmask_fast.errors import UsageError, format_error, is_user_error
from softmask_fast.evaluation.common import gather_objects

Result = TypeVar("Result")


class AgreedUsageError(UsageError):
    """A user error that all ranks raise together, so that no rank waits in a collective for one that has left."""


def run_on_all_ranks(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank and return this rank's result. A collective.

    Raises:
        AgreedUsageError: on all ranks, if `work` raised a user error on any; it is that of the lowest rank. Other
            errors pass unchanged, on the rank that met them.
    """
    result, message = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        if not is_user_error(error):
            raise
        message = format_error(error)
    messages = gather_objects(message)
    failed = [rank for rank, text in enumerate(messages) if text is not None]
    if failed:
        found_by = "" if failed[0] == 0 or len(failed) == len(messages) else f" (found by rank {failed[0]})"
        raise AgreedUsageError(messages[failed[0]] + found_by)
    return result


def mean_over_ranks(metrics: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """The mean of each scalar over all ranks, in float64 and in one reduction. A collective."""
    values = torch.stack([value.to(device, torch.float64).reshape(()) for value in metrics.values()])
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return {name: value / dist.get_world_size() for name, value in zip(metrics, values.tolist(), strict=True)}

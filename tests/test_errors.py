"""User errors are separated from bugs, and one that a single rank meets is raised on all."""

import json

import pytest
import torch.distributed as dist
from gloo_ranks import results_of_ranks

from softmask_fast.config import MomentumConfig
from softmask_fast.data.sources import open_source
from softmask_fast.errors import UsageError, format_error, is_user_error
from softmask_fast.ops import FocalITCLoss
from softmask_fast.training.ranks import run_on_all_ranks


def raised(work) -> BaseException:
    with pytest.raises(Exception) as caught:
        work()
    return caught.value


def test_user_errors_are_known_by_their_class_or_name_a_file(tmp_path):
    for work, line in [
        (lambda: MomentumConfig(momentum=2), "momentum: expected in [0, 1], got 2"),
        (lambda: open_source("nowhere.tar"), "data: 1 of 1 files do not exist: nowhere.tar"),
        (lambda: (tmp_path / "none.json").read_text(), f"{tmp_path}/none.json: No such file or directory"),
    ]:
        error = raised(work)
        assert is_user_error(error) and format_error(error) == line
    bugs = (lambda: json.loads("{"), lambda: int("one"), lambda: MomentumConfig(*range(99)), lambda: FocalITCLoss(0, 1))
    for work in bugs:
        assert not is_user_error(raised(work)), work


def _outcomes(rank: int) -> list[str]:
    def outcome(work) -> str:
        try:
            return f"returned {run_on_all_ranks(work)}"
        except (UsageError, TypeError) as error:
            return f"{type(error).__name__}: {error}"

    def data(name: str) -> None:
        open_source(f"{name}.tar")

    found = [
        outcome(lambda: rank),
        outcome(lambda: rank == 1 and data("one")),
        outcome(lambda: data(f"of-{rank}")),
        outcome(lambda: rank == 0 and data("zero")),
    ]
    dist.barrier()
    return found


def test_what_one_rank_finds_all_ranks_raise(tmp_path):
    first, second = results_of_ranks(_outcomes, 2, tmp_path)
    assert (first.pop(0), second.pop(0)) == ("returned 0", "returned 1")
    missing = "AgreedUsageError: data: 1 of 1 files do not exist: {}.tar"
    assert first == second == [missing.format("one") + " (found by rank 1)", *map(missing.format, ("of-0", "zero"))]

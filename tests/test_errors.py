"""User errors are separated from bugs, and one that a single rank meets is raised on all."""

import json

import pytest
import torch.distributed as dist
from gloo_ranks import results_of_ranks

from softmask_fast.config import MomentumConfig
from softmask_fast.data.sources import open_source
from softmask_fast.errors import UsageError, format_error, is_user_error, printable, short, without_secrets
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


def test_a_message_is_one_line_without_control_characters_and_secrets():
    error = UsageError("data: \x1b[31mred\nerror: forged \u202e\u2028\x9b\udce9 of https://me:pw@h/{a,b}.tar?s=1,2 or")
    expected = r"data: \x1b[31mred\nerror: forged \u202e\u2028\x9b\udce9 of https://h/{a,b}.tar or"
    assert str(error) == expected == str(UsageError(expected))
    assert format_error(OSError(2, "gone", "a\rb\t")) == r"a\rb\t: gone"
    assert printable("caf\u00e9, \u732b, a b") == "caf\u00e9, \u732b, a b"
    assert len(str(UsageError("data: " + "x" * 10**6 + ": is too long"))) < 1000
    deep = json.loads("[" * 800 + "]" * 800)
    assert short(deep) == "[[[[[[[...]]]]]]]" and len(short({"a": "x" * 10_000, "b": list(range(10_000))})) < 200


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://me:p@ss,word@host:80/a,b?x#y", "https://host:80/a,b"),
        ("https://h/a?x=1,https://me@h/b?y,s3://k:s@bucket/c", "https://h/a,https://h/b,s3://bucket/c"),
        ("FTP://u:p@h/x and http://h#token", "FTP://h/x and http://h"),
        ("file:///folder/who?.tar", "file:///folder/who?.tar"),
        ("s-{0..3}.tar?", "s-{0..3}.tar?"),
    ],
)
def test_urls_are_shown_without_secrets(text, shown):
    assert without_secrets(text) == shown

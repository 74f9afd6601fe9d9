"""Mistakes of the user and defects, told apart: the former are one line, the latter keep their traceback."""

from __future__ import annotations

from pathlib import Path
from traceback import walk_tb

PACKAGE = Path(__file__).parent


class UsageError(ValueError):
    """What the user can put right, found by any rank and raised on all of them (`training.ranks.run_on_all_ranks`)."""


def is_user_error(error: BaseException) -> bool:
    """Whether an error tells the user what to put right: a file that cannot be had, or a ValueError or OSError that
    this package itself raised. The same kinds out of a library are not meant for the user: they show a defect."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    *_, (frame, _) = walk_tb(error.__traceback__)
    return isinstance(error, ValueError | OSError) and Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


def format_error(error: BaseException) -> str:
    """What a mistake says."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)

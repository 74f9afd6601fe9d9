"""Separates user errors, which are shown in one line, from bugs, which keep their traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """Something that the user can fix: an option, a data file, weights, a model folder."""


def is_user_error(error: BaseException) -> bool:
    """Whether the user can fix this error: a `UsageError`, or an OSError that names a file."""
    return isinstance(error, UsageError) or (isinstance(error, OSError) and error.filename is not None)


def format_error(error: BaseException) -> str:
    """The message of a user error, without the name of its class."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)

"""Separates user errors (one line) from bugs (full traceback), and cleans what messages show."""

from __future__ import annotations

import os
import re
import reprlib
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

_SCHEME = r"[a-z][a-z0-9+.-]*://"
_PART = rf"(?:(?!,{_SCHEME})[^\s{{0}}])*"  # up to the next URL of a list
# scheme, user and password, host and path; then the query or fragment
_URL = re.compile(rf"({_SCHEME})(?:[^\s/?#]*@)?({_PART.format('?#')})(?:[?#]{_PART.format('')})?", re.IGNORECASE)
_LONGEST = 900  # letters of a message
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class UsageError(ValueError):
    """Something that the user can fix: an option, a data file, weights, a model folder. The message is one line."""

    def __init__(self, message: str) -> None:
        message = printable(without_secrets(message))
        if len(message) > _LONGEST:  # something from a damaged file
            message = f"{message[: _LONGEST - 200]} ... {message[-150:]}"
        super().__init__(message)


def printable(text: str) -> str:
    """The text with all unprintable characters escaped: names in data may hold line breaks, terminal escape sequences,
    or characters that reverse the writing direction."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def without_secrets(text: str) -> str:
    """The text with its URLs cut: without user, password, query and fragment, which may be signatures or tokens. In
    file:// URLs these are parts of a name, and stay."""

    def shown(url: re.Match) -> str:
        return url[0] if url[1].lower() == "file://" else url[1] + url[2]

    return _URL.sub(shown, text) if "://" in text else text


def short(value: Any) -> str:
    """A value of unknown size and depth as a message shows it."""
    return _SHORT.repr(value)


def is_user_error(error: BaseException) -> bool:
    """Whether the user can fix this error: a `UsageError`, or an OSError that names a file."""
    return isinstance(error, UsageError) or (isinstance(error, OSError) and error.filename is not None)


def format_error(error: BaseException) -> str:
    """The message of a user error, without the name of its class."""
    if isinstance(error, OSError) and error.filename is not None:
        return printable(without_secrets(f"{error.filename}: {error.strerror}"))
    return str(error)


def one_line(error: BaseException) -> str:
    """A library's message in one line, at most 300 characters, without its advice to trust what a file brings."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it asks for code of its own, which is never run"
    if "weights_only" in text:
        return "it holds more than tensors and plain containers, and nothing else is unpickled"
    return text[:300] or type(error).__name__


def until_unread(command: Callable[[], int]) -> int:
    """The exit status of a command, which ends without a word when the reader of its output has gone, as `head` goes.

    The status is then 141, 128 + SIGPIPE, as shells report a tool that the signal ended; 2 if the end of its output
    cannot be written.
    """
    try:
        try:
            status = command()
        except SystemExit:  # of --help, for instance
            if _written():
                raise
            return 2
        return status if _written() else 2
    except BrokenPipeError:
        gone = [stream for stream in (1, 2) if _is_unread(stream)]
        if not gone:  # another pipe, of a worker for instance
            raise
        for stream in gone:
            _discard(stream)
        return 128 + signal.SIGPIPE


def _written() -> bool:
    """Whether all output could be written; at its end the interpreter could only complain."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(1)
        print(f"softmask-fast: error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return False
    return True


def _discard(stream: int) -> None:
    """From now on nothing that is written to the descriptor goes anywhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _is_unread(stream: int) -> bool:
    """Whether the descriptor is that of a pipe or socket without a reader."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))

"""What an evaluation returns, and how its numbers are printed."""

from __future__ import annotations

from typing import Any, Protocol

from softmask_fast.errors import printable


class Report(Protocol):
    """The result of an evaluation. All scores are fractions in [0, 1]; only `table` shows percent."""

    skipped: dict[str, str]  # samples that could not be used: key -> reason

    def as_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        ...

    def table(self) -> str:
        """The scores as a plain-text table."""
        ...


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as percent, without the sign."""
    return f"{100 * fraction:.{digits}f}"


def format_title(title: str, notes: dict[str, int]) -> str:
    """The title, followed by the notes (what is counted -> count) whose counts are not zero."""
    counted = ", ".join(f"{count} {what}" for what, count in notes.items() if count)
    return printable(f"{title} ({counted})" if counted else title)


def format_table(title: str, notes: dict[str, int], header: list[str], rows: list[list[str]]) -> str:
    """A plain-text table under its title and notes: the first column left-aligned, the others right-aligned."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        aligned = [cells[0].ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([format_title(title, notes), line(header), rule, *map(line, rows)])

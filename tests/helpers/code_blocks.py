"""The code blocks of README.md, CONTRIBUTING.md and docs/, read from the pages so that what is shown is what runs."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ +(.+?)[ ]*$", re.MULTILINE)


class Block(NamedTuple):
    """One block of a page."""

    page: Path
    line: int  # of its first line of code, from 1
    heading: str  # the last one before it
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def run(self, namespace: dict) -> None:
        """Runs Python in the namespace; a traceback names the page and its line."""
        exec(compile("\n" * (self.line - 1) + self.code, str(self), "exec"), namespace)


@functools.cache
def blocks_of(page: Path, language: str | None = None) -> list[Block]:
    """The blocks of a page in order, of one language ("" is none) or of all."""
    text = page.read_text()
    blocks = []
    for found in FENCE.finditer(text):
        # comments of other blocks look like headings
        before = FENCE.sub("", text[: found.start()])
        heading = ([""] + HEADING.findall(before))[-1]
        blocks.append(Block(page, text.count("\n", 0, found.start(2)) + 1, heading, found[1], found[2]))
    return [block for block in blocks if language is None or block.language == language]


def run_section(page: Path, heading: str, **namespace) -> SimpleNamespace:
    """The names that the Python under a heading leaves, given those that it finds."""
    blocks = [block for block in blocks_of(page, "python") if block.heading == heading]
    assert blocks, f"{page.name} has no code under {heading!r}"
    for block in blocks:
        block.run(namespace)
    return SimpleNamespace(**namespace)


def assert_sections_are_named(page: Path, test: str) -> None:
    """Each section of the page with Python has its heading as a text in the test's file."""
    headings = {block.heading for block in blocks_of(page, "python")}
    assert headings and headings <= set(Path(test).read_text().split('"'))

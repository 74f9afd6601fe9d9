"""The command line: options with one spelling, and configurations from flags, a file and named defaults."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from softmask_fast.config import RENAMED, renamed
from softmask_fast.errors import UsageError
from softmask_fast.utils import parse_json


@dataclass(frozen=True)
class LaunchOptions:
    """What the launcher and DeepSpeed need; not part of the run's configuration."""

    deepspeed: str
    local_rank: int


def spell(arguments: Sequence[str]) -> list[str]:
    """Write every option with underscores and under its present name: `--batch-size=8` becomes `--batch_size=8`."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return [_OPTION.sub(_spell, argument) for argument in arguments[:end]] + list(arguments[end:])


_OPTION = re.compile(r"^--(no[-_])?([a-z][\w-]*)(?==|$)")


def _spell(option: re.Match) -> str:
    name = option[2].replace("-", "_")
    return f"--{'no_' if option[1] else ''}{RENAMED.get(name, name)}"


class OneSpelling:
    """Mixin of argument parsers: options may be given with hyphens or underscores; --help shows the underscores."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        return super().add_argument(*(name for name in names if "-" not in name.lstrip("-")), **settings)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        return super().parse_known_args(spell(sys.argv[1:] if args is None else args), namespace)


class CommandParser(OneSpelling, argparse.ArgumentParser):
    """argparse's parser with `OneSpelling`."""


def section_parser(
    sections: dict[str, type], choice: str, table: dict[str, dict[str, Any]], default: str | None, description: str
) -> argparse.ArgumentParser:
    """A parser with a flag for every field of the sections, --`choice`, --config and what the launcher adds."""
    from transformers import HfArgumentParser  # slow to import, and not needed to load a trained model

    class SectionParser(OneSpelling, HfArgumentParser):
        pass

    parser = SectionParser(tuple(sections.values()), description=description)
    about = f"Defaults of the other options; default: {default}." if default else "Task to fine-tune (required)."
    parser.add_argument(f"--{choice}", choices=sorted(table), help=about)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of the options.")
    parser.add_argument("--deepspeed", "--deepspeed_config", metavar="FILE", help="DeepSpeed configuration (ds.json).")
    parser.add_argument("--local_rank", type=int, default=-1, help="Set by the launcher.")
    return parser


def parse_sections(
    sections: dict[str, type], choice: str, table: dict[str, dict[str, Any]], default: str | None, description: str,
    argv: Sequence[str] | None, more_defaults: Callable[[dict[str, Any]], dict[str, Any]] = lambda options: {},
) -> tuple[str, dict[str, Any], LaunchOptions]:  # fmt: skip
    """Parse flags and an optional --config file.

    A flag wins over the file, the file over `more_defaults`, these over the row of the table, the row over the
    dataclasses' defaults. Returns the row's name, the value of every option, and the launcher's options.

    Args:
        sections: the dataclasses whose fields are the options, by name.
        choice: name of the flag that chooses a row of the table.
        table: defaults of the options, by row.
        default: the row without that flag; None: the flag is required.
        description: shown by --help.
        more_defaults: further defaults, given the options parsed so far.

    Raises:
        SystemExit: argparse, for unknown flags.
        UsageError: for an unknown row, and for a file that cannot be read or has unknown options.
    """
    parser = section_parser(sections, choice, table, default, description)
    first, _ = parser.parse_known_args(argv)
    from_file = _read_file(first.config) if first.config else {}
    row = getattr(first, choice) or from_file.get(choice, default)
    from_file.pop(choice, None)
    if row not in table:
        raise UsageError(f"{choice}: expected one of {sorted(table)}, got {row!r}")
    if unknown := sorted(from_file.keys() - {f.name for section in sections.values() for f in fields(section)}):
        raise UsageError(f"{first.config}: unknown options {unknown}")
    parser.set_defaults(**table[row] | from_file)
    options = parser.parse_args(argv)
    if more := more_defaults(vars(options)):
        parser.set_defaults(**table[row] | more | from_file)
        options = parser.parse_args(argv)
    if not options.deepspeed:
        parser.error("--deepspeed: expected the path of a DeepSpeed configuration such as ds.json")
    return row, vars(options), LaunchOptions(options.deepspeed, options.local_rank)


def build_sections(sections: dict[str, type], options: dict[str, Any]) -> dict[str, Any]:
    """Make each section from the options that are its fields."""
    return {name: section(**{f.name: options[f.name] for f in fields(section)}) for name, section in sections.items()}


def _read_file(path: str) -> dict[str, Any]:
    import yaml

    text = Path(path).read_text()
    try:
        options = parse_json(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--config: {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise UsageError(f"{path}: expected a mapping of options, got {type(options).__name__}")
    return renamed(options)

"""The command line: options with one spelling, and configurations from flags, a file and named defaults."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from softmask_fast.config import RENAMED, renamed
from softmask_fast.errors import UsageError
from softmask_fast.utils import parse_json, read_json

# DeepSpeed's configuration if no file is named, as in ds.json. Numbers that are also options of ours come from these.
DEEPSPEED = {"zero_optimization": {"stage": 1}, "steps_per_print": 1_000_000_000}
ESSENTIAL = (
    "model", "data", "eval_data", "output_dir", "resume", "max_steps", "epochs", "batch_size", "learning_rate", "seed",
)  # fmt: skip
NOT_STORED = ("output_dir", "resume", "compile")  # given again on resuming, or decided anew for the machine


@dataclass(frozen=True)
class LaunchOptions:
    """What the launcher and DeepSpeed need; not part of the run's configuration."""

    deepspeed: str | dict[str, Any]  # path of DeepSpeed's configuration, or that of a stored run
    local_rank: int
    verbose: bool = False


def spell(arguments: Sequence[str]) -> list[str]:
    """Write every option with underscores and under its present name: `--batch-size=8` becomes `--batch_size=8`."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return [_OPTION.sub(_spell, argument) for argument in arguments[:end]] + list(arguments[end:])


_OPTION = re.compile(r"^--(no[-_])?([a-z][\w-]*)(?==|$)")


def _spell(option: re.Match) -> str:
    name = option[2].replace("-", "_")
    return f"--{'no_' if option[1] else ''}{RENAMED.get(name, name)}"


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, with hyphens or underscores in option names; --help shows underscores.

    It rejects abbreviations, and suggests the option that a mistyped name may mean.
    """

    def __init__(self, *args: Any, allow_abbrev: bool = False, **settings: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **settings)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """argparse's, after `spell`."""
        return super().parse_known_args(spell(sys.argv[1:] if args is None else args), namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """argparse's, but unknown arguments end with a suggestion."""
        options, others = self.parse_known_args(args, namespace)
        if others:
            self.refuse(others)
        return options

    def refuse(self, others: Sequence[str]) -> None:
        """End with a message about arguments that the parser does not know."""
        options = [other.split("=")[0] for other in others if other.startswith("-")]
        if not options:
            self.error(f"unexpected argument: {others[0]}")
        known = [name for action in self._actions for name in action.option_strings if action.help != argparse.SUPPRESS]
        self.error(f"unknown option: {options[0]}{did_you_mean(options[0], known)}")


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A suggestion to end a message about an unknown name: a known name that starts with it or resembles it, if any."""
    similar = [other for other in known if other.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


class _Help(argparse.HelpFormatter):
    """Appends each default in brackets. Where the default is None, the help text itself says what that means."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, argparse.SUPPRESS) or action.nargs == 0:
            return action.help
        default = str(action.default).lower() if isinstance(action.default, bool) else action.default
        return f"{action.help} [{default}]"


_YES, _NO = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
_NAMES = {bool: "true or false", int: "an integer", float: "a number", type(None): "none"}
_METAVARS = {bool: "true|false", int: "N", float: "X", str: "TEXT"}


def _reader(kinds: Sequence[Any]) -> Callable[[str], Any]:
    """Parses an option's text as the first type that accepts it; "none" is None."""

    def read(text: str) -> Any:
        for kind in kinds:
            if kind is type(None) and text.lower() == "none":
                return None
            if kind is bool and text.lower() in _YES + _NO:
                return text.lower() in _YES
            if kind in (int, float, str):
                with suppress(ValueError):
                    return kind(text)
        raise argparse.ArgumentTypeError(f"expected {' or '.join(_NAMES[kind] for kind in kinds)}, got {text!r}")

    return read


def _add_field(group: argparse._ArgumentGroup, field: Field, hint: Any) -> None:
    kinds = sorted(get_args(hint) or (hint,), key=lambda kind: kind is str)  # every text is a str
    metavar = "|".join(_METAVARS[kind] for kind in kinds if kind is not type(None))
    settings = {"type": _reader(kinds), "default": field.default, "metavar": metavar, "help": field.metadata["help"]}
    if bool in kinds:
        settings |= {"nargs": "?", "const": True}
    group.add_argument(f"--{field.name}", **settings)
    if field.default is True:  # the short form of false
        hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        group.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", **hidden)


def section_parser(
    sections: dict[str, type], choice: str, table: dict[str, dict[str, Any]], default: str | None, description: str,
    prog: str | None = None, parents: Sequence[argparse.ArgumentParser] = (),
) -> CommandParser:  # fmt: skip
    """A parser with a flag for every field of the sections, --`choice`, --config and the launcher's options."""
    usage = f"%(prog)s [--{choice} {'|'.join(table)}] [options]"
    description += f" Defaults are in brackets; --{choice} changes them."
    settings = {"description": description, "formatter_class": _Help, "add_help": False, "parents": parents}
    parser = CommandParser(prog=prog, usage=usage, **settings)
    first = parser.add_argument_group("essentials")
    first.add_argument("-h", "--help", action="help", help=f"Show this help; with --{choice}, its defaults.")
    about = (
        f"Set of defaults for all other options; default: {default}." if default else "Task to fine-tune (required)."
    )
    first.add_argument(f"--{choice}", choices=list(table), help=about)
    for name, section in sections.items():
        group, hints = parser.add_argument_group(name, section.__doc__.split("\n\n")[0]), get_type_hints(section)
        for field in fields(section):
            _add_field(first if field.name in ESSENTIAL else group, field, hints[field.name])
    first.add_argument("--config", metavar="FILE", help="YAML or JSON file that sets any of these options; flags win.")
    about = "DeepSpeed configuration; default: ZeRO stage 1, or that of the resumed run."
    first.add_argument("--deepspeed", "--deepspeed_config", metavar="FILE", help=about)
    about = "At the start, print everything the run decides and stores, and DeepSpeed's own messages."
    first.add_argument("--verbose", action="store_true", help=about)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # set by the launcher
    return parser


def record_path(folder: str | Path) -> Path:
    """The newest record of the run in a folder."""
    first = Path(folder) / "config.json"
    return max(first.parent.glob("config-from-step-*.json"), default=first) if first.is_file() else first


def stored_record(folder: str | Path) -> dict[str, Any] | None:
    """The record that the run in a folder last wrote, when it started or resumed; None if there is no run.

    Raises UsageError if the record is damaged.
    """
    path = record_path(folder)
    if not path.is_file():
        return None
    record = read_json(path, "resume")
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise UsageError(f"resume: expected a run's record with the key 'config', got {path}")
    return record


def parse_sections(
    sections: dict[str, type], choice: str, table: dict[str, dict[str, Any]], default: str | None, description: str,
    argv: Sequence[str] | None, more_defaults: Callable[[dict[str, Any]], dict[str, Any]] = lambda options: {},
    prog: str | None = None, parents: Sequence[argparse.ArgumentParser] = (),
) -> tuple[str, dict[str, Any], LaunchOptions]:  # fmt: skip
    """Parse flags and an optional --config file.

    Flags win over the file. The file wins over the options stored by the run to resume or, in a new run, over
    `more_defaults`. Then come the row of the table and, last, the dataclasses' defaults.

    Args:
        sections: the dataclasses whose fields are the options, by name.
        choice: name of the flag that chooses a row of the table.
        table: defaults of the options, by row.
        default: the row without that flag; None: the flag is required.
        description: shown by --help.
        more_defaults: further defaults, given the options parsed so far.
        prog: name of the program in --help and in argparse's messages; None: the script's name.
        parents: parsers whose options --help shows as well.

    Returns:
        The row's name, the value of every option, and the launcher's options.

    Raises:
        SystemExit: by argparse, for --help, unknown flags and values of the wrong type.
        UsageError: for an unknown row, a row other than that of the run to resume, or a file that cannot be read or has
            unknown options.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = section_parser(sections, choice, table, default, description, prog, parents)
    asked, _ = parser.parse_known_args([text for text in argv if text not in ("-h", "--help")])
    from_file = _read_file(asked.config) if asked.config else {}
    names = [field.name for section in sections.values() for field in fields(section)]
    for name in from_file.keys() - {choice, *names}:
        raise UsageError(f"{asked.config}: unknown option {name!r}{did_you_mean(name, names)}")
    parser.set_defaults(**from_file)
    asked, _ = parser.parse_known_args([text for text in argv if text not in ("-h", "--help")])

    record = (stored_record(asked.output_dir) if asked.resume and asked.output_dir else None) or {"config": {}}
    row, before = getattr(asked, choice), record["config"].get(choice)
    if before is not None and row not in (None, before):
        raise UsageError(f"{choice}: expected {before!r}, as in the run in {asked.output_dir}, got {row!r}")
    row = row or before or default
    kept = [record["config"].get(section) for section in sections]  # a damaged one is refused when the run is resumed
    stored = renamed({name: value for part in kept if isinstance(part, dict) for name, value in part.items()})
    stored = {name: value for name, value in stored.items() if name in names and name not in NOT_STORED}
    incomplete = stored.keys() & renamed(dict.fromkeys(record.get("incomplete", ())))  # had passwords or signatures
    stored |= dict.fromkeys(incomplete, argparse.SUPPRESS)
    # an option that did not exist then takes the dataclass's default, as the preset may have changed since
    parser.set_defaults(**(stored or table.get(row, {})) | from_file)
    options = parser.parse_args(argv)
    for name in sorted(incomplete):
        if getattr(options, name) == argparse.SUPPRESS:
            raise UsageError(f"{name}: pass it again: it was stored without its password or signature")
    if row not in table:
        raise UsageError(f"{choice}: expected one of {sorted(table)}, got {row!r}")
    if not stored and (more := more_defaults(vars(options))):
        parser.set_defaults(**table[row] | more | from_file)
        options = parser.parse_args(argv)
    deepspeed = options.deepspeed or record.get("deepspeed", DEEPSPEED)
    return row, vars(options), LaunchOptions(deepspeed, options.local_rank, options.verbose)


def build_sections(sections: dict[str, type], options: dict[str, Any]) -> dict[str, Any]:
    """Builds each section from the options that are its fields."""
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

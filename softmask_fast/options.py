"""The command line: flags, an optional file and presets, parsed into a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from softmask_fast.config import PRESETS, Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig

_SECTIONS = {"model": ModelConfig, "objectives": ObjectiveConfig, "data": DataConfig, "train": TrainConfig}


@dataclass
class LaunchOptions:
    """What the launcher and DeepSpeed's own configuration need; not part of the run's configuration."""

    deepspeed: str
    local_rank: int


def parse_arguments(argv: list[str] | None = None) -> tuple[Config, LaunchOptions]:
    """Parse flags and an optional --config file into a checked Config.

    Raises SystemExit (argparse) for unknown flags and ValueError for values out of range or unknown keys in the file.
    """
    preset, options, launch = parse_sections(
        _SECTIONS, "preset", PRESETS, "tiny", "Pretrain a vision-language model with SoftMask++.", argv, _from_weights
    )
    return Config(preset, **build_sections(_SECTIONS, options)), launch


def parse_sections(
    sections: dict[str, type],
    choice: str,
    table: dict[str, dict[str, Any]],
    default: str | None,
    description: str,
    argv: list[str] | None,
    more_defaults: Callable[[dict[str, Any]], dict[str, Any]] = lambda options: {},
) -> tuple[str, dict[str, Any], LaunchOptions]:
    """The row of `table` that the flag --`choice` names, and the value of every option of the sections' fields.

    A flag wins over the --config file, the file over the row of the table, that over the dataclasses' defaults.
    more_defaults: of the options so far, what wins over the row of the table, but not over flags and file.
    """
    from transformers import HfArgumentParser  # slow to import, and not needed to load a trained model

    parser = HfArgumentParser(tuple(sections.values()), description=description)
    told = f"Where the other options start; default: {default}." if default else "What is learned; expected."
    parser.add_argument(f"--{choice}", choices=sorted(table), help=told)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of the options.")
    parser.add_argument("--deepspeed", "--deepspeed_config", metavar="FILE", help="DeepSpeed configuration (ds.json).")
    parser.add_argument("--local_rank", type=int, default=-1, help="Set by the launcher.")

    first, _ = parser.parse_known_args(argv)
    from_file = _read_options(first.config) if first.config else {}
    chosen = getattr(first, choice) or from_file.get(choice, default)
    from_file.pop(choice, None)
    if chosen not in table:
        raise ValueError(f"{choice}: expected one of {sorted(table)}, got {chosen!r}")
    known = {f.name for section in sections.values() for f in fields(section)}
    unknown = sorted(set(from_file) - known)
    if unknown:
        raise ValueError(f"{first.config}: unknown options {unknown}")
    parser.set_defaults(**table[chosen] | from_file)
    options = parser.parse_args(argv)
    if more := more_defaults(vars(options)):
        parser.set_defaults(**table[chosen] | more | from_file)
        options = parser.parse_args(argv)
    if not options.deepspeed:
        parser.error("--deepspeed: expected the path of a DeepSpeed configuration such as ds.json")
    return chosen, vars(options), LaunchOptions(options.deepspeed, options.local_rank)


def build_sections(sections: dict[str, type], options: dict[str, Any]) -> dict[str, Any]:
    """Each section from the options that are its fields."""
    return {name: section(**{f.name: options[f.name] for f in fields(section)}) for name, section in sections.items()}


def _from_weights(options: dict[str, Any]) -> dict[str, Any]:
    """The sizes of the model that `model_weights` names."""
    if not options["model_weights"]:
        return {}
    from softmask_fast.model.initialize import weights_config

    return asdict(weights_config(options["model_weights"]))


def make_config(preset: str = "tiny", **options: Any) -> Config:
    """The configuration of a preset with some options changed, for use from Python.

    Raises ValueError for an unknown preset or option and for values out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
    values = {f.name: f.default for section in _SECTIONS.values() for f in fields(section)}
    unknown = sorted(set(options) - set(values))
    if unknown:
        raise ValueError(f"unknown options {unknown}")
    values |= PRESETS[preset]
    return Config(preset, **build_sections(_SECTIONS, values | _from_weights(values | options) | options))


def _read_options(path: str) -> dict[str, Any]:
    import yaml

    text = Path(path).read_text()
    try:
        options = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config: {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected a mapping of options, got {type(options).__name__}")
    return options

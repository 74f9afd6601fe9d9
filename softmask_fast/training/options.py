"""Options of pretraining, from the command line or from Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from softmask_fast.config import PRESETS, Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from softmask_fast.errors import UsageError
from softmask_fast.options import LaunchOptions, build_sections, did_you_mean, parse_sections

SECTIONS = {"model": ModelConfig, "objectives": ObjectiveConfig, "data": DataConfig, "train": TrainConfig}
ABOUT = "Pretrain a vision-language model with SoftMask++."


def parse_arguments(argv: Sequence[str] | None = None, **program: Any) -> tuple[Config, LaunchOptions]:
    """Parse flags and an optional --config file with `parse_sections`, which receives `program`.

    Returns:
        The configuration and the launcher's options.

    Raises:
        UsageError: for values out of range.
    """
    preset, options, launch = parse_sections(
        SECTIONS, "preset", PRESETS, "tiny", ABOUT, argv, _sizes_of_weights, **program
    )
    return Config(preset, **build_sections(SECTIONS, options)), launch


def make_config(preset: str = "tiny", **options: Any) -> Config:
    """A preset with some options changed. Raises UsageError for unknown names and for values out of range."""
    if preset not in PRESETS:
        raise UsageError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
    values = {f.name: f.default for section in SECTIONS.values() for f in fields(section)}
    for name in options.keys() - values.keys():
        raise UsageError(f"unknown option {name!r}{did_you_mean(name, values)}")
    values |= PRESETS[preset]
    return Config(preset, **build_sections(SECTIONS, values | _sizes_of_weights(values | options) | options))


def _sizes_of_weights(options: dict[str, Any]) -> dict[str, Any]:
    """The model options of the weights that `model_weights` names."""
    if not options["model_weights"]:
        return {}
    from softmask_fast.model.initialize import weights_config  # imports torch, which --help does not wait for

    return asdict(weights_config(options["model_weights"]))

"""The record of a run in config.json: configuration, versions, device. A resumed run is checked against it."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softmask_fast.config import RunConfig, renamed
from softmask_fast.errors import UsageError, without_secrets
from softmask_fast.ops.registry import describe
from softmask_fast.options import record_path, stored_record
from softmask_fast.utils import installed_versions, write_json

# Options that a resumed run may change besides those of `TrainConfig`. None affects what is learned.
MAY_CHANGE = (
    "data_threads", "data_workers", "eval_data", "eval_size",
    "cache_dir", "cache_gigabytes", "prefetch_shards", "download_tries", "download_timeout",
)  # fmt: skip
MICRO_BATCH = "train_micro_batch_size_per_gpu"  # DeepSpeed's name for our batch_size


def run_record(config: RunConfig, device: torch.device, model: nn.Module, **about: Any) -> dict[str, Any]:
    """The record of a run, as JSON types.

    Args:
        config: with nothing left open.
        device: of this rank.
        model: its parameters are counted, under ZeRO as well.
        about: further entries.

    Returns:
        "versions", "device", "command", "operators" (the implementation of each), "parameters" (their number), `about`,
        "config", and "incomplete": names of the options whose secrets were removed.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    stored = shown(asdict(config))
    return {
        "versions": installed_versions(),
        "device": name,
        "command": [without_secrets(argument) for argument in sys.argv],
        "operators": {operator: chosen.get(device.type) for operator, chosen in describe().items()},
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        **about,
        "config": stored,
        "incomplete": [name for name, value in flat(asdict(config)).items() if flat(stored)[name] != value],
    }


def reported_options(record: dict[str, Any]) -> dict[str, Any]:
    """The entries of a record that loggers show: all options that are set, the device and the size of the run."""
    size = {name: record[name] for name in ("device", "world_size", "samples", "steps", "parameters")}
    return {name: value for name, value in flat(record["config"]).items() if value is not None} | size


def store_record(output: Path, step: int, record: dict[str, Any]) -> None:
    """Write the record of a run that starts, or resumes after a step, and remove the records of later resumes."""
    newest = f"config-from-step-{step:08d}.json"
    write_json(output / (newest if step else "config.json"), record)
    for path in output.glob("config-from-step-*.json"):
        if path.name > newest:
            path.unlink()


def shown(options: Any) -> Any:
    """Options, nested or not, without the passwords and signatures of URLs. A resumed run may change these."""
    if isinstance(options, dict):
        return {name: shown(value) for name, value in options.items()}
    return without_secrets(options) if isinstance(options, str) else options


def check_same_run(output: Path, config: RunConfig) -> None:
    """Raise UsageError if the run's record is damaged, or if a resumed run changes an option that is neither in
    `TrainConfig` nor in `MAY_CHANGE`."""
    stored = stored_record(output)["config"]
    for section, options in shown(asdict(config)).items():
        if section == "train" or not isinstance(options, dict):
            continue
        if not isinstance(stored.get(section), dict):
            path = record_path(output)
            raise UsageError(f"resume: expected a run's record with the key 'config.{section}', got {path}")
        before = with_defaults(getattr(config, section), stored[section])
        for name, value in options.items():
            if before[name] != value and name not in MAY_CHANGE:
                raise UsageError(f"resume: expected {name} {before[name]!r}, as in {output}, got {value!r}")


def with_defaults(section: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """The stored options of a section, completed by defaults: an option that did not exist yet acted as its default,
    whatever the presets say today."""
    return {field.name: field.default for field in fields(section)} | renamed(shown(stored))


def flat(options: dict[str, Any]) -> dict[str, Any]:
    """All options in one dict, without their sections. Option names are unique."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def changes(before: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """The differences between a resumed run and its earlier record, as "name old -> new"."""
    old, new = (
        {**one.get("deepspeed", {}), **renamed(flat(shown(one["config"]))), "world_size": one["world_size"]}
        for one in (before, record)
    )
    compared = [name for name in new if name in old and name not in ("resume", "output_dir", MICRO_BATCH)]
    return [f"{name} {old[name]} -> {new[name]}" for name in compared if old[name] != new[name]]

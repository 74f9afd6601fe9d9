"""The record of a run in config.json: its configuration, versions and device; a resumed run is checked against it."""

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

# options beside those of `TrainConfig` that a resumed run may change: none affects what is learned
MAY_CHANGE = (
    "data_threads", "data_workers", "eval_data", "eval_size",
    "cache_dir", "cache_gigabytes", "prefetch_shards", "download_tries", "download_timeout",
)  # fmt: skip
MICRO_BATCH = "train_micro_batch_size_per_gpu"  # DeepSpeed's name of our batch_size


def run_record(config: RunConfig, device: torch.device, model: nn.Module, **about: Any) -> dict[str, Any]:
    """The whole configuration, the versions, the device and the operators' implementations, as JSON types."""
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
    """What loggers show of a record: all options that are set, and how large the run is."""
    size = {name: record[name] for name in ("device", "world_size", "samples", "steps", "parameters")}
    return {name: value for name, value in flat(record["config"]).items() if value is not None} | size


def store_record(output: Path, step: int, record: dict[str, Any]) -> None:
    """Write the record of a run that begins, or goes on after a step. Those of later steps are of what it repeats."""
    newest = f"config-from-step-{step:08d}.json"
    write_json(output / (newest if step else "config.json"), record)
    for path in output.glob("config-from-step-*.json"):
        if path.name > newest:
            path.unlink()


def shown(options: Any) -> Any:
    """Options, by section or not, with URLs without passwords and signatures, which a resumed run may change."""
    if isinstance(options, dict):
        return {name: shown(value) for name, value in options.items()}
    return without_secrets(options) if isinstance(options, str) else options


def check_same_run(output: Path, config: RunConfig) -> None:
    """Raise UsageError if a resumed run changes an option other than those of `TrainConfig` and `MAY_CHANGE`, or if
    the record of the run is damaged."""
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
    """The stored options of a section. One that did not exist yet had the effect of its default, whatever the presets
    say today."""
    return {field.name: field.default for field in fields(section)} | renamed(shown(stored))


def flat(options: dict[str, Any]) -> dict[str, Any]:
    """All options without their sections; their names are unique."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def changes(before: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What a resumed run has otherwise than its record of before, as "name old -> new"."""
    old, new = (
        {**one.get("deepspeed", {}), **renamed(flat(shown(one["config"]))), "world_size": one["world_size"]}
        for one in (before, record)
    )
    told = [name for name in new if name in old and name not in ("resume", "output_dir", MICRO_BATCH)]
    return [f"{name} {old[name]} -> {new[name]}" for name in told if old[name] != new[name]]

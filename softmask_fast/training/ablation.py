"""The paper's ablation: baseline, + augmentation, + soft masks, + focal, all; several seeds each, in one table.

Every run is launched as `deepspeed softmask_fast/train.py`. Finished runs are not repeated, stopped ones are resumed.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import softmask_fast
from softmask_fast.config import Config
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.plots import save_figure
from softmask_fast.evaluation.record import parse_record
from softmask_fast.evaluation.report import PretrainingEvaluation, held_out_pairs
from softmask_fast.options import spell
from softmask_fast.training.options import parse_arguments
from softmask_fast.training.run_record import flat, shown, with_defaults
from softmask_fast.utils import read_json, write_json, write_text

# the options that switch a part off
OFF: dict[str, dict[str, Any]] = {
    "augmentation": {"masked_captions": False, "rand_augment": False, "color": False, "blur": False},
    "soft masks": {"soft_mask": False},
    "focal": {"focal_gamma": 0.0},
}
ROWS: dict[str, tuple[str, ...]] = {  # row -> the parts that are on
    "baseline": (),
    "+ augmentation": ("augmentation",),
    "+ soft masks": ("soft masks",),
    "+ focal": ("focal",),
    "all": tuple(OFF),
}
OWN = ("output_dir", "resume", "deepspeed")  # options that the ablation sets for each run
SHOWN_LINES = 15  # of the log of a run that failed
# column -> keys of the metric among the reports of a run's evaluation.json
METRICS: dict[str, tuple[str, ...]] = {
    "text to image R@1, ITC": ("retrieval", "itc", "text_to_image", "recall@1"),
    "text to image R@1, ITM": ("retrieval", "itm", "text_to_image", "recall@1"),
    "image to text R@1, ITC": ("retrieval", "itc", "image_to_text", "recall@1"),
    "image to text R@1, ITM": ("retrieval", "itm", "image_to_text", "recall@1"),
    "pointing game": ("grounding", "pointing_game", "model"),
}


@dataclass(frozen=True)
class Run:
    """One pretraining run of the ablation."""

    row: str
    seed: int
    folder: Path

    @property
    def flags(self) -> list[str]:
        """The options that are this run's own: the parts it switches off, its seed and its folder."""
        off = {name: value for part in OFF if part not in ROWS[self.row] for name, value in OFF[part].items()}
        given = off | {"seed": self.seed, "output_dir": self.folder, "resume": "auto"}
        return [text for name, value in given.items() for text in (f"--{name}", str(value))]

    @property
    def finished(self) -> bool:
        return (self.folder / "evaluation.json").exists()


class RunEnded(UsageError):
    """A run was stopped, or failed, before its end."""


def run_ablation(
    options: Sequence[str], output: Path, *, seeds: int = 3, deepspeed: str | None = None, launcher: str = ""
) -> dict[str, Any]:
    """Do all runs that are not finished and write ablation.json, ablation.md and ablation.png to `output`.

    Args:
        options: flags of train.py for all runs, with all parts on.
        seeds: runs of each row.
        deepspeed: path of DeepSpeed's configuration; None: the built-in one.
        launcher: options of the deepspeed launcher.

    Returns the content of ablation.json. Raises UsageError for options that leave nothing to compare, or that differ
    from those of the folder, and RunEnded for a run that was stopped or failed.
    """
    options = spell(options)
    config = check_options(options, seeds, deepspeed)
    check_folder(output, config)
    runs = [
        Run(row, seed, output / "runs" / f"{row.replace('+ ', '').replace(' ', '-')}-seed-{seed}")
        for seed in range(config.train.seed, config.train.seed + seeds)
        for row in ROWS
    ]
    for number, run in enumerate(runs, 1):
        state = "finished" if run.finished else run.folder
        print(f"run {number} of {len(runs)}: {run.row}, seed {run.seed}: {state}", flush=True)
        if not run.finished:
            train(run, options, deepspeed, launcher)
    table = summarize(runs)
    content = {"options": options, "seeds": seeds, "rows": table}
    write_json(output / "ablation.json", content)
    write_text(output / "ablation.md", markdown(table))
    plot(table, output / "ablation.png")
    return content


def check_options(options: Sequence[str], seeds: int, deepspeed: str | None) -> Config:
    """The configuration with all parts. Raises UsageError for options that the ablation cannot work with."""
    if seeds < 1:
        raise UsageError(f"seeds: expected at least 1, got {seeds}")
    given = [option.split("=")[0].removeprefix("--") for option in options if option.startswith("--")]
    if own := [name for name in given if name in OWN]:
        raise UsageError(f"{own[0]}: the ablation sets this option for each run, leave it out")
    config, _ = parse_arguments(_with(deepspeed, options))
    values = vars(config.objectives) | vars(config.data)
    for part, off in OFF.items():
        if all(values[name] == value for name, value in off.items()):
            raise UsageError(f"{', '.join(off)}: expected {part} switched on, to be compared with off")
    held_out = held_out_pairs(config)
    if held_out is None:
        raise UsageError(f"eval_data: expected held-out pairs to compare the runs on, got none for {config.data.data}")
    PretrainingEvaluation(config, held_out)  # its errors surface before the first run
    return config


def check_folder(output: Path, config: Config) -> None:
    """Store the options in the folder. Raises UsageError naming one that its earlier runs had otherwise."""
    path, current = output / "options.json", json.loads(json.dumps(shown(asdict(config))))
    if path.exists():
        stored, before = read_json(path, "output_dir"), {}
        for name, options in current.items():
            if not isinstance(stored, dict) or not isinstance(stored.get(name), type(options)):
                raise UsageError(f"output_dir: {path} does not hold the options of an ablation: expected {name} in it")
            is_section = isinstance(options, dict)
            before |= with_defaults(getattr(config, name), stored[name]) if is_section else {name: stored[name]}
        for name, value in flat(current).items():
            if before[name] != value:
                raise UsageError(f"{name}: was {before[name]!r} in the runs of {output}, got {value!r}")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, current)


def _with(deepspeed: str | None, options: Sequence[str]) -> list[str]:
    return [*(["--deepspeed", deepspeed] if deepspeed else []), *options]


def train(run: Run, options: Sequence[str], deepspeed: str | None, launcher: str) -> None:
    """Launch one run and wait for its end; its output goes to run.log in its folder. Raises RunEnded."""
    script = Path(softmask_fast.__file__).with_name("train.py")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *shlex.split(launcher), str(script)]
    command += [*_with(deepspeed, options), *run.flags]
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "run.log"
    stopped = f"stopped in {run.folder}; the same command resumes there"
    with open(path, "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the run received it as well, and writes its checkpoint
            process.wait()
            raise RunEnded(stopped) from None
        finally:
            signal.signal(signal.SIGTERM, before)
    if status != 0:
        last = "\n".join(path.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
        raise RunEnded(f"the run in {run.folder} failed with status {status}; the end of {path.name}:\n{last}")
    if not run.finished:
        raise RunEnded(stopped)


def summarize(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """row -> column -> values of all seeds, their mean, and their standard deviation (None for a single seed)."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for row in ROWS:
        paths = [run.folder / "evaluation.json" for run in runs if run.row == row]
        reports = [parse_record(path.read_text(), path)["reports"] for path in paths]
        table[row] = {}
        for column, path in METRICS.items():
            values = [_at(report, path) for report in reports]
            if None not in values:  # without boxes there is no grounding
                spread = statistics.stdev(values) if len(values) > 1 else None
                table[row][column] = {"values": values, "mean": statistics.fmean(values), "spread": spread}
    return table


def _at(report: dict[str, Any], path: Sequence[str]) -> float | None:
    found: Any = report
    for name in path:
        found = found.get(name) if found is not None else None
    return found


def markdown(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table of `summarize` in percent: mean ± standard deviation."""
    columns = list(table["baseline"])
    lines = [["in %", *columns], ["---"] * (len(columns) + 1)]
    for row, cells in table.items():
        lines.append([row, *(_cell(cells[column]) for column in columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(cell: dict[str, Any]) -> str:
    spread = "" if cell["spread"] is None else f" ± {100 * cell['spread']:.1f}"
    return f"{100 * cell['mean']:.1f}{spread}"


def plot(table: dict[str, dict[str, dict[str, Any]]], out: Path) -> None:
    """Draw a panel for each column: the means as bars, every seed as a point."""
    columns = list(table["baseline"])
    wide = min(3, len(columns))
    high = math.ceil(len(columns) / wide)
    figure = Figure(figsize=(4.2 * wide, 3.2 * high), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False).flatten()
    for ax, column in zip(axes, columns, strict=False):
        for position, (row, cells) in enumerate(table.items()):
            values = [100 * value for value in cells[column]["values"]]
            color = "#b0bec5" if row == "baseline" else "#5c85d6"
            ax.barh(position, 100 * cells[column]["mean"], color=color, height=0.7)
            ax.plot(values, [position] * len(values), "o", color="#263238", markersize=3.5, alpha=0.8)
        ax.set_yticks(range(len(table)), list(table), fontsize=9)
        ax.invert_yaxis()
        ax.set_title(f"{column}, %", fontsize=10)
        ax.grid(axis="x", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(columns) :]:
        ax.set_axis_off()
    save_figure(figure, out)

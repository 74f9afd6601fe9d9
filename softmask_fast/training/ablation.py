"""The paper's ablation in one table: baseline, + augmentation, + soft masks, + focal, all; several seeds each.

Every run is launched as `deepspeed softmask_fast/train.py`. Finished runs are skipped, stopped ones resumed.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import softmask_fast
from softmask_fast.config import Config
from softmask_fast.errors import UsageError, without_secrets
from softmask_fast.evaluation.plots import save_figure
from softmask_fast.evaluation.record import parse_record
from softmask_fast.evaluation.report import PretrainingEvaluation, held_out_pairs
from softmask_fast.options import spell
from softmask_fast.training.options import parse_arguments
from softmask_fast.training.run_record import flat, shown, with_defaults
from softmask_fast.utils import read_json, write_json, write_text

# part -> the options that switch it off
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
SHOWN_LINES = 15  # of a failed run's log
# column -> its places in the reports of a run's evaluation.json; several places are averaged
WAYS = ("text_to_image", "image_to_text")
METRICS: dict[str, tuple[tuple[str, ...], ...]] = {
    "R@1": tuple(("retrieval", "itc", way, "recall@1") for way in WAYS),
    "R@1, re-ranked": tuple(("retrieval", "both", way, "recall@1") for way in WAYS),
    "pointing game": (("grounding", "pointing_game", "model"),),
    "box accuracy": (("grounding", "box_accuracy", "model"),),
}
CLEAR = 2.0  # differences of more than this many standard deviations are bold, and colored
DRAWN = {"+ augmentation": "augmentation", "+ soft masks": "soft masks", "+ focal": "focal weights", "all": "all three"}
INK, MORE, LESS, UNCLEAR = "#263238", "#2e8b57", "#c8553d", "#9aa5ab"
Table = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Run:
    """One pretraining run of the ablation."""

    row: str
    seed: int
    folder: Path

    @property
    def flags(self) -> list[str]:
        """The options that only this run has: the parts it switches off, its seed and its folder."""
        off = {name: value for part in OFF if part not in ROWS[self.row] for name, value in OFF[part].items()}
        given = off | {"seed": self.seed, "output_dir": self.folder, "resume": "auto"}
        return [text for name, value in given.items() for text in (f"--{name}", str(value))]

    @property
    def finished(self) -> bool:
        """Whether the run was trained and evaluated to the end."""
        return (self.folder / "evaluation.json").exists()


class RunEnded(UsageError):
    """A run stopped or failed before its end."""


def run_ablation(
    options: Sequence[str], output: Path, *, seeds: int = 3, deepspeed: str | None = None, launcher: str = ""
) -> dict[str, Any]:
    """Do all unfinished runs. Each time a seed has all of its rows, write ablation.json, ablation.md and ablation.png.

    Args:
        options: flags of train.py for all runs, with all parts on.
        output: folder of the three files and, in `runs`, of the runs.
        seeds: runs per row.
        deepspeed: path of DeepSpeed's configuration; None: the built-in one.
        launcher: options of the deepspeed launcher, as one string.

    Returns:
        The content of ablation.json: "options", "seeds", "training_data", what `lengths` returns, and "rows" as in
        `summarize`.

    Raises:
        UsageError: for options that leave nothing to compare, or that differ from those of the folder.
        RunEnded: when a run stopped or failed.
    """
    options = spell(options)
    config = check_options(options, seeds, deepspeed)
    check_folder(output, config)
    done: list[Run] = []
    for seed in range(config.train.seed, config.train.seed + seeds):
        for row in ROWS:
            run = Run(row, seed, output / "runs" / f"{row.replace('+ ', '').replace(' ', '-')}-seed-{seed}")
            done.append(run)
            state = "finished" if run.finished else run.folder
            print(f"run {len(done)} of {seeds * len(ROWS)}: {row}, seed {seed}: {state}", flush=True)
            if not run.finished:
                train(run, options, deepspeed, launcher)
        content = write_tables(done, options, config.data.data, output)
    return content


def write_tables(runs: Sequence[Run], options: Sequence[str], data: str, output: Path) -> dict[str, Any]:
    """Write the three files from finished runs on `data`, equally many per row; returns the content of ablation.json.

    Passwords and signatures of URLs are not written.
    """
    table = summarize(runs)
    about = {"options": [without_secrets(text) for text in options], "seeds": len(runs) // len(ROWS)}
    about |= {"training_data": without_secrets(data), **lengths(runs)}
    content = about | {"rows": table}
    write_json(output / "ablation.json", content)
    write_text(output / "ablation.md", markdown(table, about))
    plot(table, about, output / "ablation.png")
    return content


def lengths(runs: Sequence[Run]) -> dict[str, Any]:
    """The length of the runs, "steps" and "epochs", and what they were measured on: "data" and "images"."""
    path = runs[-1].folder / "evaluation.json"
    record = parse_record(path.read_text(), path)
    about = {"steps": record["step"], "epochs": record["epoch"], "data": record["data"]}
    return about | {"images": record["reports"]["retrieval"]["images"]}


def check_options(options: Sequence[str], seeds: int, deepspeed: str | None) -> Config:
    """The configuration with all parts on. Raises UsageError for options that the ablation cannot work with."""
    if seeds < 1:
        raise UsageError(f"seeds: expected at least 1, got {seeds}")
    given = [option.split("=")[0].removeprefix("--") for option in options if option.startswith("--")]
    if own := [name for name in given if name in OWN]:
        raise UsageError(f"{own[0]}: expected none for the runs, as the ablation sets it for each")
    config, _ = parse_arguments(_with(deepspeed, options))
    values = vars(config.objectives) | vars(config.data)
    for part, off in OFF.items():
        if all(values[name] == value for name, value in off.items()):
            raise UsageError(f"{', '.join(off)}: expected {part} on, as the ablation compares runs with and without")
    held_out = held_out_pairs(config)
    if held_out is None:
        raise UsageError(f"eval_data: expected held-out pairs to compare the runs on, got none for {config.data.data}")
    PretrainingEvaluation(config, held_out)  # its errors surface before the first run
    return config


def check_folder(output: Path, config: Config) -> None:
    """Store the options in the folder. Raises UsageError if they differ from those of the folder's earlier runs."""
    path, current = output / "options.json", json.loads(json.dumps(shown(asdict(config))))
    if path.exists():
        stored, before = read_json(path, "output_dir"), {}
        for name, options in current.items():
            if not isinstance(stored, dict) or not isinstance(stored.get(name), type(options)):
                raise UsageError(f"output_dir: {path} lacks {name}, expected the options of an ablation")
            is_section = isinstance(options, dict)
            before |= with_defaults(getattr(config, name), stored[name]) if is_section else {name: stored[name]}
        for name, value in flat(current).items():
            if before[name] != value:
                raise UsageError(f"{name}: expected {before[name]!r}, as in the runs in {output}, got {value!r}")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, current)


def _with(deepspeed: str | None, options: Sequence[str]) -> list[str]:
    return [*(["--deepspeed", deepspeed] if deepspeed else []), *options]


def train(run: Run, options: Sequence[str], deepspeed: str | None, launcher: str) -> None:
    """Launch one run and wait for its end; its output goes to run.log in its folder.

    Raises:
        RunEnded: when the run stopped, or failed; then with the end of its log.
    """
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
        except KeyboardInterrupt:  # the run received it as well and is writing its checkpoint
            process.wait()
            raise RunEnded(stopped) from None
        finally:
            signal.signal(signal.SIGTERM, before)
    if status != 0:
        last = "\n".join(path.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
        raise RunEnded(f"the run in {run.folder} failed with status {status}; the end of {path.name}:\n{last}")
    if not run.finished:
        raise RunEnded(stopped)


def summarize(runs: Sequence[Run]) -> Table:
    """row -> column -> "values" (one per seed), "mean", "spread" and "difference". All are fractions.

    "spread" is the standard deviation, None for a single seed. "difference" has the same three keys, for
    the difference from the baseline of the same seed, which sees the same data in the same order.
    """
    values = {row: {column: _values(runs, row, column) for column in METRICS} for row in ROWS}
    table: Table = {row: {} for row in ROWS}
    for column in METRICS:
        if any(None in values[row][column] for row in ROWS):  # without boxes there is no grounding
            continue
        for row in ROWS:
            pairs = zip(values[row][column], values["baseline"][column], strict=True)
            difference = _cell([own - before for own, before in pairs])
            table[row][column] = _cell(values[row][column]) | {"difference": difference}
    return table


def _values(runs: Sequence[Run], row: str, column: str) -> list[float | None]:
    """A column of the runs of a row, by seed."""
    found: list[float | None] = []
    for run in runs:
        if run.row == row:
            path = run.folder / "evaluation.json"
            reports = parse_record(path.read_text(), path)["reports"]
            places = [_at(reports, place) for place in METRICS[column]]
            found.append(None if None in places else statistics.fmean(places))
    return found


def _cell(values: Sequence[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"values": list(values), "mean": statistics.fmean(values), "spread": spread}


def _at(report: dict[str, Any], path: Sequence[str]) -> Any:
    found: Any = report
    for name in path:
        found = found.get(name) if found is not None else None
    return found


def describe(about: dict[str, Any]) -> str:
    """One line: what the runs learned from and for how long, and what they were measured on."""
    seeds = f"{about['seeds']} seed{'s' * (about['seeds'] > 1)}"
    trained = (
        f"trained on {about['training_data']} for {about['steps']:,} steps ({about['epochs']:.3g} epochs), {seeds}"
    )
    return f"{trained}; measured on {about['images']:,} held-out images of {about['data']}"


def markdown(table: Table, about: dict[str, Any]) -> str:
    """Two tables in percent, mean ± standard deviation over the seeds: the values, and the differences from the
    baseline of the same seed. A mean beyond `CLEAR` standard deviations is bold."""
    columns = list(table["baseline"])
    values = [[row, *(_shown(cells[column]) for column in columns)] for row, cells in table.items()]
    differences = [
        [row, *(_shown(cells[column]["difference"], sign="+") for column in columns)]
        for row, cells in table.items()
        if row != "baseline"
    ]
    bold = f"bold: more than {CLEAR:g} standard deviations"
    return (
        f"In %, mean ± standard deviation; {describe(about)}.\n\n{_table(['', *columns], values)}\n"
        f"Difference from the baseline of the same seed, in points; {bold}.\n\n{_table(['', *columns], differences)}"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _shown(cell: dict[str, Any], sign: str = "") -> str:
    mean, spread = 100 * cell["mean"], cell["spread"]
    text = f"{mean:{sign}.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")
    return f"**{text}**" if sign and _clear(cell) else text


def _clear(difference: dict[str, Any]) -> bool:
    return difference["spread"] is not None and abs(difference["mean"]) > CLEAR * difference["spread"]


def plot(table: Table, about: dict[str, Any], out: Path) -> None:
    """Draw a panel per column, on one scale, with each row's difference from the baseline: a point per seed, a bar for
    the mean, and its standard deviation. Only clear differences have a color."""
    columns, rows = list(table["baseline"]), [row for row in table if row != "baseline"]
    wide = min(2, len(columns))
    high = math.ceil(len(columns) / wide)
    figure = Figure(figsize=(6.2 * wide, 2.7 * high + 1.1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    title = "Difference from the baseline of the same seed, in percentage points"
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left", color=INK)
    axes = figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True).flatten()
    for ax, column in zip(axes, columns, strict=False):
        for position, row in enumerate(rows):
            _draw_difference(ax, position, table[row][column]["difference"])
        ax.axvline(0, color=INK, linewidth=1.2)
        ax.set_yticks(range(len(rows)), [DRAWN.get(row, row) for row in rows], fontsize=11)
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelsize=9, labelbottom=True)
        ax.set_title(f"{column}: baseline {_shown(table['baseline'][column])} %", fontsize=11, loc="left", color=INK)
        ax.grid(axis="x", alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
    axes[0].invert_yaxis()  # of all panels
    least, most = axes[0].get_xlim()
    room = 0.17 * (most - least)  # for the numbers
    axes[0].set_xlim(least - room, most + room)
    for ax in axes[len(columns) :]:
        ax.set_axis_off()
    spread = f"; whiskers: standard deviation; gray: at most {CLEAR:g} of them from 0" * (about["seeds"] > 1)
    legend = f"bar and number: mean; points: seeds{spread or '; gray, as one seed has no spread'}"
    figure.supxlabel(f"{legend}\n{_wrapped(describe(about), 74 * wide)}", fontsize=9, x=0.01, ha="left", color=INK)
    save_figure(figure, out)


def _draw_difference(ax: Axes, position: int, cell: dict[str, Any]) -> None:
    mean, values = 100 * cell["mean"], [100 * value for value in cell["values"]]
    color = (MORE if mean > 0 else LESS) if _clear(cell) else UNCLEAR
    whiskers = {}
    if cell["spread"] is not None:
        whiskers = {"xerr": 100 * cell["spread"], "error_kw": {"capsize": 4, "elinewidth": 1.4, "ecolor": INK}}
    ax.barh(position, mean, color=color, alpha=0.55, height=0.5, **whiskers)
    places = [position + 0.1 * (number - (len(values) - 1) / 2) for number in range(len(values))]
    ax.plot(values, places, "o", color=INK, markersize=4.5, markeredgecolor="white", zorder=4)
    reach = [mean, *values, mean - whiskers.get("xerr", 0), mean + whiskers.get("xerr", 0)]
    end, side, way = (max(reach), 7, "left") if mean >= 0 else (min(reach), -7, "right")
    place = {"xytext": (side, 0), "textcoords": "offset points", "ha": way, "va": "center"}
    ax.annotate(_shown(cell, sign="+").strip("*"), (end, position), fontsize=9, color=INK, **place)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))

"""The curves of a run: what it learned in curves.png, its schedule and its machine in curves-system.png."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from softmask_fast.errors import UsageError
from softmask_fast.evaluation.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, float]  # "step" and metrics
Painter = Callable[["Axes"], None]

# metrics of a panel -> their names in it
PARTS = {"mlm": "masked tokens", "itm": "matching", "itc": "contrast"}  # of the loss
ACCURACIES = {
    "itc_image_accuracy": "contrast, text of an image",
    "itc_text_accuracy": "contrast, image of a text",
    "itm_accuracy": "matching",
    "mlm_accuracy": "masked tokens",
    "accuracy": "answers",
}
SCHEDULE = {
    "learning rate": {"learning_rate": "learning rate"},
    "soft masks, soft targets, temperature": {
        "soft_mask_mean": "share of the patches masked",
        "alpha": "weight of the soft targets",
        "temperature": "temperature of the contrast",
    },
}
SYSTEM = {
    "pairs per second": {"pairs_per_second": "pairs per second"},
    "operations": {"flops_utilisation": "share of a large product's rate"},
    "waiting for data": {"data_wait": "share of the time"},
    "peak memory in GiB": {"peak_memory_gib": "peak memory"},
    "data": {"bad_samples": "unusable samples", "truncated_captions": "truncated captions"},
}
KIND = "itm_"  # metrics of one kind of pair: itm_<kind> and itm_<kind>_accuracy
COLORS = {
    "itc": "#4c78a8", "itm": "#f58518", "mlm": "#54a24b", "itc_image_accuracy": "#4c78a8",
    "itc_text_accuracy": "#9ecae9", "itm_accuracy": "#f58518", "mlm_accuracy": "#54a24b",
}  # fmt: skip
MANY = ("#4c78a8", "#e45756", "#b279a2", "#72b7b2", "#9d755d", "#eeca3b")  # of lines that mean nothing elsewhere
INK = "#263238"
WINDOWS = 24  # a long curve is a moving average over 1 / this of its length, drawn over the faint values
FEW_POINTS = 40  # curves with at most this many points have markers


def plot_curves(
    metrics: str | Path,
    out: str | Path,
    held_out: Sequence[Record] = (),
    events: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Draws what was learned over the steps, and the schedule and the machine in a second figure, NAME-system.png.

    Args:
        metrics: a metrics.jsonl: each line is a JSON object of "step" and numbers.
        held_out: further such objects, of fractions.
        events: name -> step at which something in the schedule starts; drawn as vertical lines.
        weights: of the parts "itc", "itm" and "mlm" in the loss; 1 if not given.

    Raises:
        UsageError: if there are no metrics.
    """
    out = Path(out)
    records = [json.loads(line) for line in Path(metrics).read_text().splitlines() if line.strip()]
    names = _names(records)
    if not names:
        raise UsageError(f"{metrics}: expected lines with metrics, got none")
    kinds = [name.removeprefix(KIND) for name in names if _is_kind(name) and not name.endswith("_accuracy")]

    learned: dict[str, Painter] = {}
    if "loss" in names:
        parts = {name: PARTS[name] for name in PARTS if name in names}
        title = "loss, and its weighted parts, in nats" if parts else "loss, in nats"
        learned[title] = lambda ax: _losses(ax, records, parts, weights or {})
    if accuracies := {name: label for name, label in ACCURACIES.items() if name in names}:
        learned["right on training batches"] = lambda ax: _lines(ax, records, accuracies, percent=True)
    if kinds:
        learned["matched or not: right, by kind of pair"] = lambda ax: _pairs(ax, records, kinds)
    if len(held_out) > 1:
        last = {name: f"{name}, {_points(held_out, name)[1][-1]:.1%}" for name in _names(held_out)}
        learned["held-out data, with the last figure"] = lambda ax: _lines(ax, held_out, last, percent=True)
    elif held_out:
        learned[f"held-out data, step {held_out[0]['step']:,}"] = lambda ax: _bars(ax, held_out[0])
    _draw(learned, out, 7.0, 2, events or {})

    drawn = {"loss", "epoch", *PARTS, *ACCURACIES, *(name for name in names if _is_kind(name))}
    panels = {title: {n: m[n] for n in m if n in names} for title, m in (SCHEDULE | SYSTEM).items()}
    drawn |= {name for members in panels.values() for name in members}
    panels |= {name.replace("_", " "): {name: name} for name in names if name not in drawn}
    others = {title: _line_painter(records, members) for title, members in panels.items() if members}
    _draw(others, out.with_name(f"{out.stem}-system{out.suffix}"), 4.8, 4, {})


def shortcut_accuracy(kinds: Sequence[str]) -> float:
    """The matching accuracy of the best model that sees of a pair only whether the image has a soft mask.

    There are equally many pairs of each of the `kinds`; true and soft-masked ones match. Without soft masks it is the
    accuracy of the more frequent answer.
    """
    right = 0
    for masked in (True, False):
        group = [kind for kind in kinds if kind.startswith("soft_masked") == masked]
        matching = sum(kind in ("true_pair", "soft_masked") for kind in group)
        right += max(matching, len(group) - matching)
    return right / len(kinds)


def _names(records: Sequence[Record]) -> list[str]:
    """The metrics that have a value somewhere, in the order of their first mention."""
    found = (name for record in records for name, value in record.items() if name != "step" and value is not None)
    return list(dict.fromkeys(found))


def _is_kind(name: str) -> bool:
    return name.startswith(KIND) and name != KIND + "accuracy"


def _points(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The centered moving average; at both ends, the window shrinks to the values that exist."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones_like(values), kernel, mode="same")


def _losses(ax: Axes, records: Sequence[Record], parts: Mapping[str, str], weights: Mapping[str, float]) -> None:
    """The weighted parts as stacked areas, whose sum is the loss, a line."""
    whole = [record for record in records if all(record.get(name) is not None for name in parts)]
    if parts and whole:
        window = max(1, len(whole) // WINDOWS)
        values = [smooth(weights.get(name, 1.0) * _points(whole, name)[1], window) for name in parts]
        steps = _points(whole, next(iter(parts)))[0]
        ax.stackplot(steps, values, labels=parts.values(), colors=[COLORS[name] for name in parts], alpha=0.75, lw=0)
    _line(ax, records, "loss", "all", INK)
    ax.set_ylim(bottom=0)


def _pairs(ax: Axes, records: Sequence[Record], kinds: Sequence[str]) -> None:
    """A line for each kind of pair, and the accuracy of a model that sees only whether there is a mask."""
    _lines(ax, records, {f"{KIND}{kind}_accuracy": kind.replace("_", " ") for kind in kinds}, percent=True)
    masked = any(kind.startswith("soft_masked") for kind in kinds)
    label = f"all, seeing {'only whether there is a mask' if masked else 'nothing'}"
    ax.axhline(shortcut_accuracy(kinds), color=INK, linestyle="--", linewidth=1.2, label=label)


def _lines(ax: Axes, records: Sequence[Record], members: Mapping[str, str], percent: bool = False) -> None:
    free = iter(MANY * len(members))
    for name, label in members.items():
        _line(ax, records, name, label, COLORS.get(name) or next(free))
    if percent:
        ax.set_ylim(0, 1.02)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    elif ax.dataLim.y0 >= 0:
        ax.set_ylim(bottom=0)


def _line_painter(records: Sequence[Record], members: Mapping[str, str]) -> Painter:
    return lambda ax: _lines(ax, records, members)


def _line(ax: Axes, records: Sequence[Record], name: str, label: str, color: str) -> None:
    steps, values = _points(records, name)
    if not len(values):
        return
    window = max(1, len(values) // WINDOWS)
    marker = "o" if len(values) <= FEW_POINTS else ""
    ax.plot(steps, smooth(values, window), marker=marker, markersize=4, linewidth=1.8, color=color, label=label)
    if window > 1:
        ax.plot(steps, values, linewidth=0.6, alpha=0.22, color=color)


def _bars(ax: Axes, record: Record) -> None:
    names = _names([record])
    bars = ax.barh(names, [record[name] for name in names], color=MANY[0], height=0.6)
    ax.bar_label(bars, [f"{record[name]:.1%}" for name in names], padding=4, fontsize=10, color=INK)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.12)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)


def _draw(panels: Mapping[str, Painter], out: Path, width: float, columns: int, events: Mapping[str, int]) -> None:
    """Draw panels `width` inches wide in rows; the last panel fills its row. Without panels there is no figure."""
    from matplotlib.figure import Figure  # slow to import, and only needed at the end

    if not panels:
        return
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(width * columns, 0.66 * width * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    for number, (title, paint) in enumerate(panels.items(), 1):
        row, place = divmod(number - 1, columns)
        ax = figure.add_subplot(grid[row, place:] if number == len(panels) else grid[row, place])
        paint(ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        if ax.lines:
            ax.set_xlabel("step", fontsize=9)
            ax.set_xlim(0, 1.01 * ax.dataLim.x1)
            ax.grid(alpha=0.25)
            _mark(ax, events)
        ax.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=8 + 14 * _legend(ax, width))
    save_figure(figure, out)


def _legend(ax: Axes, width: float) -> int:
    """Name the curves above the panel, where the names hide no curve; returns the number of lines that takes."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) < 2:
        return 0
    lines = next((n for n in range(1, len(labels)) if _characters(labels, n) <= 12 * width), len(labels))
    ax.legend(
        handles, labels, ncols=math.ceil(len(labels) / lines), fontsize=9, frameon=False, handlelength=1.4,
        columnspacing=1.2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2,
    )  # fmt: skip
    return lines


def _characters(labels: Sequence[str], lines: int) -> int:
    """The width of a legend with this many lines, including its handles."""
    return sum(5 + max(map(len, labels[i : i + lines])) for i in range(0, len(labels), lines))


def _mark(ax: Axes, events: Mapping[str, int]) -> None:
    """A vertical line for each event, its name on the side where there is more room."""
    for name, step in events.items():
        ax.axvline(step, color=INK, linestyle=":", linewidth=1.2)
        right = step < sum(ax.get_xlim()) / 2
        ax.annotate(
            name, (step, 0.98), (3 if right else -3, 0), xycoords=ax.get_xaxis_transform(), textcoords="offset points",
            rotation=90, ha="left" if right else "right", va="top", fontsize=9, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        )  # fmt: skip

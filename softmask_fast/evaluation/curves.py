"""The curves of a run: what it learned in curves.png, its schedule and its machine in curves-system.png."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from softmask_fast.errors import UsageError
from softmask_fast.evaluation.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, float]  # "step" and metrics
Floors = Mapping[str, Mapping[str, float]]  # metric -> what it would be without knowing anything, by name
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
    "operations, of a large product's rate": {"flops_utilisation": "operations"},
    "time spent waiting for data": {"data_wait": "waiting for data"},
    "peak memory in GiB": {"peak_memory_gib": "peak memory"},
    "samples so far": {"bad_samples": "unusable samples", "truncated_captions": "truncated captions"},
}
SHARES, COUNTS = {"flops_utilisation", "data_wait"}, {"bad_samples", "truncated_captions"}
EXACT = {"learning_rate", "alpha", *COUNTS}  # have no noise to be smoothed
KIND = "itm_"  # metrics of one kind of pair: itm_<kind> and itm_<kind>_accuracy
COLORS = {
    "itc": "#4c78a8", "itm": "#f58518", "mlm": "#54a24b", "itc_image_accuracy": "#4c78a8",
    "itc_text_accuracy": "#9ecae9", "itm_accuracy": "#f58518", "mlm_accuracy": "#54a24b",
}  # fmt: skip
MANY = ("#4c78a8", "#e45756", "#b279a2", "#72b7b2", "#9d755d", "#eeca3b")  # of lines that mean nothing elsewhere
INK = "#263238"
TICKS = (INK, "#e45756", "#eeca3b", "#54a24b")  # of floors
LINE, CHARACTER = 14, 5  # points: the height of a line above a panel, the width of a character in it
WINDOWS = 24  # a long curve is a moving average over 1 / this of its length, drawn over the faint values
FEW_POINTS = 40  # curves with at most this many points have markers


def plot_curves(
    metrics: str | Path,
    out: str | Path,
    held_out: Sequence[Record] = (),
    events: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
    floors: Floors | None = None,
) -> None:
    """Draws what was learned over the steps, and the schedule and the machine in a second figure, NAME-system.png.

    Args:
        metrics: a metrics.jsonl: each line is a JSON object of "step" and numbers.
        held_out: further such objects, of fractions.
        events: name -> number of steps before something in the schedule starts; drawn as vertical lines.
        weights: of the parts "itc", "itm" and "mlm" in the loss; 1 if not given.
        floors: of the held-out metrics: metric -> {name of a floor: its value}.

    Raises:
        UsageError: if there are no metrics.
    """
    out = Path(out)
    records = [json.loads(line) for line in Path(metrics).read_text().splitlines() if line.strip()]
    names = _names(records)
    if not names:
        raise UsageError(f"{metrics}: expected lines with metrics, got none")
    kinds = [name.removeprefix(KIND) for name in names if _is_kind(name) and not name.endswith("_accuracy")]

    events, floors = events or {}, floors or {}
    log = Log(records, sorted(set(events.values())))
    learned: dict[str, Painter] = {}
    if "loss" in names:
        parts = {name: PARTS[name] for name in PARTS if name in names}
        title = "loss, and its weighted parts, in nats" if parts else "loss, in nats"
        learned[title] = lambda ax: _losses(ax, log, parts, weights or {})
    if accuracies := {name: label for name, label in ACCURACIES.items() if name in names}:
        learned["right on training batches"] = lambda ax: _fractions(ax, log, accuracies)
    if kinds:
        learned["matched or not: right, by kind of pair"] = lambda ax: _pairs(ax, log, kinds)
    if len(held_out) > 1:
        learned["held-out data, with the last figure"] = lambda ax: _held_out(ax, Log(held_out, ()), floors)
    elif held_out:
        learned[f"held-out data, step {held_out[0]['step']:,}"] = lambda ax: _bars(ax, held_out[0], floors)
    _draw(learned, out, 7.0, 2, events)

    drawn = {"loss", "epoch", *PARTS, *ACCURACIES, *(name for name in names if _is_kind(name))}
    panels = {title: {n: m[n] for n in m if n in names} for title, m in (SCHEDULE | SYSTEM).items()}
    drawn |= {name for members in panels.values() for name in members}
    panels |= {name.replace("_", " "): {name: name.replace("_", " ")} for name in names if name not in drawn}
    machine = Log(records, ())
    zero = [title for title, members in panels.items() if not any(log.points(name)[1].any() for name in members)]
    empty = [label for title in zero for label in panels[title].values()]
    others = {title: _line_painter(machine, members) for title, members in panels.items() if title not in zero}
    note = f"0 throughout and not drawn: {', '.join(empty)}" if empty else ""
    _draw(others, out.with_name(f"{out.stem}-system{out.suffix}"), 4.8, 4, {}, note)


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


@dataclass(frozen=True)
class Log:
    """Metrics by step."""

    records: Sequence[Record]
    events: Sequence[int]  # rising; after these steps metrics may jump

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps at which a metric has a value, and the values."""
        points = [(record["step"], record[name]) for record in self.records if record.get(name) is not None]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        return steps, values

    def curve(self, name: str) -> np.ndarray:
        """The values, those of a long and noisy curve smoothed, but not across an event."""
        steps, values = self.points(name)
        window = 1 if name in EXACT else max(1, len(values) // WINDOWS)
        segments = np.split(values, np.searchsorted(steps, self.events, side="right"))
        return np.concatenate([smooth(segment, window) for segment in segments if len(segment)])


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The centered moving average; at both ends, the window shrinks to the values that exist."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones_like(values), kernel, mode="same")


def _losses(ax: Axes, log: Log, parts: Mapping[str, str], weights: Mapping[str, float]) -> None:
    """The weighted parts as stacked areas, whose sum is the loss, a line."""
    whole = Log([record for record in log.records if all(record.get(name) is not None for name in parts)], log.events)
    if parts and whole.records:
        values = [weights.get(name, 1.0) * whole.curve(name) for name in parts]
        steps, _ = whole.points(next(iter(parts)))
        colors = [COLORS[name] for name in parts]
        ax.stackplot(steps, values, labels=parts.values(), colors=colors, alpha=0.75, lw=0)
    _line(ax, log, "loss", "all", INK)
    _from_zero(ax)


def _pairs(ax: Axes, log: Log, kinds: Sequence[str]) -> None:
    """A line for each kind of pair, and the accuracy of a model that sees only whether there is a mask."""
    _fractions(ax, log, {f"{KIND}{kind}_accuracy": kind.replace("_", " ") for kind in kinds})
    masked = any(kind.startswith("soft_masked") for kind in kinds)
    label = f"a model that sees {'only masks' if masked else 'nothing'}"
    ax.axhline(shortcut_accuracy(kinds), color=INK, linestyle="--", linewidth=1.2, label=label)


def _held_out(ax: Axes, log: Log, floors: Floors) -> None:
    """A line for each metric, and its strongest floor, dashed."""
    labels = {name: f"{name}, {log.points(name)[1][-1]:.1%}" for name in _names(log.records)}
    _fractions(ax, log, labels)
    colors = {line.get_label(): line.get_color() for line in ax.lines}
    known = {name: max(floors[name].values()) for name in labels if floors.get(name)}
    for name, floor in known.items():
        ax.axhline(floor, color=colors[labels[name]], linestyle="--", linewidth=1.2)
    if known:
        ax.plot([], [], color=INK, linestyle="--", linewidth=1.2, label="a metric's strongest floor")


def _fractions(ax: Axes, log: Log, members: Mapping[str, str]) -> None:
    _lines(ax, log, members)
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(_percent)


def _lines(ax: Axes, log: Log, members: Mapping[str, str]) -> None:
    free = iter(MANY * len(members))
    for name, label in members.items():
        _line(ax, log, name, label, COLORS.get(name) or next(free))


def _line_painter(log: Log, members: Mapping[str, str]) -> Painter:
    from matplotlib.ticker import MaxNLocator

    def paint(ax: Axes) -> None:
        _lines(ax, log, members)
        _from_zero(ax)
        if members.keys() <= SHARES:
            ax.yaxis.set_major_formatter(_percent)
        if members.keys() <= COUNTS:
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))

    return paint


def _percent(value: float, _: int) -> str:
    """The label of a tick."""
    return f"{100 * value:g}%"


def _from_zero(ax: Axes) -> None:
    """Let the panel begin at 0, unless something is below, with room above the largest value."""
    if ax.dataLim.y0 >= 0 and ax.dataLim.y1 > 0:
        ax.set_ylim(0, 1.05 * ax.dataLim.y1)


def _line(ax: Axes, log: Log, name: str, label: str, color: str) -> None:
    steps, values = log.points(name)
    if not len(values):
        return
    marker = "o" if len(values) <= FEW_POINTS else ""
    curve = log.curve(name)
    ax.plot(steps, curve, marker=marker, markersize=4, linewidth=1.8, color=color, label=label)
    if np.any(curve != values):
        ax.plot(steps, values, linewidth=0.6, alpha=0.22, color=color)


def _bars(ax: Axes, record: Record, floors: Floors) -> None:
    """A bar for each metric, with a tick at each of its floors."""
    from matplotlib.patheffects import withStroke

    names = _names([record])
    ax.barh(range(len(names)), [record[name] for name in names], color=MANY[0], height=0.6)
    kinds = list(dict.fromkeys(kind for name in names for kind in floors.get(name, {})))
    for kind, color in zip(kinds, TICKS, strict=False):
        places = [(place, floors[name][kind]) for place, name in enumerate(names) if kind in floors.get(name, {})]
        at, x = np.array(places).T
        halo = [withStroke(linewidth=4, foreground="white")]
        ax.vlines(x, at - 0.36, at + 0.36, colors=color, linewidth=2.5, label=kind, path_effects=halo)
    for place, name in enumerate(names):
        known = floors.get(name, {}).values()
        text = f"{record[name]:.1%}" + (f", floor {max(known):.1%}" if known else "")
        at = max(record[name], *known) if known else record[name]
        ax.annotate(text, (at, place), (6, 0), textcoords="offset points", va="center", fontsize=10, color=INK)
    ax.set_yticks(range(len(names)), [textwrap.fill(name, 22) for name in names])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.3)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)


def _draw(
    panels: Mapping[str, Painter], out: Path, width: float, columns: int, events: Mapping[str, int], note: str = ""
) -> None:
    """Draw panels `width` inches wide in rows; the last panel fills its row. Without panels there is no figure."""
    from matplotlib.figure import Figure  # slow to import, and only needed at the end

    if not panels:
        return
    rows = math.ceil(len(panels) / columns)
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(width * columns, 0.66 * width * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid = figure.add_gridspec(rows, columns)
    heads: dict[int, list[tuple[Axes, str, int, int]]] = {}  # of a row: what is above each panel, in lines
    for number, (title, paint) in enumerate(panels.items(), 1):
        row, place = divmod(number - 1, columns)
        ax = figure.add_subplot(grid[row, place:] if number == len(panels) else grid[row, place])
        paint(ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        marks = 0
        if ax.lines:
            ax.set_xlabel("step", fontsize=9)
            ax.set_xlim(0, 1.01 * ax.dataLim.x1)
            ax.grid(alpha=0.25)
            marks = _mark(ax, events, width)
        heads.setdefault(row, []).append((ax, title, _legend_lines(ax, width), marks))
    for row in heads.values():  # titles of a row are at one height
        top = LINE * max(legend + marks for _, _, legend, marks in row)
        for ax, title, legend, _ in row:
            ax.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=8 + top + 5 * bool(top))
            if legend:
                _legend(ax, legend, top)
    if note:
        figure.supxlabel(note, fontsize=9, x=0.01, ha="left", color=INK)
    save_figure(figure, out)


def _legend_lines(ax: Axes, width: float) -> int:
    """The lines that the names take above a panel of this width; a curve alone is named by the panel's title."""
    labels = ax.get_legend_handles_labels()[1]
    if len(labels) < 2 and ax.lines:
        return 0
    return next((n for n in range(1, len(labels)) if _characters(labels, n) <= 12 * width), len(labels))


def _characters(labels: Sequence[str], lines: int) -> int:
    """The width of a legend with this many lines, including its handles."""
    return sum(5 + max(map(len, labels[i : i + lines])) for i in range(0, len(labels), lines))


def _legend(ax: Axes, lines: int, top: float) -> None:
    """Name the curves between the panel and its title, `top` points above it, where the names hide no curve."""
    from matplotlib.transforms import ScaledTranslation

    handles, labels = ax.get_legend_handles_labels()
    above = ScaledTranslation(0, (top + 4) / 72, ax.figure.dpi_scale_trans)
    ax.legend(
        handles, labels, ncols=math.ceil(len(labels) / lines), fontsize=9, frameon=False, handlelength=1.4,
        columnspacing=1.2, loc="upper left", bbox_to_anchor=(0, 1), bbox_transform=ax.transAxes + above,
        borderaxespad=0, borderpad=0,
    )  # fmt: skip


def _mark(ax: Axes, events: Mapping[str, int], width: float) -> int:
    """A vertical line for each event, its name above the panel, where it hides no curve; events of one step share a
    line. Returns the number of lines that the names take."""
    steps: dict[int, list[str]] = {}
    for name, step in events.items():
        steps.setdefault(step, []).append(name)
    names = []
    for step, together in steps.items():
        text = "; ".join(together)
        place, size = step / ax.get_xlim()[1], CHARACTER * len(text) / (72 * width - 50)  # in widths of the panel
        right = place + size <= 1 or place < 0.5
        start = place if right else place - size
        names.append((step, text, right, start, start + size + 0.01))
    # Of close events right of their lines the later one is below, left of them above: so no line crosses a name.
    names.sort(key=lambda name: -name[0] if name[2] else name[0])
    taken: list[list[tuple[float, float]]] = []  # by what is written, of each line
    for step, text, right, start, end in names:
        free = (n for n, spans in enumerate(taken) if all(end <= first or start >= last for first, last in spans))
        if (line := next(free, len(taken))) == len(taken):
            taken.append([])
        taken[line].append((start, end))
        ax.axvline(step, color=INK, linestyle=":", linewidth=1.2)
        ax.annotate(
            text, (step, 1), (0, 3 + LINE * line), xycoords=ax.get_xaxis_transform(), textcoords="offset points",
            ha="left" if right else "right", va="bottom", fontsize=9, color=INK,
            arrowprops={
                "arrowstyle": "-", "linestyle": ":", "linewidth": 1.2, "color": INK, "shrinkA": 0, "shrinkB": 0,
                "relpos": (0 if right else 1, 0),
            },
        )  # fmt: skip
    return len(taken)

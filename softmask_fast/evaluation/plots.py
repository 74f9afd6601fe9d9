"""The curves of a run, and how figures are saved."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from softmask_fast.errors import UsageError
from softmask_fast.utils import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW_POINTS = 40  # a curve of at most so many points has markers


def plot_curves(metrics: str | Path, out: str | Path, held_out: Sequence[dict[str, float]] = ()) -> None:
    """Draws every metric over the steps: one panel for losses, one for accuracies, and one for each other metric.

    metrics is a metrics.jsonl: each line is a JSON object of "step" and numbers; held_out are further such objects.
    Raises UsageError if there are no metrics.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed at the end

    records = [json.loads(line) for line in Path(metrics).read_text().splitlines() if line.strip()]
    records += held_out
    names = list(dict.fromkeys(name for record in records for name in record if name != "step"))
    if not names:
        raise UsageError(f"{metrics}: expected lines with metrics, got none")
    losses = [name for name in names if name == "loss" or name.endswith("_loss") or name in ("itc", "itm", "mlm")]
    accuracies = [name for name in names if name.endswith("_accuracy")]
    panels = [("losses", losses), ("accuracy", accuracies)]
    panels += [(name, [name]) for name in names if name not in losses + accuracies]
    panels = [(title, members) for title, members in panels if members]

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, (title, members) in zip(axes.flat, panels, strict=False):
        for name in members:
            points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
            steps, values = np.array(points, dtype=float).T
            window = max(1, len(values) // 40)
            marker = "." if len(values) <= FEW_POINTS else ""
            (line,) = ax.plot(steps, smooth(values, window), marker=marker, lw=1.6, label=name.replace("_", " "))
            if window > 1:
                ax.plot(steps, values, linewidth=0.6, alpha=0.3, color=line.get_color())
        ax.set_title(title.replace("_per_", "/").replace("_", " "), fontsize=11)
        ax.set_xlabel("step", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if len(members) > 1:
            ax.legend(fontsize=8, frameon=False)
        if title == "accuracy":
            ax.set_ylim(0, 1.02)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    save_figure(figure, out)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The centered moving average; at both ends, the window shrinks to the values that exist."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones_like(values), kernel, mode="same")


def save_figure(figure: Figure, out: str | Path) -> None:
    """Writes a PNG, and its folder if there is none."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(out)) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")

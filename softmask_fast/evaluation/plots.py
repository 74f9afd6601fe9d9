"""The curves of a run, and how figures are saved."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from softmask_fast.errors import UsageError, printable
from softmask_fast.utils import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW_POINTS = 40  # a curve of at most so many points has markers
MATCHING_LOSS, MATCHING_ACCURACY = (f"matching {what} by kind of pair" for what in ("loss", "accuracy"))  # panels
HELD_OUT = "held-out pairs"
MATCHING = "itm_"  # metrics of one kind of pair: itm_<kind> and itm_<kind>_accuracy

# Title -> metrics of one panel, by their names in a figure. Others have panels of their own.
PANELS = {
    "losses": {"loss": "all, weighted", "itc": "contrast", "itm": "matching", "mlm": "masked words"},
    "accuracy": {
        "itc_image_accuracy": "contrast, text of an image", "itc_text_accuracy": "contrast, image of a text",
        "itm_accuracy": "matching", "mlm_accuracy": "masked words", "accuracy": "answers",
    },
    MATCHING_LOSS: {}, MATCHING_ACCURACY: {}, HELD_OUT: {},  # of the kinds and metrics of a run
    "learning rate": {"learning_rate": "learning rate"},
    "soft masks, soft targets, temperature": {
        "soft_mask_mean": "share of the patches masked", "alpha": "weight of the soft targets",
        "temperature": "temperature of the contrast",
    },
}  # fmt: skip
SYSTEM = {
    "pairs per second": {"pairs_per_second": "pairs per second"},
    "operations": {"flops_utilisation": "share of a large product's rate"},
    "waiting for data": {"data_wait": "share of the time"},
    "peak memory in GiB": {"peak_memory_gib": "peak memory"},
    "data": {"bad_samples": "unusable samples", "truncated_captions": "truncated captions"},
}

Panels = dict[str, dict[str, str]]


def plot_curves(metrics: str | Path, out: str | Path, held_out: Sequence[dict[str, float]] = ()) -> None:
    """Draws the metrics over the steps, and those of the machine in a second figure, NAME-system.png.

    metrics is a metrics.jsonl: each line is a JSON object of "step" and numbers; held_out are further such objects,
    which have a panel of their own. Raises UsageError if there are no metrics.
    """
    out = Path(out)
    records = [json.loads(line) for line in Path(metrics).read_text().splitlines() if line.strip()]
    names = _names(records)
    if not names:
        raise UsageError(f"{metrics}: expected lines with metrics, got none")
    kinds = [name.removeprefix(MATCHING) for name in names if _is_kind(name) and not name.endswith("_accuracy")]
    panels, system = ({t: {n: m[n] for n in m if n in names} for t, m in p.items()} for p in (PANELS, SYSTEM))
    if kinds:
        human = {kind: kind.replace("_", " ") for kind in kinds}
        panels[MATCHING_LOSS] = {"itm": "all"} | {MATCHING + kind: human[kind] for kind in kinds}
        accuracies = {f"{MATCHING}{kind}_accuracy": human[kind] for kind in kinds}
        panels[MATCHING_ACCURACY] = {"itm_accuracy": "all"} | accuracies
    panels[HELD_OUT] = {name: name for name in _names(held_out)}
    known = {name for members in [*panels.values(), *system.values()] for name in members}
    panels |= {name: {name: name.replace("_", " ")} for name in names if name not in known and name != "epoch"}
    lines = {MATCHING_LOSS: _shortcut(kinds)} if kinds else {}
    _draw_panels(panels, [*records, *held_out], out, 5.2, lines)
    _draw_panels(system, records, out.with_name(f"{out.stem}-system{out.suffix}"), 3.6, {})


def _names(records: Sequence[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record if name != "step"))


def _is_kind(name: str) -> bool:
    return name.startswith(MATCHING) and name != MATCHING + "accuracy"


def shortcut_loss(kinds: Sequence[str]) -> float:
    """The matching loss, in nats, of the best model that sees of a pair only whether the image has a soft mask.

    kinds: of the pairs, equally many of each; true and soft-masked ones match. Without soft masks it is the loss of
    always giving the share of pairs that match.
    """
    loss = 0.0
    for masked in (True, False):
        group = [kind for kind in kinds if kind.startswith("soft_masked") == masked]
        matching = sum(kind in ("true_pair", "soft_masked") for kind in group)
        for count in (matching, len(group) - matching):
            loss -= count / len(kinds) * math.log(count / len(group)) if count else 0.0
    return loss


def _shortcut(kinds: Sequence[str]) -> tuple[float, str]:
    masked = any(kind.startswith("soft_masked") for kind in kinds)
    what = "seeing only whether there is a mask" if masked else "seeing nothing"
    return shortcut_loss(kinds), f"all, {what}: {shortcut_loss(kinds):.3f}"


def _draw_panels(
    panels: Panels, records: Sequence[dict[str, float]], out: Path, width: float, lines: dict[str, tuple[float, str]]
) -> None:
    """width: inches of a panel; lines: height and name of a horizontal line by panel. Panels without curves are left
    out, and the figure if there are none."""
    from matplotlib.figure import Figure  # slow to import, and only needed at the end

    panels = {title: members for title, members in panels.items() if members}
    if not panels:
        return
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(width * columns, 0.7 * width * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, (title, members) in zip(axes.flat, panels.items(), strict=False):
        for name, label in members.items():
            points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
            steps, values = np.array(points, dtype=float).T
            window = max(1, len(values) // 40)
            marker = "." if len(values) <= FEW_POINTS else ""
            (line,) = ax.plot(steps, smooth(values, window), marker=marker, lw=1.6, label=label)
            if window > 1:
                ax.plot(steps, values, linewidth=0.6, alpha=0.3, color=line.get_color())
        if title in lines:
            height, label = lines[title]
            ax.axhline(height, color="black", linestyle="--", linewidth=1, label=label)
        ax.set_title(title, fontsize=12)
        ax.set_xlabel("step", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if len(members) > 1 or title in lines:
            ax.legend(fontsize=9, frameon=False)
        if "accuracy" in title:
            ax.set_ylim(0, 1.02)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    save_figure(figure, out)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The centered moving average; at both ends, the window shrinks to the values that exist."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones_like(values), kernel, mode="same")


def save_figure(figure: Figure, out: str | Path) -> None:
    """Writes a PNG, and its folder if there is none. All text is drawn as it stands, never as a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set(parse_math=False, usetex=False, text="\n".join(map(printable, text.get_text().split("\n"))))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(out)) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")

"""The evaluation of a pretraining run on held-out pairs, and what the run shows at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from softmask_fast.config import Config
from softmask_fast.data.sources import open_as_configured
from softmask_fast.data.synthetic import HELD_OUT
from softmask_fast.errors import without_secrets
from softmask_fast.evaluation.common import usable_samples
from softmask_fast.evaluation.curves import PARTS, plot_curves
from softmask_fast.evaluation.grounding import evaluate_grounding
from softmask_fast.evaluation.retrieval import evaluate_retrieval
from softmask_fast.evaluation.tables import Report
from softmask_fast.model.export import read_model

GUESSES = {"random": "chance", "center": "image center"}  # of grounding
RERANKED = 16  # candidates of each query that matching re-ranks


class PretrainingEvaluation:
    """Evaluates a pretrained model on held-out pairs: retrieval, and grounding where the pairs have boxes.

    The pairs are those of eval_data, by default the unseen scenes of `shapes`.
    """

    has_labels = True
    load = staticmethod(read_model)

    def __init__(self, config: Config, data: str) -> None:
        """Open the pairs. Raises UsageError when they cannot be read."""
        self.data, self.size = data, config.data.eval_size
        self.source = open_as_configured(data, config.data, image_size=config.model.image_size, **HELD_OUT)

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, limit: int, progress: bool) -> list[Report]:
        """The reports on the first `limit` pairs. A collective where there are several ranks."""
        options = {"limit": limit, "progress": progress}
        reports = [evaluate_retrieval(model, tokenizer, self.source, rerank=RERANKED, **options)]
        if any(sample.phrases for _, sample in usable_samples(self.source, range(limit), {})):
            reports.append(evaluate_grounding(model, tokenizer, self.source, **options))
        return reports

    def headline(self, reports: Sequence[Report]) -> tuple[str, float]:
        """Retrieval by contrast and matching together. Grounding does not decide, as most data have no boxes."""
        return reports[0].headline

    def figures(self, reports: dict[str, dict[str, Any]]) -> dict[str, float]:
        """The metrics of a record's reports that curves show in addition to the headline, by their names."""
        retrieval, grounding = reports["retrieval"], reports.get("grounding", {})
        shown = {"recall at 1 by contrast": retrieval["itc"]["text_to_image"]["recall@1"]}
        if reranked := retrieval.get("both") or retrieval.get("itm"):  # older records only have ITM
            shown["recall at 1 re-ranked"] = reranked["text_to_image"]["recall@1"]
        measured = {name: grounding.get(name.replace(" ", "_")) for name in ("pointing game", "box accuracy")}
        return shown | {name: value["model"] for name, value in measured.items() if value}

    def floors(self, reports: Sequence[Report]) -> dict[str, dict[str, float]]:
        """What guesses reach in the metrics that curves show: metric -> {way of guessing: value}."""
        retrieval, *others = reports
        at_1 = {"chance": retrieval.chance["text_to_image"]["recall@1"]}
        mean = {"chance": fmean(recall for way in retrieval.chance.values() for recall in way.values())}
        found = {"recall at 1 by contrast": at_1, "recall at 1 re-ranked": at_1, retrieval.headline[0]: mean}
        for grounding in others:
            for name, scores in (("pointing game", grounding.pointing_game), ("box accuracy", grounding.box_accuracy)):
                found[name] = {GUESSES[key]: value for key, value in (scores or {}).items() if key in GUESSES}
        return found

    def draw(self, model: torch.nn.Module, tokenizer: Any, out: Path) -> None:
        """A page of heat maps of held-out pairs."""
        from softmask_fast.evaluation.heatmaps import heatmap_page  # imports matplotlib

        heatmap_page(model, tokenizer, self.source, out)


def held_out_pairs(config: Config) -> str | None:
    """What a pretraining run is evaluated on: eval_data, for `shapes` its unseen scenes, else nothing."""
    data = config.data
    return data.eval_data or (data.data if data.data.split(":")[0] == "shapes" else None)


def report_run(
    output: Path, config: Config, evaluation: PretrainingEvaluation | None, reports: Sequence[Report],
    held_out: Sequence[dict[str, float]], events: dict[str, int],
) -> None:  # fmt: skip
    """Show what output/model has reached: print the tables and draw curves.png, of training and `held_out`, with
    `events` of the schedule."""
    curves = output / "curves.png"
    weights = {part: getattr(config.objectives, f"{part}_weight") for part in PARTS}
    floors = evaluation.floors(reports) if evaluation and reports else {}
    plot_curves(output / "metrics.jsonl", curves, held_out, events, weights, floors)
    if evaluation is None:
        data = without_secrets(config.data.data)
        print(f"no evaluation: no --eval_data was given for {data}; the curves are in {curves}")
        return
    for report in reports:
        print(f"\n{report.table()}")
    print(f"\ntables, curves and heat maps: {output}", flush=True)

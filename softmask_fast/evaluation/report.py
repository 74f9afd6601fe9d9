"""What a finished run shows: tables of retrieval and grounding on held-out pairs, curves, and a page of heat maps."""

from __future__ import annotations

from pathlib import Path

import torch

from softmask_fast.config import Config
from softmask_fast.data.remote.options import RemoteOptions
from softmask_fast.data.sources import open_source
from softmask_fast.data.types import CaptionSource
from softmask_fast.evaluation import evaluate_grounding, evaluate_retrieval
from softmask_fast.evaluation.heatmaps import heatmap_page
from softmask_fast.evaluation.plots import plot_curves
from softmask_fast.model.export import load_model
from softmask_fast.utils import write_json

RERANKED = 16  # candidates of each query that matching puts into a new order


def held_out_source(config: Config) -> CaptionSource | None:
    """The pairs a run is measured on: those of eval_data, for `shapes` its unseen scenes, else none."""
    data = config.data
    name = data.eval_data or (data.data if data.data.split(":")[0] == "shapes" else None)
    if name is None:
        return None
    return open_source(
        name,
        split="val",
        seed=config.train.seed,
        image_size=config.model.image_size,
        remote=RemoteOptions.of(data),
        image_root=data.image_root,
    )


def report_run(output: Path, config: Config, device: torch.device | str = "cpu") -> None:
    """Evaluate output/model; print the tables, write evaluation.json, curves.png and heatmaps.png to the folder.

    Pairs without phrase boxes have no grounding; without held-out pairs there are the curves alone.
    """
    plot_curves(output / "metrics.jsonl", output / "curves.png")
    source = held_out_source(config)
    if source is None:
        print(
            f"no evaluation: no --eval_data was given for {config.data.data}; the curves are in {output / 'curves.png'}"
        )
        return
    model, tokenizer = load_model(output / "model", device)
    limit = min(config.data.eval_size or len(source), len(source))
    reports = [evaluate_retrieval(model, tokenizer, source, limit=limit, rerank=RERANKED, progress=True)]
    if any(source.read(index).phrases for index in range(limit)):
        reports.append(evaluate_grounding(model, tokenizer, source, limit=limit, progress=True))
    heatmap_page(model, tokenizer, source, output / "heatmaps.png")
    write_json(output / "evaluation.json", [report.as_dict() for report in reports])
    for report in reports:
        print(f"\n{report.table()}")
    print(f"\ntables, curves and heat maps: {output}", flush=True)

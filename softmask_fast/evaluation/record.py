"""The record of an evaluation: the one format of evaluation.json, of a line of evaluations.jsonl, and of --json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softmask_fast.evaluation.tables import Report


def evaluation_record(
    reports: Sequence[Report],
    data: str,
    size: int | None = None,
    headline: tuple[str, float] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """The record of one evaluation: evaluation.json, a line of evaluations.jsonl, and what `evaluate --json` writes.

    Args:
        reports: one for each task.
        data: the held-out data, as an option names it.
        size: most samples that are taken of it; None or 0: all.
        headline: name and value in [0, 1] of the metric that the best model is chosen by.
        about: what was evaluated: "step" and "epoch" of a run, or the "model" folder.

    Returns:
        {"step", "epoch", "model", "data", "size", "headline": {"name", "value"}, "reports": {task: metrics}}, without
        the keys that do not apply; see docs/training.md.
    """
    record = about | {"data": data}
    if size:
        record["size"] = size
    if headline is not None:
        record["headline"] = {"name": headline[0], "value": headline[1]}
    tasks = [report.as_dict() for report in reports]
    return record | {"reports": {metrics.pop("task"): metrics for metrics in tasks}}


def parse_record(text: str) -> dict[str, Any]:
    """Read a record of `evaluation_record`, also as older versions wrote it.

    They wrote a list of reports (pretraining), or one report with the other keys among its own (fine-tuning).
    """
    content = json.loads(text)
    if isinstance(content, dict) and "reports" in content:
        return content
    if isinstance(content, list):
        return {"reports": {metrics.pop("task"): metrics for metrics in content}}
    names = {"step": "step", "epoch": "epoch", "eval_data": "data", "eval_size": "size"}
    record = {new: content.pop(old) for old, new in names.items() if old in content}
    if not record.get("size"):
        record.pop("size", None)
    if "headline" in content:
        record["headline"] = {"name": content.pop("headline"), "value": content.pop("value")}
    return record | {"reports": {content.pop("task"): content}}

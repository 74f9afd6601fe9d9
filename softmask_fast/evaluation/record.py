"""The record of an evaluation: the one format of evaluation.json, of a line of evaluations.jsonl, and of --json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softmask_fast.errors import UsageError, without_secrets
from softmask_fast.evaluation.tables import Report


def evaluation_record(
    reports: Sequence[Report],
    data: str,
    size: int | None = None,
    headline: tuple[str, float] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """{"step", "epoch", "model", "data", "size", "headline": {"name", "value"}, "reports": {task: metrics}}, without
    the keys that do not apply; see docs/training.md.

    Args:
        data: the held-out data, as the option names it. Passwords and signatures of URLs are not recorded.
        size: the largest number of samples used; None or 0: all.
        headline: name and value in [0, 1] of the metric that the best model is chosen by.
        about: what was evaluated: "step" and "epoch" of a run, or the "model" folder.
    """
    record = about | {"data": without_secrets(data)}
    if size:
        record["size"] = size
    if headline is not None:
        record["headline"] = {"name": headline[0], "value": headline[1]}
    tasks = [report.as_dict() for report in reports]
    return record | {"reports": {metrics.pop("task"): metrics for metrics in tasks}}


def parse_record(text: str, path: Path) -> dict[str, Any]:
    """Read a record in the file `path`. Raises UsageError for a damaged one, and for one of an older version, which has
    no "reports"."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(record, dict) or "reports" not in record:
        raise UsageError(f'{path}: expected records with "reports", got one by an older version; evaluate again')
    return record

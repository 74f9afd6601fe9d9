"""Evaluation of a run's model on held-out data, during the run and at its end; the best model is kept."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from softmask_fast.config import TrainConfig
from softmask_fast.data.synthetic import HELD_OUT
from softmask_fast.errors import UsageError, short
from softmask_fast.evaluation.common import sample_count, usable_samples
from softmask_fast.evaluation.record import evaluation_record, parse_record
from softmask_fast.evaluation.report import PretrainingEvaluation
from softmask_fast.evaluation.tables import Report
from softmask_fast.model.export import EVALUATION, save_model
from softmask_fast.tasks.models import load_task_model
from softmask_fast.tasks.options import FinetuneConfig
from softmask_fast.tasks.recipes import TASKS
from softmask_fast.training.deepspeed_engine import this_device
from softmask_fast.training.metrics import drop_lines_after
from softmask_fast.training.ranks import run_on_all_ranks
from softmask_fast.utils import append_line, move, write_json

logger = logging.getLogger(__name__)

RECORDS, RECORD = "evaluations.jsonl", EVALUATION
BEST, CANDIDATE = "best", "candidate"
PAGES = 20  # pages of heat maps that a run draws at most


class TaskEvaluation:
    """Evaluates a fine-tuned model on the held-out data of its task. The methods are those of
    `PretrainingEvaluation`."""

    def __init__(self, config: FinetuneConfig, image_size: int) -> None:
        """Open the data. Raises UsageError if they cannot be read."""
        self.task, self.name, self.options = TASKS[config.task], config.task, config.options
        self.data, self.size = config.data.eval_data, config.data.eval_size
        self.source = self.task.open(self.data, config.data, image_size=image_size, **HELD_OUT)
        self.has_labels = self.task.has_labels(self.source)

    def load(self, directory: Path, device: torch.device) -> tuple[nn.Module, PreTrainedTokenizerFast]:
        return load_task_model(directory, self.name, device)

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, limit: int, progress: bool
    ) -> list[Report]:
        return [self.task.evaluate(model, tokenizer, self.source, self.options, limit=limit, progress=progress)]

    def headline(self, reports: Sequence[Report]) -> tuple[str, float] | None:
        return self.task.headline(reports[0])

    def figures(self, reports: dict[str, dict[str, Any]]) -> dict[str, float]:
        return {}


class Evaluator:
    """Evaluates the model of one run.

    It exports the weights and loads them into a new model. So it finds what `softmask-fast evaluate` finds, under every
    ZeRO stage, and training is bit-identical with or without it.

    Every evaluation with labels adds a line to evaluations.jsonl; the last one is also in evaluation.json. best/ holds
    the best model so far, with its record. If the evaluation can `draw`, up to PAGES evaluations, evenly spread, write
    heatmaps-step-N.png, and the last one heatmaps.png.

    Attributes:
        count: samples that are evaluated.
        reports: of the last evaluation.
        page: the picture of heat maps of the last evaluation; None if it drew none.
    """

    def __init__(self, evaluation: PretrainingEvaluation | TaskEvaluation, output: Path, train: TrainConfig) -> None:
        """Check that there is something to evaluate.

        Args:
            evaluation: what to evaluate.
            output: the run's folder.
            train: the options that say when to evaluate.

        Raises:
            UsageError: if no sample can be used.
        """
        self.evaluation, self.output, self.train = evaluation, output, train
        self.count = sample_count(evaluation.source, 1, evaluation.size or None)
        skipped: dict[str, str] = {}
        if next(usable_samples(evaluation.source, range(self.count), skipped), None) is None:
            key, reason = next(iter(skipped.items()))
            raise UsageError(f"eval_data: none of {self.count} examples can be used; the first, {key}: {reason}")
        self.reports: list[Report] = []
        self.page: Path | None = None
        self._every_steps = self._last_step = 0
        self._page_steps = 1

    def begin(self, step: int, steps: int, steps_per_epoch: int) -> None:
        """Start a run of `steps` steps, or resume it after `step`. A collective.

        Raises:
            AgreedUsageError: if best/evaluation.json or a line of evaluations.jsonl is damaged.
        """
        if self.evaluation.has_labels and (self.train.eval_steps or self.train.eval_epochs):
            every = self.train.eval_steps or max(1, round(self.train.eval_epochs * steps_per_epoch))
            self._every_steps, self._page_steps = every, every * math.ceil(steps / every / PAGES)

        def last_evaluated() -> int:
            if dist.get_rank() != 0:
                return 0
            records = drop_lines_after(self.output / RECORDS, step)
            self.records()  # damaged records surface before training, here and in best/
            if (path := self.output / BEST / RECORD).exists():
                _parse(path.read_text(), path)
            return records[-1]["step"] if records else 0

        last = [run_on_all_ranks(last_evaluated)]
        dist.broadcast_object_list(last, src=0)
        self._last_step = last[0]

    def due(self, step: int) -> bool:
        """Whether an evaluation is due after a step and has not been done yet."""
        return self._every_steps > 0 and step > self._last_step and step % self._every_steps == 0

    def evaluate(
        self, step: int, epoch: float, model: nn.Module, tokenizer: PreTrainedTokenizerFast, weights: dict[str, Tensor],
        final: bool = False,
    ) -> dict[str, float]:  # fmt: skip
        """Evaluate the model after a step and keep it if it is the best so far. A collective.

        Args:
            step: optimizer steps done.
            epoch: passes over the training data done.
            model: exported with `weights` in place of its own.
            tokenizer: exported with it.
            weights: `full_state` of the model.
            final: also write evaluation.json.

        Returns:
            On rank 0 the headline metric and the evaluation's other metrics by their names; empty for data without
            labels and on other ranks.
        """
        candidate, first = self.output / CANDIDATE, dist.get_rank() == 0
        if first:
            save_model(model, tokenizer, candidate, weights)
        dist.barrier()  # the export is complete
        draws = (final or step % self._page_steps == 0) and hasattr(self.evaluation, "draw")
        page = "heatmaps.png" if final else f"heatmaps-step-{step:08d}.png"
        self.page = self.output / page if first and draws else None
        self.reports = self._evaluate_folder(candidate)
        headline = self.evaluation.headline(self.reports)
        curve = {}
        if first:
            about = {"step": step, "epoch": float(f"{epoch:.8g}")}
            record = evaluation_record(self.reports, self.evaluation.data, self.evaluation.size, headline, **about)
            if headline is not None:
                self._keep(record, candidate)
                curve = self._curve(record)
            if final:
                write_json(self.output / RECORD, record)
            shutil.rmtree(candidate, ignore_errors=True)
        dist.barrier()
        self._last_step = step
        return curve

    def _evaluate_folder(self, folder: Path) -> list[Report]:
        device = this_device()
        progress = dist.get_rank() == 0 and sys.stderr.isatty()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # making a model draws random weights
            model, tokenizer = self.evaluation.load(folder, device)
            if self.page is not None:
                self.evaluation.draw(model, tokenizer, self.page)
            return self.evaluation.evaluate(model, tokenizer, self.count, progress)

    def _keep(self, record: dict[str, Any], candidate: Path) -> None:
        """Keep the best model. The record is written last, so that an interrupted evaluation is repeated."""
        before = self.best(record)
        if before is None or record["headline"]["value"] > before["headline"]["value"]:
            write_json(candidate / RECORD, record)
            move(candidate, self.output / BEST)
        drop_lines_after(self.output / RECORDS, record["step"] - 1)
        append_line(self.output / RECORDS, json.dumps(record))
        best = self.best(record)
        verdict = "the best so far" if best["step"] == record["step"] else f"the best is {_describe(best)}"
        logger.info("evaluated on held-out data: %s, %s", _describe(record), verdict)

    def best(self, like: dict[str, Any]) -> dict[str, Any] | None:
        """The record of the model in best/; None if it differs from `like` in data, size or headline metric."""
        path = self.output / BEST / RECORD
        if not path.exists():
            return None
        record = _parse(path.read_text(), path)
        same = all(record.get(name) == like.get(name) for name in ("data", "size"))
        return record if same and record["headline"]["name"] == like["headline"]["name"] else None

    def records(self) -> list[dict[str, Any]]:
        """All lines of evaluations.jsonl."""
        path = self.output / RECORDS
        return [_parse(line, path) for line in path.read_text().splitlines()] if path.exists() else []

    def curves(self) -> list[dict[str, float]]:
        """The metrics of all evaluations by their names, each with its "step"."""
        return [{"step": record["step"]} | self._curve(record) for record in self.records()]

    def _curve(self, record: dict[str, Any]) -> dict[str, float]:
        headline = record["headline"]
        return {headline["name"]: headline["value"]} | self.evaluation.figures(record["reports"])

    def summary(self) -> str:
        """One line about the best step; empty for data without labels."""
        records = self.records()
        return f"best: {_describe(self.best(records[-1]))}, in {self.output / BEST}" if records else ""


def _parse(text: str, path: Path) -> dict[str, Any]:
    """`parse_record` of a run's evaluation. Raises UsageError also for one without a headline."""
    record = parse_record(text, path)
    headline = record.get("headline")
    if not isinstance(headline, dict) or not headline.keys() >= {"name", "value"}:
        raise UsageError(f'{path}: expected a "headline" with name and value, got {short(headline)}')
    return record


def _describe(record: dict[str, Any]) -> str:
    name, value = record["headline"]["name"], record["headline"]["value"]
    return f"step {record['step']}, epoch {record['epoch']:.2f}, {name} {100 * value:.2f} %"

"""A task's model measured while it is fine-tuned: a line of evaluations.jsonl each time, and the best model kept."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from softmask_fast.evaluation.common import sample_count, usable_samples
from softmask_fast.model.export import save_model
from softmask_fast.tasks.options import FinetuneConfig
from softmask_fast.tasks.recipes import TASKS, Report, load_task_model
from softmask_fast.training.metrics import drop_lines_after
from softmask_fast.utils import write_json

logger = logging.getLogger(__name__)

LINES, BEST = "evaluations.jsonl", "best"
RECORD = "evaluation.json"  # in a folder: what the model beside it, or in it, has reached
MEASURED_BY = ("headline", "eval_data", "eval_size")  # only figures that have these in common are compared


class Evaluations:
    """The measurements of one run on its eval_data.

    Each is of the weights as exported, read from a folder into a model of its own: it is what `softmask-fast evaluate`
    finds, under every ZeRO stage, and training goes on to the last bit as without it.
    """

    def __init__(self, config: FinetuneConfig, image_size: int, output: Path):
        """Raises ValueError or OSError when eval_data cannot be opened or none of it can be used."""
        self.config, self.output, self.task = config, output, TASKS[config.task]
        data = config.data
        self.source = self.task.open(data.eval_data, data, split="val", seed=config.train.seed, image_size=image_size)
        skipped: dict[str, str] = {}
        self.count = sample_count(self.source, 1, data.eval_size or None)
        if next(usable_samples(self.source, range(self.count), skipped), None) is None:
            key, reason = next(iter(skipped.items()))
            raise ValueError(f"eval_data: none of {self.count} examples can be used, the first, {key}: {reason}")
        self.report: Report | None = None  # of the last measurement
        self._every = self._last = 0  # steps

    def begin(self, step: int, steps_per_epoch: int) -> None:
        """The run starts, or goes on, after a step. A collective."""
        epochs = self.config.options.eval_epochs
        self._every = max(1, round(epochs * steps_per_epoch)) if epochs and self.task.has_labels(self.source) else 0
        last = [0]
        if dist.get_rank() == 0:
            records = drop_lines_after(self.output / LINES, step)
            last = [records[-1]["step"] if records else 0]
        dist.broadcast_object_list(last, src=0)
        self._last = last[0]

    def due(self, step: int) -> bool:
        """Whether the model is to be measured after a step, and was not yet."""
        return self._every > 0 and step > self._last and step % self._every == 0

    def measure(self, step: int, epoch: float, model, tokenizer, weights: dict[str, Tensor]) -> dict[str, float]:
        """Measure the model after a step and keep it if it is the best so far; returns the headline figure by its name,
        or nothing where there is nothing to measure. weights: the whole ones, on the CPU. A collective."""
        folder = self.output / "candidate"
        first = dist.get_rank() == 0
        if first:
            save_model(model, tokenizer, folder, weights)
        dist.barrier()  # every rank may now read it
        self.report = self._measure_folder(folder)
        headline = self.task.headline(self.report)
        if first:
            if headline is not None:
                self._record(step, epoch, folder, *headline)
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        self._last = step
        return {} if headline is None else dict([headline])

    def _measure_folder(self, folder: Path) -> Report:
        device = torch.device(get_accelerator().current_device_name())
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a new model draws its weights
            model, tokenizer = load_task_model(folder, self.config.task, device)
            return self.task.evaluate(
                model,
                tokenizer,
                self.source,
                self.config.options,
                limit=self.count,
                progress=dist.get_rank() == 0 and sys.stderr.isatty(),
            )

    def _record(self, step: int, epoch: float, folder: Path, headline: str, value: float) -> None:
        """The line comes last: an evaluation that is cut off before it is repeated."""
        data = self.config.data
        record = {"step": step, "epoch": float(f"{epoch:.8g}"), "headline": headline, "value": value}
        record |= {"eval_data": data.eval_data, "eval_size": data.eval_size}
        before = self.best(record)
        if before is None or value > before["value"]:
            write_json(folder / RECORD, record | self.report.as_dict())
            shutil.rmtree(self.output / BEST, ignore_errors=True)
            os.replace(folder, self.output / BEST)
        drop_lines_after(self.output / LINES, step - 1)
        with open(self.output / LINES, "a") as lines:
            lines.write(json.dumps(record | self.report.as_dict()) + "\n")
        best = self.best(record)
        told = "the best so far" if best["step"] == step else f"the best is {_told(best)}"
        logger.info("measured on eval_data: %s, %s", _told(record), told)

    def best(self, comparable: dict[str, Any]) -> dict[str, Any] | None:
        """The record of the model in best/, unless it was measured by other than this record says."""
        path = self.output / BEST / RECORD
        record = json.loads(path.read_text()) if path.exists() else None
        return record if record and all(record[name] == comparable[name] for name in MEASURED_BY) else None

    def summary(self) -> str:
        """Which step was the best, for the end of the run."""
        *_, last = self.records()
        return f"best: {_told(self.best(last))}, in {self.output / BEST}"

    def records(self) -> list[dict[str, Any]]:
        path = self.output / LINES
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _told(record: dict[str, Any]) -> str:
    return f"step {record['step']}, epoch {record['epoch']:.2f}, {record['headline']} {100 * record['value']:.2f} %"

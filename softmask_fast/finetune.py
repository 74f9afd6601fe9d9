"""Fine-tuning: `deepspeed softmask_fast/finetune.py --deepspeed ds.json --task TASK --model DIR --data FILE ...`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    # Python puts the folder of a script first, where our modules would hide others of the same name.
    sys.path[0] = os.path.dirname(sys.path[0])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while this imports ends it without a traceback

import torch
import torch.distributed as dist
from torch import nn

from softmask_fast.data.loader import SampleLoader
from softmask_fast.evaluation.curves import plot_curves
from softmask_fast.model.momentum import MomentumCopy
from softmask_fast.tasks.options import FinetuneConfig, parse_arguments
from softmask_fast.tasks.recipes import TASKS, predictions
from softmask_fast.training.deepspeed_engine import this_device
from softmask_fast.training.launch import StopRequest, run_script
from softmask_fast.training.periodic_eval import Evaluator, TaskEvaluation
from softmask_fast.training.ranks import run_on_all_ranks
from softmask_fast.training.trainer import Trainer, loader_options
from softmask_fast.utils import write_text


def main(argv: list[str] | None = None, name: str = "finetune.py") -> int:
    return run_script(name, argv, parse_arguments, work)


def work(config: FinetuneConfig, deepspeed_config: dict[str, Any], output: Path, stop: StopRequest) -> None:
    """Fine-tunes and then shows how good the model is."""
    trainer = build_trainer(config, deepspeed_config, output, stop)
    if trainer.train():
        stop.end()
        if dist.get_rank() == 0:
            report(trainer.evaluator, output, trainer.schedule.events())
    dist.destroy_process_group()


def build_trainer(config: FinetuneConfig, deepspeed_config: dict[str, Any], output: Path, stop: StopRequest) -> Trainer:
    """Builds all that a fine-tuning run needs. A collective. Raises AgreedUsageError for what the task lacks."""
    step, teacher, loader, evaluator = run_on_all_ranks(lambda: build_step(config, output))
    return Trainer(step, teacher, loader, config, deepspeed_config, output, stop, evaluator)


def build_step(config: FinetuneConfig, output: Path) -> tuple[nn.Module, MomentumCopy, SampleLoader, Evaluator | None]:
    """The module that DeepSpeed wraps, the momentum teacher, the loader, and the evaluator if there is eval_data."""
    train, task = config.train, TASKS[config.task]
    device = this_device()
    torch.manual_seed(train.seed)
    model, tokenizer = task.model(config)
    image_size = model.config.image_size
    source = task.open(config.data.data, config.data, split="train", seed=train.seed, image_size=image_size)
    evaluator = None
    if config.data.eval_data:
        evaluator = Evaluator(TaskEvaluation(config, image_size), output, train)
    loader = task.loader(
        source, tokenizer, image_size=image_size, max_tokens=model.config.max_tokens,
        images_per_sample=task.images_per_sample, **loader_options(config, device),
    )  # fmt: skip
    step, teacher = task.step(model, config)
    return step, teacher.to(device), loader, evaluator


def report(evaluator: Evaluator | None, output: Path, events: dict[str, int]) -> None:
    """Shows how good output/model is: prints the table, writes predictions.json and draws curves.png."""
    curves = output / "curves.png"
    plot_curves(output / "metrics.jsonl", curves, evaluator.curves() if evaluator else (), events)
    if evaluator is None:
        print(f"no evaluation: no --eval_data was given; the curves are in {curves}")
        return
    (task_report,) = evaluator.reports
    if (answers := predictions(task_report)) is not None:
        write_text(output / "predictions.json", answers)
    print(f"\n{task_report.table()}\n\n{evaluator.summary()}\nmodel, metrics and curves: {output}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

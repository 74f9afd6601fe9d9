"""Fine-tuning: `deepspeed softmask_fast/finetune.py --deepspeed ds.json --task TASK --model DIR --data FILE ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    # Run as a script, Python puts this folder first, where our modules would hide others of the same name.
    sys.path[0] = os.path.dirname(sys.path[0])

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from softmask_fast.evaluation.plots import plot_curves
from softmask_fast.tasks.options import FinetuneConfig, parse_arguments
from softmask_fast.tasks.recipes import TASKS, predictions
from softmask_fast.training.launch import StopRequest, run_script
from softmask_fast.training.periodic_eval import RECORD, Evaluations
from softmask_fast.training.ranks import run_on_all_ranks
from softmask_fast.training.trainer import loader_options, train
from softmask_fast.utils import write_json, write_text


def main(argv: list[str] | None = None) -> int:
    return run_script("finetune.py", argv, parse_arguments, work)


def work(config: FinetuneConfig, deepspeed_config: dict[str, Any], output: Path, stop: StopRequest) -> None:
    finetune(config, deepspeed_config, output, stop)
    dist.destroy_process_group()


def finetune(config: FinetuneConfig, deepspeed_config: dict[str, Any], output: Path, stop: StopRequest) -> bool:
    """Train to the end, measuring on the way, or until a stop is requested; returns whether the end was reached.

    Raises UsageError before the first step for what the task lacks.
    """
    step, teacher, loader, evaluations = run_on_all_ranks(lambda: prepare(config, output))
    finished = train(step, teacher, loader, config, deepspeed_config, output, stop, evaluations)
    if finished and dist.get_rank() == 0:
        report(evaluations, output)
    return finished


def prepare(config: FinetuneConfig, output: Path):
    """The module that DeepSpeed owns, the momentum copy, the loader, and the evaluations (None without eval_data)."""
    train, task = config.train, TASKS[config.task]
    device = torch.device(get_accelerator().current_device_name())
    torch.manual_seed(train.seed)
    model, tokenizer = task.model(config)
    image_size = model.config.image_size
    source = task.open(config.data.data, config.data, split="train", seed=train.seed, image_size=image_size)
    evaluations = Evaluations(config, image_size, output) if config.data.eval_data else None
    loader = task.loader(
        source,
        tokenizer,
        image_size=image_size,
        max_tokens=model.config.max_tokens,
        images_per_sample=task.images_per_sample,
        **loader_options(config, device),
    )
    step, teacher = task.step(model, config)
    return step, teacher.to(device), loader, evaluations


def report(evaluations: Evaluations | None, output: Path) -> None:
    """Show what output/model has reached: the table, evaluation.json, predictions.json and curves.png."""
    records = evaluations.records() if evaluations else []
    held_out = [{"step": record["step"], f"held-out {record['headline']}": record["value"]} for record in records]
    plot_curves(output / "metrics.jsonl", output / "curves.png", held_out)
    if evaluations is None:
        print(f"no evaluation: no --eval_data was given; the curves are in {output / 'curves.png'}")
        return
    measured = evaluations.report
    write_json(output / RECORD, measured.as_dict())
    if (answers := predictions(measured)) is not None:
        write_text(output / "predictions.json", answers)
    best = f"{evaluations.summary()}\n" if records else ""
    print(f"\n{measured.table()}\n\n{best}model, figures and curves: {output}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

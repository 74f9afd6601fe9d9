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

from softmask_fast import engine, loop
from softmask_fast.explain import plot_curves
from softmask_fast.files import write_json, write_text
from softmask_fast.tasks.config import FinetuneConfig, parse_arguments
from softmask_fast.tasks.registry import TASKS, load_task_model, predictions


def main(argv: list[str] | None = None) -> int:
    return loop.run_script("finetune.py", argv, parse_arguments, work)


def work(config: FinetuneConfig, deepspeed_config: dict[str, Any], output: Path, stop: loop.StopRequest) -> None:
    if finetune(config, deepspeed_config, output, stop):
        report(config, output)
    dist.destroy_process_group()


def finetune(config: FinetuneConfig, deepspeed_config: dict[str, Any], output: Path, stop: loop.StopRequest) -> bool:
    """Train to the end or until a stop is requested; returns whether the end was reached.

    Raises UsageError before the first step for what the task lacks.
    """
    step, teacher, loader = engine.together(lambda: prepare(config))
    return loop.train(step, teacher, loader, config, deepspeed_config, output, stop)


def prepare(config: FinetuneConfig):
    """The module that DeepSpeed owns, the momentum copy, and the loader."""
    train, task = config.train, TASKS[config.task]
    device = torch.device(get_accelerator().current_device_name())
    torch.manual_seed(train.seed)
    model, tokenizer = task.model(config)
    places = dict(seed=train.seed, image_size=model.config.image_size)
    source = task.open(config.data.data, config.data, split="train", **places)
    if config.data.eval_data:  # a mistake in it shall not wait for the end
        task.open(config.data.eval_data, config.data, split="val", **places)
    loader = task.loader(
        source,
        tokenizer,
        image_size=model.config.image_size,
        max_tokens=model.config.max_tokens,
        images_per_sample=task.images_per_sample,
        **loop.loader_options(config, device),
    )
    step, teacher = task.step(model, config)
    return step, teacher.to(device), loader


def report(config: FinetuneConfig, output: Path) -> None:
    """Measure output/model on eval_data; print the table, write evaluation.json, predictions.json and curves.png.

    A collective: each rank evaluates its share.
    """
    first = dist.get_rank() == 0
    if first:
        plot_curves(output / "metrics.jsonl", output / "curves.png")
    if config.data.eval_data is None:
        if first:
            print(f"no evaluation: no --eval_data was given; the curves are in {output / 'curves.png'}")
        return
    task = TASKS[config.task]
    model, tokenizer = load_task_model(output / "model", config.task, get_accelerator().current_device_name())
    source = task.open(
        config.data.eval_data, config.data, split="val", seed=config.train.seed, image_size=model.config.image_size
    )
    measured = task.evaluate(
        model, tokenizer, source, config.options, limit=config.data.eval_size, progress=first and sys.stderr.isatty()
    )
    if first:
        write_json(output / "evaluation.json", measured.as_dict())
        if (answers := predictions(measured)) is not None:
            write_text(output / "predictions.json", answers)
        print(f"\n{measured.table()}\n\nmodel, figures and curves: {output}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Launched by test_finetune.py: pretrains a small model, then fine-tunes and evaluates it for every task.

--what all: a few steps of each, but of retrieval as many as it takes to learn something. --what learn: the tasks that
build on what pretraining has learned, long enough to show it. --what resume: a few steps of one task, resumed from the
middle, and started from an ALBEF checkpoint; and pretraining that starts from a model folder.
"""

import argparse
import shutil
from pathlib import Path

import torch.distributed as dist

from softmask_fast import finetune, train
from softmask_fast.data.sources import open_source
from softmask_fast.data.synthetic import ShapesSource
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.model.convert_albef import save_albef
from softmask_fast.model.export import read_model
from softmask_fast.tasks import options as task_options
from softmask_fast.tasks.synthetic import ANSWERS, ShapesTask
from softmask_fast.training import launch
from softmask_fast.training import options as pretraining_options
from softmask_fast.training.trainer import Trainer

parser = argparse.ArgumentParser()
for name in ("--output_dir", "--deepspeed", "--what"):
    parser.add_argument(name)
options, _ = parser.parse_known_args()  # the other flags are those of helpers/runs.py
root, what = Path(options.output_dir), options.what
launched = ["--deepspeed", options.deepspeed]

SCENES, ASKED = "shapes:num={},names=color,colors=6", "shapes:num={},names=color,colors=3"
PRETRAINED = {
    "data": SCENES.format(8192), "image_size": 32, "vision_width": 64, "vision_depth": 2, "vision_heads": 2,
    "text_width": 64, "text_heads": 2, "text_layers": 1, "fusion_layers": 2, "embed_dim": 32,
    "text_contrast_layers": 0, "vision_contrast_blocks": 0, "contrast_pooling": "cls",
    "match_through_words": False, "hard_negatives": True, "soft_masked_negatives": False, "queue_size": 0,
    "distill_ramp_steps": 1000, "tokenizer": root / "words", "soft_mask": False, "masked_captions": False,
    "learning_rate": 2e-3, "max_steps": 350, "itc_weight": 0,
}  # fmt: skip
COMMON = {
    "crop": False, "flip": False, "rand_augment": False, "color": False, "blur": False, "warmup_steps": 20,
    "data_threads": 1, "log_steps": 10, "checkpoint_steps": 1000, "batch_size": 32,
}  # fmt: skip
LABELS = {
    "data": ASKED.format(8192),
    "eval_data": ASKED.format(256),
    "momentum": 0.98,
    "max_steps": 150,
    "learning_rate": 1e-3,
}
CONTRAST = {"data": SCENES.format(8192), "queue_size": 0, "momentum": 0.98}
LEARNED = {
    "entailment": LABELS | {"max_steps": 250},
    "vqa": LABELS | {"max_steps": 180},
    "nlvr2": LABELS | {"max_steps": 150},
    "grounding": CONTRAST
    | {"eval_data": SCENES.format(256), "learning_rate": 1e-3, "max_steps": 300, "hard_negatives": False},
}
BRIEF = {task: own | {"max_steps": 2, "eval_size": 32} for task, own in LEARNED.items()} | {
    "retrieval": CONTRAST
    | {"eval_data": SCENES.format(64), "learning_rate": 2e-3, "max_steps": 200, "candidates": 16, "captions": "first"},
    "text_assignment": {"data": SCENES.format(64), "max_steps": 2},
}
RESUMED = LABELS | {
    "eval_data": ASKED.format(31), "max_steps": 6, "checkpoint_steps": 3, "batch_size": 4, "log_steps": 1,
    "hidden_dropout": 0.1, "eval_epochs": 2 / 1024,  # every second step
}  # fmt: skip


def train_words() -> None:
    """A tokenizer that knows the words of all tasks, not only those of the captions."""
    texts = [caption for index in range(100) for caption in open_source(SCENES.format(100)).read(index).captions]
    for task, field in (("vqa", "question"), ("nlvr2", "sentence"), ("entailment", "sentence")):
        scenes = ShapesSource.from_options("num=200,names=color", split="train", seed=0, image_size=32)
        entries = ShapesTask(task, scenes)
        texts += [entries.entry(index)[0][field] for index in range(200)]
    train_tokenizer([*texts, *(2 * ANSWERS)], 400).save_pretrained(root / "words")


def flags(options: dict) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def run(build_trainer, parsed: tuple, stage: int = 1) -> Trainer:
    settings, launched_with = parsed
    settings, deepspeed_config, output = launch.prepare_run(settings, launched_with)
    deepspeed_config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    trainer = build_trainer(settings, deepspeed_config, output, stop)
    assert trainer.train()
    return trainer


def tune(task: str, own: dict, folder: Path, stage: int = 1) -> None:
    given = {"model": root / "pretrained" / "model", "output_dir": folder}
    parsed = task_options.parse_arguments([*launched, "--task", task, *flags(COMMON | given | own)])
    trainer = run(finetune.build_trainer, parsed, stage)
    if dist.get_rank() == 0:
        finetune.report(trainer.evaluator, folder, trainer.schedule.events())


start = {"output_dir": root / "pretrained"} | ({} if what == "learn" else {"max_steps": 2})
parsed = pretraining_options.parse_arguments([*launched, *flags(COMMON | PRETRAINED | start)])
launch.start_distributed(parsed[1])
stop = launch.StopRequest()
if dist.get_rank() == 0:
    train_words()
dist.barrier()
run(train.build_trainer, parsed)
if what != "resume":
    for task, own in (LEARNED if what == "learn" else BRIEF).items():
        tune(task, own, root / task)
else:
    tune("entailment", RESUMED, root / "whole")
    if dist.get_rank() == 0:  # as a run that was killed after its third step leaves it
        shutil.copytree(root / "whole", root / "resumed")
        shutil.rmtree(root / "resumed" / "model")
        shutil.rmtree(root / "resumed" / "checkpoints" / "step-00000006")
        shutil.copytree(root / "resumed", root / "unmeasured")
        (root / "resumed" / "candidate").mkdir()
        with open(root / "resumed" / "evaluations.jsonl", "a") as lines:
            lines.write('{"step": 7, "epo')
    dist.barrier()
    tune("entailment", RESUMED | {"resume": True}, root / "resumed")
    tune("entailment", RESUMED | {"eval_data": "none", "resume": True}, root / "unmeasured")
    model, _ = read_model(root / "pretrained" / "model")
    if dist.get_rank() == 0:
        save_albef(model, root / "albef.pth")
    dist.barrier()
    albef = {"model": root / "albef.pth", "tokenizer": root / "words", "max_steps": 2, "eval_epochs": 1e-6}
    tune("entailment", RESUMED | albef, root / "from-albef", stage=3)
    again = {"model_weights": root / "pretrained" / "model", "max_steps": 1, "data": SCENES.format(64)}
    more = COMMON | again | {"output_dir": root / "pretrained-more"}
    run(train.build_trainer, pretraining_options.parse_arguments([*launched, "--preset", "base", *flags(more)]))

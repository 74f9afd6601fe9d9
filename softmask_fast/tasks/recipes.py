"""The tasks by name: how each opens its data, what it trains, and how it is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from softmask_fast.config import DataConfig, ObjectiveConfig
from softmask_fast.data.loader import PretrainingLoader, SampleLoader
from softmask_fast.data.remote.options import RemoteOptions
from softmask_fast.data.sources import open_source
from softmask_fast.data.tokenizer import load_tokenizer
from softmask_fast.evaluation.grounding import evaluate_grounding, map_layer
from softmask_fast.evaluation.retrieval import evaluate_retrieval
from softmask_fast.model.export import TOKENIZER, load_model, read_model_folder, read_weights
from softmask_fast.model.initialize import fill_model, load_weights, weights_config, weights_tokenizer
from softmask_fast.model.momentum import MomentumCopy, MomentumTeacher
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.state import load_own_state, own_state
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.tasks.answers import evaluate_answers
from softmask_fast.tasks.base import TaskModel, TaskStep
from softmask_fast.tasks.datasets import EntryFormat, ExampleLoader, open_examples, open_expressions
from softmask_fast.tasks.entailment import EntailmentModel
from softmask_fast.tasks.nlvr2 import NLVR2Model, TextAssignmentModel
from softmask_fast.tasks.options import FinetuneConfig, TaskConfig
from softmask_fast.tasks.synthetic import ANSWERS
from softmask_fast.tasks.vqa import VQAModel, read_answers


class Report(Protocol):
    """What every evaluation returns."""

    skipped: dict[str, str]

    def table(self) -> str: ...

    def as_dict(self) -> dict[str, Any]: ...


class RetrievalTask:
    """A task whose examples are images and captions, learned by contrast and matching (ITC, ITM), as ALBEF's
    fine-tuning for retrieval and for grounding: all keys of an image's identity are its positives."""

    loader: type[SampleLoader] = PretrainingLoader
    images_per_sample = 1

    def open(self, data: str, options: DataConfig, *, split: str, seed: int, image_size: int):
        return open_source(
            data,
            split=split,
            seed=seed,
            image_size=image_size,
            remote=RemoteOptions.of(options),
            image_root=options.image_root,
        )

    def model(self, config: FinetuneConfig) -> tuple[nn.Module, Any]:
        """The model to fine-tune and its tokeniser. Raises ValueError when it cannot be had or does not fit."""
        return start_model(config.options, config.data.tokenizer)

    def step(self, model: nn.Module, config: FinetuneConfig) -> tuple[nn.Module, MomentumCopy]:
        """The module that DeepSpeed owns, and the momentum copy."""
        parts = dict(soft_mask=False, masked_captions=False, mlm_weight=0.0)
        objectives = ObjectiveConfig(**vars(config.objectives), **parts)
        teacher = MomentumTeacher(model, config.objectives, config.train.seed)
        return PretrainingStep(model, objectives, bf16=config.train.bf16), teacher

    def has_labels(self, source) -> bool:
        """Whether a source to be measured on says what is right."""
        return True

    def headline(self, report: Report) -> tuple[str, float] | None:
        """The name of the figure by which the best model of a run is chosen, and its value in [0, 1]; None where there
        was nothing to measure by. Here it is ALBEF's: the mean of recall @1, @5, @10 both ways, after re-ranking."""
        return "mean recall", report.mean_recall

    def evaluate(self, model, tokenizer, source, options: TaskConfig, **common) -> Report:
        rerank = options.candidates and max(10, min(options.candidates, len(source)))
        return evaluate_retrieval(model, tokenizer, source, captions=options.captions, rerank=rerank, **common)


class GroundingTask(RetrievalTask):
    """Grounding: trained on expressions without their boxes, measured by the boxes."""

    def open(self, data: str, options: DataConfig, *, split: str, seed: int, image_size: int):
        return open_expressions(data, split=split, seed=seed, image_size=image_size, image_root=options.image_root)

    def step(self, model: nn.Module, config: FinetuneConfig) -> tuple[nn.Module, MomentumCopy]:
        map_layer(model, config.options.layer, words=False)  # a wrong one shall not wait for the first evaluation
        return super().step(model, config)

    def headline(self, report: Report) -> tuple[str, float]:
        if report.box_accuracy is not None:
            return "box accuracy", report.box_accuracy["model"]
        return "pointing game", report.pointing_game["model"]

    def evaluate(self, model, tokenizer, source, options: TaskConfig, **common) -> Report:
        return evaluate_grounding(model, tokenizer, source, layer=options.layer, **common)


class LabelTask:
    """A task whose examples have a label or an answer."""

    loader: type[SampleLoader] = ExampleLoader

    def __init__(self, model: type[TaskModel]):
        self.model_class, self.images_per_sample = model, model.images_per_example

    def open(self, data: str, options: DataConfig, *, split: str, seed: int, image_size: int):
        return open_examples(
            data,
            self.model_class.name,
            self.form(split),
            split=split,
            seed=seed,
            image_size=image_size,
            image_root=options.image_root,
        )

    def form(self, split: str) -> EntryFormat:
        """How the entries to train on, or to be measured on ("val"), are read."""
        return self.model_class.form

    def model(self, config: FinetuneConfig) -> tuple[TaskModel, Any]:
        base, tokenizer = start_model(config.options, config.data.tokenizer)
        return self.model_class(base, tokenizer, **self.arguments(config)), tokenizer

    def arguments(self, config: FinetuneConfig) -> dict[str, Any]:
        """Of the model's constructor."""
        return {}

    def step(self, model: TaskModel, config: FinetuneConfig) -> tuple[nn.Module, MomentumCopy]:
        return TaskStep(model, bf16=config.train.bf16), MomentumCopy(model, config.objectives.momentum)

    def has_labels(self, source) -> bool:
        return source.labelled

    def headline(self, report: Report) -> tuple[str, float] | None:
        return None if report.score is None else (report.metric, report.score)

    def evaluate(self, model: TaskModel, tokenizer, source, options: TaskConfig, **common) -> Report:
        return evaluate_answers(model, tokenizer, source, **common)


class VQATask(LabelTask):
    """VQA: the answers are ranked from a list."""

    def form(self, split: str) -> EntryFormat:
        return VQAModel.form if split == "train" else VQAModel.measured_form

    def arguments(self, config: FinetuneConfig) -> dict[str, Any]:
        if config.options.answers:
            answers: Sequence[str] = read_answers(config.options.answers)
        elif config.data.data.split(":")[0] == "shapes":
            answers = ANSWERS
        else:
            raise ValueError("answers: expected a JSON list of the answers that are ranked, got none")
        return {"answers": answers, "candidates": config.options.candidates}


class NLVR2Task(LabelTask):
    """NLVR2: may start from what text assignment left."""

    def model(self, config: FinetuneConfig) -> tuple[TaskModel, Any]:
        path = Path(config.options.model)
        if not path.is_dir() or (read_model_folder(path)[1] or {}).get("task") != TextAssignmentModel.name:
            return super().model(config)
        assigned, tokenizer = load_task_model(path, TextAssignmentModel.name)
        model = self.model_class(VisionLanguageModel(task_config(assigned.config, config.options)), tokenizer)
        fill_model(model.base, own_state(assigned.base))
        return model, tokenizer


class TextAssignmentTask(RetrievalTask, LabelTask):
    """The text-assignment pretraining: captions in, and no measure of its own."""

    model, step = LabelTask.model, LabelTask.step


TASKS: dict[str, RetrievalTask | LabelTask] = {
    "retrieval": RetrievalTask(),
    "grounding": GroundingTask(),
    "vqa": VQATask(VQAModel),
    "nlvr2": NLVR2Task(NLVR2Model),
    "entailment": LabelTask(EntailmentModel),
    "text_assignment": TextAssignmentTask(TextAssignmentModel),
}
_MODELS = {task.model_class.name: task.model_class for task in TASKS.values() if isinstance(task, LabelTask)}


def task_config(config, options: TaskConfig):
    """The configuration of a pretrained model with what fine-tuning changes of it."""
    names = ("image_size", "max_tokens", "hidden_dropout")
    changed = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(config, **changed)


def start_model(options: TaskConfig, tokenizer: str | None) -> tuple[VisionLanguageModel, Any]:
    """The pretrained model that `options.model` names, and its tokeniser (`tokenizer`: another name for it).

    Raises ValueError that says what to do when they cannot be had or do not fit together.
    """
    model = VisionLanguageModel(task_config(weights_config(options.model, "model"), options))
    load_weights(model, options.model, "model", complete=False)
    words = weights_tokenizer(options.model, tokenizer)
    if len(words) != model.config.vocab_size:
        raise ValueError(f"tokenizer: expected {model.config.vocab_size} entries as the model has, got {len(words)}")
    return model, words


def load_task_model(directory: str | Path, task: str, device: str | torch.device = "cpu"):
    """Read a folder that fine-tuning for `task` wrote -> (model in eval mode, its tokeniser).

    Raises ValueError that names what is missing, or the task that the folder is of.
    """
    if task not in _MODELS:
        return load_model(directory, device)
    config, record = read_model_folder(directory)
    if record is None or record.get("task") != task:
        of = f"fine-tuned for {record['task']}" if record else "not fine-tuned for a task with labels"
        raise ValueError(f"model: expected a model fine-tuned for {task}, {directory} is {of}")
    tokenizer = load_tokenizer(str(Path(directory) / TOKENIZER))
    arguments = {name: value for name, value in record.items() if name != "task"}
    model = _MODELS[task](VisionLanguageModel(config), tokenizer, **arguments)
    load_own_state(model, read_weights(directory))
    return model.to(device).eval(), tokenizer


def predictions(report: Report) -> str | None:
    """The answers to all examples as JSON, as VQA's server takes them; None where a task has none."""
    found = getattr(report, "predictions", None)
    return None if found is None else json.dumps(found)

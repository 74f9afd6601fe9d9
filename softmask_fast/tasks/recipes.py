"""The recipe of each task: how it opens its data, what it trains, and how it is evaluated."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast as Tokenizer

from softmask_fast.config import DataConfig, ObjectiveConfig
from softmask_fast.data.loader import PretrainingLoader, SampleLoader
from softmask_fast.data.sources import open_as_configured, refuse_columns
from softmask_fast.data.types import CaptionSource
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.grounding import GroundingReport, evaluate_grounding, map_layer
from softmask_fast.evaluation.retrieval import RetrievalReport, evaluate_retrieval
from softmask_fast.evaluation.tables import Report
from softmask_fast.model.momentum import MomentumCopy, MomentumTeacher
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.tasks.answers import AnswerReport, evaluate_answers
from softmask_fast.tasks.base import TaskModel, TaskStep
from softmask_fast.tasks.datasets import (
    EntryFormat,
    ExampleSource,
    ExpressionSource,
    open_examples,
    open_expressions,
)
from softmask_fast.tasks.entailment import EntailmentModel
from softmask_fast.tasks.loader import ExampleLoader
from softmask_fast.tasks.models import start_model, start_pair_model
from softmask_fast.tasks.nlvr2 import NLVR2Model, TextAssignmentModel
from softmask_fast.tasks.options import FinetuneConfig, TaskConfig
from softmask_fast.tasks.synthetic import ANSWERS
from softmask_fast.tasks.vqa import VQAModel, read_answers

Source = CaptionSource | ExampleSource | ExpressionSource


class Task(ABC):
    """What fine-tuning and evaluation need to know about a task."""

    loader: type[SampleLoader]
    images_per_sample: int = 1

    @abstractmethod
    def open(self, data: str, options: DataConfig, *, split: str, seed: int, image_size: int) -> Source:
        """Opens samples.

        Args:
            data: What to open.
            options: How to read it. Their own `data` and `eval_data` are ignored.
            split: "train" to train on them, "val" to evaluate on them.
            seed: Of `shapes`.
            image_size: Of `shapes`, in pixels.

        Raises:
            UsageError, OSError: For data that cannot be read. The message names what is wrong.
        """

    @abstractmethod
    def model(self, config: FinetuneConfig) -> tuple[nn.Module, Tokenizer]:
        """The model to fine-tune, and its tokenizer. Raises UsageError if they are missing or do not fit."""

    @abstractmethod
    def step(self, model: nn.Module, config: FinetuneConfig) -> tuple[nn.Module, MomentumCopy]:
        """The module that DeepSpeed owns, and the momentum copy of the model."""

    def has_labels(self, source: Source) -> bool:
        """Whether the samples can be scored."""
        return True

    @abstractmethod
    def evaluate(
        self, model: nn.Module, tokenizer: Tokenizer, source: Source, options: TaskConfig, **common: Any
    ) -> Report:
        """Evaluates a model. `common` holds `batch_size`, `limit` and `progress`, as in `evaluate_retrieval`."""

    @abstractmethod
    def headline(self, report: Report) -> tuple[str, float] | None:
        """The metric that selects the best model: its name, and its value in [0, 1]. None without labels."""


class RetrievalTask(Task):
    """Trains contrast (ITC) and matching (ITM) on images and captions, as ALBEF does for retrieval: all captions of an
    image are its positives. Measures the recall of retrieval."""

    loader = PretrainingLoader

    def open(self, data: str, options: DataConfig, *, split: str, seed: int, image_size: int) -> CaptionSource:
        return open_as_configured(data, options, split=split, seed=seed, image_size=image_size)

    def model(self, config: FinetuneConfig) -> tuple[VisionLanguageModel, Tokenizer]:
        return start_model(config.options, config.data)

    def step(self, model: VisionLanguageModel, config: FinetuneConfig) -> tuple[PretrainingStep, MomentumTeacher]:
        objectives = ObjectiveConfig(**vars(config.objectives), soft_mask=False, masked_captions=False, mlm_weight=0.0)
        teacher = MomentumTeacher(model, config.objectives, config.train.seed)
        return PretrainingStep(model, objectives, bf16=config.train.bf16), teacher

    def evaluate(
        self, model: nn.Module, tokenizer: Tokenizer, source: Source, options: TaskConfig, **common: Any
    ) -> RetrievalReport:
        rerank = max(10, min(options.candidates, len(source))) if options.candidates else 0
        return evaluate_retrieval(model, tokenizer, source, captions=options.captions, rerank=rerank, **common)

    def headline(self, report: RetrievalReport) -> tuple[str, float]:
        return report.headline


class GroundingTask(RetrievalTask):
    """Trains on referring expressions as retrieval does on captions, without their boxes. Measures box accuracy if
    there are proposals, otherwise the pointing game."""

    def open(self, data: str, options: DataConfig, *, split: str, seed: int, image_size: int) -> ExpressionSource:
        refuse_columns(data, image_column=options.image_column, caption_column=options.caption_column)
        return open_expressions(data, split=split, seed=seed, image_size=image_size, image_root=options.image_root)

    def step(self, model: VisionLanguageModel, config: FinetuneConfig) -> tuple[PretrainingStep, MomentumTeacher]:
        map_layer(model, config.options.layer, words=False)  # fail now, not at the first evaluation
        return super().step(model, config)

    def evaluate(
        self, model: nn.Module, tokenizer: Tokenizer, source: Source, options: TaskConfig, **common: Any
    ) -> GroundingReport:
        return evaluate_grounding(model, tokenizer, source, layer=options.layer, **common)

    def headline(self, report: GroundingReport) -> tuple[str, float]:
        if report.box_accuracy is not None:
            return "box accuracy", report.box_accuracy["model"]
        return "pointing game", report.pointing_game["model"]


class LabelTask(Task):
    """Trains a `TaskModel` on examples with labels. Measures the mean score of its answers."""

    loader = ExampleLoader

    def __init__(self, model_class: type[TaskModel]) -> None:
        self.model_class, self.images_per_sample = model_class, model_class.images_per_example

    def open(self, data: str, options: DataConfig, *, split: str, seed: int, image_size: int) -> ExampleSource:
        refuse_columns(data, image_column=options.image_column, caption_column=options.caption_column)
        scenes = {"split": split, "seed": seed, "image_size": image_size}
        return open_examples(data, self.model_class.name, self.form(split), **scenes, image_root=options.image_root)

    def form(self, split: str) -> EntryFormat:
        """How the entries of a split are read."""
        return self.model_class.form

    def model(self, config: FinetuneConfig) -> tuple[TaskModel, Tokenizer]:
        base, tokenizer = start_model(config.options, config.data)
        return self.model_class(base, tokenizer, **self.arguments(config)), tokenizer

    def arguments(self, config: FinetuneConfig) -> dict[str, Any]:
        """Further arguments of the model's constructor."""
        return {}

    def step(self, model: TaskModel, config: FinetuneConfig) -> tuple[TaskStep, MomentumCopy]:
        return TaskStep(model, bf16=config.train.bf16), MomentumCopy(model, config.objectives.momentum)

    def has_labels(self, source: ExampleSource) -> bool:
        return source.labeled

    def evaluate(
        self, model: nn.Module, tokenizer: Tokenizer, source: Source, options: TaskConfig, **common: Any
    ) -> AnswerReport:
        return evaluate_answers(model, tokenizer, source, **common)

    def headline(self, report: AnswerReport) -> tuple[str, float] | None:
        return None if report.score is None else (report.metric, report.score)


class VQATask(LabelTask):
    """Trains a decoder to write the answer. Measures VQA accuracy of the best answer in a list."""

    def form(self, split: str) -> EntryFormat:
        return VQAModel.form if split == "train" else VQAModel.eval_form

    def arguments(self, config: FinetuneConfig) -> dict[str, Any]:
        if config.options.answers:
            answers: Sequence[str] = read_answers(config.options.answers)
        elif config.data.data.split(":")[0] == "shapes":
            answers = ANSWERS
        else:
            raise UsageError("answers: expected a JSON list of the answers to rank, got none")
        return {"answers": answers, "candidates": config.options.candidates}


class NLVR2Task(LabelTask):
    """Trains a classifier of statements about two images. Measures accuracy. It may start from text assignment."""

    def model(self, config: FinetuneConfig) -> tuple[TaskModel, Tokenizer]:
        assigned = start_pair_model(config.options, config.data)
        return super().model(config) if assigned is None else assigned


class TextAssignmentTask(LabelTask):
    """Trains the layers of NLVR2 on images and captions. It has no evaluation of its own."""

    loader = PretrainingLoader
    open = RetrievalTask.open


TASKS: dict[str, Task] = {
    "retrieval": RetrievalTask(),
    "grounding": GroundingTask(),
    "vqa": VQATask(VQAModel),
    "nlvr2": NLVR2Task(NLVR2Model),
    "entailment": LabelTask(EntailmentModel),
    "text_assignment": TextAssignmentTask(TextAssignmentModel),
}


def predictions(report: Report) -> str | None:
    """The answers to all examples as JSON, in the format of VQA's server. None for a task without answers."""
    return json.dumps(report.predictions) if isinstance(report, AnswerReport) else None

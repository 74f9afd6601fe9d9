"""What the tasks with labels share: the model around a pretrained one, and its training step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast as Tokenizer

from softmask_fast.config import ModelConfig
from softmask_fast.model.fusion import first_tokens
from softmask_fast.model.momentum import MomentumCopy, StepSettings
from softmask_fast.model.text import initial_std
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.tasks.datasets import EntryFormat, Example, TaskBatch

Loss = tuple[Tensor, dict[str, Tensor]]  # a scalar with graph, and metrics: scalars by name


class TaskModel(nn.Module):
    """A pretrained model, `base`, and what a task adds to it.

    A subclass defines how its examples are read (`form`, `images_per_example`), how it learns (`loss`), how it answers
    (`predict`), and how an answer is scored (`truth`, `score`).
    """

    name: ClassVar[str]
    form: ClassVar[EntryFormat]
    images_per_example: ClassVar[int] = 1
    metric: ClassVar[str] = "accuracy"  # name of the mean score

    def __init__(self, base: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.base, self.tokenizer = base, tokenizer

    @property
    def config(self) -> ModelConfig:
        """The configuration of the pretrained model."""
        return self.base.config

    @property
    def task_record(self) -> dict[str, Any]:
        """What task.json stores: the task's name as "task", and further arguments of the constructor."""
        return {"task": self.name}

    def set_execution(self, *options: Any) -> None:
        """As `VisionLanguageModel.set_execution`."""
        self.base.set_execution(*options)

    def loss(self, batch: TaskBatch, teacher: TaskModel | None, alpha: float) -> Loss:
        """The loss of a batch, and other metrics by name. A teacher's predictions are soft targets of weight alpha."""
        raise NotImplementedError

    def predict(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[Any]:
        """The answer to each of B examples, as the task's JSON files write it. The inputs are those of `TaskBatch`."""
        raise NotImplementedError

    def score(self, example: Example, answer: Any) -> float:
        """The score of one answer, in [0, 1]."""
        return float(answer == self.truth(example))

    def truth(self, example: Example) -> Any:
        """The right answer to an example."""
        raise NotImplementedError


class ClassifierModel(TaskModel):
    """A task whose answers are a few classes. Its head reads the fused [CLS]; its loss also returns "accuracy"."""

    classes: ClassVar[tuple[str, ...]]

    def __init__(self, base: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        super().__init__(base, tokenizer)
        self.head = classifier(base.config.text_width, len(self.classes))

    def fused(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The fused [CLS], (B, C). The inputs are those of `predict`."""
        text, _ = self.base.encode_text(input_ids, attention_mask)
        keys_values = self.base.fusion.keys_values(self.base.vision(pixels))
        return self.base.fusion(text, attention_mask, keys_values, positions=first_tokens(text))

    def logits(self, batch: TaskBatch) -> Tensor:
        """(B, classes) float32."""
        return self.head(self.fused(batch.pixels, batch.input_ids, batch.attention_mask)).float()

    def loss(self, batch: TaskBatch, teacher: ClassifierModel | None, alpha: float) -> Loss:
        logits = self.logits(batch)
        target = torch.tensor(batch.targets, device=logits.device)
        teacher_logits = None if teacher is None else teacher.logits(batch)
        loss = distilled_cross_entropy(logits, target, teacher_logits, alpha)
        return loss, {"accuracy": (logits.argmax(-1) == target).float().mean()}

    def predict(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[str]:
        chosen = self.head(self.fused(pixels, input_ids, attention_mask)).argmax(-1)
        return [self.classes[index] for index in chosen.tolist()]

    def truth(self, example: Example) -> str:
        return self.classes[example.target]


class TaskStep(nn.Module):
    """The loss of a task's model. This is the module that DeepSpeed owns."""

    def __init__(self, model: TaskModel, bf16: bool = False) -> None:
        super().__init__()
        self.model, self.bf16 = model, bf16

    def forward(self, batch: TaskBatch, teacher: MomentumCopy, settings: StepSettings) -> Loss:
        """The loss of a batch, and its metrics: "loss" and those of the model, detached scalars in float32.

        The momentum copy gives soft targets if `settings.alpha` is above 0. The other settings are unused.
        """
        dtype, soft = torch.bfloat16 if self.bf16 else None, settings.alpha > 0
        with (
            torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=self.bf16),
            self.model.base.holding_weights(dtype),
            teacher.model.base.holding_weights(dtype) if soft else nullcontext(),
        ):
            loss, metrics = self.model.loss(batch, teacher.model if soft else None, settings.alpha)
        metrics = metrics | {"loss": loss}
        return loss, {name: value.detach().float() for name, value in metrics.items()}


def classifier(width: int, classes: int) -> nn.Sequential:
    """ALBEF's head with two layers: (B, width) -> (B, classes)."""
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
    for layer in (head[0], head[2]):
        nn.init.normal_(layer.weight, std=initial_std(width))
        nn.init.zeros_(layer.bias)
    return head


def distilled_cross_entropy(logits: Tensor, target: Tensor, teacher_logits: Tensor | None, alpha: float) -> Tensor:
    """Cross entropy of logits (B, K) against target (B,) int64 and, with weight alpha, the teacher's probabilities."""
    loss = F.cross_entropy(logits, target)
    if teacher_logits is None:
        return loss
    return (1 - alpha) * loss + alpha * F.cross_entropy(logits, teacher_logits.detach().softmax(-1))

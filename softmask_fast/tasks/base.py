"""What the tasks that learn from labels share: the model around a pretrained one, its training step, its evaluation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_fast.config import ModelConfig
from softmask_fast.model.momentum import MomentumCopy, StepSettings
from softmask_fast.model.text import initial_std
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.tasks.datasets import EntryFormat, Example, TaskBatch


class TaskModel(nn.Module):
    """A pretrained model and what a task adds to it.

    A subclass says how its examples are read (`form`, `images_per_example`), what it learns (`loss`), and what it
    answers (`predict`, `score`).
    """

    name: ClassVar[str]
    form: ClassVar[EntryFormat]
    images_per_example: ClassVar[int] = 1
    metric: ClassVar[str] = "accuracy"

    def __init__(self, base: VisionLanguageModel, tokenizer):
        super().__init__()
        self.base, self.tokenizer = base, tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.base.config

    @property
    def task_record(self) -> dict[str, Any]:
        """What a model folder keeps of the task; its items beside "task" are further arguments of the constructor."""
        return {"task": self.name}

    def set_execution(self, *options) -> None:
        self.base.set_execution(*options)

    def loss(self, batch: TaskBatch, taught: TaskModel | None, alpha: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its figures. taught: the momentum copy, whose answers have the share alpha in the
        targets; None without it."""
        raise NotImplementedError

    def predict(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[Any]:
        """The answer to each example, as its file would have it."""
        raise NotImplementedError

    def score(self, example: Example, answer: Any) -> float:
        """Of one answer, in [0, 1]."""
        return float(answer == self.truth(example))

    def truth(self, example: Example) -> Any:
        """The right answer, of which the most frequent one is the floor."""
        raise NotImplementedError


class ClassifierModel(TaskModel):
    """A task whose answers are a few classes: a head on the fused [CLS]."""

    field: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]

    def __init__(self, base: VisionLanguageModel, tokenizer):
        super().__init__(base, tokenizer)
        self.head = classifier(base.config.text_width, len(self.classes))

    def fused(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The fused [CLS] (B, C)."""
        text, _ = self.base.encode_text(input_ids, attention_mask)
        keys_values = self.base.fusion.keys_values(self.base.vision(pixels))
        return self.base.fusion(text, attention_mask, keys_values, places=first_tokens(text))

    def logits(self, batch: TaskBatch) -> Tensor:
        return self.head(self.fused(batch.pixels, batch.input_ids, batch.attention_mask)).float()

    def loss(self, batch: TaskBatch, taught: ClassifierModel | None, alpha: float):
        logits = self.logits(batch)
        target = torch.tensor(batch.targets, device=logits.device)
        loss = distilled_cross_entropy(logits, target, taught and taught.logits(batch), alpha)
        return loss, {"accuracy": (logits.argmax(-1) == target).float().mean()}

    def predict(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[str]:
        chosen = self.head(self.fused(pixels, input_ids, attention_mask)).argmax(-1)
        return [self.classes[number] for number in chosen.tolist()]

    def truth(self, example: Example) -> str:
        return self.classes[example.target]


class TaskStep(nn.Module):
    """The loss around a task's model; this is the module that DeepSpeed owns."""

    def __init__(self, model: TaskModel, bf16: bool = False):
        super().__init__()
        self.model, self.bf16 = model, bf16

    def forward(self, batch, teacher: MomentumCopy, settings: StepSettings):
        """The loss of a batch and its detached metrics; `seed` and `use_queue` of the settings are unused."""
        alpha = settings.alpha
        with torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=self.bf16):
            loss, figures = self.model.loss(batch, teacher.model if alpha > 0 else None, alpha)
        return loss, {name: value.detach().float() for name, value in (figures | {"loss": loss}).items()}


def classifier(width: int, classes: int) -> nn.Sequential:
    """ALBEF's head: two layers."""
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
    for layer in (head[0], head[2]):
        nn.init.normal_(layer.weight, std=initial_std(width))
        nn.init.zeros_(layer.bias)
    return head


def first_tokens(text: Tensor) -> Tensor:
    """Places of [CLS] in (S * L) tokens, text (S, L, C)."""
    return torch.arange(len(text), device=text.device) * text.shape[1]


def distilled_cross_entropy(logits: Tensor, target: Tensor, taught: Tensor | None, alpha: float) -> Tensor:
    """logits (B, K) against target (B,) int64 and, with the share alpha, against the softmax of taught (B, K)."""
    loss = F.cross_entropy(logits, target)
    if taught is None:
        return loss
    return (1 - alpha) * loss + alpha * F.cross_entropy(logits, taught.detach().softmax(-1))



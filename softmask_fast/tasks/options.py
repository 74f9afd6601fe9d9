"""Options of fine-tuning: one dataclass in addition to those of pretraining, and the defaults of each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softmask_fast.config import DataConfig, MomentumConfig, Section, TrainConfig, option
from softmask_fast.errors import UsageError
from softmask_fast.options import LaunchOptions, build_sections, parse_sections


@dataclass(frozen=True)
class TaskConfig(Section):
    """The model to start from, and options of individual tasks."""

    model: str | None = option(None, "Folder exported by training (DIR/model), or an ALBEF checkpoint (required).")
    image_size: int | None = option(None, "Side of the square input image in pixels; default: the model's.")
    max_tokens: int | None = option(
        None, "Longest text in tokens, including special ones; longer ones are cut; default: the model's."
    )
    hidden_dropout: float | None = option(None, "Dropout in the text and fusion encoders; default: the model's.")
    answers: str | None = option(None, "vqa: JSON list of the answers to rank (required, except on shapes).")
    candidates: int = option(
        128,
        "vqa: answers scored in full; retrieval: candidates per query re-ranked by ITM, 0: none; 128 as ALBEF, where "
        "evaluate --rerank has 16 to be quick.",
    )
    captions: str = option("all", "retrieval: captions of each image to evaluate, 'all' or the 'first'.")
    layer: int | None = option(None, "grounding: fusion layer of the word maps; default: that of the soft masks.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            raise UsageError("model: expected a model folder or an ALBEF checkpoint to start from, got none")
        if self.captions not in ("first", "all"):
            raise UsageError(f"captions: expected 'first' or 'all', got {self.captions!r}")
        if self.candidates < 0:
            raise UsageError(f"candidates: expected at least 0, got {self.candidates}")


@dataclass(frozen=True)
class FinetuneConfig:
    """The configuration of a fine-tuning run."""

    task: str
    options: TaskConfig
    objectives: MomentumConfig
    data: DataConfig
    train: TrainConfig

    @property
    def name(self) -> str:
        """What output folders are named after."""
        return self.task


# ALBEF's configurations (configs/*.yaml, with batch sizes per GPU for 8 GPUs). They use neither color jitter nor blur.
_COMMON = {
    "crop_scale": 0.5, "color": False, "blur": False, "eval_size": None, "final_learning_rate": 1e-6,
    "focal_gamma": 0.0, "batch_size": 32, "data": None, "warmup_steps": 0.1, "eval_epochs": 1.0,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "retrieval": _COMMON | {"learning_rate": 1e-5, "epochs": 10.0},
    "grounding": _COMMON | {"learning_rate": 1e-5, "epochs": 5.0, "crop": False},
    "vqa": _COMMON | {"learning_rate": 2e-5, "epochs": 8.0},
    "nlvr2": _COMMON | {"learning_rate": 2e-5, "epochs": 10.0, "batch_size": 16},
    "entailment": _COMMON | {"learning_rate": 2e-5, "epochs": 5.0},
    "text_assignment": _COMMON
    | {"learning_rate": 1e-5, "epochs": 1.0, "batch_size": 64, "crop_scale": 0.2, "distill_alpha": 0.0},
}
SECTIONS = {"options": TaskConfig, "objectives": MomentumConfig, "data": DataConfig, "train": TrainConfig}
ABOUT = "Fine-tune a pretrained vision-language model for a task."


def parse_arguments(argv: Sequence[str] | None = None, **program: Any) -> tuple[FinetuneConfig, LaunchOptions]:
    """Parses flags and an optional --config file with `parse_sections`, which receives `program`.

    Returns:
        The configuration and the launcher's options.

    Raises:
        UsageError: For values out of range.
    """
    task, options, launch = parse_sections(SECTIONS, "task", DEFAULTS, None, ABOUT, argv, **program)
    if options["data"] is None:
        raise UsageError(f"data: expected the training data of {task}, got none")
    if task == "text_assignment" and options["eval_data"] is not None:
        raise UsageError("eval_data: expected none, as text_assignment has no evaluation; training logs its accuracy")
    return FinetuneConfig(task, **build_sections(SECTIONS, options)), launch

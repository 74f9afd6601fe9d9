"""Options of fine-tuning: one dataclass beside those of pretraining, and the defaults of each task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from softmask_fast.config import DataConfig, MomentumConfig, TrainConfig, option
from softmask_fast.options import LaunchOptions, build_sections, parse_sections


@dataclass
class TaskConfig:
    """Where fine-tuning starts, and what is the task's own."""

    model: str | None = option(None, "A folder that training exported (DIR/model), or an ALBEF checkpoint.")
    image_size: int | None = option(None, "Side of the square input image in pixels; default: the model's.")
    max_tokens: int | None = option(None, "Longest text in tokens, special ones included; default: the model's.")
    hidden_dropout: float | None = option(None, "Dropout on the hidden states; default: the model's.")
    answers: str | None = option(None, "vqa: JSON list of the answers that are ranked; default with shapes: theirs.")
    candidates: int = option(128, "vqa: answers ranked in full; retrieval: candidates that matching re-ranks, 0: none.")
    captions: str = option("all", "retrieval: captions of an image that are queries, 'first' or 'all'.")
    layer: int | None = option(None, "grounding: fusion layer of the maps; default: the layer of the soft masks.")
    eval_epochs: float = option(1.0, "Epochs from one measurement on eval_data to the next; 0: at the end alone.")

    def __post_init__(self) -> None:
        if self.model is None:
            raise ValueError("model: expected a model folder or an ALBEF checkpoint to start from, got none")
        if self.captions not in ("first", "all"):
            raise ValueError(f"captions: expected 'first' or 'all', got {self.captions!r}")
        if self.eval_epochs < 0:
            raise ValueError(f"eval_epochs: expected at least 0, got {self.eval_epochs}")
        if self.candidates < 0:
            raise ValueError(f"candidates: expected at least 0, got {self.candidates}")


@dataclass
class FinetuneConfig:
    """Everything that decides a fine-tuning run."""

    task: str
    options: TaskConfig
    objectives: MomentumConfig
    data: DataConfig
    train: TrainConfig

    @property
    def name(self) -> str:
        return self.task

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# Those of ALBEF's configurations (configs/*.yaml there): batches are per GPU, of 8. Color and blur are not in them.
_COMMON = {
    "crop_scale": 0.5, "color": False, "blur": False, "eval_size": None, "final_learning_rate": 1e-6,
    "focal_gamma": 0.0, "batch_size": 32, "data": None,
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

_SECTIONS = {"options": TaskConfig, "objectives": MomentumConfig, "data": DataConfig, "train": TrainConfig}


def parse_arguments(argv: list[str] | None = None) -> tuple[FinetuneConfig, LaunchOptions]:
    """Parse flags and an optional --config file into a checked configuration; see `config.parse_sections`."""
    about = "Fine-tune a pretrained vision-language model for a task."
    task, options, launch = parse_sections(_SECTIONS, "task", DEFAULTS, None, about, argv)
    if options["data"] is None:
        raise ValueError(f"data: expected the training data of {task}, got none")
    if task == "text_assignment" and options["eval_data"] is not None:
        raise ValueError("eval_data: expected none, text assignment has no measure but its accuracy in training")
    return FinetuneConfig(task, **build_sections(_SECTIONS, options)), launch

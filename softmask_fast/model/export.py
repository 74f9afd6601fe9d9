"""Models on disk: a folder with safetensors weights, their configuration and the tokenizer."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from softmask_fast.config import ModelConfig
from softmask_fast.data.tokenizer import load_tokenizer
from softmask_fast.errors import UsageError
from softmask_fast.model.state import load_own_state, own_state, save_state
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.utils import read_json, write_json

WEIGHTS, CONFIG, TOKENIZER, TASK = "model.safetensors", "config.json", "tokenizer", "task.json"


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, directory: str | Path, state: dict[str, Tensor] | None = None
) -> None:
    """Writes a model folder atomically; an existing one is replaced.

    Args:
        model: a VisionLanguageModel, or a model fine-tuned for a task, whose `task_record` goes into task.json.
        state: the weights; default: the model's own. Under ZeRO-3 these are empty: pass the gathered ones.
    """
    directory = Path(directory)
    temporary = directory.with_name(directory.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_state(own_state(model) if state is None else state, temporary / WEIGHTS)
    write_json(temporary / CONFIG, asdict(model.config))
    if not isinstance(model, VisionLanguageModel):
        write_json(temporary / TASK, model.task_record)
    tokenizer.save_pretrained(temporary / TOKENIZER)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(temporary, directory)


def load_model(
    directory: str | Path, device: str | torch.device = "cpu"
) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
    """Reads a model folder that pretraining wrote.

    Returns:
        The model in eval mode, float32, on the device, and its tokenizer.

    Raises:
        UsageError: naming what is missing or does not fit.
    """
    model = VisionLanguageModel(pretrained_config(directory))
    load_own_state(model, read_weights(directory))
    return model.to(device).eval(), load_tokenizer(str(Path(directory) / TOKENIZER))


def read_model_folder(directory: str | Path) -> tuple[ModelConfig, dict | None]:
    """The configuration in a model folder, and the task record if the model is fine-tuned for a task.

    Raises UsageError naming what is missing or unknown.
    """
    directory = Path(directory)
    absent = [name for name in (WEIGHTS, CONFIG, TOKENIZER) if not (directory / name).exists()]
    if absent:
        raise UsageError(f"model: expected a folder with {WEIGHTS}, {CONFIG}, {TOKENIZER}/; {directory} lacks {absent}")
    options = read_json(directory / CONFIG, "model")
    unknown = sorted(options.keys() - {f.name for f in fields(ModelConfig)})
    if unknown:
        raise UsageError(f"model: {directory / CONFIG} has unknown options {unknown}")
    # the weights are in the folder, wherever training started from
    options |= {"vision_weights": "random", "text_weights": "random", "model_weights": None}
    task = read_json(directory / TASK, "model") if (directory / TASK).exists() else None
    return ModelConfig(**options), task


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The tensors in a model folder. Raises UsageError if they cannot be read."""
    path = Path(directory) / WEIGHTS
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"model: {path} cannot be read: {error}") from error


def pretrained_config(directory: str | Path) -> ModelConfig:
    """The configuration in a model folder of pretraining. Raises UsageError for a fine-tuned model."""
    config, task = read_model_folder(directory)
    if task is not None:
        raise UsageError(f"model: expected a model without a task's head, {directory} is fine-tuned for {task['task']}")
    return config

"""Models on disk: a folder with safetensors weights, their configuration and the tokenizer."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from softmask_fast.config import ModelConfig
from softmask_fast.data.tokenizer import load_tokenizer
from softmask_fast.errors import UsageError
from softmask_fast.model.pair_fusion import refuse_pairs
from softmask_fast.model.state import load_own_state, own_state, save_state
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.utils import read_json, replacing, write_json

WEIGHTS, CONFIG, TOKENIZER, TASK = "model.safetensors", "config.json", "tokenizer", "task.json"
EVALUATION = "evaluation.json"  # next to a run's model folder, and inside that of its best model
RECORD_BYTES = 1 << 26  # of a JSON file; a task may have many answers


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, directory: str | Path, state: dict[str, Tensor] | None = None
) -> None:
    """Writes a model folder atomically, replacing an existing one.

    Args:
        model: a VisionLanguageModel, or a model fine-tuned for a task, whose `task_record` goes into task.json.
        tokenizer: of its texts.
        directory: the folder.
        state: the weights; default: the model's own. Under ZeRO-3 these are empty, so pass the gathered ones.

    Raises:
        UsageError: for a pretrained model whose fusion encoder reads two images.
    """
    with replacing(Path(directory)) as folder:
        folder.mkdir(parents=True)
        write_model(model, tokenizer, folder, state)


def write_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Writes the files of `save_model` into an existing folder, next to what it holds."""
    refuse_pairs(model)
    save_state(own_state(model) if state is None else state, folder / WEIGHTS)
    write_json(folder / CONFIG, asdict(model.config))
    if not isinstance(model, VisionLanguageModel):
        write_json(folder / TASK, model.task_record)
    tokenizer.save_pretrained(folder / TOKENIZER)


def read_model(
    directory: str | Path, device: str | torch.device = "cpu"
) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
    """Reads a model folder that pretraining wrote. A folder is data: none of its code runs, and no hub is asked.

    Returns:
        The model in eval mode, float32, on the device, and its tokenizer.

    Raises:
        UsageError: if a file is missing or does not fit. The message names it, and what is wrong with it.
    """
    model = VisionLanguageModel(pretrained_config(directory))
    fill_from_folder(model, directory)
    return model.to(device).eval(), folder_tokenizer(directory, model.config)


def fill_from_folder(model: nn.Module, directory: str | Path) -> None:
    """Loads a model folder's weights. Raises UsageError that names the file and the tensors that do not fit."""
    try:
        load_own_state(model, read_weights(directory))
    except UsageError as error:
        raise UsageError(f"model: {Path(directory) / WEIGHTS}: {error}") from error


def folder_tokenizer(directory: str | Path, config: ModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder. Raises UsageError if it cannot be read, or has ids that the model lacks."""
    folder = Path(directory) / TOKENIZER
    tokenizer = load_tokenizer(str(folder))
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UsageError(
            f"model: {folder} has ids up to {largest}, expected below {config.vocab_size}, vocab_size of {CONFIG}"
        )
    return tokenizer


def read_model_folder(directory: str | Path, option: str = "model") -> tuple[ModelConfig, dict | None]:
    """The configuration in a model folder, and the task record if the model is fine-tuned for a task.

    Args:
        directory: the folder.
        option: the option that it came from, for messages.

    Raises:
        UsageError: if a file is missing, an option is unknown or out of range, or the weights are too few for the
            sizes.
    """
    directory = Path(directory)
    absent = [name for name in (WEIGHTS, CONFIG, TOKENIZER) if not (directory / name).exists()]
    if absent:
        raise UsageError(
            f"{option}: expected a folder with {WEIGHTS}, {CONFIG}, {TOKENIZER}/; {directory} lacks {absent}"
        )
    options = read_record(directory / CONFIG, option)
    unknown = sorted(options.keys() - {f.name for f in fields(ModelConfig)})
    if unknown:
        raise UsageError(f"{option}: {directory / CONFIG} has unknown options {unknown}")
    # the weights are in the folder, no matter where training started from
    options |= {"vision_weights": "random", "text_weights": "random", "model_weights": None}
    task = read_record(directory / TASK, option) if (directory / TASK).exists() else None
    if task is not None and not isinstance(task.get("task"), str):
        raise UsageError(f"{option}: {directory / TASK}: task: expected a string, got {task.get('task')!r:.100}")
    try:
        config = ModelConfig(**options)
        with torch.device("meta"):  # takes no memory, whatever the sizes
            needed = sum(parameter.numel() for parameter in VisionLanguageModel(config).parameters())
    except UsageError as error:
        raise UsageError(f"{option}: {directory / CONFIG}: {error}") from error
    held = sum(tensor.numel() for tensor in read_weights(directory, option).values())  # mapped, not read
    if needed > held:
        raise UsageError(
            f"{option}: {directory / CONFIG} describes {needed:,} parameters, "
            f"expected at most the {held:,} of {WEIGHTS}"
        )
    return config, task


def read_record(path: Path, option: str) -> dict[str, Any]:
    """The mapping in a JSON file of a model. Raises UsageError if the file holds anything else."""
    if path.stat().st_size > RECORD_BYTES:
        raise UsageError(f"{option}: {path}: expected at most {RECORD_BYTES:,} bytes, got {path.stat().st_size:,}")
    record = read_json(path, option)
    if not isinstance(record, dict):
        raise UsageError(f"{option}: {path}: expected a mapping of options, got {type(record).__name__}")
    return record


def read_weights(directory: str | Path, option: str = "model") -> dict[str, Tensor]:
    """The tensors in a model folder. Raises UsageError if they cannot be read."""
    path = Path(directory) / WEIGHTS
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{option}: {path} cannot be read: {error}") from error


def pretrained_config(directory: str | Path, option: str = "model") -> ModelConfig:
    """The configuration in a model folder of pretraining. Raises UsageError for a fine-tuned model."""
    config, task = read_model_folder(directory, option)
    if task is not None:
        raise UsageError(
            f"{option}: expected a model without a task's head, {directory} is fine-tuned for {task['task']}"
        )
    return config

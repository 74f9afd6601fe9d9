"""Models on disk: a folder with safetensors weights, their configuration and the tokeniser."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softmask_fast.config import ModelConfig
from softmask_fast.model.albef import albef_tokenizer, load_albef, resample_positions, save_albef
from softmask_fast.model.vision_language import VisionLanguageModel

__all__ = [
    "load_albef", "load_model", "load_own_state", "load_weights", "own_state", "save_albef", "save_model", "save_state",
    "weights_config", "weights_tokenizer",
]  # fmt: skip

WEIGHTS, CONFIG, TOKENIZER, TASK = "model.safetensors", "config.json", "tokenizer", "task.json"
ALBEF_TOKENIZER = "google-bert/bert-base-uncased"


def save_state(state: dict[str, Tensor], path: str | Path) -> None:
    """Write tensors as safetensors, whole or not at all: to a temporary file, then renamed."""
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary)
    os.replace(temporary, path)


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and persistent buffers, shared ones once (safetensors stores each tensor once)."""
    names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    return {name: tensor for name, tensor in module.state_dict().items() if name in names}


def load_own_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `own_state`. Raises ValueError when a tensor is missing, left over, or of another size."""
    mine = own_state(module)
    missing, unexpected = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
    sizes = [
        f"{name} has size {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in mine.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or unexpected or sizes:
        raise ValueError(f"weights: missing {missing}, unexpected {unexpected}, {'; '.join(sizes) or 'sizes agree'}")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(state[name])


def save_model(
    model: nn.Module, tokenizer, directory: str | Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write a model folder, whole or not at all; an existing one is replaced.

    model: a VisionLanguageModel, or a model fine-tuned for a task, whose `task_record` goes into task.json.
    state: the weights, by default the model's own (under ZeRO-3 these are empty and the gathered ones are given here).
    """
    directory = Path(directory)
    temporary = directory.with_name(directory.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_state(own_state(model) if state is None else state, temporary / WEIGHTS)
    (temporary / CONFIG).write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    if not isinstance(model, VisionLanguageModel):
        (temporary / TASK).write_text(json.dumps(model.task_record, indent=2) + "\n")
    tokenizer.save_pretrained(temporary / TOKENIZER)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(temporary, directory)


def load_model(directory: str | Path, device: str | torch.device = "cpu"):
    """Read a model folder -> (VisionLanguageModel in eval mode, its tokeniser).

    Raises ValueError that names what is missing or does not fit.
    """
    from softmask_fast.data.tokenizer import load_tokenizer

    model = VisionLanguageModel(_config_without_task(directory))
    load_own_state(model, read_weights(directory))
    return model.to(device).eval(), load_tokenizer(str(Path(directory) / TOKENIZER))


def read_model_folder(directory: str | Path) -> tuple[ModelConfig, dict | None]:
    """The configuration in a model folder, and the record of the task that the model is fine-tuned for.

    Raises ValueError that names what is missing or unknown.
    """
    directory = Path(directory)
    absent = [name for name in (WEIGHTS, CONFIG, TOKENIZER) if not (directory / name).exists()]
    if absent:
        raise ValueError(
            f"model: expected a folder with {WEIGHTS}, {CONFIG} and {TOKENIZER}/; {directory} lacks {absent}"
        )
    options = _read_json(directory / CONFIG)
    unknown = sorted(options.keys() - {f.name for f in fields(ModelConfig)})
    if unknown:
        raise ValueError(f"model: {directory / CONFIG} has unknown options {unknown}")
    # where this model's own weights came from is no matter here
    options |= {"vision_weights": "random", "text_weights": "random", "model_weights": None}
    task = _read_json(directory / TASK) if (directory / TASK).exists() else None
    return ModelConfig(**options), task


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The tensors in a model folder. Raises ValueError when they cannot be read."""
    path = Path(directory) / WEIGHTS
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"model: {path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"model: {path} is not valid JSON: {error}") from error


def _config_without_task(directory: str | Path) -> ModelConfig:
    config, task = read_model_folder(directory)
    if task is not None:
        raise ValueError(f"model: expected a model without a task's head, {directory} is fine-tuned for {task['task']}")
    return config


def weights_config(path: str | Path, option: str = "model_weights") -> ModelConfig:
    """The configuration of a model that starts from `path`: a model folder, or an ALBEF checkpoint.

    Raises ValueError, which names the option that the path came by, when it is neither.
    """
    path = Path(path)
    if path.is_dir():
        config, _ = read_model_folder(path)
    elif path.is_file():
        config = load_albef(path).config
    else:
        raise ValueError(f"{option}: expected a model folder or an ALBEF checkpoint, got {str(path)!r}: no such")
    return replace(config, model_weights=str(path))


def weights_tokenizer(path: str | Path, named: str | None):
    """The tokeniser of a model that starts from `path`: the named one, else a folder's own, else ALBEF's, from the hub.

    Raises ValueError when it cannot be had.
    """
    from softmask_fast.data.tokenizer import load_tokenizer

    if Path(path).is_dir():
        return load_tokenizer(named or str(Path(path) / TOKENIZER))
    return albef_tokenizer(load_tokenizer(named or ALBEF_TOKENIZER))


def load_weights(
    model: VisionLanguageModel, path: str | Path, option: str = "model_weights", *, complete: bool = True
) -> None:
    """Fill a model with the weights of a model folder or an ALBEF checkpoint; position embeddings of the image are
    resampled to its grid.

    complete: an ALBEF checkpoint that lacks heads is an error; else they are new, and the log names them.
    Raises ValueError, which names the option that the path came by, when a tensor is missing, left over, or of another
    size.
    """
    if Path(path).is_dir():
        _config_without_task(path)
        state = read_weights(path)
    else:
        state = own_state(load_albef(path, complete=complete))
    try:
        fill_model(model, state)
    except ValueError as error:
        raise ValueError(f"{option}: {path} does not fit the model's options: {error}") from error


def fill_model(model: VisionLanguageModel, state: dict[str, Tensor]) -> None:
    """`load_own_state` of a model whose image grid may be another one: its position embeddings are resampled."""
    name = "vision.vit.pos_embed"
    if name in state:
        rows, columns = model.grid_size
        prefix = model.get_parameter(name).shape[1] - rows * columns
        state = state | {name: resample_positions(state[name], model.grid_size, prefix)}
    load_own_state(model, state)

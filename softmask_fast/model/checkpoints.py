"""Models on disk: a folder with safetensors weights, their configuration and the tokeniser."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softmask_fast.config import ModelConfig
from softmask_fast.model.albef import load_albef, save_albef
from softmask_fast.model.vision_language import VisionLanguageModel

__all__ = ["load_albef", "load_model", "load_own_state", "own_state", "save_albef", "save_model", "save_state"]

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer"


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
    model: VisionLanguageModel, tokenizer, directory: str | Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write a model folder, whole or not at all; an existing one is replaced.

    state: the weights, by default the model's own (under ZeRO-3 these are empty and the gathered ones are given here).
    """
    directory = Path(directory)
    temporary = directory.with_name(directory.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_state(own_state(model) if state is None else state, temporary / WEIGHTS)
    (temporary / CONFIG).write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    tokenizer.save_pretrained(temporary / TOKENIZER)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(temporary, directory)


def load_model(directory: str | Path, device: str | torch.device = "cpu"):
    """Read a model folder -> (VisionLanguageModel in eval mode, its tokeniser).

    Raises ValueError that names what is missing or does not fit.
    """
    from softmask_fast.data.tokenizer import load_tokenizer

    directory = Path(directory)
    absent = [name for name in (WEIGHTS, CONFIG, TOKENIZER) if not (directory / name).exists()]
    if absent:
        raise ValueError(
            f"model: expected a folder with {WEIGHTS}, {CONFIG} and {TOKENIZER}/; {directory} lacks {absent}"
        )
    options = json.loads((directory / CONFIG).read_text())
    unknown = sorted(options.keys() - {f.name for f in fields(ModelConfig)})
    if unknown:
        raise ValueError(f"model: {directory / CONFIG} has unknown options {unknown}")
    model = VisionLanguageModel(ModelConfig(**options))
    load_own_state(model, load_file(directory / WEIGHTS))
    return model.to(device).eval(), load_tokenizer(str(directory / TOKENIZER))

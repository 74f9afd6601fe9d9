"""The models of the tasks: the one that fine-tuning starts from, and how a fine-tuned one is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast as Tokenizer

from softmask_fast.config import DataConfig, ModelConfig
from softmask_fast.data.tokenizer import without_punctuation
from softmask_fast.errors import UsageError
from softmask_fast.model.convert_albef import load_albef
from softmask_fast.model.export import TASK, fill_from_folder, folder_tokenizer, read_model, read_model_folder
from softmask_fast.model.initialize import fill_model, load_weights, weights_config, weights_tokenizer
from softmask_fast.model.pair_fusion import PairFusion
from softmask_fast.model.state import own_state
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.tasks.base import TaskModel
from softmask_fast.tasks.entailment import EntailmentModel
from softmask_fast.tasks.nlvr2 import NLVR2Model, TextAssignmentModel
from softmask_fast.tasks.options import TaskConfig
from softmask_fast.tasks.vqa import VQAModel

# The models with a head of their own, by the name of their task.
MODELS: dict[str, type[TaskModel]] = {
    model.name: model for model in (VQAModel, NLVR2Model, EntailmentModel, TextAssignmentModel)
}


def start_model(options: TaskConfig, data: DataConfig) -> tuple[VisionLanguageModel, Tokenizer]:
    """Loads the pretrained model that fine-tuning starts from, and its tokenizer or the one that `data` names.

    Raises:
        UsageError: If one of them is missing, or they do not fit each other.
    """
    model = VisionLanguageModel(_override(weights_config(options.model, "model"), options))
    load_weights(model, options.model, "model", complete=False)
    return model, _prepared(_fitting_tokenizer(model, options.model, data.tokenizer), data)


def start_pair_model(options: TaskConfig, data: DataConfig) -> tuple[NLVR2Model, Tokenizer] | None:
    """Loads a model that text assignment trained for NLVR2, here or in ALBEF's code. Returns None if `options.model` is
    anything else."""
    path = Path(options.model)
    if path.is_dir() and (read_model_folder(path)[1] or {}).get("task") == TextAssignmentModel.name:
        assigned, loaded = load_task_model(path, TextAssignmentModel.name)
        base = assigned.base
    elif path.is_file() and isinstance((base := load_albef(path, option="model")).fusion, PairFusion):
        loaded = _fitting_tokenizer(base, path, data.tokenizer)
    else:
        return None
    loaded = _prepared(loaded, data)
    model = NLVR2Model(VisionLanguageModel(_override(base.config, options)), loaded)
    fill_model(model.base, own_state(base))
    return model, loaded


def load_task_model(
    directory: str | Path, task: str, device: str | torch.device = "cpu"
) -> tuple[VisionLanguageModel | TaskModel, Tokenizer]:
    """Loads a model folder that fine-tuning for `task` wrote.

    Returns:
        The model in eval mode, and its tokenizer. For a task without a head it is a plain `VisionLanguageModel`.

    Raises:
        UsageError: If a file is missing, or the model was fine-tuned for another task.
    """
    if task not in MODELS:
        return read_model(directory, device)
    config, record = read_model_folder(directory)
    if record is None or record.get("task") != task:
        found = f"fine-tuned for {record['task']}" if record else "not fine-tuned for a task with labels"
        raise UsageError(f"model: expected a model fine-tuned for {task}, got {directory}, which is {found}")
    tokenizer = folder_tokenizer(directory, config)
    arguments = {name: value for name, value in record.items() if name != "task"}
    try:
        model = MODELS[task](VisionLanguageModel(config), tokenizer, **arguments)
    except (UsageError, TypeError) as error:
        raise UsageError(f"model: {Path(directory) / TASK}: {error}") from error
    fill_from_folder(model, directory)
    return model.to(device).eval(), tokenizer


def _fitting_tokenizer(model: VisionLanguageModel, path: str | Path, named: str | None) -> Tokenizer:
    """`weights_tokenizer`. Raises UsageError if it has another number of entries than the model."""
    loaded = weights_tokenizer(path, named)
    if len(loaded) != model.config.vocab_size:
        raise UsageError(f"tokenizer: expected the model's {model.config.vocab_size} entries, got {len(loaded)}")
    return loaded


def _prepared(tokenizer: Tokenizer, data: DataConfig) -> Tokenizer:
    return without_punctuation(tokenizer) if data.drop_punctuation else tokenizer


def _override(config: ModelConfig, options: TaskConfig) -> ModelConfig:
    """The configuration of a pretrained model with the options' changes."""
    changes = {name: getattr(options, name) for name in ("image_size", "max_tokens", "hidden_dropout")}
    return replace(config, **{name: value for name, value in changes.items() if value is not None})

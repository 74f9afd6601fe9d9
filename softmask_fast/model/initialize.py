"""Starting weights: pretrained parts, a model folder or an ALBEF checkpoint, and the tokenizer that belongs to them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from softmask_fast.config import ModelConfig
from softmask_fast.data.tokenizer import load_tokenizer
from softmask_fast.errors import UsageError
from softmask_fast.model.convert_albef import albef_tokenizer, load_albef, resample_positions
from softmask_fast.model.export import TOKENIZER, pretrained_config, read_model_folder, read_weights
from softmask_fast.model.state import load_own_state, own_state
from softmask_fast.model.text import load_bert
from softmask_fast.model.vision import load_vision_weights
from softmask_fast.model.vision_language import VisionLanguageModel

logger = logging.getLogger(__name__)

ALBEF_TOKENIZER = "google-bert/bert-base-uncased"


def weights_config(path: str | Path, option: str = "model_weights") -> ModelConfig:
    """The configuration of a model that starts from a model folder or an ALBEF checkpoint.

    Args:
        path: the folder or the checkpoint.
        option: the option that it came from, for messages.

    Raises:
        UsageError: if it is neither.
    """
    path = Path(path)
    if path.is_dir():
        config, _ = read_model_folder(path, option)
    elif path.is_file():
        config = load_albef(path, option=option).config
    else:
        raise UsageError(
            f"{option}: expected a model folder or an ALBEF checkpoint, got {str(path)!r}, which does not exist"
        )
    return replace(config, model_weights=str(path))


def weights_tokenizer(path: str | Path, named: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model that starts from `path`: the one that is named, or else that of the model folder, or
    else ALBEF's from the hub. Raises UsageError if it cannot be loaded."""
    if Path(path).is_dir():
        return load_tokenizer(named or str(Path(path) / TOKENIZER))
    return albef_tokenizer(load_tokenizer(named or ALBEF_TOKENIZER))


def load_weights(
    model: VisionLanguageModel, path: str | Path, option: str = "model_weights", *, complete: bool = True
) -> None:
    """Loads a model folder or an ALBEF checkpoint into a model. Image position embeddings are resampled to its grid.

    Args:
        model: gets the weights.
        path: the folder or the checkpoint.
        option: the option that it came from, for messages.
        complete: refuse an ALBEF checkpoint that lacks heads. Otherwise they stay random, and the log names them.

    Raises:
        UsageError: if a tensor is missing, unexpected, or of another size.
    """
    if Path(path).is_dir():
        pretrained_config(path, option)
        state = read_weights(path, option)
    else:
        state = own_state(load_albef(path, complete=complete, option=option))
    try:
        fill_model(model, state)
    except UsageError as error:
        raise UsageError(f"{option}: {path} does not fit the model's options: {error}") from error


def fill_model(model: VisionLanguageModel, state: dict[str, Tensor]) -> None:
    """`load_own_state`, with the image position embeddings resampled to the model's grid."""
    name = "vision.vit.pos_embed"
    if name in state:
        rows, columns = model.grid_size
        prefix = model.get_parameter(name).shape[1] - rows * columns
        state = state | {name: resample_positions(state[name], model.grid_size, prefix)}
    load_own_state(model, state)


def load_pretrained(model: VisionLanguageModel) -> None:
    """Loads the weights that the model's configuration names. "random" leaves that part as it is.

    Raises:
        UsageError: if weights cannot be loaded or do not fit.
    """
    config = model.config
    if config.model_weights:
        load_weights(model, config.model_weights)
        return
    load_vision_weights(model.vision, config)
    if config.text_weights == "random":
        return
    bert, has_head = load_bert(config)
    layers = bert.bert.encoder.layer
    model.text.bert.embeddings.load_state_dict(bert.bert.embeddings.state_dict())
    for ours, theirs in zip(model.text.bert.encoder.layer, layers[: config.text_layers], strict=True):
        ours.load_state_dict(theirs.state_dict())
    fusion_weights = layers[config.text_layers : config.text_layers + config.fusion_layers]
    for ours, theirs in zip(model.fusion.layers, fusion_weights, strict=True):
        for part in ("attention", "intermediate", "output"):
            getattr(ours, part).load_state_dict(getattr(theirs, part).state_dict())
    if not has_head:
        logger.warning(
            "text_weights: %s has no head for masked language modeling; it starts random", config.text_weights
        )
        return
    model.language_head.transform.load_state_dict(bert.cls.predictions.transform.state_dict())
    model.language_head.decoder.bias.data.copy_(bert.cls.predictions.decoder.bias)

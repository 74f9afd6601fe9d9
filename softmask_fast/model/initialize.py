"""Starting weights: pretrained parts, a model folder or an ALBEF checkpoint, and the tokenizer that belongs to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from softmask_fast.config import ModelConfig
from softmask_fast.model.convert_albef import albef_tokenizer, load_albef, resample_positions
from softmask_fast.model.export import TOKENIZER, _config_without_task, read_model_folder, read_weights
from softmask_fast.model.state import load_own_state, own_state
from softmask_fast.model.text import load_bert
from softmask_fast.model.vision import load_vision_weights
from softmask_fast.model.vision_language import VisionLanguageModel

ALBEF_TOKENIZER = "google-bert/bert-base-uncased"


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


def load_pretrained(model: VisionLanguageModel) -> None:
    """Fill the model with the weights that its configuration names; 'random' leaves that part as it is.

    Raises ValueError that says what to do when weights cannot be had or do not fit.
    """
    config = model.config
    if config.model_weights:

        load_weights(model, config.model_weights)
        return
    load_vision_weights(model.vision, config)
    if config.text_weights == "random":
        return
    bert = load_bert(config)
    layers = bert.bert.encoder.layer
    model.text.bert.embeddings.load_state_dict(bert.bert.embeddings.state_dict())
    for ours, theirs in zip(model.text.bert.encoder.layer, layers[: config.text_layers], strict=True):
        ours.load_state_dict(theirs.state_dict())
    fusion_weights = layers[config.text_layers : config.text_layers + config.fusion_layers]
    for ours, theirs in zip(model.fusion.layers, fusion_weights, strict=True):
        for part in ("attention", "intermediate", "output"):
            getattr(ours, part).load_state_dict(getattr(theirs, part).state_dict())
    model.language_head.transform.load_state_dict(bert.cls.predictions.transform.state_dict())
    model.language_head.decoder.bias.data.copy_(bert.cls.predictions.decoder.bias)

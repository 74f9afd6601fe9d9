"""Text encoder: the first layers of a BERT, and the head that predicts masked tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertPredictionHeadTransform,
    BertSelfOutput,
)

from softmask_fast.config import ModelConfig
from softmask_fast.errors import UsageError, one_line
from softmask_fast.hub import from_hub
from softmask_fast.model.layers import Weights, after_attention, run_region, scale_gradient, word_logits
from softmask_fast.model.packing import Packing, self_attention
from softmask_fast.model.weights import Joined, WeightedLayer, run_layer


def initial_std(width: int) -> float:
    """BERT's 0.02 at its width of 768, scaled so that layers of any width pass on the same fraction of the signal."""
    return 0.02 * math.sqrt(768 / width)


def bert_config(config: ModelConfig, layers: int) -> BertConfig:
    """A BERT of our sizes. Attention probabilities have no dropout, as fused attention does not offer it."""
    return BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.text_width,
        num_hidden_layers=layers,
        num_attention_heads=config.text_heads,
        intermediate_size=round(config.text_mlp_ratio * config.text_width),
        hidden_dropout_prob=config.hidden_dropout,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=max(config.text_positions, config.max_tokens),
        initializer_range=initial_std(config.text_width),
        attn_implementation="sdpa",
    )


def attention_parts(attention: BertAttention) -> list[Joined]:
    """The weights of a self-attention: those of `attend`, then those of `residual`."""
    own = attention.self
    return [
        Joined((own.query.weight, own.key.weight, own.value.weight)),
        Joined((own.query.bias, own.key.bias, own.value.bias), holds_key_bias=True),
        *output_parts(attention.output),
    ]


def output_parts(output: BertSelfOutput | BertOutput) -> list[Joined]:
    """The weights of `residual`."""
    modules = (output.dense, output.LayerNorm)
    return [Joined((parameter,)) for module in modules for parameter in (module.weight, module.bias)]


def feed_forward_parts(intermediate: BertIntermediate, output: BertOutput) -> list[Joined]:
    """The weights of `feed_forward`."""
    return [Joined((intermediate.dense.weight,)), Joined((intermediate.dense.bias,)), *output_parts(output)]


def attend(weights: Weights, text: Tensor, packing: Packing, heads: int, attention: str) -> Tensor:
    """Self-attention among the tokens of each sequence, without its output projection: text (T, C) -> (T, C)."""
    joined = F.linear(text, *weights).unflatten(-1, (3, heads, -1))
    return self_attention(joined, packing, attention).flatten(1)


class TextLayer(WeightedLayer):
    """A BERT layer on packed tokens."""

    def __init__(self, layer: BertLayer) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output
        self.heads = layer.attention.self.num_attention_heads
        self.eps, self.drop = layer.output.LayerNorm.eps, layer.output.dropout.p

    def joined(self) -> list[Joined]:
        """The weights of `attend` and `after_attention`."""
        return attention_parts(self.attention) + feed_forward_parts(self.intermediate, self.output)

    def forward(self, text: Tensor, packing: Packing, attention: str) -> Tensor:
        """text (T, C) -> (T, C) in the dtype of the weights. `attention` is that of `TextEncoder`."""
        weights = self.weights()
        text = text.to(weights[0].dtype)
        attended = attend(weights[:2], text, packing, self.heads, attention)
        drop = self.drop if self.training else 0.0
        return run_region(self.compiled, after_attention, weights[2:], attended, text, self.eps, drop)


class TextEncoder(nn.Module):
    """The embeddings and first `text_layers` layers of a BERT.

    Attributes:
        attention: "auto", "padded", "varlen" or "xformers", see packing.py.
        checkpointing: whether the backward pass recomputes the intermediates of each layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.bert = BertModel(bert_config(config, config.text_layers), add_pooling_layer=False)
        self.bert.encoder.layer = nn.ModuleList(TextLayer(layer) for layer in self.bert.encoder.layer)
        self.attention, self.checkpointing = "auto", False
        self.contrast_layers = config.text_contrast_layers
        self.contrast_gradient, self.contrast_pooling = config.contrast_gradient, config.contrast_pooling

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The embeddings of the vocabulary."""
        return self.bert.embeddings.word_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor, packing: Packing | None = None) -> Tensor:
        """input_ids (B, L) int64, attention_mask (B, L) bool and its packing -> tokens (B, L, C), 0 at padding."""
        packing = Packing.of(attention_mask) if packing is None else packing
        return packing.pad(self._shared(input_ids, packing))

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        """Like `forward`; also returns one vector per text for the contrast, (B, C)."""
        packing = Packing.of(attention_mask) if packing is None else packing
        shared = own = self._shared(input_ids, packing)
        if self.contrast_layers:
            layers = self.bert.encoder.layer[-self.contrast_layers :]
            own = self._run(layers, scale_gradient(shared, self.contrast_gradient), packing)
        tokens = packing.pad(shared)
        own = tokens if own is shared else packing.pad(own)  # 0 at padding
        mean = self.contrast_pooling == "mean"
        return tokens, own.sum(1) / attention_mask.sum(1, keepdim=True) if mean else own[:, 0]

    def _shared(self, input_ids: Tensor, packing: Packing) -> Tensor:
        positions = packing.positions % input_ids.shape[1]
        text = self.bert.embeddings(packing.pack(input_ids)[None], position_ids=positions[None])[0]
        layers = self.bert.encoder.layer
        return self._run(layers[: len(layers) - self.contrast_layers], text, packing)

    def _run(self, layers: nn.ModuleList, text: Tensor, packing: Packing) -> Tensor:
        for layer in layers:
            text = run_layer(layer, text, packing, self.attention, checkpointing=self.checkpointing)
        return text


class MaskedLanguageHead(WeightedLayer):
    """BERT's head over the vocabulary. Its matrix is tied to the word embeddings."""

    def __init__(self, config: ModelConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(bert_config(config, 0))
        self.decoder = nn.Linear(config.text_width, config.vocab_size)
        self.decoder.weight = word_embeddings.weight

    def joined(self) -> list[Joined]:
        """The weights of `word_logits`."""
        modules = (self.transform.dense, self.transform.LayerNorm, self.decoder)
        return [Joined((parameter,)) for module in modules for parameter in (module.weight, module.bias)]

    def forward(self, hidden: Tensor, *labels: Tensor | None, function: Callable = word_logits) -> Any:
        """hidden (..., C) -> logits (..., V), or what another function of layers.py makes of the same weights and its
        labels."""
        return run_region(self.compiled, function, self.weights(), hidden, *labels, self.transform.LayerNorm.eps)


def load_bert(config: ModelConfig) -> tuple[BertForMaskedLM, bool]:
    """The pretrained BERT named by `text_weights`, and whether it brings a head for masked language modeling.

    Raises:
        UsageError: if it cannot be loaded, lacks tensors of an encoder or has other sizes.
    """
    name = config.text_weights
    options = {"trust_remote_code": False, "weights_only": True, "output_loading_info": True}
    options["local_files_only"] = Path(name).is_dir()  # a folder is data: its files must not name anything on a hub
    instead = (
        "give a folder with a BERT (--text_weights DIR), copy the hub's cache from a machine with a network "
        f"(`hf download {name}`), or start from --text_weights random"
    )
    try:
        with _quiet_transformers():  # its report of tensors that are missing calls every encoder without a head corrupt
            load = functools.partial(BertForMaskedLM.from_pretrained, name, **options)
            bert, report = from_hub(name, "text_weights", instead, load)
    except UsageError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors for damaged files
        raise UsageError(f"text_weights: {name!r} cannot be loaded ({one_line(error)}); {instead}") from error
    found, ours = bert.config, bert_config(config, config.text_layers)
    sizes = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings")
    expected = {name: getattr(ours, name) for name in sizes}
    wrong = {name: (getattr(found, name), want) for name, want in expected.items() if getattr(found, name) != want}
    if found.num_hidden_layers < config.text_layers + config.fusion_layers:
        wrong["num_hidden_layers"] = (found.num_hidden_layers, config.text_layers + config.fusion_layers)
    if wrong:
        sizes = ", ".join(f"{name} is {got}, expected {want}" for name, (got, want) in wrong.items())
        raise UsageError(f"text_weights: {name!r} does not fit the configuration: {sizes}")
    missing = sorted(report["missing_keys"])
    if encoder := [key for key in missing if not key.startswith("cls.")]:
        raise UsageError(f"text_weights: {name!r} lacks {len(encoder)} tensors of a BERT, the first is {encoder[0]}")
    return bert, not missing


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the library's warnings and progress bars."""
    messages = transformers.utils.logging
    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()

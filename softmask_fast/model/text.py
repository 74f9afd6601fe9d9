"""Text encoder: the first layers of a BERT, and the head that predicts masked tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, BertModel
from transformers.models.bert.modeling_bert import BertLayer, BertPredictionHeadTransform, BertSelfAttention

from softmask_fast.config import ModelConfig
from softmask_fast.errors import UsageError
from softmask_fast.model.packing import Packing, self_attention


def initial_std(width: int) -> float:
    """BERT's 0.02 at its width of 768, scaled so that layers of any width keep the same fraction of the signal."""
    return 0.02 * math.sqrt(768 / width)


def bert_config(config: ModelConfig, layers: int) -> BertConfig:
    """A BERT of our sizes, without dropout on attention probabilities, which fused attention does not offer."""
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


def attend(projections: BertSelfAttention, text: Tensor, packing: Packing, attention: str) -> Tensor:
    """BERT's self-attention on packed tokens, without its output projection: text (T, C) -> (T, C)."""
    heads = (projections.num_attention_heads, projections.attention_head_size)
    query, key, value = (
        project(text).unflatten(-1, heads) for project in (projections.query, projections.key, projections.value)
    )
    return self_attention(query, key, value, packing, attention).flatten(1)


def run_layer(layer: Callable[..., Tensor], *arguments: object, checkpointing: bool) -> Tensor:
    """A layer's output; with checkpointing the backward pass recomputes its intermediates, with the same dropout."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *arguments, use_reentrant=False)
    return layer(*arguments)


class TextEncoder(nn.Module):
    """The embeddings and first `text_layers` layers of a BERT.

    Attributes: attention ("auto", "padded", "varlen" or "xformers", see packing.py), checkpointing.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.bert = BertModel(bert_config(config, config.text_layers), add_pooling_layer=False)
        self.attention, self.checkpointing = "auto", False

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.bert.embeddings.word_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor, packing: Packing | None = None) -> Tensor:
        """input_ids (B, L) int64, attention_mask (B, L) bool and its packing -> tokens (B, L, C), 0 at padding."""
        packing = Packing.of(attention_mask) if packing is None else packing
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        text = self.bert.embeddings(packing.pack(input_ids)[None], position_ids=packing.pack(positions)[None])[0]
        for layer in self.bert.encoder.layer:
            text = run_layer(self._layer, layer, text, packing, checkpointing=self.checkpointing)
        return packing.pad(text)

    def _layer(self, layer: BertLayer, text: Tensor, packing: Packing) -> Tensor:
        attended = attend(layer.attention.self, text, packing, self.attention)
        text = layer.attention.output(attended, text)
        return layer.output(layer.intermediate(text), text)


class MaskedLanguageHead(nn.Module):
    """BERT's head over the vocabulary; its matrix is tied to the word embeddings."""

    def __init__(self, config: ModelConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.transform = BertPredictionHeadTransform(bert_config(config, 0))
        self.decoder = nn.Linear(config.text_width, config.vocab_size)
        self.decoder.weight = word_embeddings.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V)."""
        return self.decoder(self.transform(hidden))


def load_bert(config: ModelConfig) -> BertForMaskedLM:
    """The pretrained BERT named by `text_weights`. Raises UsageError if it cannot be loaded or has other sizes."""
    try:
        bert = BertForMaskedLM.from_pretrained(config.text_weights)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"text_weights: {config.text_weights!r} cannot be loaded ({error}). Give a local folder with a BERT "
            "(--text_weights DIR), or start from random weights (--text_weights random)."
        ) from error
    found, ours = bert.config, bert_config(config, config.text_layers)
    sizes = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings")
    expected = {name: getattr(ours, name) for name in sizes}
    wrong = {name: (getattr(found, name), want) for name, want in expected.items() if getattr(found, name) != want}
    if found.num_hidden_layers < config.text_layers + config.fusion_layers:
        wrong["num_hidden_layers"] = (found.num_hidden_layers, config.text_layers + config.fusion_layers)
    if wrong:
        sizes = ", ".join(f"{name} is {got}, expected {want}" for name, (got, want) in wrong.items())
        raise UsageError(f"text_weights: {config.text_weights!r} does not fit the configuration: {sizes}")
    return bert

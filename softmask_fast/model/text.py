"""Text encoder: the first layers of a BERT, and the head that predicts masked tokens."""

from __future__ import annotations

import math

from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from softmask_fast.config import ModelConfig


def initial_std(width: int) -> float:
    """BERT's 0.02 at its width of 768, scaled so that layers of any width start with the same share of the signal."""
    return 0.02 * math.sqrt(768 / width)


def bert_config(config: ModelConfig, layers: int) -> BertConfig:
    """A BERT of our width. Attention probabilities have no dropout: fused attention does not offer it."""
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


class TextEncoder(nn.Module):
    """The first `text_layers` layers of a BERT, embeddings included."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.bert = BertModel(bert_config(config, config.text_layers), add_pooling_layer=False)

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.bert.embeddings.word_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids (B, L) int64, attention_mask (B, L) bool -> tokens (B, L, C)."""
        return self.bert(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state


class MaskedLanguageHead(nn.Module):
    """BERT's head over the vocabulary; its matrix is the one of the word embeddings."""

    def __init__(self, config: ModelConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.transform = BertPredictionHeadTransform(bert_config(config, 0))
        self.decoder = nn.Linear(config.text_width, config.vocab_size)
        self.decoder.weight = word_embeddings.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V)."""
        return self.decoder(self.transform(hidden))


def load_bert(config: ModelConfig) -> BertForMaskedLM:
    """The pretrained BERT that `text_weights` names.

    Raises ValueError that says what to do when it cannot be had or has other sizes than the configuration.
    """
    try:
        bert = BertForMaskedLM.from_pretrained(config.text_weights)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text_weights: {config.text_weights!r} cannot be loaded ({error}). Give a local folder with a BERT "
            "(--text_weights DIR), or start without weights (--text_weights random)."
        ) from error
    found, ours = bert.config, bert_config(config, config.text_layers)
    sizes = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings")
    expected = {name: getattr(ours, name) for name in sizes}
    wrong = {name: (getattr(found, name), want) for name, want in expected.items() if getattr(found, name) != want}
    if found.num_hidden_layers < config.text_layers + config.fusion_layers:
        wrong["num_hidden_layers"] = (found.num_hidden_layers, config.text_layers + config.fusion_layers)
    if wrong:
        sizes = ", ".join(f"{name} is {got}, expected {want}" for name, (got, want) in wrong.items())
        raise ValueError(f"text_weights: {config.text_weights!r} does not fit the configuration: {sizes}")
    return bert

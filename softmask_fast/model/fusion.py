"""Fusion encoder: BERT layers that also attend to the image.

Three properties make it cheap (and exact):

- the keys and values of each image are computed once per layer and serve every sequence that looks at that image
  (`image_index` says which one);
- a soft mask commutes with their projections, so a masked image is the same keys and values with a factor `keep` per
  token inside the attention;
- the Grad-CAM of a layer needs the graph from that layer's attention output onwards only.

A key bias would add the same number to all logits of a query, which softmax ignores: there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertOutput, BertSelfOutput

from softmask_fast.config import ModelConfig
from softmask_fast.model.text import bert_config
from softmask_fast.ops import attention_output_gradient, soft_masked_attention

KeyValue = tuple[Tensor, Tensor]  # each (B, H, N, D), without bias


class CrossAttention(nn.Module):
    """Queries from the text, keys and values from the image, each with its own projection."""

    def __init__(self, width: int, image_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(image_width, width, bias=False)
        self.value = nn.Linear(image_width, width, bias=False)
        self.value_bias = nn.Parameter(torch.zeros(heads, width // heads))  # apart: a soft mask scales X W alone

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, image_tokens: Tensor) -> KeyValue:
        """image_tokens (B, N, Cv) -> keys and values (B, H, N, D)."""
        return self.split_heads(self.key(image_tokens)), self.split_heads(self.value(image_tokens))

    def biased(self, value: Tensor) -> Tensor:
        """value (B, H, N, D) with its bias, as a Grad-CAM needs it: dS/dA is dS/dO times the whole value, and what the
        bias adds, the same for every image token, decides which of them are above zero.

        The bias is read as the attention to a single token of value zero: only in a module's forward is a parameter
        whole under ZeRO-3.
        """
        token = value[:, :, :1]
        return value + self(token, (token, torch.zeros_like(token)), None, None)

    def forward(self, query: Tensor, key_value: KeyValue, image_index: Tensor | None, keep: Tensor | None) -> Tensor:
        """query (S, H, L, D), image_index (S,) or None, keep (S, N) or None -> attention output (S, H, L, D)."""
        key, value = key_value
        bias = self.value_bias.to(query.dtype)
        return soft_masked_attention(query, key, value, keep, image_index=image_index, value_bias=bias)


class FusionLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, each with BERT's residual and norm."""

    def __init__(self, config: ModelConfig, image_width: int):
        super().__init__()
        bert = bert_config(config, config.fusion_layers)
        self.attention = BertAttention(bert)
        self.cross_attention = CrossAttention(config.text_width, image_width, config.text_heads)
        self.cross_output = BertSelfOutput(bert)
        self.intermediate = BertIntermediate(bert)
        self.output = BertOutput(bert)

    def query(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """text (S, L, C), mask (S, 1, 1, L) -> text after self-attention (S, L, C) and its queries (S, H, L, D)."""
        text = self.attention(text, mask)[0]
        return text, self.cross_attention.split_heads(self.cross_attention.query(text))

    def finish(self, text: Tensor, attended: Tensor) -> Tensor:
        """text (S, L, C) and the attention output (S, H, L, D) -> the layer's output (S, L, C)."""
        text = self.cross_output(attended.transpose(1, 2).flatten(2), text)
        return self.output(self.intermediate(text), text)

    def forward(
        self, text: Tensor, mask: Tensor, key_value: KeyValue, image_index: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        text, query = self.query(text, mask)
        return self.finish(text, self.cross_attention(query, key_value, image_index, keep))


class FusionEncoder(nn.Module):
    """The last layers of a BERT, with cross-attention to the image tokens."""

    def __init__(self, config: ModelConfig, image_width: int):
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config, image_width) for _ in range(config.fusion_layers))

    def keys_values(self, image_tokens: Tensor) -> list[KeyValue]:
        """image_tokens (B, N, Cv) -> the keys and values of every layer, each (B, H, N, D)."""
        return [layer.cross_attention.keys_values(image_tokens) for layer in self.layers]

    def forward(
        self,
        text: Tensor,
        attention_mask: Tensor,
        keys_values: list[KeyValue],
        image_index: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """text (S, L, C), attention_mask (S, L) bool, image_index (S,) int64 or None (then S == B: sequence i looks at
        image i), keep (S, N) float32 or None -> (S, L, C)."""
        mask = attention_mask[:, None, None, :]
        for layer, key_value in zip(self.layers, keys_values, strict=True):
            text = layer(text, mask, key_value, image_index, keep)
        return text

    def relevance_inputs(
        self, text: Tensor, attention_mask: Tensor, keys_values: list[KeyValue], layer: int, score
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `word_gradcam` and `word_soft_mask` need of one layer: query, key, value and the gradient of the score
        with respect to the attention output, all detached.

        text (B, L, C), attention_mask (B, L) bool; score: a function from the encoder's output (B, L, C) to (B,), one
        number per pair. The layers up to `layer` run without a graph, the later ones on a detached leaf.
        """
        mask = attention_mask[:, None, None, :]
        with torch.no_grad():
            for below, key_value in zip(self.layers[:layer], keys_values[:layer], strict=True):
                text = below(text, mask, key_value, None, None)
            text, query = self.layers[layer].query(text, mask)
            attended = self.layers[layer].cross_attention(query, keys_values[layer], None, None)

        def score_of(attended: Tensor) -> Tensor:
            hidden = self.layers[layer].finish(text, attended)
            for above, (key, value) in zip(self.layers[layer + 1 :], keys_values[layer + 1 :], strict=True):
                hidden = above(hidden, mask, (key.detach(), value.detach()), None, None)
            return score(hidden).sum()

        gradient = attention_output_gradient(score_of, attended)
        key, value = keys_values[layer]
        with torch.no_grad():
            value = self.layers[layer].cross_attention.biased(value)
        return query, key.detach(), value, gradient

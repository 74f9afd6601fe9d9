"""Fusion encoder: BERT layers that also attend to the image.

Four properties make it cheap, without approximation:

- Keys and values of each image are computed once per layer for all sequences that attend to it (`image_index`).
- A soft mask commutes with their projections: a masked image has the same keys and values, scaled by one factor `keep`
  per token inside the attention.
- The Grad-CAM of a layer only needs the graph from that layer's attention output onwards.
- The last layer only computes the tokens that are read: [CLS] for matching, the masked words for MLM.

There is no key bias: it would add the same number to all logits of a query, which softmax ignores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertOutput, BertSelfOutput

from softmask_fast.config import ModelConfig
from softmask_fast.model.packing import Packing
from softmask_fast.model.text import attend, bert_config, run_layer
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
        self.value_bias = nn.Parameter(torch.zeros(heads, width // heads))  # separate: a soft mask scales X W only

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, image_tokens: Tensor) -> KeyValue:
        """image_tokens (B, N, Cv) -> keys and values (B, H, N, D)."""
        return self.split_heads(self.key(image_tokens)), self.split_heads(self.value(image_tokens))

    def biased(self, value: Tensor) -> Tensor:
        """value (B, H, N, D) with its bias. A Grad-CAM needs it: dS/dA is dS/dO times the whole value.

        It is computed as attention to a single token of value zero, because ZeRO-3 only gathers a parameter in its
        module's forward.
        """
        token = value[:, :, :1]
        return value + self(token, (token, torch.zeros_like(token)), None, None)

    def forward(self, query: Tensor, key_value: KeyValue, image_index: Tensor | None, keep: Tensor | None) -> Tensor:
        """query (S, H, L, D), image_index (S,) or None, keep (S, N) or None -> attention output (S, H, L, D)."""
        key, value = key_value
        bias = self.value_bias.to(query.dtype)
        return soft_masked_attention(query, key, value, keep, image_index=image_index, value_bias=bias)


class FusionLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward on packed tokens, each with BERT's residual and norm."""

    def __init__(self, config: ModelConfig, image_width: int):
        super().__init__()
        bert = bert_config(config, config.fusion_layers)
        self.attention = BertAttention(bert)
        self.cross_attention = CrossAttention(config.text_width, image_width, config.text_heads)
        self.cross_output = BertSelfOutput(bert)
        self.intermediate = BertIntermediate(bert)
        self.output = BertOutput(bert)

    def query(
        self, text: Tensor, packing: Packing, attention: str, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """text (T, C) -> text after self-attention and its cross-attention queries, both (T, C), or (R, C) of the rows
        read (R,)."""
        attended = attend(self.attention.self, text, packing, attention)
        if read is not None:
            attended, text = attended.index_select(0, read), text.index_select(0, read)
        text = self.attention.output(attended, text)
        return text, self.cross_attention.query(text)

    def finish(self, text: Tensor, attended: Tensor) -> Tensor:
        """text (T, C) and the cross-attention's output (T, C) -> the layer's output (T, C)."""
        text = self.cross_output(attended, text)
        return self.output(self.intermediate(text), text)

    def forward(
        self, text: Tensor, packing: Packing, key_value: KeyValue, image_index: Tensor | None, keep: Tensor | None,
        attention: str,
    ) -> Tensor:  # fmt: skip
        """text (T, C) -> the layer's output (T, C); the rest as in `CrossAttention.forward`."""
        text, query = self.query(text, packing, attention)
        attended = self.cross_attention(
            self.cross_attention.split_heads(packing.pad(query)), key_value, image_index, keep
        )
        return self.finish(text, packing.pack(join_heads(attended)))

    def read(
        self, text: Tensor, packing: Packing, key_value: KeyValue, image_index: Tensor | None, keep: Tensor | None,
        attention: str, positions: Tensor,
    ) -> Tensor:  # fmt: skip
        """`forward` for some tokens only: positions (R,) among the S * L tokens -> (R, C)."""
        text, query = self.query(text, packing, attention, packing.rows_of(positions))
        sequence = positions // packing.mask.shape[1]
        image_index = sequence if image_index is None else image_index[sequence]
        keep = None if keep is None else keep[sequence]
        attended = self.cross_attention(self.cross_attention.split_heads(query[:, None]), key_value, image_index, keep)
        return self.finish(text, join_heads(attended)[:, 0])


class FusionEncoder(nn.Module):
    """The last layers of a BERT, with cross-attention to the image tokens.

    Attributes: attention ("auto", "padded", "varlen" or "xformers", see packing.py), checkpointing.
    """

    def __init__(self, config: ModelConfig, image_width: int):
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config, image_width) for _ in range(config.fusion_layers))
        self.attention, self.checkpointing = "auto", False

    def keys_values(self, image_tokens: Tensor) -> list[KeyValue]:
        """image_tokens (B, N, Cv) -> the keys and values of every layer, each (B, H, N, D)."""
        return [layer.cross_attention.keys_values(image_tokens) for layer in self.layers]

    def forward(
        self, text: Tensor, attention_mask: Tensor, keys_values: list[KeyValue], image_index: Tensor | None = None,
        keep: Tensor | None = None, positions: Tensor | None = None, packing: Packing | None = None,
    ) -> Tensor:  # fmt: skip
        """text (S, L, C), attention_mask (S, L) bool and its packing -> fused tokens (S, L, C), 0 at padding.

        Sequence i attends to the image image_index[i], (S,) int64, by default to image i, soft-masked by keep (S, N)
        float32. With positions (R,) int64 among the S * L tokens only these are computed: (R, C).
        """
        packing = Packing.of(attention_mask) if packing is None else packing
        text = packing.pack(text)
        inputs = (image_index, keep, self.attention)
        whole = self.layers if positions is None else self.layers[:-1]
        for layer, key_value in zip(whole, keys_values, strict=False):
            text = run_layer(layer, text, packing, key_value, *inputs, checkpointing=self.checkpointing)
        if positions is None:
            return packing.pad(text)
        last = self.layers[-1].read
        return run_layer(last, text, packing, keys_values[-1], *inputs, positions, checkpointing=self.checkpointing)

    def relevance_inputs(
        self, text: Tensor, attention_mask: Tensor, keys_values: list[KeyValue], layer: int,
        score: Callable[[Tensor], Tensor], packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Inputs of `word_gradcam` and `word_soft_mask` from one layer: query, key, value and the gradient of the score
        with respect to the attention output, all detached, (B, H, L, D) or (B, H, N, D).

        text (B, L, C), attention_mask (B, L) bool; score: from the encoder's output at [CLS] (B, C) to one number per
        pair (B,). The layers up to that one run without a graph, the later ones on a detached leaf.
        """
        packing = Packing.of(attention_mask) if packing is None else packing
        keys_values = [(key.detach(), value.detach()) for key, value in keys_values]
        chosen, last, positions = self.layers[layer], self.layers[-1], first_tokens(text)
        with torch.no_grad():
            text = packing.pack(text)
            for below, key_value in zip(self.layers[:layer], keys_values, strict=False):
                text = below(text, packing, key_value, None, None, self.attention)
            text, query = chosen.query(text, packing, self.attention)
            query = chosen.cross_attention.split_heads(packing.pad(query))
            attended = chosen.cross_attention(query, keys_values[layer], None, None)

        def score_of(attended: Tensor) -> Tensor:
            hidden = chosen.finish(text, packing.pack(join_heads(attended)))
            if chosen is last:
                return score(hidden[packing.rows_of(positions)]).sum()
            for above, key_value in zip(self.layers[layer + 1 : -1], keys_values[layer + 1 :], strict=False):
                hidden = above(hidden, packing, key_value, None, None, self.attention)
            hidden = last.read(hidden, packing, keys_values[-1], None, None, self.attention, positions)
            return score(hidden).sum()

        gradient = attention_output_gradient(score_of, attended)
        key, value = keys_values[layer]
        with torch.no_grad():
            value = chosen.cross_attention.biased(value)
        return query, key, value, gradient


def first_tokens(text: Tensor) -> Tensor:
    """The positions of [CLS] among the S * L tokens of text (S, L, C): (S,) int64."""
    return torch.arange(len(text), device=text.device) * text.shape[1]


def join_heads(x: Tensor) -> Tensor:
    """(S, H, L, D) -> (S, L, C)."""
    return x.transpose(1, 2).flatten(2)

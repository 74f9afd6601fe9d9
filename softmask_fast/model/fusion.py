"""Fusion encoder: BERT layers that also attend to the image.

Four properties make it cheap, without approximation:

- Keys and values of each image are computed once per layer for all sequences that attend to it (`image_index`).
- A soft mask commutes with their projections: a masked image has the same keys and values, scaled by one factor `keep`
  per token inside the attention.
- The Grad-CAM of a layer only needs the graph from that layer's attention output onwards.
- The last layer only computes the tokens that are read: [CLS] for matching, the masked tokens for MLM.

With `match_through_words` cross-attention gives nothing to [CLS] and [SEP]. Matching, which reads [CLS], then learns of
the image through the words alone, so each word has to look at what it names.

There is no key bias: it would add the same number to all logits of a query, which softmax ignores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertOutput, BertSelfOutput

from softmask_fast.config import ModelConfig
from softmask_fast.model.layers import after_attention, cross_query, run_region
from softmask_fast.model.packing import Packing
from softmask_fast.model.text import attend, attention_parts, bert_config, feed_forward_parts, output_parts
from softmask_fast.model.weights import Joined, WeightedLayer, run_layer
from softmask_fast.ops import ImagePlan, attention_output_gradient, plan_image_index, soft_masked_attention

Result = TypeVar("Result")
KeyValue = tuple[Tensor, Tensor]  # each (B, H, N, D), without bias


class CrossAttention(nn.Module):
    """Queries from the text, keys and values from the image, each with its own projection."""

    def __init__(self, width: int, image_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(image_width, width, bias=False)
        self.value = nn.Linear(image_width, width, bias=False)
        self.value_bias = nn.Parameter(torch.zeros(heads, width // heads))  # separate: a soft mask scales X W only

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, query: Tensor, key_value: KeyValue, image_index: ImagePlan | Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """query (S, H, L, D), or packed rows (T, H, D) with their plan; keep (S, N) or None -> output of the query's
        size."""
        key, value = key_value
        return soft_masked_attention(query, key, value, keep, image_index=image_index, value_bias=self.value_bias)


class FusionLayer(WeightedLayer):
    """Self-attention, cross-attention and feed-forward on packed tokens, each with BERT's residual and norm.

    Its parts, the methods below, run through its call: `layer(FusionLayer.query, text, ...)`.
    """

    def __init__(self, config: ModelConfig, image_width: int) -> None:
        super().__init__()
        bert = bert_config(config, config.fusion_layers)
        self.attention = BertAttention(bert)
        self.cross_attention = CrossAttention(config.text_width, image_width, config.text_heads)
        self.cross_output = BertSelfOutput(bert)
        self.intermediate = BertIntermediate(bert)
        self.output = BertOutput(bert)
        self.eps, self.drop = bert.layer_norm_eps, bert.hidden_dropout_prob
        self.words_alone = config.match_through_words

    def joined(self) -> list[Joined]:
        """The weights of `keys_values`, `attend`, `cross_query` and `after_attention`, in this order."""
        cross = self.cross_attention
        query = [Joined((cross.query.weight,)), Joined((cross.query.bias,))]
        rest = output_parts(self.cross_output) + feed_forward_parts(self.intermediate, self.output)
        return [Joined((cross.key.weight, cross.value.weight)), *attention_parts(self.attention), *query, *rest]

    def forward(self, part: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Runs a method of the layer; under ZeRO-3 the call gathers the weights."""
        return part(self, *arguments, **options)

    def keys_values(self, image_tokens: Tensor) -> KeyValue:
        """image_tokens (B, N, Cv) -> keys and values (B, H, N, D)."""
        joined = F.linear(image_tokens, self.weights()[0])
        key, value = joined.unflatten(-1, (2, self.cross_attention.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return key, value

    def query(
        self, text: Tensor, packing: Packing, attention: str, read: Tensor | None = None, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        """text (T, C) -> text after self-attention and its cross-attention queries, both (T, C), or (R, C) of the rows
        read (R,). Frozen: without dropout, and without a graph of the weights."""
        weights = self.weights(frozen)
        text = text.to(weights[0].dtype)
        attended = attend(weights[1:3], text, packing, self.cross_attention.heads, attention)
        if read is not None:
            attended, text = attended.index_select(0, read), text.index_select(0, read)
        drop = self.drop if self.training and not frozen else 0.0
        return run_region(self.compiled, cross_query, weights[3:9], attended, text, self.eps, drop)

    def finish(
        self, text: Tensor, attended: Tensor, packing: Packing, rows: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """text and the cross-attention's output, (T, C), or (R, C) of some rows (R,) -> the layer's output."""
        drop, weights = self.drop if self.training and not frozen else 0.0, self.weights(frozen)
        if self.words_alone:
            ends = packing.ends if rows is None else packing.ends[rows]
            attended = attended.masked_fill(ends[:, None], 0)
        return run_region(self.compiled, after_attention, weights[9:], attended, text, self.eps, drop)

    def whole(
        self, text: Tensor, packing: Packing, key_value: KeyValue, plan: ImagePlan, keep: Tensor | None,
        attention: str, frozen: bool = False,
    ) -> Tensor:  # fmt: skip
        """text (T, C) -> the layer's output (T, C); the rest as in `CrossAttention.forward` and `query`."""
        text, query = self.query(text, packing, attention, frozen=frozen)
        attended = self.cross_attention(query.unflatten(-1, (self.cross_attention.heads, -1)), key_value, plan, keep)
        return self.finish(text, attended.flatten(1), packing, frozen=frozen)

    def read(
        self, text: Tensor, packing: Packing, key_value: KeyValue, plan: ImagePlan, keep: Tensor | None,
        attention: str, positions: Tensor, frozen: bool = False,
    ) -> Tensor:  # fmt: skip
        """`whole` for some tokens only: positions (R,) among the S * L tokens -> (R, C)."""
        rows = packing.rows_of(positions)
        text, query = self.query(text, packing, attention, rows, frozen)
        sequence = positions // packing.mask.shape[1]
        image_index = plan.image_index[sequence]
        keep = None if keep is None else keep[sequence]
        attended = self.cross_attention(self.cross_attention.split_heads(query[:, None]), key_value, image_index, keep)
        return self.finish(text, join_heads(attended)[:, 0], packing, rows, frozen)

    def explained(
        self, text: Tensor, packing: Packing, key_value: KeyValue, attention: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """text (T, C) -> text (T, C) before the end of the layer, and of its cross-attention the query, the output and
        the value with its bias, all (B, H, ., D). A Grad-CAM needs the bias: dS/dA is dS/dO times the whole value."""
        text, query = self.query(text, packing, attention, frozen=True)
        query = self.cross_attention.split_heads(packing.pad(query))
        value = key_value[1] + self.cross_attention.value_bias[:, None].to(query.dtype)
        return text, query, self.cross_attention(query, key_value, None, None), value


class FusionEncoder(nn.Module):
    """The last layers of a BERT, with cross-attention to the image tokens.

    Attributes:
        attention: "auto", "padded", "varlen" or "xformers", see packing.py.
        checkpointing: whether the backward pass recomputes the intermediates of each layer.
    """

    def __init__(self, config: ModelConfig, image_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config, image_width) for _ in range(config.fusion_layers))
        self.attention, self.checkpointing = "auto", False

    def keys_values(self, image_tokens: Tensor) -> list[KeyValue]:
        """image_tokens (B, N, Cv) -> the keys and values of every layer, each (B, H, N, D)."""
        return [layer(FusionLayer.keys_values, image_tokens) for layer in self.layers]

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
        inputs = (plan_of(packing, image_index, keys_values), keep, self.attention)
        whole = self.layers if positions is None else self.layers[:-1]
        run = functools.partial(run_layer, checkpointing=self.checkpointing)
        for layer, key_value in zip(whole, keys_values, strict=False):
            text = run(layer, FusionLayer.whole, text, packing, key_value, *inputs)
        if positions is None:
            return packing.pad(text)
        return run(self.layers[-1], FusionLayer.read, text, packing, keys_values[-1], *inputs, positions)

    def relevance_inputs(
        self, text: Tensor, attention_mask: Tensor, keys_values: list[KeyValue], layer: int,
        score: Callable[[Tensor], Tensor], packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Inputs of `word_gradcam` and `word_soft_mask` from one layer: query, key, value and the gradient of the score
        with respect to the attention output, all detached, (B, H, L, D) or (B, H, N, D).

        text (B, L, C), attention_mask (B, L) bool; score: from the encoder's output at [CLS] (B, C) to one number per
        pair (B,). The layers up to that one run without a graph, the later ones on a detached leaf; none has dropout.
        """
        packing = Packing.of(attention_mask) if packing is None else packing
        keys_values = [(key.detach(), value.detach()) for key, value in keys_values]
        chosen, last, positions = self.layers[layer], self.layers[-1], first_tokens(text)
        plan = plan_of(packing, None, keys_values)
        inputs = dict(plan=plan, keep=None, attention=self.attention, frozen=True)
        with torch.no_grad():
            text = packing.pack(text)
            for below, key_value in zip(self.layers[:layer], keys_values, strict=False):
                text = below(FusionLayer.whole, text, packing, key_value, **inputs)
            parts = chosen(FusionLayer.explained, text, packing, keys_values[layer], self.attention)
        text, query, attended, value = parts

        def score_of(attended: Tensor) -> Tensor:
            hidden = chosen(FusionLayer.finish, text, packing.pack(join_heads(attended)), packing, frozen=True)
            if chosen is last:
                return score(hidden[packing.rows_of(positions)]).sum()
            for above, key_value in zip(self.layers[layer + 1 : -1], keys_values[layer + 1 :], strict=False):
                hidden = above(FusionLayer.whole, hidden, packing, key_value, **inputs)
            hidden = last(FusionLayer.read, hidden, packing, keys_values[-1], positions=positions, **inputs)
            return score(hidden).sum()

        return query, keys_values[layer][0], value, attention_output_gradient(score_of, attended)


def plan_of(packing: Packing, image_index: Tensor | None, keys_values: list[KeyValue]) -> ImagePlan:
    """Which rows see which image, for all layers: sequence i the image image_index[i], by default image i."""
    images, sequences = len(keys_values[0][0]), len(packing.mask)
    if image_index is None:
        image_index = torch.arange(images, device=packing.mask.device)
    boundaries = packing.boundaries[: sequences + 1]  # the rows behind are padding
    return plan_image_index(image_index, images, boundaries=boundaries, rows=len(packing.positions))


def first_tokens(text: Tensor) -> Tensor:
    """The positions of [CLS] among the S * L tokens of text (S, L, C): (S,) int64."""
    return torch.arange(len(text), device=text.device) * text.shape[1]


def join_heads(x: Tensor) -> Tensor:
    """(S, H, L, D) -> (S, L, C)."""
    return x.transpose(1, 2).flatten(2)

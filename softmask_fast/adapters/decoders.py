"""Word maps of decoders that read an image as tokens: LLaVA, Qwen-VL, InternVL, PaliGemma, Idefics, Gemma, ..."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softmask_fast.adapters.attention_record import AttentionRecord, take
from softmask_fast.adapters.image_layouts import Layout, find_layouts, on_picture
from softmask_fast.adapters.scores import (
    BEFORE,
    OUTSIDE,
    UNREAD,
    answer_log_probability,
    answer_start,
    next_token_log_probability,
    notes,
)
from softmask_fast.errors import UsageError

Score = Callable[[Any], Tensor]


class DecoderRelevance:
    """Word maps of one layer of a decoder, from what it computed in the model's last forward pass.

    Attributes, after a forward pass:
        image_tokens: (B, L) bool, True where a token stands for the image.
        answer: (B,) int64, the position of each answer's first token; None without answers.
        notes: after `maps`, one line for each reason why some words have no map.
    """

    def __init__(
        self, model: nn.Module, score: Score | None, image_tokens: Tensor | None, answer: int | Tensor | None
    ) -> None:
        self.model, self.score = model, score
        self._given_tokens, self._given_answer = image_tokens, answer
        self.inputs: dict[str, Any] = {}
        self.outputs: Any = None
        self.record: AttentionRecord | None = None
        self.passes = 0
        self.zero: list[tuple[Tensor, str]] = []  # (B, W) bool of the words of `maps`, and why they have none
        self.notes: list[str] = []

    @property
    def image_tokens(self) -> Tensor:
        """(B, N) bool: True for image tokens. Raises UsageError if they are unknown."""
        self._check_pass()
        tokens = self.record.key.shape[2]
        found = self._given_tokens
        if found is None:
            ids, image_id = self.inputs.get("input_ids"), image_token_id(self.model)
            if ids is None or image_id is None:
                what = "input_ids" if ids is None else "image_token_id in its configuration"
                raise UsageError(f"image_tokens: expected (B, {tokens}) bool, as the model has no {what}; got None")
            found = ids == image_id
        if found.shape[1] != tokens and found.shape[1] != self.record.query.shape[2]:
            raise UsageError(f"image_tokens: expected (B, {tokens}) bool, got {tuple(found.shape)}")
        if found.shape[1] < tokens and self._past:
            raise UsageError(
                f"image_tokens: expected (B, {tokens}) bool, as the pass continues a KV cache; got None or "
                f"{tuple(found.shape)}"
            )
        if not found.any():
            raise UsageError("input_ids: expected an image's tokens among them, got a text alone")
        return found

    @property
    def answer(self) -> Tensor | None:
        """Where the answer starts, see `answer_start`."""
        return answer_start(self.inputs, self._given_answer)

    def keep(self, _: nn.Module, record: AttentionRecord) -> None:
        """Keep what the layer's attention computed in the last forward pass."""
        self.record = record

    def maps(self, score: Tensor | None = None, word_index: Tensor | None = None) -> Tensor:
        """Grad-CAM of a score of the last forward pass, for words of the prompt or of the answer.

        The map of a prompt word comes from its own row of the attention. That of an answer word comes from the row
        before it, which predicts it. A word sees only the image tokens before it; without any, its map is zero and
        `notes` says so.

        Args:
            score: (B,) or a scalar, computed inside the `with` block. None: the `score` passed to `word_relevance`;
                else the log-probability of the answer, if `answer` or labels say where it begins; else that of the most
                likely next token.
            word_index: (B, W) or (B,) int64, positions among the tokens of this pass; None: all.

        Returns:
            The relevance of each image token, in order, float32, at least 0: (B, W, N), or (B, N) for a `word_index` of
            (B,). N is the largest number of image tokens in a sample; samples with fewer are padded with 0.

        Raises:
            UsageError: if there was no forward pass, or several pieces of one, as in `generate()`; if the score does
                not depend on the layer, or a word is out of range.
        """
        self._check_pass()
        record = self.record
        batch, _, length, _ = record.query.shape
        batch = max(batch, len(record.key))
        device = record.key.device
        if word_index is None:
            words = torch.arange(length, device=device).expand(batch, -1)
        else:
            words = (word_index if word_index.ndim == 2 else word_index[:, None]).to(device)
            if len(words) != batch or words.numel() and not 0 <= int(words.min()) <= int(words.max()) < length:
                raise UsageError(
                    f"word_index: expected ({batch}, words) positions from 0 to {length - 1}, got {tuple(words.shape)} "
                    f"from {int(words.min())} to {int(words.max())}"
                )
        gradient = record.gradient(self._score() if score is None else score)
        rows = self._rows(words)
        columns, exists = self._columns()
        maps, sees = record.maps(gradient, rows, columns, exists)
        self.zero = self._zero_by_construction(gradient, rows, words, columns, exists, sees)
        self.notes = notes(words, self.zero)
        return maps if word_index is None or word_index.ndim == 2 else maps[:, 0]

    def image_features(self) -> Tensor:
        """What words can read from each image token in this layer: its values (B, N, C), in the order of `maps`."""
        values = take(self.record.value, self._columns()[0])
        return values.transpose(1, 2).flatten(2)

    def layouts(self, picture_sizes: Sequence[tuple[int, int]] | None = None) -> list[list[Layout]]:
        """Where the image tokens lie on the images: for each sample, a list with one layout per image.

        Args:
            picture_sizes: (height, width) of every image of the batch, in order, in pixels. Needed by models whose
                inputs do not say how an image was cut into tiles (InternVL); without it, only their overview is mapped.

        Raises:
            UsageError: for a model whose image grid is unknown here, or image tokens that do not fit the images.
        """
        return find_layouts(self.model, self.inputs, self.image_tokens, picture_sizes)

    def pictures(self, maps: Tensor, picture_sizes: Sequence[tuple[int, int]] | None = None) -> list[list[Tensor]]:
        """Lays maps (B, W, N) on the images: for each sample, a list with one (W, rows, columns) per image.

        The relevance of a token is spread evenly over the part of the image that it covers. Where tiles overlap, it
        adds up. Tokens that cover no part (ends of rows) are left out. `picture_sizes` and errors are as in `layouts`.
        """
        placed = []
        for sample, layouts in zip(maps, self.layouts(picture_sizes), strict=True):
            first, images = 0, []
            for layout in layouts:
                images.append(on_picture(sample[:, first : first + layout.tokens], layout))
                first += layout.tokens
            placed.append(images)
        return placed

    def _check_pass(self) -> None:
        if self.record is None:
            raise UsageError("score: expected a forward pass inside the `with` block first, the layer has not run yet")
        if self.passes > 1 and self.record.query.shape[2] == 1 < self.record.key.shape[2]:
            raise UsageError(
                "maps: expected one forward pass over the finished answer, got the steps of generate(); see "
                "with_answer in softmask_fast.adapters.words"
            )

    @property
    def _past(self) -> bool:
        return self.record.key.shape[2] > self.record.query.shape[2]

    def _attended(self) -> Tensor:
        """(B, L) bool, the tokens of this pass that are no padding."""
        ids, mask = self.inputs.get("input_ids"), self.inputs.get("attention_mask")
        length = self.record.query.shape[2]
        if mask is None or mask.ndim != 2:
            like = ids if ids is not None else self.inputs["inputs_embeds"][..., 0]
            return torch.ones_like(like, dtype=torch.bool)
        return mask[:, -length:].bool()

    def _score(self) -> Tensor:
        with torch.enable_grad():
            if self.score is not None:
                return self.score(self.outputs)
            logits = getattr(self.outputs, "logits", None)
            if logits is None:
                raise UsageError("score: expected a callable or a tensor, as the output has no logits; got None")
            return self._answer_score(logits)

    def _answer_score(self, logits: Tensor) -> Tensor:
        if self.answer is None:
            return next_token_log_probability(logits, self._attended())
        return answer_log_probability(logits, self.inputs["input_ids"], self.answer, self._attended())

    def _rows(self, words: Tensor) -> Tensor:
        if self.answer is None:
            return words
        answered = words >= self.answer.to(words.device)[:, None]
        return (words - answered.long()).clamp(min=0)

    def _columns(self) -> tuple[Tensor, Tensor]:
        """The places (B, N) of the image tokens among the keys, and which of them exist."""
        tokens = self.image_tokens.to(self.record.key.device)
        exists = torch.arange(int(tokens.sum(1).max()), device=tokens.device) < tokens.sum(1, keepdim=True)
        order = tokens.int().argsort(dim=1, descending=True, stable=True)[:, : exists.shape[1]]
        return order * exists, exists

    def _zero_by_construction(
        self, gradient: Tensor, rows: Tensor, words: Tensor, columns: Tensor, exists: Tensor, sees: Tensor
    ) -> list[tuple[Tensor, str]]:
        attended = self._attended().to(rows.device).gather(1, words)
        first = torch.where(exists, columns, columns.new_full((), 1 << 62)).amin(1, keepdim=True)
        before = attended & (rows + self.record.key.shape[2] - self.record.query.shape[2] < first)
        unread = attended & ~before & ~gradient.abs().amax((1, 3)).bool().gather(1, rows)
        outside = attended & ~before & ~unread & ~sees
        return [(before, BEFORE), (unread, UNREAD), (outside, OUTSIDE)]


def image_token_id(model: nn.Module) -> int | None:
    """The id at the image's places, by the model's configuration."""
    config = model.config
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def decoder_attention(model: nn.Module) -> list[nn.Module]:
    """The self-attention of the language model's layers, in order; empty if there is none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    numbered: dict[str, list[nn.Module]] = {}
    for name, module in decoder.named_modules():
        if found := re.fullmatch(r"(.*?)\.?\d+\.(self_attn|attn|attention|layer\.0\.SelfAttention)", name):
            numbered.setdefault(found[1], []).append(module)
    return max(numbered.values(), key=len, default=[])

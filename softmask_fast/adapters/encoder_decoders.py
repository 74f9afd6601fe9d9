"""Word maps of decoders that read an image by cross-attention, through the attention interface of transformers:
captioners such as GPT-2 and BART, and Mllama."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from softmask_fast.adapters.decoders import DecoderRelevance, image_token_id
from softmask_fast.adapters.image_layouts import square_grid
from softmask_fast.adapters.scores import LABEL_IGNORED, UNREAD, answer_log_probability
from softmask_fast.errors import UsageError


class EncoderDecoderRelevance(DecoderRelevance):
    """`DecoderRelevance` for a cross-attention layer. The image tokens are some or all of the encoder's tokens.

    Words are the decoder's tokens. If the model is called with `decoder_input_ids`, a word's map comes from the row
    before it, which predicts it. If it is called with `labels` alone, the words are the labels, each at its own row.
    """

    @property
    def image_tokens(self) -> Tensor:
        self._check_pass()
        batch, tokens = self.record.key.shape[0], self.record.key.shape[2]
        ids, image_id = self.inputs.get("input_ids"), image_token_id(self.model)
        if self._given_tokens is not None:
            found = self._given_tokens
        elif ids is not None and image_id is not None and ids.shape[1] == tokens and (ids == image_id).any():
            found = ids == image_id
        else:
            found = torch.ones(batch, tokens, dtype=torch.bool, device=self.record.key.device)
        if found.shape != (batch, tokens):
            raise UsageError(f"image_tokens: expected ({batch}, {tokens}) bool, got {tuple(found.shape)}")
        return found

    @property
    def answer(self) -> Tensor | None:
        """As passed; default: 1, after the decoder's first token. None with labels alone: the words are the labels."""
        ids = self._decoder_ids()
        if ids is None:
            return None
        return torch.as_tensor(1 if self._given_answer is None else self._given_answer).expand(len(ids))

    def pictures(self, maps: Tensor, picture_sizes: Any = None) -> list[list[Tensor]]:
        """Lays maps (B, W, N) on the square grid of patches, without [CLS]: for each sample, a list of one picture."""
        return [[picture] for picture in square_grid(maps)]

    def _decoder_ids(self) -> Tensor | None:
        """The decoder's ids: all input_ids if the encoder reads only the image (Mllama)."""
        ids = self.inputs.get("decoder_input_ids")
        return self.inputs.get("input_ids") if ids is None and not self.model.config.is_encoder_decoder else ids

    def _attended(self) -> Tensor:
        ids, decoder = self._decoder_ids(), "decoder_" * bool(self.model.config.is_encoder_decoder)
        mask = self.inputs.get(f"{decoder}attention_mask")
        if mask is not None:
            return mask.bool()
        return self.inputs["labels"] != LABEL_IGNORED if ids is None else torch.ones_like(ids, dtype=torch.bool)

    def _answer_score(self, logits: Tensor) -> Tensor:
        ids, attended = self._decoder_ids(), self._attended()
        if ids is not None:
            return answer_log_probability(logits, ids, self.answer.to(ids.device), attended)
        labels = self.inputs["labels"].clamp(min=0)
        chosen = logits.float().gather(2, labels[..., None])[..., 0] - logits.float().logsumexp(-1)
        return (chosen * attended).sum(1)

    def _zero_by_construction(
        self, gradient: Tensor, rows: Tensor, words: Tensor, *_: Tensor
    ) -> list[tuple[Tensor, str]]:
        unread = self._attended().to(rows.device).gather(1, words)
        unread = unread & ~gradient.abs().amax((1, 3)).bool().gather(1, rows)
        return [(unread, UNREAD)]


def cross_attention(model: nn.Module) -> list[nn.Module]:
    """The cross-attention of a decoder's layers that runs by the attention interface, in order; empty if none does."""
    numbered: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if found := re.fullmatch(r"(.*)\.\d+\.(encoder_attn|cross_attn|crossattention)", name):
            if not hasattr(module, "self"):  # BERT's, which holds the attention itself
                numbered.setdefault(found[1], []).append(module)
    return max(numbered.values(), key=len, default=[])

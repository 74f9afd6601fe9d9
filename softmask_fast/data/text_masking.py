"""BERT's masking of tokens, and the random word that drives the soft mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from softmask_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACE_BY_MASK = 0.8  # BERT: 80 % [MASK], 10 % a random token, 10 % unchanged
REPLACE_BY_RANDOM = 0.1


@dataclass(frozen=True)
class MaskedCaption:
    """One caption after masking. Positions count tokens from [CLS] = 0."""

    ids: np.ndarray  # (L,) int64
    positions: np.ndarray  # (P,) int64, ascending: the tokens to predict
    labels: np.ndarray  # (P,) int64: the original ids there
    word_index: int  # first token of the chosen word


class TextMasker:
    """Masks captions of a tokenizer. Raises UsageError for a probability outside [0, 1]."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, mask_probability: float = 0.15) -> None:
        if not 0 <= mask_probability <= 1:
            raise UsageError(f"mask_probability: expected in [0, 1], got {mask_probability}")
        self.mask_probability = mask_probability
        self._mask_id = tokenizer.mask_token_id
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        special = np.zeros(len(pieces), bool)
        special[tokenizer.all_special_ids] = True
        self._special = special  # (V,) bool
        self._ordinary_ids = np.flatnonzero(~special)
        # punctuation may be masked, but an image cannot show it
        self.word_start = ~special & [  # (V,) bool
            not piece.startswith("##") and any(letter.isalnum() for letter in piece) for piece in pieces
        ]

    def mask(self, ids: np.ndarray, generator: np.random.Generator) -> MaskedCaption:
        """Masks one caption and draws its word.

        Each token is chosen with `mask_probability`, at least one unless the probability is 0. The word is one that was
        not chosen, if possible; in a caption without a known word it is the first token after [CLS].

        Args:
            ids: (L,) int64, with special tokens and without padding.
            generator: Of the random numbers.
        """
        candidates = np.flatnonzero(~self._special[ids])
        chosen = candidates[generator.random(len(candidates)) < self.mask_probability]
        if len(chosen) == 0 and len(candidates) and self.mask_probability > 0:
            chosen = candidates[generator.integers(len(candidates), size=1)]
        masked = ids.copy()
        kind = generator.random(len(chosen))
        masked[chosen[kind < REPLACE_BY_MASK]] = self._mask_id
        random = chosen[(kind >= REPLACE_BY_MASK) & (kind < REPLACE_BY_MASK + REPLACE_BY_RANDOM)]
        masked[random] = self._ordinary_ids[generator.integers(len(self._ordinary_ids), size=len(random))]

        words = np.flatnonzero(self.word_start[ids])
        words = words if len(words) else candidates
        hidden = np.zeros(len(ids), bool)
        hidden[chosen] = True
        unmasked = words[~hidden[words]]
        words = unmasked if len(unmasked) else words
        word_index = int(words[generator.integers(len(words))]) if len(words) else min(1, len(ids) - 1)
        return MaskedCaption(masked, chosen, ids[chosen], word_index)

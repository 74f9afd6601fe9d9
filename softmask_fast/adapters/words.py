"""Words of a decoder's tokens, and the second pass over an answer that `generate()` wrote."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softmask_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arguments with one number per token, and the number for a generated token.
TOKEN_ARGUMENTS = {"token_type_ids": 0, "mm_token_type_ids": 0}
SUFFIX = {"paligemma": 1}  # token_type_ids of an answer, by model_type
ONE_PASS = ("labels", "position_ids", "cache_position", "past_key_values", "rope_deltas")


@dataclass(frozen=True)
class Word:
    """A word of the prompt or of the answer."""

    text: str
    tokens: tuple[int, ...]  # positions of its tokens


def with_answer(model: nn.Module, inputs: Mapping[str, Any], generated: Tensor) -> tuple[dict[str, Any], int]:
    """The inputs of one forward pass over prompt and answer, to map what `generate` wrote.

    Args:
        model: the model that generated.
        inputs: the processor's output, as passed to `generate`, with input_ids (B, L), padded on the left.
        generated: (B, L + T) int64 as `generate` returns them, or (B, T) of the answer alone.

    Returns:
        The inputs with input_ids (B, L + T), padded after the end of each answer; and L, where the answers begin, for
        `word_relevance(answer=...)`.

    Raises:
        UsageError: if nothing was generated.
    """
    prompt = inputs["input_ids"]
    length = prompt.shape[1]
    if generated.shape[1] >= length and torch.equal(generated[:, :length], prompt):
        generated = generated[:, length:]
    if generated.shape[1] == 0:
        raise UsageError("generated: expected at least one token after the prompt, got none")
    end = getattr(model.generation_config, "eos_token_id", None)
    ends = torch.tensor([] if end is None else end, dtype=generated.dtype, device=generated.device).view(-1)
    ended = torch.isin(generated, ends).int()
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(prompt) if mask is None else mask
    full = {name: value for name, value in inputs.items() if name not in ONE_PASS}
    full["input_ids"] = torch.cat([prompt, generated], 1)
    full["attention_mask"] = torch.cat([mask, (ended.cumsum(1) - ended == 0).to(mask)], 1)
    for name, number in TOKEN_ARGUMENTS.items():
        if full.get(name) is not None:
            number = SUFFIX.get(model.config.model_type, number) if name == "token_type_ids" else number
            full[name] = torch.cat([full[name], torch.full_like(generated, number).to(full[name])], 1)
    return full, length


def words_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], left_out: Collection[int] = (), starts: Collection[int] = ()
) -> list[Word]:
    """The words of a text, separated by whitespace.

    Args:
        tokenizer: any tokenizer of transformers.
        ids: the tokens of the text. Special ones separate words and belong to none.
        left_out: positions of other tokens to leave out, such as padding and the image.
        starts: positions where a word always begins, such as the answer's first token.

    Returns:
        The words in order, with the positions of their tokens.
    """
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    hidden = set(left_out) | {place for place, token in enumerate(ids) if token in special}
    words: list[tuple[str, list[int]]] = []
    part: list[int] = []
    before = ""
    for place, token in enumerate(ids):
        if place in hidden or place in starts:
            part, before = [], ""
        if place in hidden:
            continue
        part.append(token)
        text = tokenizer.decode(part, clean_up_tokenization_spaces=False)
        piece = text[len(before) :]
        if not before or before[-1].isspace() or piece[:1].isspace():
            words.append(("", []))
        before = text
        words[-1] = (words[-1][0] + piece, [*words[-1][1], place])
    return [Word(text.strip(), tuple(places)) for text, places in words if text.strip()]


def maps_of_words(maps: Tensor, words: Sequence[Word]) -> Tensor:
    """Averages the maps (L, ...) of all tokens over the tokens of each word: (words, ...)."""
    return torch.stack([maps[list(word.tokens)].mean(0) for word in words]) if words else maps[:0]

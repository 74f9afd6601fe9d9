"""The default score that a map explains, its gradient, and the notes about maps that are zero by construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softmask_fast.errors import UsageError

LABEL_IGNORED = -100
BEFORE = "before the image, which it cannot see"
OUTSIDE = "the image is outside this layer's window"
UNREAD = "not read by the score"


def output_gradient(score: Tensor, output: Tensor) -> Tensor:
    """d score / d output, of a layer that has run; the graph stays. Raises UsageError for a score without it."""
    gradient = None
    if score.requires_grad:
        (gradient,) = torch.autograd.grad(score.sum(), output, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise UsageError(
            "score: expected one computed inside the `with` block from the layer's output, got one that does not "
            "depend on it"
        )
    return gradient


def answer_start(inputs: dict[str, Any], answer: int | Tensor | None) -> Tensor | None:
    """The position (B,) of each answer's first token: as given, else that of the first label; None without answers."""
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    if answer is not None:
        batch = len(ids if ids is not None else inputs["inputs_embeds"])
        first = torch.as_tensor(answer).expand(batch)
        return first.to(ids.device if ids is not None else "cpu")
    if labels is None or ids is None or labels.shape != ids.shape or not (labels != LABEL_IGNORED).any():
        return None
    return (labels != LABEL_IGNORED).int().argmax(1)


def answer_log_probability(logits: Tensor, ids: Tensor, first: Tensor, attended: Tensor) -> Tensor:
    """The log-probability (B,) of each answer.

    Args:
        logits: (B, T, V) of the last T of L tokens.
        ids, attended: (B, L) int64 and bool.
        first: (B,) int64, the position of the answer's first token, at least 1.

    Raises:
        UsageError: if a sample has no answer, or its logits were not kept.
    """
    length, first = ids.shape[1], first.to(ids.device)
    wanted = (torch.arange(length, device=ids.device) >= first[:, None]) & attended
    low, offset = int(first.min()), length - logits.shape[1]
    if not wanted.any(1).all() or low < 1 or low - 1 < offset:
        raise UsageError(
            f"answer: expected a position from {max(1, offset + 1)} to {length - 1} for every sample, where an answer "
            f"begins whose logits are kept, got {first.tolist()}"
        )
    kept = logits[:, low - 1 - offset : -1].float()
    chosen = kept.gather(2, ids[:, low:, None].to(kept.device))[..., 0] - kept.logsumexp(-1)
    return (chosen * wanted[:, low:].to(kept.device)).sum(1)


def next_token_log_probability(logits: Tensor, attended: Tensor) -> Tensor:
    """The log-probability (B,) of the likeliest next token after the last attended one, without answers."""
    positions = torch.arange(attended.shape[1], device=attended.device)
    last = (attended * positions).argmax(1) - (attended.shape[1] - logits.shape[1])
    at_last = logits[torch.arange(len(logits), device=logits.device), last.to(logits.device)].float()
    return at_last.amax(-1) - at_last.logsumexp(-1)


def notes(words: Tensor, reasons: Sequence[tuple[Tensor, str]]) -> list[str]:
    """A line for each reason, with the words that it holds for, from (B, W) bool."""
    notes = []
    for found, reason in reasons:
        for sample in range(len(found)):
            if places := words[sample][found[sample]].tolist():
                notes.append(f"sample {sample}: zero at {_ranges(places)}: {reason}")
    return notes


def _ranges(places: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    runs: list[list[int]] = []
    for place in sorted(set(places)):
        if runs and runs[-1][-1] == place - 1:
            runs[-1][1:] = [place]
        else:
            runs.append([place])
    return ", ".join("-".join(map(str, run)) for run in runs)

"""The answers of a task's model to all examples, and their mean score."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast as Tokenizer

from softmask_fast.errors import UsageError
from softmask_fast.evaluation.common import (
    batches,
    eval_mode,
    gather_objects,
    image_pixels,
    rank_indices,
    sample_count,
    tokenize,
    usable_samples,
)
from softmask_fast.evaluation.tables import format_table, format_title, percent
from softmask_fast.tasks.base import TaskModel
from softmask_fast.tasks.datasets import Example, ExampleSource


@dataclass(frozen=True)
class AnswerReport:
    """The mean score of a model's answers. Scores are fractions in [0, 1], and None if the examples have no labels."""

    task: str
    metric: str  # what the score is called
    examples: int
    score: float | None
    majority: float | None  # the score of answering every example with the most frequent right answer
    majority_answer: str | None  # that answer
    skipped: dict[str, str]  # examples that could not be used: key -> reason
    truncated_texts: int  # texts cut to the model's max_tokens
    predictions: list[dict[str, Any]] = field(repr=False)  # "answer" to each "question_id", or "key" without one

    def as_dict(self) -> dict[str, Any]:
        """All but the predictions."""
        return {name: value for name, value in vars(self).items() if name != "predictions"}

    def table(self) -> str:
        """The report as a table for a terminal."""
        notes = {"examples skipped": len(self.skipped), "texts too long and cut": self.truncated_texts}
        if self.score is None:
            title = f"{self.task}: answered {self.examples} examples; nothing to measure, as they have no labels"
            return format_title(title, notes)
        rows = [["model", percent(self.score, 2)], [f"always {self.majority_answer!r}", percent(self.majority, 2)]]
        return format_table(f"{self.task} on {self.examples} examples", notes, [f"{self.metric} in %", ""], rows)


def evaluate_answers(
    model: TaskModel, tokenizer: Tokenizer, source: ExampleSource, *, batch_size: int = 64, limit: int | None = None,
    progress: bool = False,
) -> AnswerReport:  # fmt: skip
    """Answers the examples of a source, or the first `limit` of them, and scores the answers if there are labels.

    In a process group this is a collective: each rank answers a part, and all return the report of all examples.

    Raises:
        UsageError: If no example can be used, or an option is out of range.
    """
    count = sample_count(source, batch_size, limit)
    skipped: dict[str, str] = {}
    answered: list[tuple[int, Example, Any]] = []
    truncated = 0
    indices = tqdm(rank_indices(count), desc="examples", unit="example", disable=not progress)
    with eval_mode(model), torch.inference_mode():
        for batch in batches(usable_samples(source, indices, skipped), batch_size):
            numbers, examples = zip(*batch, strict=True)
            text = tokenize(model, tokenizer, [example.text for example in examples])
            truncated += text.truncated
            answers = model.predict(image_pixels(model, examples), text.input_ids, text.attention_mask)
            without_images = [replace(example, images=[]) for example in examples]
            answered += zip(numbers, without_images, answers, strict=True)
    ranks = gather_objects((answered, skipped, truncated))
    answered = sorted((one for own, _, _ in ranks for one in own), key=lambda one: one[0])
    if not answered:
        raise UsageError(f"source: none of {count} examples can be used: {ranks[0][1]}")
    score = majority = common = None
    if source.labeled:
        common, _ = Counter(model.truth(example) for _, example, _ in answered).most_common(1)[0]
        score = statistics.fmean(model.score(example, answer) for _, example, answer in answered)
        majority = statistics.fmean(model.score(example, common) for _, example, _ in answered)
    return AnswerReport(
        task=model.name,
        metric=model.metric,
        examples=len(answered),
        score=score,
        majority=majority,
        majority_answer=None if common is None else str(common),
        skipped={key: reason for _, own, _ in ranks for key, reason in own.items()},
        truncated_texts=sum(own for _, _, own in ranks),
        predictions=[_identity(example) | {"answer": answer} for _, example, answer in answered],
    )


def _identity(example: Example) -> dict[str, Any]:
    """What identifies an example among the predictions; VQA's server asks for "question_id"."""
    number = example.record.get("question_id")
    return {"key": example.key} if number is None else {"question_id": number}

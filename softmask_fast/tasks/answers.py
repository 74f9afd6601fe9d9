"""The answers of a task's model to all examples, and their score."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from softmask_fast.evaluation.common import (
    batches,
    eval_mode,
    format_table,
    gathered,
    image_pixels,
    sample_count,
    share_of_rank,
    titled,
    tokenize,
    usable_samples,
)
from softmask_fast.tasks.base import TaskModel
from softmask_fast.tasks.datasets import Example, ExampleSource


@dataclass(frozen=True)
class AnswerReport:
    """Mean score over examples, as a fraction, and the floor of the most frequent answer given to all of them; None
    where the examples have no labels, and the answers alone are of use."""

    task: str
    metric: str
    examples: int
    score: float | None
    majority: float | None
    majority_answer: str | None
    skipped: dict[str, str]  # examples that could not be used: key -> reason
    truncated_texts: int
    predictions: list[dict[str, Any]] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "predictions"}

    def table(self) -> str:
        notes = {"examples skipped": len(self.skipped), "texts too long and cut": self.truncated_texts}
        if self.score is None:
            told = f"{self.task}: nothing to measure, the entries have no labels; {self.examples} examples are answered"
            return titled(told, notes)
        rows = [
            ["model", f"{100 * self.score:.2f}"],
            [f"always {self.majority_answer!r}", f"{100 * self.majority:.2f}"],
        ]
        return format_table(f"{self.task} on {self.examples} examples", notes, [f"{self.metric} in %", ""], rows)


def evaluate_answers(
    model: TaskModel,
    tokenizer,
    source: ExampleSource,
    *,
    batch_size: int = 64,
    limit: int | None = None,
    progress: bool = False,
) -> AnswerReport:
    """Answer every example of the source (or the first `limit`) and score the answers, where it has labels.

    Where a process group is up, each rank answers its share and all return the report of all examples, each counted
    once: a collective. Raises ValueError when no example can be used, and for options out of range.
    """
    count = sample_count(source, batch_size, limit)
    skipped: dict[str, str] = {}
    answered: list[tuple[int, Example, Any]] = []
    truncated = 0
    numbers = tqdm(share_of_rank(count), desc="examples", unit="example", disable=not progress)
    with eval_mode(model), torch.inference_mode():
        for batch in batches(usable_samples(source, numbers, skipped), batch_size):
            indices, examples = zip(*batch, strict=True)
            text = tokenize(model, tokenizer, [example.text for example in examples])
            truncated += text.truncated
            answers = model.predict(image_pixels(model, examples), text.input_ids, text.attention_mask)
            without_images = [replace(example, images=[]) for example in examples]
            answered += zip(indices, without_images, answers, strict=True)
    found = gathered((answered, skipped, truncated))
    answered = sorted((one for of_rank, _, _ in found for one in of_rank), key=lambda one: one[0])
    if not answered:
        raise ValueError(f"source: none of {count} examples can be used: {found[0][1]}")
    score = majority = common = None
    if source.labelled:
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
        skipped={key: reason for _, skips, _ in found for key, reason in skips.items()},
        truncated_texts=sum(cut for _, _, cut in found),
        predictions=[_named(example) | {"answer": answer} for _, example, answer in answered],
    )


def _named(example: Example) -> dict[str, Any]:
    """What names an example among the predictions: VQA's server asks for the question's id."""
    number = example.record.get("question_id")
    return {"key": example.key} if number is None else {"question_id": number}

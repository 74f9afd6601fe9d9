"""Visual question answering (VQA v2): a decoder learns to write the answer, and ranks the answers in a list.

Entries of ALBEF's JSON files: {"image": path, "question": text, "answer": the annotators' answers, "question_id":
number}. In training a question whose answer is a single text (Visual Genome) has half the weight. The metric is VQA's
official accuracy (`evaluation/vqa_accuracy.py`).

As in ALBEF, the decoder starts from the fusion layers, the text encoder's embeddings and the language head.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertLMHeadModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from softmask_fast.errors import UsageError, short
from softmask_fast.evaluation.vqa_accuracy import FEWEST_ANNOTATORS, vqa_accuracy
from softmask_fast.model.text import bert_config
from softmask_fast.model.vision_language import VisionLanguageModel, hold_key_biases
from softmask_fast.tasks.base import Loss, TaskModel
from softmask_fast.tasks.datasets import EntryFormat, Example, TaskBatch, one_image
from softmask_fast.utils import read_json

logger = logging.getLogger(__name__)

SINGLE_ANSWER_WEIGHT = 0.5  # of a question with a single answer: ALBEF's weight of Visual Genome
RANKING_BATCH = 1024  # sequences ranked at a time; their logits are (sequences, L, V)


def _weighted_answers(entry: dict[str, Any]) -> list[tuple[str, float]]:
    """Each distinct answer, weighted by the fraction of annotators who gave it."""
    given = entry.get("answer")
    if isinstance(given, str) and given.strip():
        return [(given, SINGLE_ANSWER_WEIGHT)]
    if not _is_list_of_texts(given):
        raise UsageError(f'"answer": expected a string or a list of strings, got {short(given)}')
    return [(answer, count / len(given)) for answer, count in Counter(given).items()]


def _annotated_answers(entry: dict[str, Any]) -> list[tuple[str, float]]:
    """The same for evaluation, where a list needs as many annotators as the official accuracy."""
    answers = _weighted_answers(entry)
    if isinstance(entry["answer"], list) and len(entry["answer"]) < FEWEST_ANNOTATORS:
        raise UsageError(
            f'"answer": expected one answer, or those of at least {FEWEST_ANNOTATORS} people (VQA v2 has ten), got '
            f"{short(entry['answer'])}"
        )
    return answers


def _is_list_of_texts(answers: Any) -> bool:
    return isinstance(answers, list) and bool(answers) and all(isinstance(a, str) and a.strip() for a in answers)


def read_answers(path: str | Path) -> list[str]:
    """The distinct answers of a JSON list of strings, in order. Raises UsageError if the file holds anything else."""
    answers = read_json(path, "answers")
    if not _is_list_of_texts(answers):
        raise UsageError(f"answers: {path}: expected a JSON list of strings, got {short(answers)}")
    return list(dict.fromkeys(answers))


class VQAModel(TaskModel):
    """The text and fusion encoders read the question; the decoder attends to all of its fused tokens."""

    name = "vqa"
    metric = "VQA accuracy"
    form = EntryFormat("question", _weighted_answers, one_image, "answer")
    eval_form = EntryFormat("question", _annotated_answers, one_image, "answer")

    def __init__(
        self, base: VisionLanguageModel, tokenizer: Tokenizer, answers: Sequence[str], candidates: int = 128
    ) -> None:
        """Makes the decoder.

        Args:
            base: The pretrained model.
            tokenizer: Of questions and answers.
            answers: The list to rank.
            candidates: Answers that are ranked in full: those with the most probable first token.

        Raises:
            UsageError: For an empty list, or fewer than one candidate.
        """
        super().__init__(base, tokenizer)
        if type(candidates) is not int or candidates < 1:
            raise UsageError(f"candidates: expected an integer of at least 1, got {candidates!r}")
        if not _is_list_of_texts(answers):
            raise UsageError(f"answers: expected a list of strings, got {answers!r:.60}")
        self.answers, self.candidates = list(answers), candidates
        self._warn_about_equal_tokens()
        config = bert_config(base.config, base.config.fusion_layers)
        config.is_decoder = config.add_cross_attention = True
        config.use_cache = False
        self.decoder = BertLMHeadModel(config)
        self._start_decoder()
        hold_key_biases(self.decoder)

    @property
    def task_record(self) -> dict[str, Any]:
        """Also stores "answers" and "candidates"."""
        return super().task_record | {"answers": self.answers, "candidates": self.candidates}

    def _warn_about_equal_tokens(self) -> None:
        """Warns about answers with identical tokens: only the first can be predicted."""
        seen: dict[tuple[int, ...], str] = {}
        for answer, ids in zip(self.answers, self.tokenizer(self.answers)["input_ids"], strict=True):
            if (first := seen.setdefault(tuple(ids), answer)) != answer:
                logger.warning("answers: the tokenizer turns %r and %r into the same tokens", answer, first)

    @torch.no_grad()
    def _start_decoder(self) -> None:
        """Copies the weights that the decoder starts from."""
        base, bert = self.base, self.decoder.bert
        bert.embeddings.load_state_dict(base.text.bert.embeddings.state_dict())
        self.decoder.cls.predictions.transform.load_state_dict(base.language_head.transform.state_dict())
        self.decoder.cls.predictions.bias.copy_(base.language_head.decoder.bias)
        for ours, fused in zip(bert.encoder.layer, base.fusion.layers, strict=True):
            for part in ("attention", "intermediate", "output"):
                getattr(ours, part).load_state_dict(getattr(fused, part).state_dict())
            cross, theirs = ours.crossattention.self, fused.cross_attention
            ours.crossattention.output.load_state_dict(fused.cross_output.state_dict())
            cross.query.load_state_dict(theirs.query.state_dict())
            nn.init.zeros_(cross.key.bias)
            cross.value.bias.copy_(theirs.value_bias.flatten())
            if theirs.key.weight.shape == cross.key.weight.shape:
                cross.key.weight.copy_(theirs.key.weight)
                cross.value.weight.copy_(theirs.value.weight)
        if base.vision.width != base.config.text_width:
            logger.warning(
                "the decoder's keys and values start at random: those of the fusion encoder are for image tokens of "
                "width %d, the decoder needs width %d",
                base.vision.width,
                base.config.text_width,
            )

    def question_states(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, C), the tokens of the questions, fused with the images. The inputs are those of `predict`."""
        text, _ = self.base.encode_text(input_ids, attention_mask)
        return self.base.fusion(text, attention_mask, self.base.fusion.keys_values(self.base.vision(pixels)))

    def answer_tokens(self, answers: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """[CLS] answer [SEP], padded: ids (A, La) int64, and mask (A, La) bool, True = token."""
        pieces = self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        rows = [[self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id] for ids in pieces]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(mask.shape, self.tokenizer.pad_token_id)
        ids[mask] = torch.tensor([token for row in rows for token in row])
        return ids.to(device), mask.to(device)

    def answer_logits(self, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor) -> Tensor:
        """The decoder's logits for every token but the first, from those before it: (A, La - 1, V) float32.

        Args:
            ids: (A, La) int64, of `answer_tokens`.
            mask: (A, La) bool, of `answer_tokens`.
            states: (A, L, C), `question_states` of each answer's question.
            states_mask: (A, L) bool.
        """
        written = self.decoder(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1].long(),
            encoder_hidden_states=states,
            encoder_attention_mask=states_mask.long(),
        )
        return written.logits.float()

    def loss(self, batch: TaskBatch, teacher: VQAModel | None, alpha: float) -> Loss:
        """The weighted sum of -log p(answer) over a question's answers, averaged over the questions.

        The metric "exact_answers" is the fraction of answers in which every token is the most probable one.
        """
        device = batch.pixels.device
        ids, mask = self.answer_tokens([a for answers in batch.targets for a, _ in answers], device)
        weights = torch.tensor([weight for answers in batch.targets for _, weight in answers], device=device)
        question = torch.tensor([i for i, answers in enumerate(batch.targets) for _ in answers], device=device)

        def logits(model: VQAModel) -> Tensor:
            states = model.question_states(batch.pixels, batch.input_ids, batch.attention_mask)
            return model.answer_logits(ids, mask, states[question], batch.attention_mask[question])

        student_logits = logits(self)
        losses = F.cross_entropy(student_logits.mT, ids[:, 1:], reduction="none")
        if teacher is not None:
            soft_target = logits(teacher).detach().softmax(-1)
            soft_losses = F.cross_entropy(student_logits.mT, soft_target.mT, reduction="none")
            losses = (1 - alpha) * losses + alpha * soft_losses
        loss = (weights * (losses * mask[:, 1:]).sum(1)).sum() / len(batch.targets)
        right = (student_logits.argmax(-1) == ids[:, 1:]) | ~mask[:, 1:]
        return loss, {"exact_answers": right.all(1).float().mean()}

    def predict(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[str]:
        """The most probable of the candidates, for each question."""
        states = self.question_states(pixels, input_ids, attention_mask)
        ids, mask = self.answer_tokens(self.answers, pixels.device)
        first = self.answer_logits(ids[:1, :2].expand(len(states), -1), mask[:1, :2], states, attention_mask)[:, 0]
        count = min(self.candidates, len(self.answers))
        chosen = first.log_softmax(-1)[:, ids[:, 1]].topk(count).indices  # (B, count)
        answer, question = chosen.flatten(), torch.arange(len(states), device=ids.device).repeat_interleave(count)
        scores = [
            self._log_probability(ids[a], mask[a], states[q], attention_mask[q])
            for a, q in zip(answer.split(RANKING_BATCH), question.split(RANKING_BATCH), strict=True)
        ]
        best = chosen.gather(1, torch.cat(scores).unflatten(0, chosen.shape).argmax(1, keepdim=True))[:, 0]
        return [self.answers[index] for index in best.tolist()]

    def _log_probability(self, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor) -> Tensor:
        """log p of each answer, (A,). The inputs are those of `answer_logits`."""
        losses = F.cross_entropy(self.answer_logits(ids, mask, states, states_mask).mT, ids[:, 1:], reduction="none")
        return -(losses * mask[:, 1:]).sum(1)

    def score(self, example: Example, answer: str) -> float:
        """The official accuracy. For an entry with a single answer, 1 if the two are equal, else 0."""
        annotated = example.record["answer"]
        return vqa_accuracy(answer, annotated) if isinstance(annotated, list) else float(answer == annotated)

    def truth(self, example: Example) -> str:
        """The most frequent answer of the annotators."""
        return max(example.target, key=lambda pair: pair[1])[0]

"""Retrieval: recall@k in both directions, by ITC, and after ITM has re-ranked the best candidates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from softmask_fast.data.types import CaptionSource, Sample
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.common import (
    batches,
    eval_mode,
    image_pixels,
    rank_indices,
    sample_count,
    tokenize,
    usable_samples,
)
from softmask_fast.evaluation.tables import format_table, percent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

    from softmask_fast.model.vision_language import VisionLanguageModel

RECALL_AT = (1, 5, 10)
MATCH_SCORES = {"log_odds": "ITM", "logit": "ITM's logit"}  # what ITM ranks by -> its name in tables


@dataclass(frozen=True)
class RetrievalReport:
    """Recalls, as fractions of the queries in [0, 1].

    `itc`, `itm`, `both` and `chance` have the keys {"text_to_image": {"recall@1": 0.5, "recall@5": ...,
    "recall@10": ...}, "image_to_text": {...}}.
    """

    images: int  # in the gallery
    captions: int  # in the gallery
    captions_of_an_image: Literal["all", "first"]  # which of them count
    skipped: dict[str, str]  # samples that could not be used: key -> reason
    truncated_captions: int  # captions cut to the model's max_tokens
    reranked: int  # candidates of each query that ITM re-ranks; fewer in a smaller gallery
    match_score: str  # what ITM ranks by, "log_odds" or "logit"
    itc: dict[str, dict[str, float]]  # ranked by ITC alone
    itm: dict[str, dict[str, float]] | None  # after ITM alone has re-ranked; None without re-ranking
    both: dict[str, dict[str, float]] | None  # the same by the sum of both logits
    chance: dict[str, dict[str, float]]  # expected of a random order

    @property
    def headline(self) -> tuple[str, float]:
        """Name and value of the metric that picks the best model.

        It is the mean of all six recalls, by the sum of both logits if ITM re-ranked. The name says how it was
        measured, so that it is never compared with another metric.
        """
        name = "mean recall" + " of all captions" * (self.captions > self.images) + ", ITC + ITM" * bool(self.both)
        return name, fmean(recall for way in (self.both or self.itc).values() for recall in way.values())

    def as_dict(self) -> dict[str, Any]:
        return {"task": "retrieval"} | asdict(self)

    def table(self) -> str:
        rows = [("ITC", self.itc), ("chance", self.chance)]
        if self.itm is not None:
            by = f"{MATCH_SCORES[self.match_score]} on the best {self.reranked}"
            rows[1:1] = [(by, self.itm), (f"ITC + {by}", self.both)]
        header = ["recall in %"] + [f"@{k}" for k in RECALL_AT]
        body = [
            [f"{way.replace('_', ' ')}, {name}"] + [percent(recalls[way][f"recall@{k}"]) for k in RECALL_AT]
            for way in ("text_to_image", "image_to_text")
            for name, recalls in rows
        ]
        which = "all" if self.captions_of_an_image == "all" else "the first"
        title = f"Retrieval among {self.images} images and {self.captions} captions, {which} of each"
        notes = {"samples skipped": len(self.skipped), "captions too long and cut": self.truncated_captions}
        return format_table(title, notes, header, body)


def evaluate_retrieval(
    model: VisionLanguageModel, tokenizer: Tokenizer, source: CaptionSource, *,
    captions: Literal["first", "all"] = "all", rerank: int = 16, match_score: Literal["log_odds", "logit"] = "log_odds",
    batch_size: int = 64, limit: int | None = None, progress: bool = False,
) -> RetrievalReport:  # fmt: skip
    """Measures recall@1, 5 and 10 of text-to-image and image-to-text retrieval.

    Samples that cannot be read are skipped and reported. The tokens of all images and captions stay on the model's
    device: (images + captions) * tokens * width numbers. In a process group this is a collective: each rank re-ranks
    some of the pairs, and all return the same report.

    Args:
        model, tokenizer: as `load_model` returns them.
        source: images with captions, as `open_source` returns them.
        captions: "all" uses every caption. Each is a query, and an image's query succeeds if any of its captions is
            among the first k, as papers report for COCO and Flickr30k. "first" uses the first caption of each image.
        rerank: number of candidates per query to re-rank, at least 10; once by ITM alone and once by the sum of the ITM
            and ITC logits. 0 skips ITM.
        match_score: the score that ITM ranks by. "log_odds" is the difference of its two logits, which orders pairs as
            the probability of "matched" does. "logit" is the logit of "matched" alone, as in ALBEF's code.
        batch_size: images, or captions, to encode at a time.
        limit: evaluate only the first `limit` samples; None: all.
        progress: show a progress bar.

    Returns:
        A `RetrievalReport`.

    Raises:
        UsageError: for a source without a usable sample, or an option out of range.
    """
    if captions not in ("first", "all"):
        raise UsageError(f"captions: expected 'first' or 'all', got {captions!r}")
    if match_score not in MATCH_SCORES:
        raise UsageError(f"match_score: expected 'log_odds' or 'logit', got {match_score!r}")
    if rerank != 0 and rerank < max(RECALL_AT):
        raise UsageError(f"rerank: expected 0, or at least {max(RECALL_AT)} for recall@{max(RECALL_AT)}, got {rerank}")
    count = sample_count(source, batch_size, limit)

    with eval_mode(model), torch.inference_mode():
        images, texts = _encode_source(model, tokenizer, source, count, batch_size, captions, progress)
        image_of_text = texts.image_index
        similarity = texts.features.float() @ images.features.float().T  # (T, I)
        itc = _both_recalls(similarity, similarity, image_of_text)
        itm = both = None
        if rerank:
            best_images = _top_k_mask(similarity, min(rerank, similarity.shape[1]))
            best_texts = _top_k_mask(similarity.T, min(rerank, similarity.shape[0])).T
            pairs = best_images | best_texts
            scores = _matching_scores(model, images, texts, pairs, match_score, batch_size, progress)
            itm, both = (
                _both_recalls(
                    by.masked_fill(~best_images, -torch.inf), by.masked_fill(~best_texts, -torch.inf), image_of_text
                )
                # The sum, as matching learns which of the pairs that the contrast finds similar match, but not how
                # similar they are.
                for by in (scores, scores + similarity / model.temperature.float())
            )
    return RetrievalReport(
        images=len(images.features),
        captions=len(image_of_text),
        captions_of_an_image=captions,
        skipped=texts.skipped,
        truncated_captions=texts.truncated,
        reranked=rerank,
        match_score=match_score,
        itc=itc,
        itm=itm,
        both=both,
        chance=_chance(image_of_text, len(images.features)),
    )


def ranks_of_best(scores: Tensor, correct: Tensor) -> Tensor:
    """The number of wrong items ranked before the best correct one: (Q,) int64, 0 if a correct one is first.

    scores are (Q, G), of Q queries over G gallery items; correct is (Q, G) bool, with at least one True per row. A
    wrong item with the score of the correct one counts as ranked before it, so that constant scores earn nothing.
    """
    best = scores.masked_fill(~correct, -torch.inf).amax(dim=1, keepdim=True)  # (Q, 1)
    return ((scores >= best) & ~correct).sum(dim=1)


def recall_at_k(ranks: Tensor) -> dict[str, float]:
    """The fraction of queries whose rank (0 = first) is below k, for k = 1, 5, 10."""
    return {f"recall@{k}": (ranks < k).double().mean().item() for k in RECALL_AT}


@dataclass
class _Images:
    tokens: Tensor  # (I, N, Cv)
    features: Tensor  # (I, d)


@dataclass
class _Texts:
    tokens: Tensor  # (T, L, C)
    features: Tensor  # (T, d)
    attention_mask: Tensor  # (T, L) bool
    image_index: Tensor  # (T,) int64
    truncated: int
    skipped: dict[str, str]


def _encode_source(
    model: VisionLanguageModel, tokenizer: Tokenizer, source: CaptionSource, count: int, batch_size: int,
    captions: str, progress: bool,
) -> tuple[_Images, _Texts]:  # fmt: skip
    """Encodes the gallery: each image once, even if the source lists it once per caption."""
    numbers: dict[int, int] = {}  # image id -> index in the gallery
    captions_of: list[list[str]] = []
    skipped: dict[str, str] = {}

    def gallery() -> Iterator[Sample]:
        for index, sample in usable_samples(source, range(count), skipped):
            number = numbers.setdefault(int(source.image_ids[index]), len(numbers))
            if number == len(captions_of):
                captions_of.append(list(sample.captions))
                yield sample
            else:
                captions_of[number] += sample.captions

    image_tokens, image_features = [], []
    samples = tqdm(gallery(), desc="images", unit="image", disable=not progress)
    for batch in batches(samples, batch_size):
        tokens, features = model.encode_image(image_pixels(model, batch))
        image_tokens.append(tokens)
        image_features.append(features)
    if not captions_of:
        raise UsageError(f"source: none of {count} samples can be used, the first: {next(iter(skipped.items()))}")

    if captions == "first":
        captions_of = [own[:1] for own in captions_of]
    texts = [caption for own in captions_of for caption in own]
    owners = [number for number, own in enumerate(captions_of) for _ in own]
    text = tokenize(model, tokenizer, texts)
    pieces = [
        model.encode_text(ids, mask)
        for ids, mask in zip(text.input_ids.split(batch_size), text.attention_mask.split(batch_size), strict=True)
    ]
    return _Images(torch.cat(image_tokens), torch.cat(image_features)), _Texts(
        tokens=torch.cat([tokens for tokens, _ in pieces]),
        features=torch.cat([features for _, features in pieces]),
        attention_mask=text.attention_mask,
        image_index=torch.tensor(owners, device=text.input_ids.device),
        truncated=text.truncated,
        skipped=skipped,
    )


def _matching_scores(
    model: VisionLanguageModel, images: _Images, texts: _Texts, pairs: Tensor, match_score: str, batch_size: int,
    progress: bool,
) -> Tensor:  # fmt: skip
    """The `match_score` where pairs (T, I) is True, else -inf: (T, I) float32. A collective."""
    # Sorted by image, so that a batch needs the keys and values of few images.
    image_index, text_index = pairs.T.nonzero(as_tuple=True)
    scores = torch.full(pairs.shape, -torch.inf, device=pairs.device)
    chunks = list(zip(image_index.split(4 * batch_size), text_index.split(4 * batch_size), strict=True))
    own_chunks = [chunks[number] for number in rank_indices(len(chunks))]
    for image_of_pair, text_of_pair in tqdm(own_chunks, desc="pairs", unit="batch", disable=not progress):
        unique, local = image_of_pair.unique_consecutive(return_inverse=True)
        mask = texts.attention_mask[text_of_pair]
        length = int(mask.sum(dim=1).max())  # captions are padded on the right
        logits = model.match_tokens(
            images.tokens[unique], texts.tokens[text_of_pair, :length], mask[:, :length], image_index=local
        )
        other = logits[:, 0] if match_score == "log_odds" else 0
        scores[text_of_pair, image_of_pair] = (logits[:, 1] - other).float()
    if dist.is_initialized():
        dist.all_reduce(scores, dist.ReduceOp.MAX)
    return scores


def _both_recalls(by_text: Tensor, by_image: Tensor, image_of_text: Tensor) -> dict[str, dict[str, float]]:
    """Recalls both ways, from the scores (T, I) that rank the images of a text, and the texts of an image."""
    correct = image_of_text[:, None] == torch.arange(by_text.shape[1], device=by_text.device)  # (T, I)
    return {
        "text_to_image": recall_at_k(ranks_of_best(by_text, correct)),
        "image_to_text": recall_at_k(ranks_of_best(by_image.T, correct.T)),
    }


def _top_k_mask(scores: Tensor, k: int) -> Tensor:
    """True at the k largest scores of each row."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(k, dim=1).indices, True)


def _chance(image_of_text: Tensor, images: int) -> dict[str, dict[str, float]]:
    """The expected recalls of a random order."""
    texts = len(image_of_text)
    own = torch.bincount(image_of_text, minlength=images).double()  # (I,) captions of each image
    text_to_image, image_to_text = {}, {}
    for k in RECALL_AT:
        text_to_image[f"recall@{k}"] = min(1.0, k / images)
        miss = torch.ones_like(own)  # probability that k texts, drawn without replacement, are all of other images
        for drawn in range(min(k, texts)):
            miss *= (texts - own - drawn).clamp(min=0) / (texts - drawn)
        image_to_text[f"recall@{k}"] = 1.0 - miss.mean().item()
    return {"text_to_image": text_to_image, "image_to_text": image_to_text}

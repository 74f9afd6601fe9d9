"""Grounding without box supervision: do the word heat maps fall into the boxes of the words?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from softmask_fast.data.images import image_size
from softmask_fast.evaluation.boxes import GroundingScore, grounding_score, proposal_score
from softmask_fast.evaluation.common import (
    batches,
    eval_mode,
    format_table,
    gathered,
    image_pixels,
    sample_count,
    share_of_rank,
    tokenize,
    usable_samples,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from softmask_fast.data.types import CaptionSource, Phrase, Sample
    from softmask_fast.model.vision_language import VisionLanguageModel


@dataclass(frozen=True)
class GroundingReport:
    """Averages over phrases, as fractions."""

    images: int
    phrases: int
    skipped: dict[str, str]  # samples that could not be used: key -> reason
    skipped_phrases: int  # without a token among the first max_tokens
    flat_maps: int  # phrases whose heat map is the same everywhere; they score what the random floor scores
    layer: int  # fusion layer of the maps, 0 = first
    pointing_game: dict[str, float]  # model, and the floors: random patch, image centre
    mass_inside: dict[str, float]  # share of the relevance inside the boxes: model, and the floor of an even map
    mean_mask: dict[str, float]  # mean of the min-max normalised map: inside the boxes, and over the whole image
    box_accuracy: dict[str, float] | None = None  # of the chosen proposals, and of a random one; None without any

    def as_dict(self) -> dict[str, Any]:
        return {"task": "grounding"} | asdict(self)

    def table(self) -> str:
        def percent(value: float) -> str:
            return f"{100 * value:.1f}"

        body = [
            ["pointing game", *(percent(self.pointing_game[name]) for name in ("model", "random", "centre"))],
            ["relevance inside the boxes", percent(self.mass_inside["model"]), percent(self.mass_inside["even"]), ""],
            ["mean mask inside the boxes", percent(self.mean_mask["inside"]), percent(self.mean_mask["image"]), ""],
        ]
        if self.box_accuracy is not None:
            body.append(["box accuracy", percent(self.box_accuracy["model"]), percent(self.box_accuracy["random"]), ""])
        title = f"Grounding of {self.phrases} phrases in {self.images} images, fusion layer {self.layer}"
        notes = {
            "samples skipped": len(self.skipped),
            "phrases beyond the token limit": self.skipped_phrases,
            "phrases with a flat map": self.flat_maps,
        }
        return format_table(title, notes, ["in %", "model", "random or even", "image centre"], body)


def evaluate_grounding(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    source: CaptionSource,
    *,
    layer: int | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    progress: bool = False,
) -> GroundingReport:
    """Pointing game and relevance inside the boxes, for every phrase of the source that has boxes.

    The heat map of a phrase is the mean of its tokens' maps, of a phrase that is the whole caption with those of [CLS]
    and [SEP], as ALBEF's on RefCOCO+. It hits when the centre of its largest patch lies in one
    of the phrase's boxes. Each phrase counts once. layer: fusion layer of the maps, default the soft masks' layer.
    limit: take the first `limit` samples of the source. Samples that cannot be read are skipped and reported.

    Phrases with proposals also have a box accuracy, by the protocol of weakly supervised RefCOCO+ (boxes.py).
    Where a process group is up, each rank evaluates its share and all return the report of all samples: a collective.

    Raises ValueError when no sample has phrases, and for options out of range.
    """
    count = sample_count(source, batch_size, limit)
    layer = map_layer(model, layer, words=False)

    scores: list[GroundingScore] = []
    choices: list[tuple[bool, float]] = []  # whether the chosen proposal is right, the share of those that are
    images: set[str] = set()
    skipped: dict[str, str] = {}
    skipped_phrases = 0
    with eval_mode(model):
        for queries in batches(_caption_queries(source, count, skipped, progress), batch_size):
            maps, spans = phrase_maps(model, tokenizer, queries, layer=layer)
            for (sample, _, phrases), maps_of_caption, spans_of_caption in zip(queries, maps, spans, strict=True):
                images.add(sample.key)
                for phrase, heat, span in zip(phrases, maps_of_caption, spans_of_caption, strict=True):
                    if not span:
                        skipped_phrases += 1
                        continue
                    if not np.isfinite(heat).all():
                        raise ValueError(f"{sample.key}: the heat map of {phrase.text!r} is not finite")
                    scores.append(grounding_score(heat, phrase.boxes))
                    if phrase.proposals:
                        choices.append(proposal_score(heat, phrase.boxes, phrase.proposals, image_size(sample.image)))
    found = gathered((scores, choices, images, skipped, skipped_phrases))
    scores, choices = ([score for part in found for score in part[i]] for i in range(2))
    images, skipped = set().union(*(part[2] for part in found)), {k: v for part in found for k, v in part[3].items()}
    skipped_phrases = sum(part[4] for part in found)
    if not scores:
        raise ValueError(f"source: grounding needs phrases with boxes; none of the first {count} samples has one")

    def mean(field: str) -> float:
        return float(np.mean([getattr(score, field) for score in scores]))

    return GroundingReport(
        images=len(images),
        phrases=len(scores),
        skipped=skipped,
        skipped_phrases=skipped_phrases,
        flat_maps=sum(score.flat for score in scores),
        layer=layer,
        pointing_game={"model": mean("hit"), "random": mean("hit_random"), "centre": mean("hit_centre")},
        mass_inside={"model": mean("mass_inside"), "even": mean("area_inside")},
        mean_mask={"inside": mean("mask_inside"), "image": mean("mask_image")},
        box_accuracy={
            name: float(np.mean([choice[i] for choice in choices])) for i, name in enumerate(("model", "random"))
        }
        if choices
        else None,
    )


def map_layer(model: VisionLanguageModel, layer: int | None, words: bool = True) -> int:
    """The fusion layer to take heat maps from: the one asked for, else the soft masks'.

    Raises ValueError for a layer that has none. The last one has none of words because only [CLS] is read after it: no
    word of that layer reaches the score, so all maps of words would be zero.
    """
    layers = model.config.fusion_layers
    layer = model.config.soft_mask_layer if layer is None else layer
    if not 0 <= layer < layers - words:
        why = f"; in the last one of {layers} no word reaches the matching score" if words else ""
        raise ValueError(f"layer: expected a fusion layer from 0 to {layers - 1 - words}, got {layer}{why}")
    return layer


def phrase_maps(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    queries: Sequence[tuple[Sample, str, list[Phrase]]],
    *,
    layer: int | None = None,
) -> tuple[list[list[np.ndarray]], list[list[list[int]]]]:
    """Heat maps of phrases: for each query (sample, caption, phrases of that caption) one map a phrase.

    -> maps, each (rows, cols) float32 over the patches, and the token positions each one averages; without any token
    (the phrase lies behind max_tokens) the list is empty and its map is all zero.
    """
    text = tokenize(model, tokenizer, [caption for _, caption, _ in queries])
    samples = {id(sample): sample for sample, _, _ in queries}  # captions of one image come together: decode it once
    places = {identity: place for place, identity in enumerate(samples)}
    pixels = image_pixels(model, list(samples.values()))[[places[id(sample)] for sample, _, _ in queries]]
    layer = map_layer(model, layer, words=not all(phrase.whole for _, _, phrases in queries for phrase in phrases))
    relevance = model.word_relevance(pixels, text.input_ids, text.attention_mask, layer)  # (B, L, N)
    relevance = relevance[:, :, model.prefix_tokens :].float().cpu().numpy()
    maps, spans = [], []
    for row, (sample, caption, phrases) in enumerate(queries):
        spans.append([])
        maps.append([])
        for phrase in phrases:
            words = range(phrase.first_word, phrase.first_word + phrase.n_words)
            if len(words) == 0 or words.stop > len(caption.split()):
                raise ValueError(f"{sample.key}: phrase {phrase.text!r}: {words} lies outside the caption {caption!r}")
            span = word_tokens(caption, text.offsets[row], words)
            if phrase.whole:
                span = text.attention_mask[row].nonzero()[:, 0].tolist()
            spans[-1].append(span)
            heat = relevance[row, span].mean(axis=0) if span else np.zeros(relevance.shape[2], np.float32)
            maps[-1].append(heat.reshape(model.grid_size))
    return maps, spans


def word_tokens(caption: str, offsets: Sequence[tuple[int, int]], words: range) -> list[int]:
    """Positions of the tokens that lie in the given whitespace-separated words of the caption.

    offsets: (start, end) character of each token, as fast tokenizers return; special tokens and padding are empty.
    """
    inside, end = [], 0
    for number, word in enumerate(caption.split()):
        start = caption.index(word, end)
        end = start + len(word)
        if number in words:
            inside += [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
    return inside


def _caption_queries(
    source: CaptionSource, count: int, skipped: dict[str, str], progress: bool
) -> Iterator[tuple[Sample, str, list[Phrase]]]:
    """One query for each caption that has phrases with boxes, so that a caption is encoded once."""
    samples = usable_samples(source, share_of_rank(count), skipped)
    for _, sample in tqdm(samples, total=len(share_of_rank(count)), desc="images", unit="image", disable=not progress):
        by_caption: dict[str, list[Phrase]] = {}
        for phrase in sample.phrases:
            if phrase.boxes:
                by_caption.setdefault(phrase.caption, []).append(phrase)
        for caption, phrases in by_caption.items():
            yield sample, caption, phrases

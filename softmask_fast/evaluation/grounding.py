"""Grounding without box supervision: do word maps fall into the boxes of what the words name?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from softmask_fast.data.images import image_size
from softmask_fast.data.types import CaptionSource, Phrase, Sample
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.boxes import GroundingScore, grounding_score, pointing_hit, proposal_score
from softmask_fast.evaluation.common import (
    Tokens,
    batches,
    eval_mode,
    gather_objects,
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

POINTING = ("model", "random", "center")  # whose hits are counted
Query = tuple[Sample, str, list[Phrase]]  # a sample, one of its captions, and phrases of that caption


@dataclass(frozen=True)
class GroundingReport:
    """Means over phrases, as fractions in [0, 1]; the keys of each dict are in quotes."""

    images: int
    phrases: int
    skipped: dict[str, str]  # samples that could not be used: key -> reason
    skipped_phrases: int  # without a token among the first max_tokens
    flat_maps: int  # phrases whose map is the same everywhere; they score like a random patch
    layer: int  # fusion layer of the maps, 0 = first
    pointing_game: dict[str, float]  # hits of the "model", of a "random" patch, and of the image's "center"
    pointing_off_center: dict[str, float] | None  # the same over the "phrases" with the center in no box; None: no such
    # The same over the "phrases" beside others in their caption, and of the map of an "other_phrase": the mean over all
    # others. None: no caption has several.
    pointing_beside_others: dict[str, float] | None
    mass_inside: dict[str, float]  # fraction of the relevance inside the boxes: of the "model", and of an "even" map
    mean_mask: dict[str, float]  # mean of the min-max normalized map: "inside" the boxes, and over the whole "image"
    box_accuracy: dict[str, float] | None = None  # right choices: "model", and "random" proposals; None without any

    def as_dict(self) -> dict[str, Any]:
        return {"task": "grounding"} | asdict(self)

    def table(self) -> str:
        header = ["in %", "model", "random or even", "image center"]
        shown = {"pointing game": self.pointing_game}
        if (some := self.pointing_off_center) is not None:
            shown[f"... of {some['phrases']:,} with boxes off center"] = some
        if (some := self.pointing_beside_others) is not None:
            header.append("map of another phrase")
            shown[f"... of {some['phrases']:,} beside other phrases"] = some
        kinds = (*POINTING, "other_phrase")
        body = [[name, *(percent(hits[kind]) for kind in kinds if kind in hits)] for name, hits in shown.items()]
        body.append(
            ["relevance inside the boxes", percent(self.mass_inside["model"]), percent(self.mass_inside["even"])]
        )
        body.append(["mean mask inside the boxes", percent(self.mean_mask["inside"]), percent(self.mean_mask["image"])])
        if self.box_accuracy is not None:
            body.append(["box accuracy", percent(self.box_accuracy["model"]), percent(self.box_accuracy["random"])])
        title = f"Grounding of {self.phrases} phrases in {self.images} images, fusion layer {self.layer}"
        notes = {
            "samples skipped": len(self.skipped),
            "phrases beyond the token limit": self.skipped_phrases,
            "phrases with a flat map": self.flat_maps,
        }
        return format_table(title, notes, header, [row + [""] * (len(header) - len(row)) for row in body])


@dataclass
class _Scores:
    """What one rank measured."""

    phrases: list[GroundingScore] = field(default_factory=list)
    others: list[float] = field(default_factory=list)  # for each phrase, the mean hit of its caption's others, or NaN
    choices: list[tuple[bool, float]] = field(default_factory=list)  # of `proposal_score`
    images: set[str] = field(default_factory=set)  # keys
    skipped: dict[str, str] = field(default_factory=dict)
    skipped_phrases: int = 0


def evaluate_grounding(
    model: VisionLanguageModel, tokenizer: Tokenizer, source: CaptionSource, *, layer: int | None = None,
    batch_size: int = 32, limit: int | None = None, progress: bool = False,
) -> GroundingReport:  # fmt: skip
    """Scores the word map of every phrase that has boxes: pointing game, and relevance inside the boxes.

    Three floors say what a hit is worth: a random patch, the image's center and, for phrases beside others in their
    caption, the maps of these others, which hit as often if maps only show what stands out in the image.

    The map of a phrase is the mean of its tokens' maps. If the phrase is the whole caption, [CLS] and [SEP] count too,
    as in ALBEF on RefCOCO+. The map hits if the center of its largest patch lies in one of the phrase's boxes. Each
    phrase counts once. Phrases with proposals also get a box accuracy, by the protocol of weakly supervised RefCOCO+
    (`boxes.proposal_score`).

    Samples that cannot be read are skipped and reported. In a process group this is a collective: each rank evaluates
    some of the samples, and all return the report of all samples.

    Args:
        model, tokenizer: as `load_model` returns them.
        source: images with phrases and boxes, as `open_source` returns them.
        layer: fusion layer of the maps, 0 is the first; None: that of the soft masks.
        batch_size: captions to evaluate at a time.
        limit: evaluate only the first `limit` samples; None: all.
        progress: show a progress bar.

    Returns:
        A `GroundingReport`.

    Raises:
        UsageError: if no sample has phrases with boxes, or an option is out of range.
    """
    count = sample_count(source, batch_size, limit)
    layer = map_layer(model, layer, words=False)
    own = _Scores()
    with eval_mode(model):
        for queries in batches(caption_queries(source, count, own.skipped, progress), batch_size):
            maps, spans = phrase_maps(model, tokenizer, queries, layer=layer)
            for query, maps_of_caption, spans_of_caption in zip(queries, maps, spans, strict=True):
                _score_caption(query, maps_of_caption, spans_of_caption, own)
    ranks = gather_objects(own)
    scores = [score for rank in ranks for score in rank.phrases]
    others = [hit for rank in ranks for hit in rank.others]
    choices = [choice for rank in ranks for choice in rank.choices]
    if not scores:
        skipped = "".join(f"; skipped {key}: {reason}" for rank in ranks for key, reason in rank.skipped.items())
        raise UsageError(f"source: expected phrases with boxes, none of the first {count} samples has one{skipped}")

    def mean(field: str) -> float:
        return float(np.mean([getattr(score, field) for score in scores]))

    hits = {
        "model": np.array([score.hit for score in scores]),
        "random": np.array([score.hit_random for score in scores]),
        "center": np.array([score.hit_center for score in scores]),
        "other_phrase": np.array(others),  # NaN for a phrase alone
    }

    def pointing(chosen: np.ndarray, *names: str) -> dict[str, float] | None:
        if not chosen.any():
            return None
        return {"phrases": int(chosen.sum())} | {name: float(hits[name][chosen].mean()) for name in names}

    box_accuracy = None
    if choices:
        chosen, random = zip(*choices, strict=True)
        box_accuracy = {"model": float(np.mean(chosen)), "random": float(np.mean(random))}
    return GroundingReport(
        images=len(set().union(*(rank.images for rank in ranks))),
        phrases=len(scores),
        skipped={key: reason for rank in ranks for key, reason in rank.skipped.items()},
        skipped_phrases=sum(rank.skipped_phrases for rank in ranks),
        flat_maps=sum(score.flat for score in scores),
        layer=layer,
        pointing_game={name: float(hits[name].mean()) for name in POINTING},
        pointing_off_center=pointing(hits["center"] == 0, *POINTING),
        pointing_beside_others=pointing(~np.isnan(hits["other_phrase"]), *POINTING, "other_phrase"),
        mass_inside={"model": mean("mass_inside"), "even": mean("area_inside")},
        mean_mask={"inside": mean("mask_inside"), "image": mean("mask_image")},
        box_accuracy=box_accuracy,
    )


def _score_caption(query: Query, maps: list[np.ndarray], spans: list[list[int]], scores: _Scores) -> None:
    sample, _, phrases = query
    scores.images.add(sample.key)
    mapped = [(phrase, heat) for phrase, heat, span in zip(phrases, maps, spans, strict=True) if span]
    scores.skipped_phrases += len(phrases) - len(mapped)
    for phrase, heat in mapped:
        if not np.isfinite(heat).all():
            raise UsageError(f"model: its word map of {phrase.text!r} in {sample.key} is not finite")
    for phrase, heat in mapped:
        scores.phrases.append(grounding_score(heat, phrase.boxes))
        others = [pointing_hit(other, phrase.boxes) for other_phrase, other in mapped if other_phrase is not phrase]
        scores.others.append(float(np.mean(others)) if others else float("nan"))
        if phrase.proposals:
            scores.choices.append(proposal_score(heat, phrase.boxes, phrase.proposals, image_size(sample.image)))


def map_layer(model: VisionLanguageModel, layer: int | None, words: bool = True) -> int:
    """The fusion layer to take maps from: `layer`, or by default that of the soft masks.

    After the last layer only [CLS] is read, so that layer is refused for maps of single words (`words`) and, with
    `match_through_words`, for all: its maps would be zero. Raises UsageError for a layer without maps.
    """
    layers = model.config.fusion_layers
    last, reason = layers - 1, ""
    if words or model.config.match_through_words:
        last, reason = layers - 2, f"; in the last of {layers} layers no word reaches the matching score"
    layer = model.config.soft_mask_layer if layer is None else layer
    if not 0 <= layer <= last:
        raise UsageError(f"layer: expected a fusion layer from 0 to {last}, got {layer}{reason}")
    return layer


def phrase_maps(
    model: VisionLanguageModel, tokenizer: Tokenizer, queries: Sequence[Query], *, layer: int | None = None
) -> tuple[list[list[np.ndarray]], list[list[list[int]]]]:
    """Computes the word maps of phrases.

    Args:
        queries: samples, each with a caption and phrases of it.
        layer: as for `map_layer`.

    Returns:
        For each phrase of each query, its map over the patches, (rows, columns) float32; and the positions of the
        tokens that the map averages. A phrase beyond max_tokens has no positions and a map of zeros.

    Raises:
        UsageError: for a layer without maps, or a phrase outside its caption.
    """
    text, pixels = query_inputs(model, tokenizer, queries)
    layer = map_layer(model, layer, words=not all(phrase.whole for _, _, phrases in queries for phrase in phrases))
    return mean_maps(model, queries, text, model.word_relevance(pixels, text.input_ids, text.attention_mask, layer))


def query_inputs(model: VisionLanguageModel, tokenizer: Tokenizer, queries: Sequence[Query]) -> tuple[Tokens, Tensor]:
    """The captions of the queries, and the pixels (B, 3, image_size, image_size) of their images."""
    text = tokenize(model, tokenizer, [caption for _, caption, _ in queries])
    samples = {id(sample): sample for sample, _, _ in queries}  # an image with several captions is decoded once
    image_index = {identity: index for index, identity in enumerate(samples)}
    pixels = image_pixels(model, list(samples.values()))[[image_index[id(sample)] for sample, _, _ in queries]]
    return text, pixels


def mean_maps(
    model: VisionLanguageModel, queries: Sequence[Query], text: Tokens, tokens: Tensor
) -> tuple[list[list[np.ndarray]], list[list[list[int]]]]:
    """Averages maps of tokens (B, L, N) into those of phrases; returns and raises as `phrase_maps`."""
    tokens = tokens[:, :, model.prefix_tokens :].float().cpu().numpy()
    maps, spans = [], []
    for row, (sample, caption, phrases) in enumerate(queries):
        spans.append([])
        maps.append([])
        for phrase in phrases:
            words = range(phrase.first_word, phrase.first_word + phrase.n_words)
            if len(words) == 0 or words.stop > len(caption.split()):
                raise UsageError(f"{sample.key}: phrase {phrase.text!r}: {words} lies outside the caption {caption!r}")
            span = word_tokens(caption, text.offsets[row], words)
            if phrase.whole:
                span = text.attention_mask[row].nonzero()[:, 0].tolist()
            spans[-1].append(span)
            heat = tokens[row, span].mean(axis=0) if span else np.zeros(tokens.shape[2], np.float32)
            maps[-1].append(heat.reshape(model.grid_size))
    return maps, spans


def word_tokens(caption: str, offsets: Sequence[tuple[int, int]], words: Sequence[int]) -> list[int]:
    """The positions of the tokens of some words of a caption.

    Args:
        offsets: [start, end) of each token in characters, as fast tokenizers return; empty for special tokens.
        words: numbers of whitespace-separated words, from 0.
    """
    inside, end = [], 0
    for number, word in enumerate(caption.split()):
        start = caption.index(word, end)
        end = start + len(word)
        if number in words:
            inside += [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
    return inside


def boxed_phrases(sample: Sample) -> dict[str, list[Phrase]]:
    """The phrases of a sample that have boxes, by caption."""
    by_caption: dict[str, list[Phrase]] = {}
    for phrase in sample.phrases:
        if phrase.boxes:
            by_caption.setdefault(phrase.caption, []).append(phrase)
    return by_caption


def caption_queries(source: CaptionSource, count: int, skipped: dict[str, str], progress: bool) -> Iterator[Query]:
    """One query for each caption that has phrases with boxes, so that a caption is encoded once."""
    indices = rank_indices(count)
    samples = usable_samples(source, indices, skipped)
    for _, sample in tqdm(samples, total=len(indices), desc="images", unit="image", disable=not progress):
        for caption, phrases in boxed_phrases(sample).items():
            yield sample, caption, phrases

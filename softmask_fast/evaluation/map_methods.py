"""Ways to make a word's map, compared on boxes: word Grad-CAM, plain attention, attention rollout, Grad-CAM."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from softmask_fast.data.types import CaptionSource
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.boxes import box_coverage, grounding_score, region_score
from softmask_fast.evaluation.common import batches, eval_mode, gather_objects, sample_count
from softmask_fast.evaluation.grounding import caption_queries, map_layer, mean_maps, query_inputs
from softmask_fast.evaluation.tables import format_table, percent
from softmask_fast.ops import word_gradcam

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

    from softmask_fast.model.vision_language import VisionLanguageModel

METHODS = {
    "word_gradcam": "word Grad-CAM (ours)",
    "attention": "attention",
    "rollout": "attention rollout",
    "gradcam": "Grad-CAM",
    "random": "a random patch, an even map",
}


@dataclass(frozen=True)
class MapsReport:
    """Means over phrases, as fractions in [0, 1]; the keys of each dict are those of `METHODS`."""

    images: int
    phrases: int
    skipped: dict[str, str]  # samples that could not be used: key -> reason
    layer: int  # fusion layer of the maps, 0 = first
    pointing_game: dict[str, float]
    iou: dict[str, float]  # of the region above half of the map's range with the boxes
    mass_inside: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {"task": "maps"} | asdict(self)

    def table(self) -> str:
        scores = (self.pointing_game, self.iou, self.mass_inside)
        rows = [[name, *(percent(score[key]) for score in scores)] for key, name in METHODS.items()]
        title = f"Maps of {self.phrases} phrases in {self.images} images, fusion layer {self.layer}"
        header = ["in %", "pointing game", "IoU", "relevance inside the boxes"]
        return format_table(title, {"samples skipped": len(self.skipped)}, header, rows)


def evaluate_maps(
    model: VisionLanguageModel, tokenizer: Tokenizer, source: CaptionSource, *, layer: int | None = None,
    batch_size: int = 32, limit: int | None = None, progress: bool = False,
) -> MapsReport:  # fmt: skip
    """Scores the maps of every phrase with boxes, by each of `METHODS`.

    Arguments, errors and the work of several ranks are as in `evaluate_grounding`. Returns a `MapsReport`.
    """
    count = sample_count(source, batch_size, limit)
    layer = map_layer(model, layer)
    skipped: dict[str, str] = {}
    scores: dict[str, list[tuple[float, float, float]]] = {key: [] for key in METHODS}
    images: set[str] = set()

    with eval_mode(model):
        for queries in batches(caption_queries(source, count, skipped, progress), batch_size):
            text, pixels = query_inputs(model, tokenizer, queries)
            made = method_maps(model, pixels, text.input_ids, text.attention_mask, layer)
            found = {key: mean_maps(model, queries, text, tokens) for key, tokens in made.items()}
            for row, (sample, _, phrases) in enumerate(queries):
                images.add(sample.key)
                for number, phrase in enumerate(phrases):
                    if not found["word_gradcam"][1][row][number]:
                        continue
                    for key, (heats, _) in found.items():
                        heat = heats[row][number]
                        if not np.isfinite(heat).all():
                            raise UsageError(f"model: its {key} map of {phrase.text!r} in {sample.key} is not finite")
                        score = grounding_score(heat, phrase.boxes)
                        iou = region_score(heat, box_coverage(phrase.boxes, *heat.shape))
                        scores[key].append((score.hit, iou, score.mass_inside))
                    scores["random"].append((score.hit_random, score.area_inside, score.area_inside))
    ranks = gather_objects((scores, images, skipped))
    joined = {key: [score for rank in ranks for score in rank[0][key]] for key in METHODS}
    if not joined["random"]:
        raise UsageError(f"source: expected phrases with boxes, none of the first {count} samples has one")
    means = {key: np.mean(values, axis=0) for key, values in joined.items()}
    pointing_game, iou, mass_inside = ({key: float(mean[i]) for key, mean in means.items()} for i in range(3))
    return MapsReport(
        images=len(set().union(*(rank[1] for rank in ranks))),
        phrases=len(joined["random"]),
        skipped={key: reason for rank in ranks for key, reason in rank[2].items()},
        layer=layer,
        pointing_game=pointing_game,
        iou=iou,
        mass_inside=mass_inside,
    )


def method_maps(
    model: VisionLanguageModel, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, layer: int
) -> dict[str, Tensor]:
    """The maps (B, L, N) of every token over the image's tokens, by method; arguments as for `word_relevance`.

    - word_gradcam: the method of this library.
    - attention: the mean over heads of the layer's probabilities.
    - rollout (Abnar & Zuidema, 2020): attention carried down through the image encoder, that is, times the product over
      its blocks of (mean attention + identity) / 2.
    - gradcam (Selvaraju et al., 2017): relu of the image encoder's tokens times the mean over patches of the gradient
      of the "matched" logit; the same for all words.
    """
    with torch.no_grad():
        image, rollout = _rollout(model, pixels)
        text, _ = model.encode_text(input_ids, attention_mask)
        keys_values = model.fusion.keys_values(image)
    query, key, value, gradient = model.relevance_inputs(text, attention_mask, keys_values, layer)
    attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1).mean(1)
    with torch.enable_grad():
        image = image.detach().requires_grad_()
        matched = model.match_tokens(image, text, attention_mask)[:, 1]
        (slope,) = torch.autograd.grad(matched.sum(), image)
    weights = slope[:, model.prefix_tokens :].mean(1, keepdim=True)
    gradcam = (image.detach() * weights).sum(-1).relu()
    return {
        "word_gradcam": word_gradcam(query, key, value, gradient),
        "attention": attention,
        "rollout": attention @ rollout,
        "gradcam": gradcam[:, None].expand_as(attention),
    }


def _rollout(model: VisionLanguageModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The image encoder's tokens (B, N, C), and how much each of them holds of each input token, (B, N, N)."""
    mixed: list[Tensor] = []

    def mix(block: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        attention = block.attn
        qkv = attention.qkv(block.norm1(args[0])).unflatten(-1, (3, attention.num_heads, -1))
        query, key = (part.transpose(1, 2) for part in qkv.unbind(2)[:2])
        mean = (attention.q_norm(query) @ attention.k_norm(key).mT * attention.scale).softmax(-1).mean(1)
        step = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        mixed[:] = [step @ mixed[0]] if mixed else [step]

    handles = [block.register_forward_pre_hook(mix) for block in model.vision.vit.blocks]
    try:
        return model.vision(pixels), mixed[0]
    finally:
        for handle in handles:
            handle.remove()

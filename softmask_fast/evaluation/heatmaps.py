"""Pictures of what a model looks at: the heat maps of words, drawn over the image."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from softmask_fast.data.images import check_image, decode_image
from softmask_fast.data.types import CaptionSource, Phrase, Sample
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.boxes import Box, grounding_score
from softmask_fast.evaluation.common import eval_mode, image_pixels, tokenize, usable_samples
from softmask_fast.evaluation.grounding import boxed_phrases, phrase_maps
from softmask_fast.evaluation.plots import save_figure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

    from softmask_fast.model.vision_language import VisionLanguageModel

COLORS = "inferno"
GRAY, GREEN, RED = "#666666", "#1a7f37", "#c62828"
SHOWN_SIDE = 384  # longer side of an image inside a figure, in pixels


def explain(
    model: VisionLanguageModel, tokenizer: Tokenizer, image: bytes | np.ndarray, text: str, out: str | Path, *,
    layer: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Draws one heat map for each word of a text over an image, and returns what the figure shows as numbers.

    Args:
        image: an encoded file, or (H, W, 3) uint8.
        out: the PNG to write.
        layer: fusion layer of the maps, 0 = first; default: the layer of the soft masks.

    Returns:
        "text"; "matched", the probability that image and text match; "words", a list of {"word", "strength", "peak"};
        "left_out", the words without a map. The strength is the word's largest relevance as a fraction of the strongest
        word's, the peak is the center (x, y) of its largest patch as fractions of the image.

    Raises:
        UsageError: for a text without words, an unreadable image, or a layer without maps.
    """
    shown, maps = explained_words(model, tokenizer, image, text, layer=layer)
    notes = left_out_notes(model, shown["left_out"])
    words = [word["word"] for word in shown["words"]]
    matched = f"match {100 * shown['matched']:.0f} %"
    draw(image, words, maps, out, title=text, note=matched, footnotes=notes)
    return shown


def left_out_notes(model: VisionLanguageModel, left_out: Sequence[str]) -> list[str]:
    """What a figure says of the words without a map."""
    if not left_out:
        return []
    return [f"no map, beyond {model.config.max_tokens} tokens or without a token: {' '.join(left_out)}"]


def explained_words(
    model: VisionLanguageModel, tokenizer: Tokenizer, image: bytes | np.ndarray, text: str, *, layer: int | None = None
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What `explain` returns, and the map (rows, cols) of each of its words; raises as it does."""
    words = text.split()
    if not words:
        raise UsageError("text: expected at least one word, got none")
    phrases = [Phrase(caption=text, text=w, first_word=i, n_words=1, boxes=[]) for i, w in enumerate(words)]
    check_image(image)
    sample = Sample(key="image", image=image, captions=[text], phrases=phrases)
    with eval_mode(model):
        [maps], [spans] = phrase_maps(model, tokenizer, [(sample, text, phrases)], layer=layer)
        tokens = tokenize(model, tokenizer, [text])
        with torch.inference_mode():
            logits = model.match_logits(image_pixels(model, [sample]), tokens.input_ids, tokens.attention_mask)
    seen = [i for i, span in enumerate(spans) if span]
    if not seen:
        raise UsageError(f"text: the tokenizer finds no token in {text!r}")
    report = [
        {"word": words[i], "strength": strength, "peak": peak(maps[i])}
        for i, strength in zip(seen, strengths([maps[i] for i in seen]), strict=True)
    ]
    shown = {
        "text": text,
        "matched": logits.float().softmax(dim=-1)[0, 1].item(),
        "words": report,
        "left_out": [word for word, span in zip(words, spans, strict=True) if not span],
    }
    return shown, [maps[i] for i in seen]


def strengths(maps: Sequence[np.ndarray]) -> list[float]:
    """Each map's largest value, as a fraction of the largest of all; 0 if all maps are."""
    peaks = [float(heat.max()) for heat in maps]
    strongest = max(peaks, default=0.0)
    return [value / strongest if strongest > 0 else 0.0 for value in peaks]


def draw(
    image: str | Path | bytes | np.ndarray | Image.Image, words: Sequence[str], maps: Sequence[Any], out: str | Path, *,
    title: str = "", note: str = "", footnotes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Draws one heat map for each word over an image.

    Args:
        image: a file's name or its content, (H, W, 3) uint8, or a PIL image.
        words: their names.
        maps: as many, each (rows, cols) over the whole image: arrays or tensors, at least 0.
        out: the PNG to write; its folder is made.
        title, note, footnotes: lines above the figure, under the image, and under the figure.

    Raises:
        UsageError: for no words, another number of maps, or maps of another shape; BadSample for an unreadable image.
    """
    heats = [np.asarray(heat.detach().float().cpu() if hasattr(heat, "detach") else heat, np.float32) for heat in maps]
    if not words or len(heats) != len(words) or any(heat.ndim != 2 for heat in heats):
        shapes = [heat.shape for heat in heats]
        raise UsageError(f"maps: expected one (rows, cols) for each word, got {shapes} for {len(words)} words")
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    elif isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    picture = shown_picture(image)
    rows = math.ceil((len(heats) + 1) / 5)
    columns = math.ceil((len(heats) + 1) / rows)
    height, width = picture.shape[:2]
    size = columns * 2.3, rows * (2.3 * height / width + 0.5) + 0.9  # inches
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    if title:
        figure.suptitle("\n".join(textwrap.wrap(title, 26 * columns)), fontsize=13, fontweight="bold")
    _show(axes.flat[0], picture, "image", note)
    for ax, word, heat, strength in zip(axes.flat[1:], words, heats, strengths(heats), strict=False):
        # The map of a weak word is mostly noise: draw it fainter, so that the eye goes to the words that count.
        _show(ax, overlay(picture, heat, opacity=strength**0.35), word, f"strength {100 * strength:.0f} %")
    for ax in axes.flat[len(heats) + 1 :]:
        ax.set_axis_off()
    _color_bar(figure, axes)
    if footnotes:
        lines = [line for text in footnotes for line in textwrap.wrap(text, 34 * columns)]
        figure.supxlabel("\n".join(lines), fontsize=9, color=GRAY)
    save_figure(figure, out)


def heatmap_page(
    model: VisionLanguageModel, tokenizer: Tokenizer, source: CaptionSource, out: str | Path, *, images: int = 6,
    words: int = 4, layer: int | None = None,
) -> None:  # fmt: skip
    """Draws a page of `images` rows: an image with its caption, then the heat maps of up to `words` of its phrases.

    The images are spread evenly over the source; one that cannot be read is replaced by the next. Boxes are drawn, and
    a cross marks the largest patch: green inside a box, red outside. Without phrases, the longest words of the captions
    are drawn instead, without boxes.

    Raises UsageError for a source without a usable sample, or an option out of range.
    """
    if images < 1 or words < 1:
        raise UsageError(f"images, words: expected at least 1, got {images} and {words}")
    if len(source) == 0:
        raise UsageError("source: expected at least one sample, got none")
    queries = _choose_queries(source, images, words)
    with eval_mode(model):
        maps, spans = phrase_maps(model, tokenizer, queries, layer=layer)

    panel = 2.1
    columns = 1 + max(len(phrases) for _, _, phrases in queries)
    shown = [shown_picture(sample.image) for sample, _, _ in queries]
    captions = ["\n".join(textwrap.wrap(caption, 30)) for _, caption, _ in queries]
    heights = [  # inches, of the image, its caption and a note
        panel * min(picture.shape[0] / picture.shape[1], 1.4) + 0.15 * max(2, caption.count("\n") + 1) + 0.2
        for picture, caption in zip(shown, captions, strict=True)
    ]
    figure = Figure(figsize=(columns * panel, sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(queries), columns, squeeze=False, height_ratios=heights)
    for row, (picture, caption, (_, _, phrases), heats, tokens) in enumerate(
        zip(shown, captions, queries, maps, spans, strict=True)
    ):
        _show(axes[row, 0], picture, "")
        axes[row, 0].set_title(caption, fontsize=8, loc="left")
        for ax, phrase, heat, token in zip(axes[row, 1:], phrases, heats, tokens, strict=False):
            if not token:
                _show(ax, picture, phrase.text, "beyond the token limit")
                continue
            _show(ax, overlay(picture, heat), phrase.text)
            if phrase.boxes:
                _draw_boxes(ax, picture, heat, phrase.boxes)
        for ax in axes[row, 1 + len(phrases) :]:
            ax.set_axis_off()
    _color_bar(figure, axes)
    save_figure(figure, out)


def shown_picture(image: bytes | np.ndarray) -> np.ndarray:
    """The upright image, its longer side scaled to SHOWN_SIDE pixels: (H, W, 3) uint8."""
    check_image(image)
    picture = decode_image(image)
    scale = SHOWN_SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC))


def overlay(picture: np.ndarray, heat: np.ndarray, opacity: float = 1.0) -> np.ndarray:
    """Lays a heat map (rows, cols) over a picture (H, W, 3) uint8: (H, W, 3) float in [0, 1].

    The map is enlarged (bicubic) and scaled from its smallest to its largest patch, as training scales the soft masks.
    The picture is colored where the word looks, with at most `opacity`, and dimmed elsewhere.
    """
    height, width = picture.shape[:2]
    values = torch.from_numpy(np.ascontiguousarray(heat, dtype=np.float32))[None, None]
    values = F.interpolate(values, (height, width), mode="bicubic", align_corners=False)[0, 0].numpy()
    low, high = float(heat.min()), float(heat.max())
    values = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    gray = picture.astype(np.float32).mean(axis=2, keepdims=True)
    dimmed = (0.5 * picture + 0.5 * gray) / 255 * 0.65
    color = matplotlib.colormaps[COLORS](values)[..., :3]
    alpha = (0.85 * opacity * values**0.7)[..., None]
    return dimmed * (1 - alpha) + color * alpha


def peak(heat: np.ndarray) -> tuple[float, float]:
    """The center (x, y) of the largest patch, the first of equal ones, as fractions of the image."""
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    return (float(column) + 0.5) / heat.shape[1], (float(row) + 0.5) / heat.shape[0]


def _choose_queries(source: CaptionSource, images: int, words: int) -> list[tuple[Sample, str, list[Phrase]]]:
    """Samples spread evenly over the source, those with boxes first, each with one caption and phrases of it."""
    count = len(source)
    stride = max(1, count // images)
    spread = [index for offset in range(stride) for index in range(offset, count, stride)][: 4 * images]
    skipped: dict[str, str] = {}
    with_boxes, without = [], []
    for _, sample in usable_samples(source, spread, skipped):
        if by_caption := boxed_phrases(sample):
            caption = max(by_caption, key=lambda text: len(by_caption[text]))
            # one phrase for each span of words
            distinct = {(phrase.first_word, phrase.n_words): phrase for phrase in by_caption[caption]}
            with_boxes.append((sample, caption, list(distinct.values())[:words]))
        else:
            caption = sample.captions[0]
            parts = caption.split()
            longest = sorted(sorted(range(len(parts)), key=lambda i: -len(parts[i]))[:words])
            without.append((sample, caption, [Phrase(caption, parts[i], i, 1, []) for i in longest]))
        if len(with_boxes) == images:
            break
    chosen = (with_boxes + without)[:images]
    if not chosen:
        first = next(iter(skipped.items()))
        raise UsageError(f"source: none of {len(spread)} samples tried can be used, the first: {first}")
    return chosen


def _draw_boxes(ax: Axes, picture: np.ndarray, heat: np.ndarray, boxes: Sequence[Box]) -> None:
    height, width = picture.shape[:2]
    for x1, y1, x2, y2 in boxes:
        corner, size = (x1 * width - 0.5, y1 * height - 0.5), ((x2 - x1) * width, (y2 - y1) * height)
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=1.8))
    score = grounding_score(heat, boxes)
    if not score.flat:
        x, y = peak(heat)
        color = GREEN if score.hit == 1 else RED
        ax.plot(x * width, y * height, marker="X", markersize=9, color=color, markeredgecolor="white")


def _show(ax: Axes, picture: np.ndarray, title: str, note: str = "") -> None:
    ax.imshow(picture)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title("\n".join(textwrap.wrap(title, 24)), fontsize=11)
    if note:
        ax.set_xlabel("\n".join(textwrap.wrap(note, 30)), fontsize=8, color=GRAY, labelpad=2)


def _color_bar(figure: Figure, axes: np.ndarray) -> None:
    width, height = figure.get_size_inches()
    place = dict(location="bottom", shrink=min(1.0, 4.5 / width), aspect=45, pad=0.05 / height)
    bar = figure.colorbar(ScalarMappable(cmap=COLORS), ax=axes, **place)
    bar.set_label("relevance, from each word's weakest patch (0) to its strongest (1)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)

"""Pictures of what a model looks at: heat maps, that is, word maps drawn over the image."""

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
from softmask_fast.data.words import content_words
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.boxes import Box, grounding_score
from softmask_fast.evaluation.common import eval_mode, tokenize, usable_samples
from softmask_fast.evaluation.grounding import Query, boxed_phrases, phrase_maps, query_inputs, word_tokens
from softmask_fast.evaluation.plots import save_figure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

    from softmask_fast.model.vision_language import VisionLanguageModel

COLORS, GRAYS = "inferno", "gray"  # colormaps; the second one for pairs that do not match
# Under the color bar, of `draw` and of a page:
WORD_NOTE = "strength: a map's largest relevance / that of the strongest word; weaker maps are fainter"
PAGE_NOTE = (
    "strength: a map's largest relevance / the page's largest; all maps have the same colors, however weak. "
    "box: what the words name; cross: the map's strongest patch, green inside a box, red outside"
)
MATCHES = 0.5  # from this probability on
GRAY, GREEN, RED = "#666666", "#1a7f37", "#c62828"
SHOWN_SIDE = 384  # longer side of an image inside a figure, in pixels
# These bound the size of a figure, whatever its image and text:
TALLEST = 1.4  # height / width of a panel; a taller image becomes narrower inside it
MOST_WORDS = 59  # that `draw` shows at most: with the image, twelve rows of panels
MOST_IMAGES, MOST_PHRASES = 50, 12  # rows of a page, and its columns next to the image


def explain(
    model: VisionLanguageModel, tokenizer: Tokenizer, image: bytes | np.ndarray, text: str, out: str | Path, *,
    layer: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Draws a heat map of each word of a text over an image, and returns the figure's numbers.

    Words that name nothing ("with") get numbers but no picture. The maps of a pair that does not match are gray.

    Args:
        model, tokenizer: as `load_model` returns them.
        image: the bytes of an image file, or (H, W, 3) uint8.
        text: a caption, right or wrong.
        out: the PNG to write.
        layer: fusion layer of the maps, 0 is the first; None: that of the soft masks.

    Returns:
        A dict with the keys "text"; "matched", the probability that image and text match; "words", a list of {"word",
        "strength", "peak"}; and "left_out", the words without a map. The strength is the word's largest relevance as a
        fraction of the strongest word's. The peak is the center (x, y) of its largest patch, as fractions of the image.

    Raises:
        UsageError: for a text without words, an unreadable image, or a layer without maps.
    """
    shown, maps = explained_words(model, tokenizer, image, text, layer=layer)
    notes = left_out_notes(model, shown["left_out"])
    words = [word["word"] for word in shown["words"]]
    matched = shown["matched"]
    draw(
        image, words, maps, out, title=text, note=f"match {100 * matched:.0f} %", footnotes=notes,
        shown=content_words(words), gray=matched < MATCHES,
    )  # fmt: skip
    return shown


def left_out_notes(model: VisionLanguageModel, left_out: Sequence[str]) -> list[str]:
    """What a figure says about the words without a map."""
    if not left_out:
        return []
    return [f"no map, beyond {model.config.max_tokens} tokens or without a token: {' '.join(left_out)}"]


def explained_words(
    model: VisionLanguageModel, tokenizer: Tokenizer, image: bytes | np.ndarray, text: str, *, layer: int | None = None
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What `explain` returns, and the map (rows, columns) of each word; raises as `explain` does."""
    words = text.split()
    if not words:
        raise UsageError("text: expected at least one word, got none")
    phrases = [Phrase(caption=text, text=w, first_word=i, n_words=1, boxes=[]) for i, w in enumerate(words)]
    check_image(image)
    sample = Sample(key="image", image=image, captions=[text], phrases=phrases)
    [maps], [spans], [matched] = _maps_and_matches(model, tokenizer, [(sample, text, phrases)], layer)
    seen = [i for i, span in enumerate(spans) if span]
    if not seen:
        raise UsageError(f"text: the tokenizer finds no token in {text!r}")
    report = [
        {"word": words[i], "strength": strength, "peak": peak(maps[i])}
        for i, strength in zip(seen, strengths([maps[i] for i in seen]), strict=True)
    ]
    shown = {
        "text": text,
        "matched": matched,
        "words": report,
        "left_out": [word for word, span in zip(words, spans, strict=True) if not span],
    }
    return shown, [maps[i] for i in seen]


def _maps_and_matches(
    model: VisionLanguageModel, tokenizer: Tokenizer, queries: Sequence[Query], layer: int | None
) -> tuple[list[list[np.ndarray]], list[list[list[int]]], list[float]]:
    """What `phrase_maps` returns, and the probability that each query's image and caption match."""
    with eval_mode(model):
        maps, spans = phrase_maps(model, tokenizer, queries, layer=layer)
        tokens, pixels = query_inputs(model, tokenizer, queries)
        with torch.inference_mode():
            logits = model.match_logits(pixels, tokens.input_ids, tokens.attention_mask)
    return maps, spans, logits.float().softmax(dim=-1)[:, 1].tolist()


def strengths(maps: Sequence[np.ndarray]) -> list[float]:
    """Each map's largest value, as a fraction of the largest of all; 0 if all maps are."""
    peaks = [float(heat.max()) for heat in maps]
    strongest = max(peaks, default=0.0)
    return [value / strongest if strongest > 0 else 0.0 for value in peaks]


def draw(
    image: str | Path | bytes | np.ndarray | Image.Image, words: Sequence[str], maps: Sequence[Any], out: str | Path, *,
    title: str = "", note: str = "", footnotes: Sequence[str] = (), shown: Sequence[int] | None = None,
    gray: bool = False,
) -> None:  # fmt: skip
    """Draws word maps over an image, each with its strength: its largest value / that of the strongest word.

    Args:
        image: the path of a file or its bytes, (H, W, 3) uint8, or a PIL image.
        words: the words.
        maps: one per word, (rows, columns) over the whole image: arrays or tensors, at least 0.
        out: the PNG to write; its folder is created.
        title, note, footnotes: lines above the figure, under the image, and under the figure; long ones are cut.
        shown: numbers of the words to draw, from 0; the others are named below. None: all. If there are more than
            `MOST_WORDS`, the strongest are drawn.
        gray: draw without color, as for a text that does not match.

    Raises:
        UsageError: without words, or for maps of a wrong number or shape.
        BadSample: for an unreadable image.
    """
    heats = [np.asarray(heat.detach().float().cpu() if hasattr(heat, "detach") else heat, np.float32) for heat in maps]
    if not words or len(heats) != len(words) or any(heat.ndim != 2 for heat in heats):
        shapes = [heat.shape for heat in heats]
        raise UsageError(
            f"maps: expected one of size (rows, columns) for each word, got {shapes} for {len(words)} words"
        )
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    elif isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    picture = shown_picture(image)
    strength = strengths(heats)
    shown = range(len(words)) if shown is None else shown
    if len(shown) > MOST_WORDS:
        shown = sorted(sorted(shown, key=lambda number: -strength[number])[:MOST_WORDS])
    if rest := [word for number, word in enumerate(words) if number not in shown]:
        footnotes = [*footnotes, f"not drawn: {' '.join(rest)}"]
    rows = math.ceil((len(shown) + 1) / 5)
    columns = math.ceil((len(shown) + 1) / rows)
    height, width = picture.shape[:2]
    scale_note = _lines(WORD_NOTE, round(14 * 2.3 * columns))
    above = rows * (2.3 * min(height / width, TALLEST) + 0.5)  # inches
    size = columns * 2.3, above + 1.05 + 0.15 * scale_note.count("\n")
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    if title:
        figure.suptitle(_lines(title, 26 * columns), fontsize=13, fontweight="bold")
    _show(axes.flat[0], picture, "image", note)
    colors = GRAYS if gray else COLORS
    for ax, number in zip(axes.flat[1:], shown, strict=False):
        # The map of a weak word is mostly noise: draw it fainter, so that the eye goes to the words that count.
        picture_of_word = overlay(picture, heats[number], strength[number] ** 0.35, colors)
        _show(ax, picture_of_word, words[number], f"strength {100 * strength[number]:.0f} %")
    for ax in axes.flat[len(shown) + 1 :]:
        ax.set_axis_off()
    _color_bar(figure, axes, scale_note, colors)
    if footnotes:
        lines = "\n".join(_lines(text, 34 * columns) for text in footnotes)
        figure.supxlabel(lines, fontsize=9, color=GRAY)
    save_figure(figure, out)


def heatmap_page(
    model: VisionLanguageModel, tokenizer: Tokenizer, source: CaptionSource, out: str | Path, *, images: int = 10,
    words: int = 4, layer: int | None = None,
) -> None:  # fmt: skip
    """Draws a page of the first `images` usable images of a source, good or bad.

    Each comes with its caption and the heat maps of up to `words` of its phrases.

    Each map shows how sure the model is that image and caption match, and its strength: its largest value / that of the
    page's strongest. Maps of a pair that does not match are gray. Boxes are drawn, and a cross marks the largest patch:
    green inside a box, red outside. If a caption has no phrases, its longest words that name something are drawn,
    without boxes. Words beyond the token limit are not drawn.

    Raises:
        UsageError: for a source without a usable sample, or an option out of range.
    """
    for name, value, most in (("images", images, MOST_IMAGES), ("words", words, MOST_PHRASES)):
        if not 1 <= value <= most:
            raise UsageError(f"{name}: expected 1 to {most}, got {value}")
    if len(source) == 0:
        raise UsageError("source: expected at least one sample, got none")
    queries = _first_queries(model, tokenizer, source, images, words)
    maps, _, matches = _maps_and_matches(model, tokenizer, queries, layer)
    strength = iter(strengths([heat for heats in maps for heat in heats]))

    panel, across = 2.1, 1 if len(queries) <= 6 else 2  # inches; images side by side
    width = 1 + max(len(phrases) for _, _, phrases in queries)
    rows = math.ceil(len(queries) / across)
    shown = [shown_picture(sample.image) for sample, _, _ in queries]
    captions = [_lines(caption, 30) for _, caption, _ in queries]
    heights = [  # inches, of the image, its caption and a note
        panel * min(picture.shape[0] / picture.shape[1], TALLEST) + 0.15 * max(2, caption.count("\n") + 1) + 0.2
        for picture, caption in zip(shown, captions, strict=True)
    ]
    heights = [max(heights[row * across : (row + 1) * across]) for row in range(rows)]
    scale_note = _lines(PAGE_NOTE, round(14 * across * width * panel))
    size = across * width * panel, sum(heights) + 0.75 + 0.15 * scale_note.count("\n")
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, across * width, squeeze=False, height_ratios=heights)
    for ax in axes.flat:
        ax.set_axis_off()
    for picture, caption, (_, _, phrases), heats, match, places in zip(
        shown, captions, queries, maps, matches, axes.reshape(-1, width), strict=False
    ):
        _show(places[0], picture, "")
        places[0].set_title(caption, fontsize=8, loc="left")
        for ax, phrase, heat in zip(places[1:], phrases, heats, strict=False):
            note = f"match {100 * match:.0f} %, strength {100 * next(strength):.0f} %"
            _show(ax, overlay(picture, heat, colors=COLORS if match >= MATCHES else GRAYS), phrase.text, note)
            if phrase.boxes:
                _draw_boxes(ax, picture, heat, phrase.boxes)
    _color_bar(figure, axes, scale_note)
    save_figure(figure, out)


def shown_picture(image: bytes | np.ndarray) -> np.ndarray:
    """The upright image, its longer side scaled to SHOWN_SIDE pixels: (H, W, 3) uint8."""
    check_image(image)
    picture = decode_image(image)
    scale = SHOWN_SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC))


def overlay(picture: np.ndarray, heat: np.ndarray, opacity: float = 1.0, colors: str = COLORS) -> np.ndarray:
    """Lays a map (rows, columns) over a picture (H, W, 3) uint8: (H, W, 3) float in [0, 1].

    The map is enlarged (bicubic) and scaled from its smallest to its largest patch, as training scales soft masks. The
    picture is colored where the map is large, with at most `opacity`, and dimmed elsewhere. `colors` is a colormap of
    matplotlib.
    """
    height, width = picture.shape[:2]
    values = torch.from_numpy(np.ascontiguousarray(heat, dtype=np.float32))[None, None]
    values = F.interpolate(values, (height, width), mode="bicubic", align_corners=False)[0, 0].numpy()
    low, high = float(heat.min()), float(heat.max())
    values = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    gray = picture.astype(np.float32).mean(axis=2, keepdims=True)
    dimmed = (0.5 * picture + 0.5 * gray) / 255 * 0.65
    color = matplotlib.colormaps[colors](values)[..., :3]
    alpha = (0.85 * opacity * values**0.7)[..., None]
    return dimmed * (1 - alpha) + color * alpha


def peak(heat: np.ndarray) -> tuple[float, float]:
    """The center (x, y) of the largest patch, as fractions of the image; of equally large ones, the first."""
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    return (float(column) + 0.5) / heat.shape[1], (float(row) + 0.5) / heat.shape[0]


def _first_queries(
    model: VisionLanguageModel, tokenizer: Tokenizer, source: CaptionSource, images: int, words: int
) -> list[Query]:
    """The first usable samples, each with one caption and phrases of it that the model reads to their end."""
    skipped: dict[str, str] = {}
    queries = []
    for _, sample in usable_samples(source, range(len(source)), skipped):
        if by_caption := boxed_phrases(sample):
            caption = max(by_caption, key=lambda text: len(by_caption[text]))
            # one phrase for each span of words
            phrases = list({(phrase.first_word, phrase.n_words): phrase for phrase in by_caption[caption]}.values())
        else:
            caption = sample.captions[0]
            parts = caption.split()
            phrases = [Phrase(caption, parts[i], i, 1, []) for i in content_words(parts)]
            phrases.sort(key=lambda phrase: -len(phrase.text))
        [offsets] = tokenize(model, tokenizer, [caption]).offsets
        read = [phrase for phrase in phrases if word_tokens(caption, offsets, [phrase.first_word + phrase.n_words - 1])]
        queries.append((sample, caption, sorted(read[:words], key=lambda phrase: phrase.first_word)))
        if len(queries) == images:
            break
    if not queries:
        first = next(iter(skipped.items()))
        raise UsageError(f"source: none of {len(source)} samples can be used, the first: {first}")
    return queries


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
    ax.set_axis_on()
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(_lines(title, 24, 3), fontsize=11)
    if note:
        ax.set_xlabel(_lines(note, 30, 3), fontsize=8, color=GRAY, labelpad=2)


def _lines(text: str, width: int, most: int = 8) -> str:
    """A text of any length as a few lines of limited length. If it is cut, it ends in an ellipsis."""
    return "\n".join(textwrap.wrap(text, width, max_lines=most, placeholder=" ..."))


def _color_bar(figure: Figure, axes: np.ndarray, note: str, colors: str = COLORS) -> None:
    """The scale of the maps under the panels, with a note on what else is drawn."""
    width, height = figure.get_size_inches()
    place = dict(location="bottom", shrink=min(1.0, 4.5 / width), aspect=45, pad=0.05 / height)
    bar = figure.colorbar(ScalarMappable(cmap=colors), ax=axes, **place)
    bar.set_label(f"relevance, from each word's weakest patch (0) to its strongest (1)\n{note}", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)

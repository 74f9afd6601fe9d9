"""Heat maps: what they show as numbers, and that their files are complete."""

import io
import json
import re

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from small_models import small_pair

from softmask_fast.data.sources import open_source
from softmask_fast.data.types import BadSample, Sample
from softmask_fast.errors import UsageError, printable
from softmask_fast.evaluation import heatmaps
from softmask_fast.evaluation.common import image_pixels, tokenize
from softmask_fast.evaluation.heatmaps import draw, explain, heatmap_page, overlay, peak, shown_picture


@pytest.fixture(scope="module")
def shapes():
    return open_source("shapes:num=6", split="val", image_size=32)


@pytest.fixture(scope="module")
def model_and_tokenizer(shapes):
    return small_pair(shapes, fusion_layers=2)


def size_of(png):
    """The size of a PNG; a truncated file raises."""
    with Image.open(png) as picture:
        picture.load()
        assert picture.format == "PNG"
        return picture.size


def jpeg(width, height, orientation=None):
    picture = Image.new("RGB", (width, height), "white")
    picture.paste((200, 0, 0), (0, 0, width // 2, height))  # the left half is red
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def test_explain_reports_each_word(model_and_tokenizer, shapes, tmp_path):
    model, tokenizer = model_and_tokenizer
    image = shapes.read(0).image
    text = "A small red circle"
    out = tmp_path / "new folder" / "words.png"
    shown = explain(model, tokenizer, image, text, out)
    assert [word["word"] for word in shown["words"]] == text.split()
    assert max(word["strength"] for word in shown["words"]) == 1.0
    assert all(0 < x < 1 for word in shown["words"] for x in word["peak"])
    assert json.loads(json.dumps(shown)) == shown | {
        "words": [word | {"peak": list(word["peak"])} for word in shown["words"]]
    }

    tokens = tokenize(model, tokenizer, [text])
    pixels = image_pixels(model, [Sample("x", image, [text])])
    with torch.no_grad():
        logits = model.match_logits(pixels, tokens.input_ids, tokens.attention_mask)
    assert shown["matched"] == pytest.approx(logits.softmax(-1)[0, 1].item(), rel=1e-5)

    assert min(size_of(out)) > 100
    assert [path.name for path in out.parent.iterdir()] == ["words.png"]  # no temporary file stays


def test_explain_says_which_words_it_cannot_map(model_and_tokenizer, shapes, tmp_path):
    model, tokenizer = model_and_tokenizer
    text = "a " * model.config.max_tokens + "circle"
    shown = explain(model, tokenizer, shapes.read(0).image, text, tmp_path / "long.png")
    kept = model.config.max_tokens - 2
    assert len(shown["words"]) == kept
    assert shown["left_out"] == text.split()[kept:]
    assert size_of(tmp_path / "long.png")


def test_explain_refuses_what_it_cannot_draw(model_and_tokenizer, shapes, tmp_path):
    model, tokenizer = model_and_tokenizer
    out = tmp_path / "none.png"
    with pytest.raises(UsageError, match="text: expected at least one word"):
        explain(model, tokenizer, shapes.read(0).image, "  ", out)
    with pytest.raises(BadSample, match="image cannot be decoded"):
        explain(model, tokenizer, b"not an image", "a circle", out)
    with pytest.raises(UsageError, match="layer"):
        explain(model, tokenizer, shapes.read(0).image, "a circle", out, layer=1)
    assert not out.exists()


def test_draw_takes_any_picture_and_any_map(tmp_path):
    pixels, maps = np.zeros((20, 30, 3), np.uint8), [np.eye(3), torch.rand(2, 5)]
    (tmp_path / "red.jpg").write_bytes(jpeg(30, 20))
    for image in (pixels, Image.fromarray(pixels), tmp_path / "red.jpg", str(tmp_path / "red.jpg"), jpeg(30, 20)):
        draw(image, ["one", "two"], maps, tmp_path / "out.png", title="a title", note="a note", footnotes=["a line"])
        assert min(size_of(tmp_path / "out.png")) > 100
        (tmp_path / "out.png").unlink()
    for words, given in ((["one"], maps), ([], []), (["one"], [np.zeros(9)])):
        with pytest.raises(UsageError, match="maps: expected one of size .rows, columns. for each word"):
            draw(pixels, words, given, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_explain_draws_the_words_that_name_something(model_and_tokenizer, shapes, tmp_path, monkeypatch):
    """In gray, unless the pair matches; the numbers are of all words."""
    model, tokenizer = model_and_tokenizer
    drawn = drawn_maps(monkeypatch)
    for bias, colors in ((9.0, "inferno"), (-9.0, "gray")):
        with torch.no_grad():
            monkeypatch.setattr(model.match_head.bias, "data", torch.tensor([0.0, bias]))
        shown = explain(model, tokenizer, shapes.read(0).image, "a circle with a star", tmp_path / "words.png")
        assert (shown["matched"] >= 0.5) == (bias > 0) and len(shown["words"]) == 5
        strengths = {word["word"]: f"strength {100 * word['strength']:.0f} %" for word in shown["words"]}
        assert drawn.pop(0)[0] == "image"
        assert [(title, note) for title, note, _ in drawn] == [(word, strengths[word]) for word in ("circle", "star")]
        assert {used for _, _, used in drawn} == {colors}
        drawn.clear()


def drawn_maps(monkeypatch):
    """The list of (title, note, colormap or None) of the pictures to be drawn."""
    drawn, colormap = [], []

    def note_colors(picture, heat, opacity=1.0, colors="inferno"):
        colormap.append(colors)
        return overlay(picture, heat, opacity, colors)

    def note_picture(ax, picture, title, note=""):
        drawn.append((title, note, colormap.pop() if colormap else None))

    monkeypatch.setattr(heatmaps, "overlay", note_colors)
    monkeypatch.setattr(heatmaps, "_show", note_picture)
    return drawn


class Bare:
    """Images without boxes; the first cannot be read."""

    keys, image_ids, encoded = ["bad", "a", "b"], np.arange(3), True

    def __len__(self):
        return 3

    def read(self, index):
        image = jpeg(20 + 20 * index, 60) if index else b"not an image"
        return Sample(self.keys[index], image, ["a circle while " + "the " * 40 + "star"] if index == 1 else ["square"])


def test_heatmap_page_shows_the_first_images_whatever_they_are(model_and_tokenizer, shapes, tmp_path, monkeypatch):
    model, tokenizer = model_and_tokenizer
    drawn = drawn_maps(monkeypatch)
    heatmap_page(model, tokenizer, shapes, tmp_path / "boxes.png", images=3, words=2)
    samples = [shapes.read(number) for number in range(3)]
    expected = [title for sample in samples for title in ("", *(phrase.text for phrase in sample.phrases[:2]))]
    assert [title for title, _, _ in drawn] == expected
    strength = [re.fullmatch(r"match (\d+) %, strength (\d+) %", note).groups() for title, note, _ in drawn if title]
    assert max(int(s) for _, s in strength) == 100
    tokens = tokenize(model, tokenizer, [samples[0].captions[0]])
    with torch.no_grad():
        logits = model.match_logits(image_pixels(model, samples[:1]), tokens.input_ids, tokens.attention_mask)
    assert strength[0][0] == f"{100 * logits.softmax(-1)[0, 1].item():.0f}"

    drawn.clear()
    heatmap_page(model, tokenizer, Bare(), tmp_path / "bare.png")  # no boxes; a word beyond the token limit
    assert [title for title, _, _ in drawn] == ["", "circle", "", "square"]
    with pytest.raises(UsageError, match="images: expected 1 to 50, got 0"):
        heatmap_page(model, tokenizer, shapes, tmp_path / "none.png", images=0)


def test_heatmap_page_has_two_images_a_row_if_there_are_many(model_and_tokenizer, shapes, tmp_path):
    model, tokenizer = model_and_tokenizer
    many = open_source("shapes:num=8", split="val", image_size=32)
    sizes = []
    for number in (3, 6, 7):
        heatmap_page(model, tokenizer, many, tmp_path / "page.png", images=number, words=2)
        sizes.append(size_of(tmp_path / "page.png"))
    (few, _), (column, tall), (two_columns, low) = sizes
    assert few == column and two_columns == 2 * column and low < tall


def test_figures_have_a_bounded_size_and_say_what_they_leave_out(model_and_tokenizer, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(heatmaps, "save_figure", lambda figure, out: figures.append(figure))
    monkeypatch.setattr(heatmaps, "MOST_WORDS", 4)
    maps = [np.full((2, 2), 1.0 + number % 7) for number in range(30)]  # the strongest: 6, 13, 20, 27
    words = [f"word-{number}-{'x' * 3000}" for number in range(30)]
    for size in ((900, 20), (20, 900)):
        draw(np.zeros((*size, 3), np.uint8), words, maps, "out.png", title="long " * 3000, note="n " * 999)
    for figure in figures:
        titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
        assert [title.split("-")[1] for title in titles[1:]] == ["6", "13", "20", "27"]
        assert figure.get_supxlabel().replace("\n", "").startswith("not drawn: word-0-xxx")
        scale = figure.axes[-1].get_xlabel().replace("\n", " ")
        assert "strength: a map's largest relevance / that of the strongest word; weaker maps are fainter" in scale
        texts = [*titles, figure.get_suptitle(), figure.get_supxlabel(), figure.axes[0].get_xlabel()]
        assert all(text.count("\n") < 8 for text in texts) and figure.get_suptitle().endswith("long ...")
    assert figures[0].get_figheight() < 6 and figures[1].get_figheight() < 6

    class Tall:
        keys, image_ids, encoded = ["a"], np.arange(1), True

        def __len__(self):
            return 1

        def read(self, index):
            return Sample("a", jpeg(4, 900), ["red circle " * 2500])

    heatmap_page(*model_and_tokenizer, Tall(), "out.png")
    assert figures[2].get_figheight() < 6 and len(figures[2].axes) == 6
    scale = figures[2].axes[-1].get_xlabel().replace("\n", " ")
    assert "the page's largest; all maps have the same colors, however weak" in scale
    assert "cross: the map's strongest patch, green inside a box, red outside" in scale


def test_overlay_puts_the_color_where_the_relevance_is():
    picture = np.full((40, 80, 3), 128, np.uint8)
    heat = np.zeros((4, 8), np.float32)
    heat[1, 6] = 0.01  # small, but the largest: the scale is the word's own
    shown = overlay(picture, heat)
    assert shown.shape == (40, 80, 3) and shown.min() >= 0 and shown.max() <= 1
    row, column = np.unravel_index(shown.sum(axis=2).argmax(), (40, 80))
    assert 10 <= row < 20 and 60 <= column < 70
    flat = overlay(picture, np.zeros((4, 8), np.float32))
    assert np.ptp(flat) == 0 and flat.max() < 128 / 255


def test_peak_is_the_center_of_the_largest_patch():
    heat = np.zeros((2, 4))
    heat[1, 2] = 1
    assert peak(heat) == (0.625, 0.75)


def test_shown_picture_is_turned_and_scaled():
    wide = shown_picture(jpeg(64, 32))
    assert wide.shape == (192, 384, 3)
    assert wide[100, 20, 1] < 60 < 200 < wide[100, 360, 1]  # red to the left, white to the right
    turned = shown_picture(jpeg(64, 32, orientation=6))  # 90 degrees clockwise: red on top
    assert turned.shape == (384, 192, 3)
    assert turned[20, 100, 1] < 60 < 200 < turned[360, 100, 1]
    assert shown_picture(np.zeros((800, 400, 3), np.uint8)).shape == (384, 192, 3)


@pytest.mark.parametrize("text", ["$a_{ and $b", "from $5 to $10", r"\frac$ \$x^2$ 50%", "a\x1b[2J\0b \u202e c"])
def test_text_is_drawn_as_it_stands(text, tmp_path, model_and_tokenizer, shapes, monkeypatch):
    drawn = set()
    monkeypatch.setitem(matplotlib.rcParams, "text.parse_math", True)

    def written(figure, *_, **options):
        for artist in figure.findobj(Text):
            assert not artist.get_parse_math() and not artist.get_usetex()
            drawn.update(artist.get_text().split("\n"))
        return savefig(figure, *_, **options)

    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", written)
    image = np.full((8, 8, 3), 200, np.uint8)
    draw(image, [text], [np.eye(2)], tmp_path / "d.png", title=text, note=text, footnotes=[text])
    assert printable(text) in drawn and size_of(tmp_path / "d.png")
    drawn.clear()
    members = {"read": lambda self, index: Sample("k", image, [text]), "keys": ["k"], "__len__": lambda self: 1}
    page = type("Source", (), members)()
    heatmap_page(*model_and_tokenizer, page, tmp_path / "p.png", images=1)
    assert any(printable(text).split()[-1] in line for line in drawn) and size_of(tmp_path / "p.png")

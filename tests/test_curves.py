"""The curves of a run: which panels it has, what is in them, and that the files are complete."""

import json

import numpy as np
import pytest
from PIL import Image

from softmask_fast.errors import UsageError
from softmask_fast.evaluation.curves import plot_curves, shortcut_accuracy, smooth
from softmask_fast.evaluation.plots import save_figure

KINDS = ("true_pair", "other_image", "soft_masked_other_text", "soft_masked")
LOSS, RIGHT = "loss, and its weighted parts, in nats", "right on training batches"
PAIRS = "matched or not: right, by kind of pair"


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws the curves of metrics; returns the axes of each file's panels by title."""

    def drawn(records, *others):
        figures = {}

        def note(figure, path):
            figures[path.name] = {ax.get_title(loc="left"): ax for ax in figure.axes}
            save_figure(figure, path)
            with Image.open(path) as picture:
                picture.load()

        monkeypatch.setattr("softmask_fast.evaluation.curves.save_figure", note)
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", *others)
        return figures

    return drawn


def legend(ax):
    return ax.get_legend_handles_labels()[1]


def record(step):
    parts = {"itc": 6 - step / 100, "itm": 0.5, "mlm": 1.0}
    kinds = {f"itm_{kind}{what}": 0.5 for kind in KINDS for what in ("", "_accuracy")}
    others = {"itm_accuracy": step / 400, "temperature": 0.07, "pairs_per_second": 9.0, "epoch": step / 10}
    return {"step": step, "loss": parts["itc"] + 2 * parts["itm"] + 3 * parts["mlm"], **parts, **kinds, **others}


def test_few_panels_that_say_something(draw):
    records = [record(step) | ({"grad_norm": 1.0} if step % 2 else {}) for step in range(1, 51)]
    held_out = [{"step": step, "mean recall": step / 400, "pointing game": 0.5} for step in (200, 300)]
    held_out[0]["re-ranked"] = held_out[1]["re-ranked"] = None  # was not measured
    figures = draw(records, held_out, {"queue enters": 10}, {"itm": 2.0, "mlm": 3.0})
    learned = figures["curves.png"]
    assert list(learned) == [LOSS, RIGHT, PAIRS, "held-out data, with the last figure"]
    assert legend(learned[LOSS]) == ["masked tokens", "matching", "contrast", "all"]
    assert legend(learned[RIGHT]) == ["matching"]
    kinds = ["true pair", "other image", "soft masked other text", "soft masked"]
    assert legend(learned[PAIRS]) == [*kinds, "all, seeing only whether there is a mask"]
    assert legend(learned["held-out data, with the last figure"]) == ["mean recall, 75.0%", "pointing game, 50.0%"]
    top = learned[LOSS].collections[-1].get_paths()[0].vertices[:, 1].max()  # of the weighted parts on each other
    assert top == pytest.approx(learned[LOSS].lines[0].get_ydata().max(), rel=1e-3)
    for ax in learned.values():  # the event, by its name
        assert [text.get_text() for text in ax.texts] == ["queue enters"]
        assert any(list(line.get_xdata()) == [10, 10] for line in ax.lines)
    system = figures["curves-system.png"]
    assert list(system) == ["soft masks, soft targets, temperature", "pairs per second", "grad norm"]
    assert not any(ax.texts for ax in system.values())


def test_a_legend_is_as_wide_as_its_panel(draw):
    """Of 7 inches, whatever the names are: one long one takes the panel no width."""
    names = ("mean recall of all captions, ITC + ITM", "recall at 1 by contrast", "recall at 1 re-ranked")
    records = [dict.fromkeys((*names, "pointing game", "box accuracy"), 0.5) | {"step": step} for step in (1, 2)]
    (ax,) = draw([{"step": 1, "learning_rate": 2.0}], records)["curves.png"].values()
    figure = ax.figure
    assert ax.get_legend().get_window_extent().width < 7 * figure.dpi
    assert ax.get_window_extent().width > 6 * figure.dpi


def test_one_evaluation_is_bars_and_one_point_is_drawn(draw):
    figures = draw([{"step": 1, "loss": 2.0}], [{"step": 1600, "mean recall": 0.75}], {"queue enters": 1})
    assert list(figures) == ["curves.png"]  # nothing of the machine
    assert list(figures["curves.png"]) == ["loss, in nats", "held-out data, step 1,600"]
    assert [text.get_text() for text in figures["curves.png"]["held-out data, step 1,600"].texts] == ["75.0%"]
    with pytest.raises(UsageError, match="expected lines with metrics"):
        draw([])


def test_the_accuracy_of_a_model_that_sees_only_masks():
    pairs = ["true_pair", "other_image", "other_text"]
    assert shortcut_accuracy(pairs) == pytest.approx(2 / 3)  # "never"
    assert shortcut_accuracy([*pairs, "soft_masked"]) == 0.75
    assert shortcut_accuracy(KINDS) == 0.5


def test_smooth_keeps_constants_and_averages():
    np.testing.assert_allclose(smooth(np.full(7, 3.0), 4), 3.0)
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 0.0]), 3), [1.5, 1.0, 1.5])

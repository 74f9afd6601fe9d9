"""The curves of a run: which panels it has, what is in them, and that the files are complete."""

import json

import numpy as np
import pytest
from matplotlib.text import Text
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
    assert legend(learned[PAIRS]) == [*kinds, "a model that sees only masks"]
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


def test_events_are_named_above_the_panels(draw):
    """Those of one step in one line; close ones above each other, where no name hides a curve or another name."""
    records = [{"step": step, "loss": 2.0, "mlm_accuracy": 1.0} for step in range(1, 101)]
    events = {"queue enters": 90, "negatives turn hard": 92, "soft targets at full weight": 90, "early": 1, "soon": 2}
    for ax in draw(records, (), events)["curves.png"].values():
        ax.figure.draw_without_rendering()  # where things are without the file's resolution
        boxes = {text.get_text(): Text.get_window_extent(text) for text in ax.texts}  # without their lines
        assert set(boxes) == {"queue enters; soft targets at full weight", "negatives turn hard", "early", "soon"}
        assert all(box.y0 >= ax.get_window_extent().y1 for box in boxes.values())
        for name, box in boxes.items():
            assert not any(box.overlaps(other) for text, other in boxes.items() if text != name)
        assert boxes["early"].y0 > boxes["soon"].y0  # the other way round its line would cross "soon"
        assert boxes["negatives turn hard"].y0 > boxes["queue enters; soft targets at full weight"].y0
        (title,) = (text for text in ax.findobj(Text) if text.get_text() == ax.get_title(loc="left"))
        assert title.get_window_extent().y0 > max(box.y1 for box in boxes.values())


def test_curves_are_smoothed_but_not_across_an_event(draw):
    """The queue enters after step 100: the loss and its part jump between records 100 and 110, in one place."""
    records = []
    for step in range(10, 1001, 10):
        loss = 2.0 if step <= 100 else 5.0
        wave = 1.0 if step % 20 else 0.0
        records.append({"step": step, "loss": loss, "itc": loss, "mlm_accuracy": wave, "learning_rate": wave})
    figures = draw(records, (), {"queue enters": 100})
    loss = figures["curves.png"]["loss, and its weighted parts, in nats"]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [2.0] * 10 + [5.0] * 90)
    area = loss.collections[0].get_paths()[0].vertices[:, 1]
    assert set(area.round(6)) == {0.0, 2.0, 5.0}
    noisy = figures["curves.png"][RIGHT].lines[0].get_ydata()
    assert noisy[20:-20] == pytest.approx(np.full(60, 0.5))  # smoothed, elsewhere
    assert set(figures["curves-system.png"]["learning rate"].lines[0].get_ydata()) == {0.0, 1.0}  # has no noise


def test_floors_of_held_out_metrics(draw):
    """Ticks at a bar, and the strongest one in words; with several evaluations the strongest one as a line."""
    held_out = {"step": 9, "mean recall, by both together": 0.5, "pointing game": 0.4, "other": 0.2}
    floors = {"mean recall, by both together": {"chance": 0.1}, "pointing game": {"chance": 0.3, "image center": 0.54}}
    metrics = [{"step": 1, "learning_rate": 1.0}]
    (ax,) = draw(metrics, [held_out], None, None, floors)["curves.png"].values()
    assert [text.get_text() for text in ax.texts] == ["50.0%, floor 10.0%", "40.0%, floor 54.0%", "20.0%"]
    assert ax.texts[1].xy[0] == 0.54  # right of the tick
    ticks = {lines.get_label(): [segment[0, 0] for segment in lines.get_segments()] for lines in ax.collections}
    assert ticks == {"chance": [0.1, 0.3], "image center": [0.54]}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(ticks)
    assert ax.get_yticklabels()[0].get_text() == "mean recall, by both\ntogether"
    (ax,) = draw(metrics, [held_out, held_out | {"step": 10}], None, None, floors)["curves.png"].values()
    lines = {line.get_label().split(",")[0]: line.get_color() for line in ax.lines}
    floors = [line for line in ax.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
    dashed = {line.get_color(): line.get_ydata()[0] for line in floors}
    assert dashed[lines["mean recall"]] == 0.1 and dashed[lines["pointing game"]] == 0.54
    assert lines["other"] not in dashed and "a metric's strongest floor" in lines


def test_the_machine_has_units_and_no_empty_panel(draw):
    zero = {"bad_samples": 0, "truncated_captions": 0, "alpha": 0.0}
    busy = {"data_wait": 0.004, "flops_utilisation": 0.4, "pairs_per_second": 30.0}
    records = [{"step": 1, "loss": 1.0} | zero | busy, {"step": 2, "loss": 1.0} | zero | busy]
    panels = draw(records)["curves-system.png"]
    assert list(panels) == [
        "pairs per second", "operations, of a large product's rate", "time spent waiting for data"
    ]  # fmt: skip
    note = next(iter(panels.values())).figure.get_supxlabel()
    assert note == "0 throughout and not drawn: weight of the soft targets, unusable samples, truncated captions"
    for ax, largest in zip(panels.values(), (30.0, 0.4, 0.004), strict=True):
        assert ax.get_ylim() == pytest.approx((0, 1.05 * largest))
    ticks = [tick.get_text() for tick in panels["time spent waiting for data"].get_yticklabels()]
    assert "0.2%" in ticks and all(tick.endswith("%") for tick in ticks)
    records[1]["bad_samples"] = 1
    panels = draw(records)["curves-system.png"]
    assert all(tick == int(tick) for tick in panels["samples so far"].get_yticks())


def test_the_accuracy_of_a_model_that_sees_only_masks():
    pairs = ["true_pair", "other_image", "other_text"]
    assert shortcut_accuracy(pairs) == pytest.approx(2 / 3)  # "never"
    assert shortcut_accuracy([*pairs, "soft_masked"]) == 0.75
    assert shortcut_accuracy(KINDS) == 0.5


def test_smooth_keeps_constants_and_averages():
    np.testing.assert_allclose(smooth(np.full(7, 3.0), 4), 3.0)
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 0.0]), 3), [1.5, 1.0, 1.5])

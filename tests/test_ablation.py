"""The ablation: five configurations of one run, their table and figure, and no run done twice."""

import json

import pytest
from PIL import Image
from runs import ROOT, SMALL

from softmask_fast.cli import main
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.plots import save_figure
from softmask_fast.training import ablation
from softmask_fast.training.ablation import (
    ROWS,
    Run,
    check_folder,
    check_options,
    write_tables,
)
from softmask_fast.training.options import parse_arguments

DS = str(ROOT / "ds.json")
TINY = SMALL | {"max_steps": 2, "eval_size": 12, "rand_augment": True}


def flags(options: dict) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def test_each_row_has_on_what_it_says(tmp_path):
    found = {}
    for row in ROWS:
        config, _ = parse_arguments(["--deepspeed", DS, *flags(TINY), *Run(row, 3, tmp_path).flags])
        assert config.train.seed == 3 and config.train.resume and config.train.output_dir == str(tmp_path)
        assert config.data.crop and not config.data.flip  # as the preset has them
        augmented = {config.data.rand_augment, config.data.color, config.data.blur, config.objectives.masked_captions}
        found[row] = augmented, config.objectives.soft_mask, config.objectives.focal_gamma
    assert found == {
        "baseline": ({False}, False, 0),
        "+ augmentation": ({True}, False, 0),
        "+ soft masks": ({False}, True, 0),
        "+ focal": ({False}, False, 2),
        "all": ({True}, True, 2),
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"soft_mask": False}, "soft_mask: expected soft masks on"),
        ({"focal_gamma": 0}, "focal_gamma: expected focal on"),
        (
            {"masked_captions": False, "rand_augment": False, "color": False, "blur": False},
            "masked_captions, rand_augment, color, blur: expected augmentation on",
        ),
        ({"output_dir": "x"}, "output_dir: expected none for the runs, as the ablation sets it"),
        ({"resume": True}, "resume: expected none for the runs, as the ablation sets it"),
        ({"data": "a.json"}, "eval_data: expected held-out pairs to compare the runs on, got none for a.json"),
        ({"momentum": 2}, "momentum: expected in"),
    ],
)
def test_what_cannot_be_compared_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        check_options(flags(TINY | change), 3, DS)


def test_a_folder_keeps_its_options(tmp_path):
    check_folder(tmp_path, check_options(flags(TINY), 3, DS))
    check_folder(tmp_path, check_options(flags(TINY), 5, DS))  # more seeds
    with pytest.raises(ValueError, match="batch_size: expected 4, as in the runs in .*, got 8"):
        check_folder(tmp_path, check_options(flags(TINY | {"batch_size": 8}), 3, DS))
    path, config = tmp_path / "options.json", check_options(flags(TINY), 3, DS)
    stored = json.loads(path.read_text())
    del stored["objectives"]["hard_negatives_start"]  # of before this option
    path.write_text(json.dumps(stored))
    check_folder(tmp_path, config)
    for content in ("{", "[]", '{"preset": "tiny"}'):
        path.write_text(content)
        with pytest.raises(UsageError, match=f"^output_dir: {path} [^\n]*$"):
            check_folder(tmp_path, config)


def write_evaluation(run: Run, recall: float, pointing: float | None) -> None:
    recalls = {"text_to_image": {"recall@1": recall - 0.02}, "image_to_text": {"recall@1": recall + 0.02}}
    reports = {"retrieval": {"images": 12, "itc": recalls, "both": None}}
    if pointing is not None:
        reports["grounding"] = {"pointing_game": {"model": pointing}}
    run.folder.mkdir(parents=True)
    record = {"step": 1600, "epoch": 12.5, "data": "shapes", "reports": reports}
    (run.folder / "evaluation.json").write_text(json.dumps(record))


@pytest.mark.parametrize("pointing", [0.25, None])
def test_the_tables_have_means_spreads_and_differences(tmp_path, pointing):
    """Seeds differ by 20 points; of "all" from the baseline by 30 and 32, of "+ focal" by 10 and -10."""
    recalls = {"all": (0.4, 0.62), "+ focal": (0.2, 0.2)}
    runs = [Run(row, seed, tmp_path / f"{row}-{seed}") for seed in range(2) for row in ROWS]
    for run in runs:
        write_evaluation(run, recalls.get(run.row, (0.1, 0.3))[run.seed], pointing)
    content = write_tables(runs, ["--data", "https://me:key@a/b.tar"], "https://me:key@a/b.tar", tmp_path)
    cell = content["rows"]["all"]["R@1"]
    assert cell["values"] == pytest.approx([0.4, 0.62]) and cell["mean"] == pytest.approx(0.51)
    assert cell["spread"] == pytest.approx(0.22 / 2**0.5)
    assert cell["difference"]["values"] == pytest.approx([0.3, 0.32])
    assert list(content["rows"]["baseline"]) == (["R@1"] if pointing is None else ["R@1", "pointing game"])
    text = (tmp_path / "ablation.md").read_text()
    about = (
        "trained on https://a/b.tar for 1,600 steps (12.5 epochs), 2 seeds; measured on 12 held-out images of shapes"
    )
    assert text.startswith(f"In %, mean ± standard deviation; {about}.\n")
    assert "key" not in (tmp_path / "ablation.json").read_text()
    values, differences = text.split("Difference from the baseline")
    assert "| all | 51.0 ± 15.6 |" in values and "| baseline | 20.0 ± 14.1 |" in values
    assert "| all | **+31.0 ± 1.4** |" in differences and "| + focal | +0.0 ± 14.1 |" in differences
    assert "baseline |" not in differences
    assert json.loads((tmp_path / "ablation.json").read_text()) == content
    one = write_tables(runs[: len(ROWS)], [], "shapes", tmp_path)
    assert one["rows"]["all"]["R@1"]["spread"] is None and one["seeds"] == 1
    assert "| all | +30.0 |" in (tmp_path / "ablation.md").read_text()


def test_the_figure_has_one_scale_and_shows_every_seed(tmp_path, monkeypatch):
    """Recall of "all" is about 2 points below the baseline, pointing 20 points; "+ focal" points here and there."""
    figures = []

    def note(figure, path):
        figures.append(figure)
        save_figure(figure, path)
        with Image.open(path) as picture:
            picture.load()

    monkeypatch.setattr(ablation, "save_figure", note)
    runs = [Run(row, seed, tmp_path / f"{row}-{seed}") for seed in range(3) for row in ROWS]
    for run in runs:
        recall = 0.3 - (0.02 + 0.001 * run.seed) * (run.row == "all")
        pointing = {"all": 0.5, "+ focal": 0.7 + 0.1 * run.seed}.get(run.row, 0.7)
        write_evaluation(run, recall, pointing)
    write_tables(runs, [], "shapes:num=9", tmp_path)
    write_tables(runs[: len(ROWS)], [], "shapes:num=9", tmp_path)
    for figure, seeds in zip(figures, (3, 1), strict=True):
        recall, pointing, *_ = figure.axes
        assert recall.get_xlim() == pointing.get_xlim()
        names = [label.get_text() for label in recall.get_yticklabels()]
        assert names == ["augmentation", "soft masks", "focal weights", "all three"]
        points = [line for line in pointing.lines if line.get_marker() == "o"]
        assert [len(line.get_xdata()) for line in points] == [seeds] * 4
        assert list(points[3].get_xdata()) == pytest.approx([-20] * seeds)
        assert len(pointing.collections) == (4 if seeds > 1 else 0)  # whiskers
        numbers = [text.get_text() for text in pointing.texts]
        assert numbers[3] == ("-20.0 ± 0.0" if seeds > 1 else "-20.0")
        colors = [bar.get_facecolor() for bar in pointing.patches]
        assert (colors[3] != colors[2]) == (seeds > 1)  # clear, and not
        caption = figure.get_supxlabel()
        assert "trained on shapes:num=9 for 1,600 steps (12.5 epochs)" in caption and "of shapes" in caption
        assert ("whiskers" in caption) == (seeds > 1)


def test_finished_runs_are_not_repeated_and_interrupted_ones_go_on(tmp_path, monkeypatch, capsys):
    """Of two seeds of two rows one run is left, a real one. The first seed's table is there before it begins."""
    monkeypatch.setattr(ablation, "ROWS", {row: ROWS[row] for row in ("baseline", "all")})
    output = tmp_path / "ablation"
    runs = [Run(row, seed, output / "runs" / f"{row}-seed-{seed}") for seed in range(2) for row in ablation.ROWS]
    for run in runs[:3]:
        write_evaluation(run, 0.1, None)
    last = runs[3].folder
    command = ["ablate", "--output_dir", str(output), "--seeds", "2", "--deepspeed", DS, *flags(TINY)]
    command += ["--rand_augment", "false"]  # which takes seconds to prepare
    assert main([*command, "--launcher=--no_such_option"]) == 2
    assert "failed with status 2; the end of run.log:" in capsys.readouterr().err
    assert json.loads((output / "ablation.json").read_text())["seeds"] == 1

    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "baseline, seed 1: finished" in shown and "| baseline | 10.0 ± 0.0 |" in shown and "| all |" in shown
    assert [path.name for path in runs[0].folder.iterdir()] == ["evaluation.json"]
    stored = json.loads((output / "ablation.json").read_text())
    assert set(stored["rows"]) == {"baseline", "all"} and stored["seeds"] == 2
    config = json.loads((last / "config.json").read_text())["config"]
    assert config["objectives"]["soft_mask"] and config["objectives"]["focal_gamma"] == 2
    assert config["train"]["resume"] == "auto"  # the same command goes on with one that was killed

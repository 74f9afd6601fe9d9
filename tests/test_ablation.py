"""The ablation: five configurations of one run, their table and figure, and no run done twice."""

import json

import pytest
from PIL import Image
from runs import ROOT, SMALL

from softmask_fast.cli import main
from softmask_fast.errors import UsageError
from softmask_fast.training import ablation
from softmask_fast.training.ablation import (
    ROWS,
    Run,
    check_folder,
    check_options,
    markdown,
    plot,
    run_ablation,
    summarize,
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
        ({"soft_mask": False}, "soft_mask: expected soft masks switched on"),
        ({"focal_gamma": 0}, "focal_gamma: expected focal switched on"),
        (
            {"masked_captions": False, "rand_augment": False, "color": False, "blur": False},
            "masked_captions, rand_augment, color, blur: expected augmentation switched on",
        ),
        ({"output_dir": "x"}, "output_dir: the ablation sets this option for each run"),
        ({"resume": True}, "resume: the ablation sets this option for each run"),
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
    with pytest.raises(ValueError, match="batch_size: was 4 in the runs of .*, got 8"):
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
    recalls = {way: {"recall@1": recall} for way in ("text_to_image", "image_to_text")}
    reports = {"retrieval": {"itc": recalls, "itm": None}}
    if pointing is not None:
        reports["grounding"] = {"pointing_game": {"model": pointing}}
    run.folder.mkdir(parents=True)
    (run.folder / "evaluation.json").write_text(json.dumps({"data": "shapes", "reports": reports}))


@pytest.mark.parametrize("pointing", [0.25, None])
def test_the_table_has_means_and_spreads(tmp_path, pointing):
    runs = [Run(row, seed, tmp_path / f"{row}-{seed}") for row in ROWS for seed in range(2)]
    for run in runs:
        write_evaluation(run, 0.4 + 0.2 * run.seed if run.row == "all" else 0.1, pointing)
    table = summarize(runs)
    assert table["all"]["text to image R@1, ITC"]["values"] == [0.4, pytest.approx(0.6)]
    assert table["all"]["text to image R@1, ITC"]["mean"] == pytest.approx(0.5)
    assert table["all"]["text to image R@1, ITC"]["spread"] == pytest.approx(0.02**0.5)
    columns = ["text to image R@1, ITC", "image to text R@1, ITC", "pointing game"]
    assert list(table["baseline"]) == (columns[:2] if pointing is None else columns)
    lines = markdown(table).splitlines()
    assert lines[-1].startswith("| all | 50.0 ± 14.1 | 50.0 ± 14.1 |")
    assert lines[2].startswith("| baseline | 10.0 ± 0.0 |")
    assert summarize(runs[::2])["all"]["image to text R@1, ITC"]["spread"] is None
    assert "| all | 40.0 | 40.0 |" in markdown(summarize(runs[::2]))
    plot(table, tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as picture:
        picture.load()


def test_finished_runs_are_not_repeated_and_interrupted_ones_go_on(tmp_path, monkeypatch, capsys):
    """One of two rows is finished already; the other is a real run."""
    monkeypatch.setattr(ablation, "ROWS", {row: ROWS[row] for row in ("baseline", "all")})
    output = tmp_path / "ablation"
    first, second = (output / "runs" / f"{row}-seed-0" for row in ("baseline", "all"))
    write_evaluation(Run("baseline", 0, first), 0.1, None)
    command = ["ablate", "--output_dir", str(output), "--seeds", "1", "--deepspeed", DS, *flags(TINY)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "baseline, seed 0: finished" in shown and "| baseline | 10.0 |" in shown and "| all |" in shown
    assert [path.name for path in first.iterdir()] == ["evaluation.json"]
    stored = json.loads((output / "ablation.json").read_text())
    assert set(stored["rows"]) == {"baseline", "all"} and (output / "ablation.png").exists()
    config = json.loads((second / "config.json").read_text())["config"]
    assert config["objectives"]["soft_mask"] and config["objectives"]["focal_gamma"] == 2

    (second / "evaluation.json").unlink()  # as if it had been killed before its end
    assert run_ablation(flags(TINY), output, seeds=1, deepspeed=DS) == stored
    assert "resumed  after step 2\n" in (second / "run.log").read_text()

    (second / "evaluation.json").unlink()
    assert main([*command, "--launcher=--no_such_option"]) == 2
    assert "failed with status 2; the end of run.log:" in capsys.readouterr().err

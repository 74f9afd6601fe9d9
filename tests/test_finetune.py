"""Fine-tuning as a user runs it, on questions, pairs and phrases about `shapes`: it learns, and it resumes exactly."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from test_train import finish, launch, metrics

from softmask_fast.cli import main
from softmask_fast.tasks.config import parse_arguments
from softmask_fast.tasks.registry import TASKS


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A small model, pretrained, and fine-tuned for every task, in one process."""
    folder = tmp_path_factory.mktemp("tasks")
    finish(launch(folder, cwd=folder, script="tests/all_tasks.py", what="learn"))
    return folder


def measured(folder, task: str) -> dict:
    return json.loads((folder / task / "evaluation.json").read_text())


@pytest.mark.parametrize("task, bar", [("entailment", 0.55), ("vqa", 0.5), ("nlvr2", 0.62)])
def test_tasks_with_answers_are_learned(learned, task, bar):
    report = measured(learned, task)
    assert report["examples"] == 256 and not report["skipped"]
    assert report["score"] > bar > report["majority"] + 0.05, report
    answers = json.loads((learned / task / "predictions.json").read_text())
    assert len(answers) == 256 and all("answer" in answer for answer in answers)


def test_retrieval_is_learned(learned):
    report = measured(learned, "retrieval")
    for way in ("text_to_image", "image_to_text"):
        assert report["itc"][way]["recall@5"] > 3 * report["chance"][way]["recall@5"], report


def test_grounding_learns_from_expressions_without_boxes(learned):
    """Which object of several an expression means takes longer than a test has: at this size the maps are better than
    the floors, and the contrast of expressions and images better than guessing among 32."""
    report = measured(learned, "grounding")
    floors = report["pointing_game"]["random"], report["pointing_game"]["centre"]
    assert report["pointing_game"]["model"] > max(floors) + 0.05, report
    assert report["box_accuracy"]["random"] == pytest.approx(0.5) and 0 < report["box_accuracy"]["model"] < 1
    logged = metrics(learned / "grounding")
    assert sum(logged[step]["itc"] for step in (60, 70, 80)) / 3 < math.log(32) - 0.2, logged


def test_the_command_measures_what_the_run_did(learned, tmp_path, capsys):
    data = "shapes:num=256,names=colour,colours=3"
    command = ["evaluate", "--task", "vqa", "--model", str(learned / "vqa" / "model"), "--data", data]
    assert main([*command, "--json", str(tmp_path / "vqa.json"), "--predictions", str(tmp_path / "answers.json")]) == 0
    assert "VQA accuracy in %" in capsys.readouterr().out
    report = json.loads((tmp_path / "vqa.json").read_text())
    assert report["score"] == measured(learned, "vqa")["score"]
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers == json.loads((learned / "vqa" / "predictions.json").read_text()) and "question_id" in answers[0]
    command[2] = "nlvr2"
    assert main(command) == 2 and "expected a model fine-tuned for nlvr2" in capsys.readouterr().err
    assert main(["evaluate", "--task", "retrieval", *command[3:]]) == 2
    assert "is fine-tuned for vqa" in capsys.readouterr().err


def test_two_ranks_resume_exactly_and_measure_every_example_once(tmp_path):
    finish(launch(tmp_path, ranks=2, cwd=tmp_path, script="tests/all_tasks.py", what="resume"))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (whole, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (resumed / "config-from-step-00000003.json").exists()
    assert metrics(whole) == metrics(resumed) and len(metrics(whole)) == 6
    out = tmp_path / "alone.json"
    data = "shapes:num=31,names=colour,colours=3"  # an odd number: the ranks have shares of unequal size
    command = ["evaluate", "--task", "entailment", "--model", str(whole / "model"), "--data", data, "--json", str(out)]
    assert main(command) == 0
    alone, together = json.loads(out.read_text()), measured(tmp_path, "whole")
    assert together["examples"] == 31 and all(alone[name] == together[name] for name in together)
    assert measured(tmp_path, "from-albef")["examples"] == 31
    more = json.loads((tmp_path / "pretrained-more" / "config.json").read_text())["config"]
    assert more["preset"] == "base" and more["model"]["text_width"] == 64  # sizes are those of the weights
    assert (tmp_path / "pretrained-more" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "shapes"}, "task: expected one of .*'entailment', 'grounding'.* got None"),
        ({"task": "vqa", "data": "shapes"}, "model: expected a model folder or an ALBEF checkpoint to start from"),
        ({"task": "vqa", "model": "m"}, "data: expected the training data of vqa, got none"),
        ({"task": "text_assignment", "model": "m", "data": "a.tar", "eval_data": "b.tar"}, "eval_data: expected none"),
        ({"task": "nlvr2", "model": "m", "data": "a.json", "momentum": 2}, r"momentum: expected in \[0, 1\], got 2.0"),
    ],
)
def test_mistakes_are_named_before_any_work(options, message):
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--deepspeed", "ds.json", *flags])


def test_what_a_task_lacks_is_named_before_it_trains(learned):
    given = ["--deepspeed", "ds.json", "--task", "vqa", "--data", "questions.json", "--model"]
    for model, message in [
        (learned / "pretrained" / "model", "answers: expected a JSON list of the answers that are ranked, got none"),
        (learned / "nlvr2" / "model", "without a task's head, .* is fine-tuned for nlvr2"),
        (learned, "expected a folder with model.safetensors"),
    ]:
        config, _ = parse_arguments([*given, str(model)])
        with pytest.raises(ValueError, match=message):
            TASKS["vqa"].model(config)

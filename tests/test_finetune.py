"""Fine-tuning as a user runs it, on questions, pairs and phrases about `shapes`: it learns, and it resumes exactly."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_train import finish, launch, metrics

from softmask_fast.cli import main
from softmask_fast.evaluation import evaluate_grounding
from softmask_fast.model.checkpoints import load_model
from softmask_fast.tasks.config import parse_arguments
from softmask_fast.tasks.expressions import open_expressions
from softmask_fast.tasks.registry import TASKS

EXPRESSIONS = "shapes:num=256,names=colour,colours=6"  # what all_tasks.py measures grounding on


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


def grounded(folder) -> dict:
    """A model's maps in the fusion layer that is best on training scenes, measured on unseen ones: which of the two
    attends to what is named is up to the model, and the number of ALBEF's layer was chosen, too."""
    model, tokenizer = load_model(folder)

    def measure(split: str, layer: int, limit: int):
        source = open_expressions(EXPRESSIONS, split=split, seed=0, image_size=model.config.image_size)
        return evaluate_grounding(model, tokenizer, source, layer=layer, limit=limit)

    layer = max(range(model.config.fusion_layers), key=lambda n: measure("train", n, 128).box_accuracy["model"])
    return measure("val", layer, 256).as_dict()


def test_grounding_learns_from_expressions_without_boxes(learned):
    """Against the floors, and against the model that it started from."""
    assert measured(learned, "grounding")["phrases"] == 256
    before, report = (grounded(learned / name / "model") for name in ("pretrained", "grounding"))
    pointing, right = report["pointing_game"], report["box_accuracy"]
    assert pointing["model"] > 3 * max(pointing["random"], pointing["centre"]), report
    assert pointing["model"] > before["pointing_game"]["model"] + 0.05, (report, before)
    assert right["random"] == pytest.approx(0.5) and right["model"] > 0.63, report
    assert right["model"] > before["box_accuracy"]["model"] + 0.05, (report, before)
    logged = metrics(learned / "grounding")  # "not matched" for all pairs is right for two of three
    assert sum(logged[step]["itm_accuracy"] for step in range(210, 301, 10)) / 10 > 0.69, logged


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

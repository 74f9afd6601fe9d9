"""Fine-tuning as a user runs it, on questions, pairs and phrases about `shapes`: it learns, and it resumes exactly."""

import json

import pytest
import torch
from PIL import Image
from runs import finish, launch, metrics, torchrun
from safetensors.torch import load_file
from small_models import small_model, small_tokenizer

from softmask_fast.cli import main
from softmask_fast.errors import UsageError
from softmask_fast.evaluation import evaluate_grounding
from softmask_fast.finetune import report
from softmask_fast.model.export import read_model
from softmask_fast.model.state import own_state
from softmask_fast.tasks.datasets import open_expressions
from softmask_fast.tasks.entailment import EntailmentModel
from softmask_fast.tasks.models import load_task_model
from softmask_fast.tasks.options import parse_arguments
from softmask_fast.tasks.recipes import TASKS
from softmask_fast.training.periodic_eval import Evaluator, TaskEvaluation

EXPRESSIONS = "shapes:num=256,names=color,colors=6"  # what all_tasks.py measures grounding on


def run_tasks(folder, what: str, ranks: int = 1):
    launcher = torchrun(ranks) if ranks > 1 else None
    finish(launch(folder, ranks=ranks, cwd=folder, launcher=launcher, script="tests/launched/all_tasks.py", what=what))
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A small model, hardly pretrained, and briefly fine-tuned for every task, in one process; for retrieval longer."""
    return run_tasks(tmp_path_factory.mktemp("tasks"), "all")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A small model, pretrained, and fine-tuned for what builds on that."""
    return run_tasks(tmp_path_factory.mktemp("learned"), "learn")


def record(folder) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def measured(folder, task: str) -> dict:
    """The only report of a folder's evaluation.json."""
    (report,) = record(folder / task)["reports"].values()
    return report


@pytest.mark.learning
@pytest.mark.parametrize("task, bar", [("entailment", 0.55), ("vqa", 0.5), ("nlvr2", 0.62)])
def test_tasks_with_answers_are_learned(learned, task, bar):
    report = measured(learned, task)
    assert report["examples"] == 256 and not report["skipped"]
    assert report["score"] > bar > report["majority"] + 0.05, report
    answers = json.loads((learned / task / "predictions.json").read_text())
    assert len(answers) == 256 and all("answer" in answer for answer in answers)


def test_retrieval_is_learned(tuned):
    report = measured(tuned, "retrieval")
    for way in ("text_to_image", "image_to_text"):
        assert report["itc"][way]["recall@5"] > 3 * report["chance"][way]["recall@5"], report


def grounded(folder) -> dict:
    """The grounding of unseen scenes by the fusion layer that is best on training scenes, as ALBEF's was chosen: which
    layer attends to what is named differs between models."""
    model, tokenizer = read_model(folder)

    def measure(split: str, layer: int, limit: int):
        source = open_expressions(EXPRESSIONS, split=split, seed=0, image_size=model.config.image_size)
        return evaluate_grounding(model, tokenizer, source, layer=layer, limit=limit)

    layer = max(range(model.config.fusion_layers), key=lambda n: measure("train", n, 128).box_accuracy["model"])
    return measure("val", layer, 256).as_dict()


@pytest.mark.learning
def test_grounding_learns_from_expressions_without_boxes(learned):
    """Against the floors, and against the model that it started from."""
    assert measured(learned, "grounding")["phrases"] == 256
    before, report = (grounded(learned / name / "model") for name in ("pretrained", "grounding"))
    pointing, right = report["pointing_game"], report["box_accuracy"]
    assert pointing["model"] > 3 * max(pointing["random"], pointing["center"]), report
    assert pointing["model"] > before["pointing_game"]["model"] + 0.05, (report, before)
    assert right["random"] == pytest.approx(0.5) and right["model"] > 0.63, report
    assert right["model"] > before["box_accuracy"]["model"] + 0.05, (report, before)
    logged = metrics(learned / "grounding")  # "not matched" for all pairs is right for two of three
    assert sum(logged[step]["itm_accuracy"] for step in range(210, 301, 10)) / 10 > 0.68, logged


def test_the_command_measures_what_the_run_did(tuned, tmp_path, capsys):
    data = "shapes:num=256,names=color,colors=3"
    command = ["evaluate", "--task", "vqa", "--model", str(tuned / "vqa" / "model"), "--data", data, "--limit", "32"]
    assert main([*command, "--json", str(tmp_path / "vqa.json"), "--predictions", str(tmp_path / "answers.json")]) == 0
    assert "VQA accuracy in %" in capsys.readouterr().out
    written = json.loads((tmp_path / "vqa.json").read_text())
    assert written["model"] == str(tuned / "vqa" / "model") and written["data"] == data
    assert written["reports"] == {"vqa": measured(tuned, "vqa")}
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers == json.loads((tuned / "vqa" / "predictions.json").read_text()) and "question_id" in answers[0]
    command[2] = "nlvr2"
    assert main(command) == 2 and "expected a model fine-tuned for nlvr2" in capsys.readouterr().err
    assert main(["evaluate", "--task", "retrieval", *command[3:]]) == 2
    assert "is fine-tuned for vqa" in capsys.readouterr().err


def check_evaluations(folder, steps: list[int]) -> None:
    """A line for each, the last as at the end, and in best/ the record of the best."""
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == steps and lines[-1]["epoch"] == pytest.approx(steps[-1] / 1024)
    assert lines[-1] == record(folder)
    assert all(line["headline"]["value"] == line["reports"]["entailment"]["score"] for line in lines)
    best = max(lines, key=lambda line: line["headline"]["value"])  # the first of equal ones
    assert record(folder / "best") == best
    out = folder / "best.json"
    command = ["evaluate", "--task", "entailment", "--model", str(folder / "best"), "--data", best["data"]]
    assert main([*command, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["reports"] == best["reports"]


def test_every_task_has_a_headline_that_chooses_its_best_model(tuned):
    headlines = {}
    for task in ("entailment", "vqa", "nlvr2", "retrieval", "grounding"):
        last = record(tuned / task)
        *_, line = (json.loads(line) for line in (tuned / task / "evaluations.jsonl").read_text().splitlines())
        assert line == last and (tuned / task / "best" / "model.safetensors").exists()
        headline, report = line["headline"], last["reports"][task]
        headlines[headline["name"]] = headline["value"]
        if "score" in report:
            assert headline == {"name": report["metric"], "value": report["score"]}
    recalls = [recall for way in measured(tuned, "retrieval")["both"].values() for recall in way.values()]
    assert headlines["mean recall, ITC + ITM"] == pytest.approx(sum(recalls) / 6)
    assert headlines["box accuracy"] == measured(tuned, "grounding")["box_accuracy"]["model"]
    assert headlines.keys() == {"accuracy", "VQA accuracy", "mean recall, ITC + ITM", "box accuracy"}


def flags_of(options: dict) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def evaluator_of(folder, **options) -> Evaluator:
    given = {"task": "entailment", "model": "m", "data": "shapes", "eval_data": "shapes:num=8", "eval_epochs": 0.5}
    config, _ = parse_arguments(["--deepspeed", "ds.json", *flags_of(given | options)])
    return Evaluator(TaskEvaluation(config, 32), folder, config.train)


def test_the_best_model_is_kept_and_a_resumed_run_remembers_it(tmp_path, one_rank, monkeypatch):
    model = EntailmentModel(small_model(tokenizer := small_tokenizer()), tokenizer)
    folder, reached = tmp_path / "run", {}
    folder.mkdir()
    monkeypatch.setattr(EntailmentModel, "score", lambda *_: reached["value"])

    def evaluate(run: Evaluator, step: int, value: float) -> dict:
        """The model of a step is known by its bias; returns the record of the best one."""
        torch.nn.init.constant_(model.head[2].bias, step)
        reached["value"], state = value, torch.get_rng_state()
        assert run.evaluate(step, step / 4, model, tokenizer, own_state(model)) == {"accuracy": value}
        assert torch.equal(torch.get_rng_state(), state) and model.training
        best = record(folder / "best")
        kept, _ = load_task_model(folder / "best", "entailment")
        assert (kept.head[2].bias == best["step"]).all() and not (folder / "candidate").exists()
        return best

    run = evaluator_of(folder)
    run.begin(0, steps=16, steps_per_epoch=4)
    assert [step for step in range(7) if run.due(step)] == [2, 4, 6]
    assert [evaluate(run, step, value)["step"] for step, value in ((2, 0.5), (4, 0.75), (6, 0.25))] == [2, 4, 4]
    assert run.summary() == f"best: step 4, epoch 1.00, accuracy 75.00 %, in {folder / 'best'}"

    run = evaluator_of(folder)
    run.begin(5, steps=16, steps_per_epoch=4)  # step 6 is repeated
    assert [line["step"] for line in run.records()] == [2, 4]
    assert run.due(6) and not run.due(4)
    assert evaluate(run, 6, 0.5)["step"] == 4 and evaluate(run, 8, 0.75)["step"] == 4
    assert [(line["step"], line["headline"]["value"]) for line in run.records()][2:] == [(6, 0.5), (8, 0.75)]
    assert evaluate(run, 8, 0.75)["step"] == 4 and len(run.records()) == 4  # a finished run, resumed
    assert evaluator_of(folder, eval_size=0).count == 8
    path = folder / "best" / "evaluation.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"headline": None}))
    with pytest.raises(UsageError, match=f'{path}: expected a "headline" with name and value, got None'):
        evaluator_of(folder).begin(8, steps=16, steps_per_epoch=4)
    path.write_text(whole)
    other = evaluator_of(folder, eval_size=4)  # its metrics do not compare with those before
    other.begin(8, steps=16, steps_per_epoch=4)
    assert evaluate(other, 10, 0.1)["step"] == 10
    for options, due in (
        ({"eval_epochs": 0}, []),
        ({"eval_epochs": 0, "eval_steps": 7}, [7, 14]),
        ({"eval_steps": 9}, [9]),
    ):
        run = evaluator_of(tmp_path / "other", **options)
        run.begin(0, steps=16, steps_per_epoch=4)
        assert [step for step in range(17) if run.due(step)] == due


def test_held_out_examples_without_labels_are_answered_at_the_end(tmp_path, one_rank, capsys):
    model = EntailmentModel(small_model(tokenizer := small_tokenizer()), tokenizer)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    entries = [{"image": "a.png", "sentence": "there is a red object"}] * 3
    (tmp_path / "test.json").write_text(json.dumps(entries))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    run = evaluator_of(tmp_path, eval_data=tmp_path / "test.json")
    run.begin(0, steps=16, steps_per_epoch=4)
    assert not any(run.due(step) for step in range(20))
    assert run.evaluate(4, 1.0, model, tokenizer, own_state(model), final=True) == {}
    report(run, tmp_path, {})
    assert "nothing to measure" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 3
    assert measured(tmp_path.parent, tmp_path.name)["score"] is None
    assert not (tmp_path / "best").exists() and not (tmp_path / "evaluations.jsonl").exists()
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="test.json: 3 of 3 images do not exist, first: .*a.png, see --image_root"):
        evaluator_of(tmp_path, eval_data=tmp_path / "test.json")


def test_two_ranks_resume_exactly_and_measure_every_example_once(tmp_path):
    run_tasks(tmp_path, "resume", ranks=2)
    whole, resumed, unmeasured = (tmp_path / name for name in ("whole", "resumed", "unmeasured"))
    for again in (resumed, unmeasured):  # as without evaluations, too
        a, b = (load_file(folder / "model" / "model.safetensors") for folder in (whole, again))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert (again / "config-from-step-00000003.json").exists()
        assert metrics(whole) == metrics(again) and len(metrics(whole)) == 6
    check_evaluations(whole, steps=[2, 4, 6])
    assert (whole / "evaluations.jsonl").read_text() == (resumed / "evaluations.jsonl").read_text()
    a, b = (load_file(folder / "best" / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a) and not (resumed / "candidate").exists()
    out = tmp_path / "alone.json"
    data = "shapes:num=31,names=color,colors=3"  # an odd number: the ranks evaluate unequal parts
    command = ["evaluate", "--task", "entailment", "--model", str(whole / "model"), "--data", data, "--json", str(out)]
    assert main(command) == 0
    assert measured(tmp_path, "whole")["examples"] == 31
    assert json.loads(out.read_text())["reports"] == record(whole)["reports"]
    assert measured(tmp_path, "from-albef")["examples"] == 31
    check_evaluations(tmp_path / "from-albef", steps=[1, 2])  # under ZeRO-3
    more = json.loads((tmp_path / "pretrained-more" / "config.json").read_text())["config"]
    assert more["preset"] == "base" and more["model"]["text_width"] == 64  # sizes are those of the weights
    assert (tmp_path / "pretrained-more" / "model" / "model.safetensors").exists()


def test_a_user_error_is_one_line_of_one_rank(tuned, tmp_path):
    """Through the launcher, which kills the other ranks as soon as one exits."""
    given = {"task": "entailment", "model": tuned / "pretrained" / "model", "data": "shapes:num=64"}
    given["eval_data"] = "nowhere.json"
    script = "softmask_fast/finetune.py"
    text = finish(launch(tmp_path / "run", ranks=2, cwd=tmp_path, script=script, common=given), 2)
    assert text.count("finetune.py: error: data: 1 of 1 files do not exist: nowhere.json") == text.count("error: ") == 1
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "shapes"}, "task: expected one of .*'entailment', 'grounding'.* got None"),
        ({"task": "vqa", "data": "shapes"}, "model: expected a model folder or an ALBEF checkpoint to start from"),
        ({"task": "vqa", "model": "m"}, "data: expected the training data of vqa, got none"),
        (
            {"task": "text_assignment", "model": "m", "data": "a.tar", "eval_data": "b.tar"},
            "eval_data: expected none, as text_assign",
        ),
        ({"task": "vqa", "model": "m", "data": "a.json", "eval_epochs": -1}, "eval_epochs: expected at least 0, got -"),
        ({"task": "vqa", "model": "m", "data": "a.json", "eval_size": -1}, "eval_size: expected at least 0, got -1"),
        ({"task": "nlvr2", "model": "m", "data": "a.json", "momentum": 2}, r"momentum: expected in \[0, 1\], got 2.0"),
    ],
)
def test_user_errors_are_named_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--deepspeed", "ds.json", *flags_of(options)])


def test_what_a_task_lacks_is_named_before_it_trains(tuned):
    given = ["--deepspeed", "ds.json", "--task", "vqa", "--data", "questions.json", "--model"]
    for model, message in [
        (tuned / "pretrained" / "model", "answers: expected a JSON list of the answers to rank, got none"),
        (tuned / "nlvr2" / "model", "without a task's head, .* is fine-tuned for nlvr2"),
        (tuned, "model: expected a folder with model.safetensors"),
        ("no/such", "^model: expected a model folder or an ALBEF checkpoint, got 'no/such', which does not exist"),
    ]:
        config, _ = parse_arguments([*given, str(model)])
        with pytest.raises(ValueError, match=message):
            TASKS["vqa"].model(config)
    given[3] = "grounding"
    config, _ = parse_arguments([*given, str(tuned / "pretrained" / "model"), "--layer", "2"])
    with pytest.raises(ValueError, match="layer: expected a fusion layer from 0 to 1, got 2"):
        TASKS["grounding"].step(TASKS["grounding"].model(config)[0], config)

"""Loggers: TensorBoard's own files are read back. wandb and mlflow are clients that note what they are asked; where the
real ones are installed, what they stored is read back as well."""

import json
import logging
import os
import struct
import sys
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from runs import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

from softmask_fast import config
from softmask_fast.config import TrainConfig
from softmask_fast.errors import UsageError
from softmask_fast.training.loggers import LOGGERS, REQUEST, Reports, check_loggers, held_out_tag, tag
from softmask_fast.training.options import make_config
from softmask_fast.training.run_record import reported_options

OPTIONS = {"learning_rate": 0.25, "soft_mask": True, "data": "shapes"}


class Client:
    """A client, or an object of it: notes each call with its arguments and returns itself."""

    def __init__(self, calls, **attributes):
        self.calls = calls
        vars(self).update(attributes)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)

        def method(*args, **options):
            self.calls.append((name, *args, options) if options else (name, *args))
            return self

        return method


@pytest.fixture
def clients(monkeypatch):
    """wandb and mlflow by name; `calls` of each."""
    made = {}
    for name, attributes in (("wandb", {"id": "w1"}), ("mlflow", {"info": SimpleNamespace(run_id="m1")})):
        made[name] = Client([], **attributes, __spec__=SimpleNamespace(origin=f"{name}.py"))
        monkeypatch.setitem(sys.modules, name, made[name])
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(variable, raising=False)
    return made


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "page.png")
    return tmp_path / "page.png"


def test_names_have_groups():
    names = ("loss", "itm_accuracy", "itm_other_text", "itm_soft_masked_negative_accuracy", "data_wait")
    groups = ["train/loss", "train/itm_accuracy", "itm/other_text", "itm_accuracy/soft_masked_negative"]
    assert [tag(name) for name in names] == [*groups, "system/data_wait"]
    assert held_out_tag("mean recall, ITC + ITM") == "eval/mean_recall_ITC_ITM"


def test_options_are_those_that_are_set():
    run = make_config(**SMALL)
    size = {"device": "CPU", "world_size": 2, "samples": 9, "steps": 7, "parameters": 5}
    shown = reported_options({"config": {"preset": "tiny", "train": vars(run.train)}, **size})
    assert shown["preset"] == "tiny" and shown["batch_size"] == 4 and shown["parameters"] == 5
    assert run.train.eval_steps is None and "eval_steps" not in shown


def test_tensorboard_continues_the_run(tmp_path, picture):
    for first_step in (0, 2):
        reports = Reports("tensorboard", tmp_path, first_step, OPTIONS)
        for step in range(first_step + 1, first_step + 4):
            reports.scalars(step, {"train/loss": 10.0 * first_step + step})
        reports.image(step, "eval/heatmaps", picture)
        reports.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1), (2, 2), (3, 23), (4, 24), (5, 25)
    ]  # fmt: skip
    assert [event.step for event in events.Images("eval/heatmaps")] == [5]
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    hparams = parse_session_start_info_plugin_data(content).hparams
    assert hparams["learning_rate"].number_value == 0.25 and hparams["data"].string_value == "shapes"
    assert not (tmp_path / "loggers.json").exists()  # the folder says which run it is


def test_wandb_continues_the_run_of_the_folder(tmp_path, clients, picture):
    calls = clients["wandb"].calls
    first = dict(project="softmask_fast", name=tmp_path.name, dir=str(tmp_path), config=OPTIONS, resume="allow")
    for first_step, known in ((0, None), (2, "w1"), (0, None)):  # a run from its first step on is another one
        calls.clear()
        reports = Reports("wandb", tmp_path, first_step, OPTIONS)
        assert calls[0] == ("init", first | {"id": known})
        assert ("define_metric", "*", {"step_metric": "step"}) in calls  # steps may come again
    calls.clear()
    reports.scalars(3, {"train/loss": 0.5})
    reports.image(3, "eval/heatmaps", picture)
    reports.close()
    assert calls[0] == ("log", {"train/loss": 0.5, "step": 3}) and calls[1] == ("Image", str(picture))
    assert calls[2][1].keys() == {"eval/heatmaps", "step"} and calls[3:] == [("finish",)]


def test_mlflow_continues_the_run_of_the_folder(tmp_path, clients, picture, monkeypatch):
    calls = clients["mlflow"].calls
    reports = Reports("mlflow", tmp_path, 0, OPTIONS | {"data": "x" * 9999})
    reports.scalars(3, {"train/loss": 0.5})
    reports.image(3, "eval/heatmaps", picture)
    reports.close()
    parameters = {"learning_rate": "0.25", "soft_mask": "True", "data": "x" * 497 + "..."}
    assert calls == [
        ("set_experiment", "softmask_fast"),
        ("start_run", {"run_id": None, "run_name": tmp_path.name}),
        ("log_params", parameters),
        ("log_metrics", {"train/loss": 0.5}, 3, {"run_id": "m1"}),
        ("log_artifact", str(picture), "eval/heatmaps", {"run_id": "m1"}),
        ("end_run",),
    ]
    calls.clear()
    Reports("mlflow", tmp_path, 2, OPTIONS)
    assert calls == [("start_run", {"run_id": "m1", "run_name": tmp_path.name})]  # its parameters are fixed
    calls.clear()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    Reports("mlflow", tmp_path, 0, OPTIONS)
    assert [call[0] for call in calls] == ["start_run", "log_params"]


def test_mlflow_gives_a_request_up_in_time(tmp_path, clients, monkeypatch):
    for name in REQUEST:
        monkeypatch.setenv(name, "7")  # to have it restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "99")
    seen = []
    clients["mlflow"].set_experiment = lambda name: seen.append({name: os.environ.get(name) for name in REQUEST})
    Reports("mlflow", tmp_path, 0, OPTIONS).close()
    assert seen == [{"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5", "MLFLOW_HTTP_REQUEST_TIMEOUT": "99"}]  # the user's


def test_a_logger_that_fails_is_left_out_after_one_line(tmp_path, clients, caplog):
    def fail(*args, **options):
        raise ConnectionError("no route to\nhttps://me:secret@host/api?key=secret")

    reports = Reports("wandb, mlflow,tensorboard", tmp_path, 0, OPTIONS)
    clients["wandb"].log = clients["mlflow"].end_run = fail
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            reports.scalars(step, {"train/loss": 1.0})
        reports.close()
    lines = [record.message for record in caplog.records]
    assert lines == [
        f"warning: report_to: {name} failed, the run continues without it: no route to https://host/api"
        for name in ("wandb", "mlflow")
    ]
    assert [call[2] for call in clients["mlflow"].calls if call[0] == "log_metrics"] == [1, 2]
    assert len(EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")) == 2
    caplog.clear()
    reports = Reports("mlflow", tmp_path, 0, OPTIONS)
    clients["mlflow"].log_metrics = fail  # in its thread
    reports.scalars(1, {"train/loss": 1.0})
    wait(reports.loggers["mlflow"].sent)
    for step in (2, 3):
        reports.scalars(step, {"train/loss": 1.0})
    assert len(caplog.records) == 1 and not reports.loggers
    clients["wandb"].init = fail  # without a login, at the start
    caplog.clear()
    Reports("wandb", tmp_path, 0, OPTIONS).close()
    assert len(caplog.records) == 1


def test_a_client_that_is_not_installed_is_named_before_any_work(tmp_path, clients, monkeypatch):
    assert tuple(LOGGERS) == config.LOGGERS
    check_loggers(TrainConfig(report_to="wandb,mlflow,tensorboard"))
    check_loggers(TrainConfig(report_to=None))
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for folder in (False, True):  # wandb's own files are no client
        if folder:
            (tmp_path / "wandb").mkdir()
        with pytest.raises(UsageError, match="^report_to: wandb is not installed; install it with: pip install wandb$"):
            check_loggers(TrainConfig(report_to="wandb"))
    with pytest.raises(UsageError, match="report_to: expected some of tensorboard, wandb, mlflow, or none, got 'tb'"):
        TrainConfig(report_to="mlflow,tb")
    (tmp_path / "loggers.json").write_text('{"wandb": 3}')
    with pytest.raises(UsageError, match=r"resume: .*loggers\.json is damaged: expected a run's id by logger"):
        check_loggers(TrainConfig(output_dir=str(tmp_path)))


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Real clients work offline and write nowhere else."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.chdir(folder)
    variables = {"HOME": folder, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    variables |= {f"WANDB_{name}_DIR": folder for name in ("CACHE", "CONFIG", "DATA")}
    variables |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "WANDB_FINISH_TIMEOUT": "60"} | REQUEST
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    for name in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return folder


def report_twice(name, folder, picture):
    """A run of three steps, resumed after the second for two more."""
    for first_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        reports = Reports(name, folder, first_step, OPTIONS)
        for step in steps:
            reports.scalars(step, {"train/loss": 10.0 * first_step + step})
        reports.image(step, "eval/heatmaps", picture)
        reports.close()
        assert list(reports.loggers) == [name]  # nothing failed


def stored_records(path):
    """The records in wandb's file: LevelDB's log format, parts of them in blocks of 32 KiB, after 7 bytes."""
    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        if (room := 2**15 - place % 2**15) < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<4xHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_wandb_itself_has_what_was_reported(tmp_path, own_folder, picture):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    try:
        report_twice("wandb", tmp_path, picture)
    finally:
        wandb.teardown()
    runs, points, options, images = set(), [], {}, 0
    for path in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime):
        for record in map(Record.FromString, stored_records(path)):
            if record.HasField("run"):
                runs.add((record.run.project, record.run.run_id))
                options |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "train/loss" in row:
                points.append((json.loads(row["step"]), json.loads(row["train/loss"])))
            images += any("image-file" in value for value in row.values())
    assert len(runs) == 1 and runs.pop()[0] == "softmask_fast"
    assert points == [(1, 1), (2, 2), (3, 3), (3, 23), (4, 24)] and images == 2
    assert {name: options[name] for name in OPTIONS} == OPTIONS


def test_mlflow_itself_has_what_was_reported(tmp_path, own_folder, picture):
    mlflow = pytest.importorskip("mlflow")
    report_twice("mlflow", tmp_path, picture)
    client = mlflow.MlflowClient()
    [experiment] = [found for found in client.search_experiments() if found.name == "softmask_fast"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params == {name: str(value) for name, value in OPTIONS.items()} and run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1), (2, 2), (3, 3), (3, 23), (4, 24)]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "eval/heatmaps")] == ["eval/heatmaps/page.png"]
    assert own_folder in Path(run.info.artifact_uri).parents

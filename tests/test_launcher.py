"""`softmask-fast train` and `finetune`: what is checked before anything starts, which ranks run, and how they stop."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from runs import SMALL, finish, free_port, metrics, wait_for_step

from softmask_fast import finetune, launcher, train
from softmask_fast.cli import main
from softmask_fast.training.launch import StopRequest, output_directory
from softmask_fast.training.options import make_config

COMMAND = [sys.executable, "-m", "softmask_fast.cli", "train"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture
def started(monkeypatch):
    """What would have been started, instead of starting it."""
    calls = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(train, "main", lambda argv, name: calls.append((name, argv)) or 0)
    monkeypatch.setattr(finetune, "main", lambda argv, name: calls.append((name, argv)) or 0)
    monkeypatch.setattr(
        launcher, "launch", lambda name, script, argv, ranks, gpus: calls.append((name, argv, ranks)) or 0
    )
    return calls


@pytest.mark.parametrize(
    "gpus, devices, ranks", [(0, None, 1), (0, 2, 2), (1, None, 1), (4, None, 4), (4, 2, 2), (4, 1, 1)]
)
def test_a_rank_for_each_device(started, monkeypatch, gpus, devices, ranks):
    monkeypatch.setattr(launcher, "count_gpus", lambda: gpus)
    given = ["--task", "vqa", "--model", "m", "--data", "shapes", "--batch_size", "8"]
    chosen = [] if devices is None else ["--devices", str(devices)]
    assert main(["finetune", *given[:4], *chosen, *given[4:]]) == 0
    assert started == [("softmask-fast finetune", given) + ((ranks,) if ranks > 1 else ())]


def test_the_rank_of_another_launcher_starts_no_more(started, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launcher, "count_gpus", lambda: 4)
    assert main(["train", "--seed", "3"]) == 0
    assert started == [("softmask-fast train", ["--seed", "3"])]
    assert main(["train", "--devices", "2"]) == 2
    assert "devices: expected none, as another launcher started this process, got 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--devices", "5"], "devices: expected at least 1 and at most 4, the GPUs of this machine, got 5"),
        (["--devices", "0"], "devices: expected at least 1 and at most 4"),
        (["--momentum", "2"], "momentum: expected in [0, 1], got 2.0"),
        (["--config", "none.yaml"], "none.yaml: No such file or directory"),
    ],
)
def test_errors_are_said_before_anything_starts(started, monkeypatch, capsys, options, message):
    monkeypatch.setattr(launcher, "count_gpus", lambda: 4)
    assert main(["train", *options]) == 2
    assert message in capsys.readouterr().err and not started


def test_two_ranks_without_deepspeed_name_what_installs_it(started, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "count_gpus", lambda: 0)
    monkeypatch.setattr(launcher, "find_spec", lambda name: None)
    assert main(["train", "--devices", "2"]) == 2 and not started
    assert re.search(r"No module named 'deepspeed'; install it with: pip install .*\[train\]", capsys.readouterr().err)


@pytest.mark.parametrize("status, ended", [(247, "was killed by SIGKILL"), (130, "ended with status 130")])
def test_how_a_rank_ended_is_said(monkeypatch, capsys, status, ended):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=lambda: status))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launcher.launch("train", Path("train.py"), [], 2, 0) == status
    assert capsys.readouterr().err == f"train: error: a rank {ended}\n"


def test_the_second_interrupt_ends_at_once(monkeypatch, capfd):
    """The first one only asks the run to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ended = []
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(os, "_exit", ended.append)
    try:
        stop = StopRequest()
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT" and not ended
        signal.raise_signal(signal.SIGTERM)  # as DeepSpeed's launcher sends it after Ctrl-C
        assert not ended
        signal.raise_signal(signal.SIGINT)
        assert ended == [130]
        stop.end()
        assert {number: signal.getsignal(number) for number in before} == before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capfd.readouterr().err.count("The run stops after this step and saves") == 1


def test_two_ranks_stop_by_ctrl_c_and_torchrun_resumes_them(tmp_path):
    flags = [text for name, value in (SMALL | {"max_steps": 400}).items() for text in (f"--{name}", str(value))]
    run = tmp_path / "run"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT, "cwd": tmp_path}
    process = subprocess.Popen(
        [*COMMAND, "--devices", "2", *flags, "--output_dir", str(run)], start_new_session=True, **pipes
    )
    wait_for_step(run, 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    text = finish(process)
    assert "Traceback" not in text and "[WARNING]" not in text and "[INFO]" not in text
    screen = text[: text.index("to stop")].splitlines()
    assert [line.split()[0] for line in screen] == ["model", "data", "steps", "device", "folder"], text
    assert "400 of 8 samples (2 devices x 4)" in screen[2]
    stopped = re.search(rf"stopped by SIGTERM after step (\d+); resume with --output_dir {run} --resume true", text)
    step = int(stopped[1])
    assert (run / "checkpoints" / f"step-{step:08d}").is_dir()
    assert json.loads((run / "config.json").read_text())["matmul_tflops"] > 0

    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(free_port())]
    resume = ["--output_dir", str(run), "--resume", "true", "--max_steps", str(step + 1), "--learning_rate", "2e-4"]
    text = finish(subprocess.Popen([*torchrun, train.__file__, *resume], **pipes))
    changed = f"after step {step}; max_steps 400 -> {step + 1}; learning_rate 0.001 -> 0.0002"
    assert re.search(rf"^resumed +{re.escape(changed)}$", text, re.MULTILINE), text
    assert list(metrics(run)) == list(range(1, step + 2))


def test_there_must_be_a_run_to_resume_unless_it_is_automatic(tmp_path, one_rank):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=f"resume: expected the folder of a run, got {folder}"):
        output_directory(make_config(output_dir=str(folder), resume=True))
    assert not folder.exists()
    assert output_directory(make_config(output_dir=str(folder), resume="auto")) == folder
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run; resume it"):
        output_directory(make_config(output_dir=str(folder)))
    for resume in (True, "auto"):
        assert output_directory(make_config(output_dir=str(folder), resume=resume)) == folder

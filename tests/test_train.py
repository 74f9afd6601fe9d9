"""The training script as a user runs it: launched, interrupted, resumed, sharded. Every run is real, only small."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from runs import SMALL, STEPS, deepspeed, finish, free_port, launch, metrics, wait_for_step
from safetensors.torch import load_file
from sample_files import BAD, GOOD
from shard_files import write_shard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from softmask_fast import train
from softmask_fast.data.sources import open_source
from softmask_fast.errors import UsageError


def ranks_and_workers(launcher: subprocess.Popen) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The ranks that a launcher has started, and the worker processes of their loaders."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    workers = [child for child in children if "softmask_fast.data.workers" in " ".join(child.cmdline())]
    named = [child for child in children if any("--local_rank" in word for word in child.cmdline())]
    return [child for child in named if set(child.children()) <= set(workers)], workers


def same_run(first: Path, second: Path) -> None:
    assert metrics(first) == metrics(second) and len(metrics(first)) == STEPS
    for name in ("model.safetensors",):
        a, b = (load_file(folder / "model" / name) for folder in (first, second))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    last = f"checkpoints/step-{STEPS:08d}/teacher.safetensors"
    a, b = load_file(first / last), load_file(second / last)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """Two ranks, from the first step to the last, from a working directory that is not the repository."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    text = finish(launch(folder / "run", ranks=2, cwd=folder))
    assert "Retrieval among 32 images" in text and "pointing game" in text
    return folder / "run"


def test_a_run_leaves_its_record(uninterrupted):
    record = json.loads((uninterrupted / "config.json").read_text())
    assert record["world_size"] == 2 and record["config"]["train"]["max_steps"] == STEPS
    assert set(record["operators"]) >= {"word_mask", "soft_masked_attention", "focal_itc"}
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    logged = metrics(uninterrupted)
    assert list(logged) == list(range(1, STEPS + 1))
    for name in ("loss", "itc", "itm", "mlm", "itm_accuracy", "temperature", "learning_rate", "alpha", "bad_samples"):
        assert name in logged[STEPS], name
    kinds = ("true_pair", "other_image", "soft_masked_other_text", "soft_masked")
    assert sum(logged[STEPS][f"itm_{kind}"] for kind in kinds) / 4 == pytest.approx(logged[STEPS]["itm"], rel=1e-5)
    record = json.loads((uninterrupted / "evaluation.json").read_text())
    assert record["step"] == STEPS and record["data"] == SMALL["data"] and record["size"] == 32
    assert record["headline"]["name"] == "mean recall of all captions, ITC + ITM"
    assert set(record["reports"]) == {"retrieval", "grounding"}
    assert json.loads((uninterrupted / "evaluations.jsonl").read_text()) == record
    assert json.loads((uninterrupted / "best" / "evaluation.json").read_text()) == record
    assert logged[1]["alpha"] == 0 and logged[STEPS]["alpha"] == pytest.approx(0.4)
    names = {path.name for path in uninterrupted.iterdir()}
    assert {
        "model",
        "tokenizer",
        "checkpoints",
        "tensorboard",
        "evaluation.json",
        "curves.png",
        "heatmaps.png",
    } <= names
    kept = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["step-00000009", "step-00000010"]


def test_killed_rank_then_resume_is_the_uninterrupted_run(uninterrupted, tmp_path):
    """It is also measured on the way, which the uninterrupted one is not."""
    process = launch(tmp_path / "run", ranks=2, cwd=tmp_path, data_workers=1, eval_steps=4)
    wait_for_step(tmp_path / "run", 5, process)
    ranks, workers = ranks_and_workers(process)
    assert len(ranks) == len(workers) == 2
    ranks[-1].send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not psutil.wait_procs(workers, timeout=10)[1]
    (tmp_path / "run" / "checkpoints" / "partial-step-00000099").mkdir()  # as a crash leaves it
    with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
        log.write('{"step": 7, "lo')
    text = finish(launch(tmp_path / "run", ranks=2, cwd=tmp_path, resume=True, eval_steps=4))
    same_run(uninterrupted, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8, STEPS]
    assert records[-1] == json.loads((uninterrupted / "evaluation.json").read_text())
    best = json.loads((tmp_path / "run" / "best" / "evaluation.json").read_text())
    assert best == max(records, key=lambda record: record["headline"]["value"])
    assert f"best: step {best['step']}, " in text
    pages = sorted((tmp_path / "run").glob("heatmaps-*.png"))
    assert [page.name for page in pages] == ["heatmaps-step-00000004.png", "heatmaps-step-00000008.png"]
    assert (tmp_path / "run" / "heatmaps.png").exists()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Images("eval/heatmaps")] == [4, 8, STEPS]
    assert [event.step for event in events.Scalars("eval/pointing_game")] == [4, 8, STEPS]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert "system/pairs_per_second" in events.Tags()["scalars"] and len(events.Scalars("itm/true_pair")) == STEPS


@pytest.mark.parametrize("whom", ["process group", "launcher alone"])
def test_sigterm_writes_a_checkpoint_and_exits_cleanly(uninterrupted, tmp_path, whom):
    ranks = 2 if whom == "process group" else 1
    launcher = deepspeed("--num_accelerators", str(ranks))
    process = launch(tmp_path / "run", ranks=ranks, launcher=launcher, cwd=tmp_path, data_workers=1)
    wait_for_step(tmp_path / "run", 4, process)
    _, workers = ranks_and_workers(process)
    if whom == "process group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=100)
    assert "resume with --output_dir" in text, text[-4000:]
    done = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert int(done[-1].removeprefix("step-")) >= 4
    assert len(workers) == ranks and not psutil.wait_procs(workers, timeout=10)[1]
    if whom == "process group":
        finish(launch(tmp_path / "run", ranks=2, cwd=tmp_path, resume=True))
        same_run(uninterrupted, tmp_path / "run")


@pytest.mark.gpu
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    text = finish(
        launch(
            tmp_path / "run", cwd=tmp_path, learning_rate=1e30, warmup_steps=0, checkpoint_steps=1, gradient_clipping=0
        ),
        1,
    )
    assert "the loss is not finite (" in text and "Samples: " in text and "The last checkpoint is from step" in text
    assert not (tmp_path / "run" / "model").exists()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.gpu
def test_bad_samples_are_skipped_counted_and_named_or_stop_the_run(tmp_path):
    huge = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(huge, "PNG")
    bad = BAD | {"huge": {"png": huge.getvalue(), "json": BAD["empty"]["json"]}}
    samples = list((GOOD | bad).items())
    for part in range(2):
        write_shard(tmp_path / f"s-{part}.tar", dict(samples[part::2]))
    data = dict(data=f"{tmp_path}/s-{{0..1}}.tar", cwd=tmp_path, batch_size=20, max_steps=12)
    text = finish(launch(tmp_path / "run", max_bad_fraction=0.1, launcher=deepspeed(), **data))
    assert "skipped 12 samples" in text and all(re.search(rf"s-\d/{name}", text) for name in bad)
    assert metrics(tmp_path / "run")[12]["bad_samples"] == 12
    assert "no evaluation: no --eval_data" in text and (tmp_path / "run" / "curves.png").exists()
    text = finish(launch(tmp_path / "stopped", **data), 1)
    assert "BadDataError: more than 2 of 200 samples cannot be used" in text
    assert len(set(re.findall(r"  s-\d/([\w-]+): ", text.split("BadDataError")[1]))) == 10


@pytest.fixture
def hosts():
    """Address -> prefix of a command that runs there, of two hosts: network namespaces with a cable between them, or
    where these are not allowed two addresses of this machine."""
    names = [f"softmask-{os.getpid()}-{host}" for host in range(2)]
    made = subprocess.run(["sh", "-ec", f"""
        ip netns add {names[0]}; ip netns add {names[1]}
        ip link add cable netns {names[0]} type veth peer name cable netns {names[1]}
        for i in 0 1; do
            on="ip -n $(echo {" ".join(names)} | cut -d" " -f$((i + 1)))"
            $on address add 10.77.0.$((i + 1))/24 dev cable; $on link set cable up; $on link set lo up
        done"""], capture_output=True) if shutil.which("ip") else None  # fmt: skip
    if made and made.returncode == 0:
        yield {f"10.77.0.{i + 1}": ["ip", "netns", "exec", name] for i, name in enumerate(names)}, "cable"
    else:
        yield {"127.0.0.1": [], "127.0.0.2": []}, "lo"
    if made:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_hosts_without_ssh_lose_a_rank_and_resume(uninterrupted, tmp_path, hosts):
    commands, interface = hosts
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in commands))

    def launch_hosts(**options) -> list[subprocess.Popen]:
        common = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", next(iter(commands))]
        common += ["--master_port", str(free_port())]  # theirs together
        return [
            launch(
                tmp_path / "run", cwd=tmp_path, prefix=prefix, launcher=deepspeed(*common, "--node_rank", str(number)),
                variables={"GLOO_SOCKET_IFNAME": interface}, **options,
            )
            for number, prefix in enumerate(commands.values())
        ]  # fmt: skip

    processes = launch_hosts()
    wait_for_step(tmp_path / "run", 5, processes[0])
    ((rank,), _) = ranks_and_workers(processes[1])
    rank.send_signal(signal.SIGKILL)
    first = processes[0].communicate(timeout=60)[0]
    processes[1].communicate(timeout=60)
    assert all(process.returncode for process in processes)
    assert "lost the connection to another rank" in first and f"--output_dir {tmp_path}/run --resume true" in first
    for process in launch_hosts(resume=True):
        finish(process)
    same_run(uninterrupted, tmp_path / "run")


def test_user_errors_are_named_before_any_work(tmp_path, monkeypatch, capsys):
    """In options by themselves, and in what they name."""

    def error_of(*flags: str) -> str:
        with pytest.raises(SystemExit) as left:
            train.main(["--deepspeed", "ds.json", *flags])
        assert left.value.code == 2
        return capsys.readouterr().err

    def error_of_a_process(deepspeed: str) -> str:
        command = [sys.executable, train.__file__, "--deepspeed", deepspeed]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 7}')
    assert 'train_micro_batch_size_per_gpu: expected "auto" or 32, as --batch_size, got 7' in error_of_a_process(
        "ds.json"
    )
    assert "expected a JSON file, got 'none.json'" in error_of_a_process("none.json")
    assert "temperature: expected in [0.001, 0.5], got 3.0" in error_of("--temperature", "3")
    (tmp_path / "run.yaml").write_text("epochs: [1")
    assert "--config: run.yaml cannot be read: while parsing" in error_of("--config", "run.yaml")
    assert not (tmp_path / "runs").exists()


def test_a_user_error_is_one_line_of_one_rank(tmp_path):
    """Through the launcher, which kills the other ranks as soon as one exits."""
    text = finish(launch(tmp_path / "run", ranks=2, cwd=tmp_path, momentum=2), 2)
    assert text.count("train.py: error: ") == 1 and "train.py: error: momentum: expected in [0, 1], got 2.0" in text
    assert "Traceback" not in text


def test_samples_of_which_none_can_be_used_are_named_before_a_tokenizer_is_trained(tmp_path):
    write_shard(tmp_path / "s.tar", {name: {"jpg": b"", "json": b"{}"} for name in "xyz"})
    expected = 'data: none of 2 samples that were tried can be used; the first, s/x: no "captions"'
    with pytest.raises(UsageError, match=expected):
        list(train.sample_captions(open_source(str(tmp_path / "s.tar")), 2))

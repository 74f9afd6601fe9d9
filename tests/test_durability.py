"""What a run writes: whole or not at all, on the disk before it has its name, by one run at a time, and on a full disk
with one line that says what is left."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import ROOT, SMALL

from softmask_fast import train
from softmask_fast.data.prepare import make_shards
from softmask_fast.data.preparing import FACTS, Job
from softmask_fast.data.workers import WorkerPool
from softmask_fast.errors import UsageError, format_error, is_user_error
from softmask_fast.options import record_path
from softmask_fast.training import launch
from softmask_fast.training.checkpoint import newest_whole_checkpoint
from softmask_fast.training.launch import lock_folder, new_folder, prepare_run
from softmask_fast.training.metrics import drop_lines_after
from softmask_fast.training.options import parse_arguments
from softmask_fast.training.ranks import AgreedUsageError
from softmask_fast.training.run_record import check_same_run, store_record
from softmask_fast.utils import append_line, file_sha256, replacing, write_json
from softmask_fast.word_maps import write_arrays

NO_STOP = SimpleNamespace(agreed=lambda device: False, received=None)


def trainer_in(output, **options):
    """The trainer of a small run, in this process."""
    given = SMALL | {"output_dir": output, "max_steps": 4, "checkpoint_steps": 1, "keep_checkpoints": 2} | options
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    config, launched = parse_arguments(["--deepspeed", str(ROOT / "ds.json"), *flags])
    return train.build_trainer(*prepare_run(config, launched), NO_STOP)


def do_steps(trainer, number):
    """Logged steps with a checkpoint each; then the trainer is closed."""
    for _ in range(number):
        metrics = trainer.train_step()
        trainer.flops.count()
        trainer.log_metrics(metrics)
        trainer.save()
    trainer.log.close()
    trainer.loader.close()


@contextmanager
def small_files(most=50_000):
    """No file may become larger than `most` bytes, as on a full disk: the error is "File too large"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Steps 1 and 2 of a run, each with its checkpoint."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def stopped(one_rank, trained):
    if not trained.exists():
        do_steps(trainer_in(trained), 2)
    return trained


def damages(checkpoint: Path):
    """name of the damage -> the file and what is done to it."""
    optimizer = next(checkpoint.glob("*optim_states.pt"))
    tail = os.path.getsize(optimizer) // 2

    def zeros(path, start):
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(bytes(os.path.getsize(path) - start))

    def wrong_files(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {"teacher.safetensors": 3}}))

    return {
        "cut": (optimizer, lambda path: os.truncate(path, 1000)),
        "half zeros": (optimizer, lambda path: zeros(path, tail)),
        "all zeros": (checkpoint / "model/model.safetensors", lambda path: zeros(path, 0)),
        "longer": (checkpoint / "model/config.json", lambda path: path.write_text(path.read_text() + " ")),
        "missing": (checkpoint / "teacher.safetensors", Path.unlink),
        "a missing folder": (checkpoint / "model/tokenizer/tokenizer.json", lambda path: shutil.rmtree(path.parent)),
        "no state": (checkpoint / "training_state.json", Path.unlink),
        "zeros for a state": (checkpoint / "training_state.json", lambda path: zeros(path, 0)),
        "no object": (checkpoint / "training_state.json", lambda path: path.write_text("null")),
        "another object": (checkpoint / "training_state.json", lambda path: path.write_text('{"step": 2}')),
        "wrong files": (checkpoint / "training_state.json", wrong_files),
    }


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(stopped, tmp_path, caplog):
    names = damages(stopped / "checkpoints/step-00000002")
    for number, name in enumerate(names):
        folder = tmp_path / f"case-{number}"
        shutil.copytree(stopped / "checkpoints", folder)
        path, damage = damages(folder / "step-00000002")[name]
        damage(path)
        caplog.clear()
        assert newest_whole_checkpoint(folder) == folder / "step-00000001", name
        (record,) = caplog.records
        assert str(path) in record.message and "renamed it to damaged-step-00000002" in record.message, name
        assert {p.name for p in folder.iterdir()} == {"step-00000001", "damaged-step-00000002"}
    (folder / "step-00000001/teacher.safetensors").write_bytes(b"")
    with pytest.raises(AgreedUsageError, match=r"teacher.safetensors is damaged: 0 bytes instead of \d+, and .* no "):
        newest_whole_checkpoint(folder)
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None


def test_a_resumed_run_repeats_what_a_damaged_checkpoint_had(stopped, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    next((run / "checkpoints/step-00000002").glob("*optim_states.pt")).write_bytes(b"")
    with open(run / "metrics.jsonl", "a") as log:
        log.write("\0" * 40 + '\n{"step"\n[3]\n{"step": 3, "lo')
    trainer = trainer_in(run, resume=True)
    assert trainer.state.step == 1 and "metrics.jsonl: dropped 3 damaged lines, the first is line 3" in caplog.text
    do_steps(trainer, 1)
    first, again = ([json.loads(line) for line in open(folder / "metrics.jsonl")] for folder in (stopped, run))
    assert [line["step"] for line in again] == [1, 2] and again[1]["loss"] == first[1]["loss"]
    states = [folder / "checkpoints/step-00000002/teacher.safetensors" for folder in (stopped, run)]
    assert file_sha256(states[0]) == file_sha256(states[1])


@pytest.mark.parametrize("content", ["", "{", "null", "{}", '{"config": 3}', '{"config": {"model": []}}'])
def test_a_damaged_record_of_the_run_is_named(tmp_path, content):
    config, _ = parse_arguments(["--deepspeed", "ds.json"])
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=f"^resume: [^\n]*{tmp_path}/config.json[^\n]*$"):
        check_same_run(tmp_path, config)


def test_the_newest_record_of_a_run_counts(tmp_path):
    for step in (0, 20, 10, 0):
        store_record(tmp_path, step, {})
        name = f"config-from-step-{step:08d}.json" if step else "config.json"
        assert record_path(tmp_path) == tmp_path / name


def test_damaged_lines_are_dropped_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": "x\xe2\x80\xa8y"}\n\xff\xfe{\n' + b"[" * 100_000 + b'\n"5"\n\n{"step": 2}\n{"s')
    kept = [{"step": 1, "a": "x\u2028y"}, {"step": 2}]
    assert drop_lines_after(path, 2) == kept and "dropped 4 damaged lines, the first is line 2" in caplog.text
    caplog.clear()
    assert drop_lines_after(path, 2) == kept and not caplog.text
    assert [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]] == kept


def test_what_is_written_is_on_the_disk_before_it_has_its_name(stopped, monkeypatch):
    """By inode: every file and folder of a checkpoint is flushed before the last rename, its folder after it."""
    done, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        done.append(("flush", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def noted_replace(source, target):
        replace(source, target)
        done.append(("rename", os.stat(target).st_ino))

    run = stopped.with_name("flushed")
    shutil.copytree(stopped, run)
    trainer = trainer_in(run, resume=True)
    trainer.train_step()
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    trainer.save()
    monkeypatch.undo()
    trainer.loader.close()
    final = run / "checkpoints/step-00000003"
    renamed = done.index(("rename", final.stat().st_ino))
    before, after = ({inode for what, inode in part if what == "flush"} for part in (done[:renamed], done[renamed:]))
    written = [path for path in (final, *final.rglob("*"), run / "metrics.jsonl")]
    assert len(written) > 10 and not [path for path in written if path.stat().st_ino not in before]
    assert after == {final.parent.stat().st_ino}


def test_a_full_disk_ends_a_checkpoint_in_one_line_and_leaves_the_one_before(stopped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    trainer = trainer_in(run, resume=True)
    trainer.train_step()
    expected = (
        rf"output_dir: {run}/checkpoints: File too large "
        r"\(checkpoint of step 3 not written; that of step 2 is intact\); "
        rf"resume with --output_dir {run} --resume true$"
    )
    with small_files(), pytest.raises(AgreedUsageError, match=expected):
        trainer.save()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000001", "step-00000002"}
    trainer.save()
    assert newest_whole_checkpoint(run / "checkpoints").name == "step-00000003"
    trainer.loader.close()
    shutil.rmtree(run / "checkpoints")
    with small_files(), pytest.raises(AgreedUsageError, match="step 3 not written; there is no earlier one"):
        trainer.save()


def test_whatever_meets_a_full_disk_names_its_file_and_leaves_the_old_one(tmp_path):
    def array(path):
        write_arrays({"maps": np.random.default_rng(0).random(100_000)}, path)

    def weights(path):
        from safetensors.torch import save_file

        with replacing(path) as temporary:
            save_file({"a": torch.zeros(100_000)}, temporary)

    def line(path):
        append_line(path, "x" * 100_000)

    for write in (lambda path: write_json(path, list(range(100_000))), array, weights, line):
        path = tmp_path / "old"
        path.write_text("old")
        with small_files(), pytest.raises(OSError) as raised:
            write(path)
        assert is_user_error(raised.value) and format_error(raised.value) == f"{path}: File too large"
        assert path.read_text().startswith("old") and [p.name for p in tmp_path.iterdir()] == ["old"]


def test_prepare_on_a_full_disk_names_the_shard_and_goes_on_later(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (4, 120, 120, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{n}.png,a dog\n" for n in range(4)))
    options = {"pairs": tmp_path / "t.csv", "images": tmp_path, "shard_size": 2, "workers": 1}
    with small_files(), pytest.raises(OSError) as raised:
        make_shards(out=tmp_path / "out", **options)
    assert format_error(raised.value) == f"{tmp_path}/out/shard-000000.tar: File too large"
    make_shards(out=tmp_path / "out", **options)
    make_shards(out=tmp_path / "other", **options)
    files = [sorted(path.relative_to(at) for path in at.rglob("*")) for at in (tmp_path / "out", tmp_path / "other")]
    assert files[0] == files[1] and len(files[0]) == 6
    for name in files[0]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_folder_has_one_run_and_the_lock_dies_with_its_owner(tmp_path):
    code = f"""
import time
from filelock import FileLock
with FileLock({str(tmp_path / "lock")!r}):
    print("locked", flush=True)
    time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match=f"^output_dir: another run is writing to {tmp_path}$"):
            lock_folder(tmp_path)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
    lock_folder(tmp_path)
    lock_folder(tmp_path)  # the same process may go on


def test_runs_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tiny-2").mkdir(parents=True)
    found, barrier = [], threading.Barrier(8)

    def start():
        barrier.wait()
        found.append(Path(new_folder("tiny")).name)

    threads = [threading.Thread(target=start) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(found) == sorted(f"tiny-{number}" for number in (1, *range(3, 10)))


def test_what_ends_one_rank_between_checkpoints_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    """It ends at once: the other ranks wait for it in a collective."""

    def full_disk(*_):
        with small_files():
            append_line(tmp_path / "metrics.jsonl", "x" * 100_000)

    def killed_worker(*_):
        pool = WorkerPool(None, 1, 2)
        try:
            pool._workers[0].process.kill()
            pool.submit(Job([0], ["key"], [0], np.zeros((1, 1), FACTS)))
            pool.receive()
        finally:
            pool.close()

    def leave(status):
        raise SystemExit(status)

    config = SimpleNamespace(train=SimpleNamespace(output_dir=str(tmp_path)))
    monkeypatch.setattr(launch, "read_options", lambda *_: (config, SimpleNamespace(verbose=False)))
    monkeypatch.setattr(launch, "start_distributed", lambda _: None)
    monkeypatch.setattr(launch, "prepare_run", lambda *_: (config, {}, tmp_path))
    monkeypatch.setattr(launch, "StopRequest", lambda: None)
    monkeypatch.setattr(launch.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(os, "_exit", leave)
    faults = {
        full_disk: rf"{tmp_path}/metrics.jsonl: File too large",
        killed_worker: r"data worker 0 \(process \d+\) was killed by SIGKILL",
    }
    for work, reason in faults.items():
        with pytest.raises(SystemExit) as left:
            launch.run_script("train.py", None, None, work)
        again = f"; resume from the last checkpoint with --output_dir {tmp_path} --resume true"
        expected = f"train.py: error: {reason}{again if list(tmp_path.glob('checkpoints/step-*')) else ''}\n"
        (tmp_path / "checkpoints/step-00000001").mkdir(parents=True, exist_ok=True)
        assert left.value.code == 1 and re.fullmatch(expected, capsys.readouterr().err), reason

"""Worker processes: the same batches for any number of them, and none of them outlives its loader or its parent."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from sample_files import BAD, GOOD
from shard_files import scene_files, write_shard
from small_loaders import loader, same

from softmask_fast.config import DataConfig
from softmask_fast.data.preparing import FACTS, Job
from softmask_fast.data.seeding import hash_names, visiting_order
from softmask_fast.data.sources import open_source
from softmask_fast.data.workers import WorkerError, WorkerPool, default_workers
from softmask_fast.errors import UsageError
from softmask_fast.tasks.recipes import TASKS

SEED = 3  # at which bad samples do not follow each other for a whole epoch
JOB = Job([0], ["key"], [0], np.zeros((1, 1), FACTS))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """60 good samples and 12 that are bad in different ways, in a shard; another 10 in a list."""
    folder = tmp_path_factory.mktemp("damaged")
    mixed = {}
    for (name, files), number in zip(BAD.items(), range(0, 60, 5), strict=True):
        good = list(GOOD)[number : number + 5]
        mixed |= {key: GOOD[key] for key in good} | {name: files}
    write_shard(folder / "s.tar", mixed)
    entries = []
    for number in range(10):
        files = scene_files(number, 28)
        (folder / f"{number}.jpg").write_bytes(files["jpg"])
        entries.append({"image": f"{number}.jpg", "caption": json.loads(files["json"])["captions"]})
    entries[3]["image"] = "nowhere.jpg"
    (folder / "list.json").write_text(json.dumps(entries))
    return open_source(f"{folder}/s.tar,{folder}/list.json")


OPTIONS = {"batch_size": 7, "max_bad_fraction": 0.3, "max_pixels": 100 * 100, "max_tokens": 9}


def visits_of(source, epoch: int) -> list[int]:
    return visiting_order(hash_names(source.keys), SEED, epoch).tolist()


def processes(pool: WorkerPool) -> list[subprocess.Popen]:
    return [worker.process for worker in pool._workers]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(damaged, workers):
    """Two epochs with bad samples and cut captions, then again from the middle of the second."""
    with loader(damaged, **OPTIONS) as batches:
        expected = [next(batches) for _ in range(12)]
        state = json.loads(json.dumps(batches.state_dict()))
        expected += [next(batches) for _ in range(5)]
        end, bad = batches.state_dict(), batches.bad
    assert len(bad) == 13 and end["truncated_captions"] > 20 and end["epoch"] == 1 and state["epoch"] == 1
    with loader(damaged, workers=workers, **OPTIONS) as batches:
        assert all(same(next(batches), batch) for batch in expected)
        assert batches.state_dict() == end and list(batches.bad.items()) == list(bad.items())
        batches.load_state_dict(state)
        assert all(same(next(batches), batch) for batch in expected[12:])
        assert batches.state_dict() == end


def test_drawn_scenes_are_the_same_from_workers():
    """Pixels that are no files; 70 a batch, so that a batch is several jobs."""
    source = open_source("shapes:num=90", image_size=24)
    with loader(source, batch_size=70) as first, loader(source, batch_size=70, workers=2) as second:
        for _ in range(3):
            assert same(next(first), next(second))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_may_take_more_jobs_than_are_held_at_a_time(tmp_path, workers):
    """3 good samples of 15, in batches of 6."""
    write_shard(tmp_path / "s.tar", {"good": GOOD["000"]} | BAD | {name: GOOD[name] for name in ("001", "002")})
    source = open_source(f"{tmp_path}/s.tar")
    options = {"batch_size": 6, "max_bad_fraction": 1.0, "max_pixels": 100 * 100, "workers": workers, "seed": SEED}
    with loader(source, **options) as batches:
        found = [next(batches) for _ in range(3)]
        held = batches._capacity * batches._job_size
    order = [source.keys[i] for epoch in range(7) for i in visits_of(source, epoch)]
    bad = {key for key in source.keys if key.split("/")[1] in BAD}
    good = [place for place, key in enumerate(order) if key not in bad]
    assert any(good[n + 6] - good[n] > held for n in (0, 6))
    assert [key for batch in found for key in batch.keys] == [order[place] for place in good[:18]]
    assert len({row.numpy().tobytes() for batch in found for row in batch.pixels}) == 18
    assert set(batches.bad) == bad


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_source_of_shapes_can_be_sent_to_workers(task):
    source = TASKS[task].open("shapes:num=5", DataConfig(), split="train", seed=0, image_size=24)
    copy = pickle.loads(pickle.dumps(source))
    got, expected = getattr(copy, "load", copy.read)(getattr(source, "locate", int)(3)), source.read(3)
    assert [image.tobytes() for image in got.images] == [image.tobytes() for image in expected.images]
    assert (got.key, getattr(got, "target", None)) == (expected.key, getattr(expected, "target", None))


def test_a_killed_worker_is_named_at_once():
    with loader(workers=2) as batches:
        next(batches)
        victim = processes(batches._pool)[1]
        victim.kill()
        victim.wait()
        began = time.monotonic()
        message = rf"data worker 1 \(process {victim.pid}\) was killed by SIGKILL"
        with pytest.raises(WorkerError, match=message):
            for _ in range(3):
                next(batches)
        assert time.monotonic() - began < 10
        with pytest.raises(WorkerError, match=message):
            next(batches)
        survivor = processes(batches._pool)[0]
    assert survivor.returncode is not None


def test_workers_ignore_the_signals_that_ask_their_parent_to_stop_and_close_ends_them():
    with loader(workers=2) as batches:
        next(batches)
        started = processes(batches._pool)
        for process in started:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
        for _ in range(12):
            next(batches)
        assert all(process.poll() is None for process in started)
    assert all(process.returncode == -signal.SIGKILL for process in started)
    batches.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_workers_end_with_their_parent_though_it_is_killed():
    """Also while another process holds the parent's end of their pipes, as one that was forked does."""
    code = """
import os, time
from softmask_fast.data.workers import WorkerPool
pool = WorkerPool(None, 2, 4)
pids = [worker.process.pid for worker in pool._workers]
if (fork := os.fork()) == 0:
    time.sleep(60)
print(fork, *pids, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
    forked, *pids = map(int, parent.stdout.readline().split())
    workers = [psutil.Process(pid) for pid in pids]
    try:
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive and psutil.pid_exists(forked)
    finally:
        os.kill(forked, signal.SIGKILL)
        parent.stdout.close()


def test_what_fails_in_a_worker_is_shown_with_its_traceback():
    pool = WorkerPool(None, 1, 2)
    try:
        pool.submit(JOB)
        with pytest.raises(WorkerError, match=r"data worker 0 .*failed:\n(?s:.*)'NoneType' object has no attribute"):
            pool.receive()
    finally:
        pool.close()


def test_a_source_that_cannot_be_sent_is_refused():
    source = open_source("shapes:num=40")
    source.read = lambda index: None
    with pytest.raises(UsageError, match="data_workers: expected 0, as this data source cannot be sent to workers"):
        loader(source, workers=1)
    with pytest.raises(UsageError, match="data_workers: expected at least 0, got -1"):
        loader(workers=-1)


def test_the_default_number_goes_by_device_and_cores(monkeypatch):
    for cores, ranks, expected in [(2, 1, 0), (4, 1, 2), (16, 1, 8), (64, 1, 8), (64, 8, 4)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert default_workers(torch.device("cuda")) == expected
        assert default_workers(torch.device("cpu")) == 0

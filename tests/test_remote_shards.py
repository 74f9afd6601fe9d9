"""Shards by URL: the samples are those of the local files, whatever the network does, and the cache keeps its bound."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from file_server import FileServer
from shard_files import scene_files, write_shard

from softmask_fast.data.augment import AugmentConfig
from softmask_fast.data.loader import PretrainingLoader
from softmask_fast.data.remote import download
from softmask_fast.data.remote.options import RemoteOptions
from softmask_fast.data.shards import write_index
from softmask_fast.data.sources import open_source
from softmask_fast.data.synthetic import ShapesSource
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.data.types import UnreachableFile
from softmask_fast.errors import UsageError, format_error, is_user_error
from softmask_fast.training.options import make_config

SHARDS, PER_SHARD = 8, 6
SHAPES = ShapesSource(num=40)
TOKENIZER = train_tokenizer([text for i in range(40) for text in SHAPES.read(i).captions], 200)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards; one sample is bad, one name is there twice."""
    folder = tmp_path_factory.mktemp("remote")
    for shard in range(SHARDS):
        samples = {f"{shard}{i}": scene_files(shard * PER_SHARD + i) for i in range(PER_SHARD)}
        if shard == 2:
            samples["20"]["jpg"] = b"no image"
        write_shard(folder / f"s-{shard}.tar", samples)
    return folder


@pytest.fixture
def server(shards):
    server = FileServer(shards)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.01)


@pytest.fixture
def remote(server, tmp_path):
    """Opens the shards of the server, by default all, with a cache that is empty at first."""

    def opened(pattern=f"s-{{0..{SHARDS - 1}}}.tar", **options):
        defaults = {"cache_dir": str(tmp_path / "cache"), "shuffle_shards": 2, "prefetch_shards": 1}
        defaults |= {"download_timeout": 0.4, "download_tries": 4}
        return open_source(f"{server.url}/{pattern}", remote=RemoteOptions(**defaults | options))

    return opened


def loader(source, **options):
    defaults = {"batch_size": 5, "image_size": 16, "augment": AugmentConfig(), "max_tokens": 20, "seed": 3}
    defaults |= {"num_threads": 2, "max_bad_fraction": 0.1}
    return PretrainingLoader(source, TOKENIZER, **defaults | options)


def visits(batches):
    """key -> pixels and captions, of batches that hold each key once."""
    rows = [
        (key, (batch.pixels[row].numpy().tobytes(), TOKENIZER.decode(batch.masked_ids[row], skip_special_tokens=True)))
        for batch in batches
        for row, key in enumerate(batch.keys)
    ]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def cache_bytes(folder):
    """Whole files and downloads in the cache, these with the size that they have reserved and that on the disk."""
    sizes = []
    for path in (folder / "shards").iterdir():
        try:
            written = path.stat().st_size
        except FileNotFoundError:
            continue
        reserved = int(path.name.rsplit(".", 2)[1]) if path.suffix == ".partial" else 0
        assert path.suffix != ".partial" or written <= reserved
        sizes.append(max(written, reserved))
    return sum(sizes)


def test_the_samples_are_those_of_the_local_files_though_the_server_fails(shards, server, remote, caplog):
    local = open_source(str(shards))
    server.faults |= {
        "/s-0.tar": ["drop", "503", "drop"],
        "/s-1.tar": ["stall"],
        "/s-2.tar": ["503", "stall"],
        "/s-3.tar": ["429"],
        "/s-4.tar.index.jsonl": ["503", "drop"],
    }
    source = remote()
    assert len(source) == len(local) and list(source.keys) == local.keys and source.keys[-1] == local.keys[-1]
    assert (source.image_ids[list(range(len(local)))] == local.image_ids).all()
    assert source.image_ids[3] == local.image_ids[3]
    assert [source.read(i) for i in range(len(local))] == [local.read(i) for i in range(len(local))]
    assert "s-0.tar: " in caplog.text and "no data for 0.4 s" in caplog.text and "503" in caplog.text
    assert sum(len(faults) for faults in server.faults.values()) == 0
    assert len(server.gets(".tar")) == SHARDS + 7  # each whole once, the seven failures but that of the index besides
    again = remote()
    assert [again.read(i) for i in range(3)] == [local.read(i) for i in range(3)]
    assert len(server.gets(".tar")) == SHARDS + 7


def test_the_loader_gives_the_same_pixels_and_names_the_bad_sample(shards, remote):
    with loader(open_source(str(shards))) as batches:
        expected = visits([next(batches) for _ in range(9)])  # 45 of 47
    with loader(remote(cache_gigabytes=1.0)) as batches:
        got = visits([next(batches) for _ in range(9)])
        next(batches)
        assert batches.epoch == pytest.approx(51 / 48, abs=1.1 / 48)
        assert batches.bad.keys() == {"s-2/20"} and "cannot be decoded" in batches.bad["s-2/20"]
    shared = expected.keys() & got.keys()
    assert len(shared) >= 43 and list(got) != list(expected)
    assert {key: got[key] for key in shared} == {key: expected[key] for key in shared}


@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 3)])
def test_resume_in_the_middle_gives_the_same_continuation(remote, server, tmp_path, rank, world_size):
    options = {"rank": rank, "world_size": world_size, "batch_size": 4}
    with loader(remote(), **options) as batches:
        for _ in range(3):
            next(batches)
        state = json.loads(json.dumps(batches.state_dict()))
        expected = [next(batches) for _ in range(12)]
    elsewhere = remote(cache_dir=str(tmp_path / "other"), prefetch_shards=0, cache_gigabytes=1.0)
    with loader(elsewhere, workers=rank, **options) as batches:
        batches.load_state_dict(state)
        for batch in expected:
            got = next(batches)
            assert got.keys == batch.keys and (got.pixels == batch.pixels).all()
            assert (got.masked_ids == batch.masked_ids).all()
    with (
        loader(remote(shuffle_shards=1), **options) as batches,
        pytest.raises(UsageError, match="state: expected source .*, got a state saved with"),
    ):
        batches.load_state_dict(state)


def test_two_ranks_in_one_bounded_cache(shards, server, remote, tmp_path, monkeypatch):
    """Both ranks get their halves; all the while the cache holds no more than it may."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    limit = 6 * largest  # two ranks of window 1 plus the shards at the borders; two of the eight must go
    seen = []
    server.watch = lambda: seen.append(cache_bytes(tmp_path / "cache"))
    options = {"shuffle_shards": 1, "prefetch_shards": 0, "cache_gigabytes": limit / 1e9}
    found = [{}, {}]

    def run(rank):
        with loader(remote(**options), rank=rank, world_size=2, batch_size=1, max_bad_fraction=1.0) as batches:
            found[rank] = visits([next(batches) for _ in range(23)])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found[0]) == len(found[1]) == 23 and not found[0].keys() & found[1].keys()
    assert max(seen) <= limit and max(seen) > 3 * largest
    assert len(server.gets(".tar")) > SHARDS  # some were needed again for reading after the listing
    assert not list((tmp_path / "cache" / "shards").glob("*.partial"))


READER = """
import sys
from softmask_fast.data.sources import open_source
from softmask_fast.data.remote.options import RemoteOptions
url, folder, gigabytes, first = sys.argv[1:]
options = RemoteOptions(cache_dir=folder, cache_gigabytes=float(gigabytes), shuffle_shards=1, prefetch_shards=0)
source = open_source(url, remote=options)
order = [i for _ in range(2) for i in range(len(source))]
if first == "1":
    order.reverse()
assert all(len(source.read(i).image) for i in order)
print(len(order))
"""


def test_processes_that_evict_each_others_shards_still_read_all(shards, server, tmp_path):
    limit = 3 * max(path.stat().st_size for path in shards.glob("*.tar"))
    cache, seen = tmp_path / "cache", []
    server.watch = lambda: seen.append(cache_bytes(cache))
    url = f"{server.url}/s-{{0..{SHARDS - 1}}}.tar"
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, url, str(cache), str(limit / 1e9), str(first)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in range(2)
    ]
    assert [reader.communicate(timeout=60)[0] for reader in readers] == [f"{2 * SHARDS * PER_SHARD}\n"] * 2
    assert [reader.returncode for reader in readers] == [0, 0]
    assert 0 < max(seen) <= limit


def test_what_a_killed_download_left_is_removed(remote, server, tmp_path):
    left = tmp_path / "cache" / "shards" / f"0123-gone.tar.{10**12}.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x" * 100)
    remote("s-0.tar", cache_gigabytes=1.0)
    assert not left.exists()


def test_an_index_beside_the_shard_saves_the_first_download(shards, server, remote, tmp_path):
    try:
        for shard in range(SHARDS):
            write_index(shards / f"s-{shard}.tar", shards / f"s-{shard}.tar.index.jsonl")
        source = remote()
        assert list(source.keys) == open_source(str(shards)).keys and server.gets(".tar") == []
        assert source.read(7) == open_source(str(shards)).read(7) and server.gets(".tar") == ["/s-1.tar"]
        first, entry = (shards / "s-3.tar.index.jsonl").read_text().splitlines()[:2]
        for wrong in (
            "<html>", first, f"{first}\n{entry}", first.replace("6", "1", 1) + '\n["a",{"jpg":[0,1000000000]}]',
            first + '\n["a",{"jpg":[-5,3]}]', first + '\n[["a"],{}]', first + "\n" + "[" * 100_000,
        ):  # fmt: skip
            (shards / "s-3.tar.index.jsonl").write_text(wrong)
            with pytest.raises(UsageError, match="s-3.tar.index.jsonl"):
                remote("s-3.tar", cache_dir=str(tmp_path / "fresh"))
    finally:
        for path in shards.glob("*.jsonl"):
            path.unlink()


def test_a_shard_that_stays_away_is_an_error_with_url_and_cause(server, remote, tmp_path):
    server.faults["/s-1.tar"] = ["503"] * 10
    with pytest.raises(UnreachableFile, match=r"/s-1.tar: download failed after 3 attempts: .*503"):
        remote(download_tries=3)
    with pytest.raises(UnreachableFile, match=r"/s-77.tar: download failed after 1 attempt: .*") as error:
        remote("s-77.tar")
    assert is_user_error(error.value) and format_error(error.value) == str(error.value)
    with socket.socket() as taken:  # bound, but no one listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/s-5.tar"
        options = RemoteOptions(cache_dir=str(tmp_path / "cache"), download_tries=2)
        with pytest.raises(UnreachableFile, match=r"/s-5.tar.index.jsonl: download failed after 2 attempts: .*Connect"):
            open_source(url, remote=options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_lost_during_training_stops_it_for_good(server, remote, tmp_path, workers):
    source = remote(shuffle_shards=1, prefetch_shards=0)
    for path in (tmp_path / "cache" / "shards").glob("*-s-5.tar"):
        path.unlink()
    server.faults["/s-5.tar"] = ["404"] * 100
    seen = []
    with loader(source, batch_size=1, workers=workers) as batches:
        with pytest.raises(UnreachableFile, match="s-5.tar"):
            for _ in range(48):
                seen += next(batches).keys
        with pytest.raises(UnreachableFile, match="s-5.tar"):
            next(batches)
        order = [source.keys[i] for i in source.sampler.indices(3, 0, 0, 1)]
    good = [key for key in order if key != "s-2/20"]
    assert seen == good[: len(seen)] and good[len(seen)].startswith("s-5/")  # up to the first that is missing


@pytest.mark.parametrize("change, cause", [("cut", "cut off, or changed"), ("same size", "does not match the index")])
def test_a_shard_that_changed_since_it_was_indexed_is_refused(tmp_path, remote, shards, server, change, cause):
    source = remote("s-0.tar")
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.unlink()
    content = (shards / "s-0.tar").read_bytes()
    try:
        changed = content[:-1024] if change == "cut" else content[:-1] + b"x"
        (shards / "s-0.tar").write_bytes(changed)
        with pytest.raises(UnreachableFile, match=f"s-0.tar: .*{cause}"):
            source.read(0)
    finally:
        (shards / "s-0.tar").write_bytes(content)
    assert source.read(0).captions


def test_no_more_is_prefetched_than_asked_and_before_it_is_needed(server, remote, tmp_path):
    source = remote()
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.unlink()
    server.requests.clear()
    with loader(source, batch_size=1, num_threads=1) as batches:
        next(batches)
        deadline = time.monotonic() + 5
        while len(server.gets(".tar")) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert 2 <= len(server.gets(".tar")) < SHARDS
        for _ in range(30):
            next(batches)
    assert len(server.gets(".tar")) == len(set(server.gets(".tar")))


def test_mistakes_are_named(server, remote, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match=r"cache_gigabytes: expected at least 0.000102 for shuffle_shards=2"):
        remote(cache_gigabytes=3e-5)
    with pytest.raises(UsageError, match=r"cache_gigabytes: expected 2.05e-05 or more for .*tar, got 1e-05"):
        remote(cache_gigabytes=1e-5, cache_dir=str(tmp_path / "other"))
    with pytest.raises(UsageError, match="s-1.tar is named twice"):
        remote("s-{1,1}.tar")
    with pytest.raises(UsageError, match="a.tar and .*a/b.tar"):
        remote("{a,a/b,c}.tar")
    with pytest.raises(UsageError, match="expected .tar shards"):
        remote("list.json")
    with pytest.raises(UsageError, match="chain"):
        remote("simplecache::s-0.tar")
    with pytest.raises(UsageError, match="nothing://"):
        open_source("nothing://bucket/*.tar")
    assert RemoteOptions.of(make_config("tiny").data) == RemoteOptions()
    for wrong in ({"shuffle_shards": 0}, {"prefetch_shards": -1}, {"download_timeout": 0.0}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))}: expected .*, got"):
            RemoteOptions.of(make_config("tiny", **wrong).data)


def test_damaged_shards_are_refused_by_their_url(tmp_path):
    (tmp_path / "text.tar").write_text("not a tar file at all " * 100)
    server = FileServer(tmp_path)
    try:
        with pytest.raises(UsageError, match=f"{server.url}/text.tar is not a readable tar"):
            open_source(f"{server.url}/text.tar?signature=secret", remote=RemoteOptions(cache_dir=str(tmp_path / "c")))
    finally:
        server.close()


def test_shards_on_s3(shards, tmp_path, monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    ThreadedMotoServer = pytest.importorskip("moto.server").ThreadedMotoServer
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        s3 = s3fs.S3FileSystem(skip_instance_cache=True)
        s3.mkdir("pairs")
        for shard in range(3):
            s3.put_file(str(shards / f"s-{shard}.tar"), f"pairs/train/s-{shard}.tar")
        write_index(shards / "s-1.tar", tmp_path / "s-1.tar.index.jsonl")
        s3.put_file(str(tmp_path / "s-1.tar.index.jsonl"), "pairs/train/s-1.tar.index.jsonl")
        local = open_source(f"{shards}/s-{{0..2}}.tar")
        options = RemoteOptions(cache_dir=str(tmp_path / "cache"), shuffle_shards=2)
        for data in ("s3://pairs/train/s-{0..2}.tar", "s3://pairs/train/", "s3://pairs/train/s-*.tar"):
            source = open_source(data, remote=options)
            assert list(source.keys) == local.keys
            assert [source.read(i) for i in range(len(local))] == [local.read(i) for i in range(len(local))]
        with pytest.raises(UnreachableFile, match="s3://pairs/train/s-9.tar: download failed after 1 attempt"):
            open_source("s3://pairs/train/s-9.tar", remote=options)
    finally:
        server.stop()


def test_file_urls_mix_with_others(shards, remote, tmp_path):
    source = open_source(f"file://{shards}/s-0.tar", remote=RemoteOptions(cache_dir=str(tmp_path)))
    assert source.read(2) == open_source(f"{shards}/s-0.tar").read(2)
    assert os.listdir(tmp_path / "shards")

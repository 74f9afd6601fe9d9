"""What a server of data may not do: lead into this network, fill the memory; secrets in URLs; files left in caches."""

import asyncio
import http.server
import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from shard_files import scene_files, write_shard
from yarl import URL

from softmask_fast.data.remote import download, redirects
from softmask_fast.data.remote.cache import ShardCache
from softmask_fast.data.remote.download import Downloader
from softmask_fast.data.remote.options import RemoteOptions
from softmask_fast.data.remote.source import RemoteShardSource
from softmask_fast.data.shards import write_index
from softmask_fast.data.sources import open_source
from softmask_fast.data.types import UnreachableFile
from softmask_fast.errors import UsageError, format_error
from softmask_fast.evaluation.record import evaluation_record
from softmask_fast.training.options import make_config
from softmask_fast.training.run_record import check_same_run, shown


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Two samples in /a.tar; `answer` may send something else for a path: (status, headers, pieces of the body)."""
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.01)
    shard = write_shard(tmp_path / "a.tar", {"one": scene_files(0), "two": scene_files(1)})
    write_index(shard, tmp_path / "a.tar.index.jsonl")
    site = SimpleNamespace(answer=lambda path: None, asked=[], folder=tmp_path)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            site.asked.append(self.path)
            path = self.path.split("?")[0]
            status, headers, body = site.answer(path) or (200, {}, [])
            if status == 200 and not body:
                name = tmp_path / path.lstrip("/")
                status, body = (200, [name.read_bytes()]) if name.is_file() else (404, [])
                headers = {"Content-Length": str(sum(map(len, body)))}
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            try:
                for piece in body if self.command == "GET" else ():
                    self.wfile.write(piece)
            except OSError:
                pass

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    site.port = server.server_port
    site.url = f"http://127.0.0.1:{site.port}"
    yield site
    server.shutdown()
    server.server_close()


def opened(url, folder, **options):
    return open_source(url, remote=RemoteOptions(cache_dir=str(folder), download_tries=2, **options))


def redirect_to(target, *paths):
    return lambda path: (302, {"Location": target, "Content-Length": "0"}, []) if path in paths else None


@pytest.mark.parametrize("target", ["http://localhost:{port}/b", "http://10.1.2.3/b", "http://[::1]:{port}/b",
                                    "http://169.254.169.254/latest", "http://127.1:{port}/b"])  # fmt: skip
@pytest.mark.parametrize("path", ["/a.tar", "/a.tar.index.jsonl"])
def test_a_redirect_to_a_private_address_is_not_followed(site, tmp_path, target, path):
    site.answer = redirect_to(target.format(port=site.port), path)
    with pytest.raises(UnreachableFile, match=r"redirects to .*, a private or local address") as refused:
        opened(f"{site.url}/a.tar", tmp_path / "cache").read(0)
    assert "1 attempt" in str(refused.value) and not any(asked.startswith("/b") for asked in site.asked)


def test_a_redirect_to_another_public_host_is_followed_and_logged_once(site, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(redirects, "is_public", lambda address: True)
    monkeypatch.setattr(redirects, "_logged", set())
    index = (site.folder / "a.tar.index.jsonl").rename(site.folder / "moved.jsonl")
    site.answer = redirect_to(f"http://localhost:{site.port}/{index.name}?token=secret", "/a.tar.index.jsonl")
    for name in ("one", "two"):
        assert opened(f"{site.url}/a.tar", tmp_path / name).read(1).captions
    lines = [record.message for record in caplog.records if "another host" in record.message]
    assert lines == [
        f"{site.url}/a.tar.index.jsonl redirects to another host: http://localhost:{site.port}/moved.jsonl"
    ]


def test_a_redirect_within_a_host_is_followed(site, tmp_path, caplog):
    (site.folder / "a.tar.index.jsonl").rename(site.folder / "moved.jsonl")
    site.answer = redirect_to("/moved.jsonl", "/a.tar.index.jsonl")
    assert len(opened(f"{site.url}/a.tar", tmp_path / "cache")) == 2 and not caplog.records


def test_a_redirect_from_https_to_http_is_refused():
    class Public:
        async def look_up(self, host, port):
            return [{"host": "93.184.216.34"}]

    def check(here, there):
        asyncio.run(redirects._check(URL(here), URL(there), Public()))

    check("https://a.org/x", "https://a.org/y")
    check("http://a.org/x", "https://a.org/x")
    with pytest.raises(redirects.RefusedRedirect, match="https://a.org/x redirects from https to http: http://b.org/y"):
        check("https://a.org/x?sig=1", "http://b.org/y?sig=2")
    for address in ("127.0.0.1", "10.0.0.1", "192.168.0.1", "169.254.1.1", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1",
                    "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "2002:7f00:1::"):  # fmt: skip
        assert not redirects.is_public(address)
    assert redirects.is_public("93.184.216.34") and redirects.is_public("2606:2800:220:1::1")


@pytest.mark.parametrize("headers", [{}, {"Content-Length": str(10**12)}])
def test_an_index_is_read_up_to_a_bound(site, tmp_path, monkeypatch, headers):
    monkeypatch.setattr("softmask_fast.data.remote.source.MAX_INDEX_BYTES", 10**6)
    sent = []

    def endless():
        while len(sent) < 3000:
            sent.append(1)
            yield b" " * 10**4

    site.answer = lambda path: (200, headers, endless()) if path.endswith("jsonl") else None
    with pytest.raises(UnreachableFile, match=r"index.jsonl: .*more than 1000000 bytes: too many"):
        opened(f"{site.url}/a.tar", tmp_path / "cache")
    assert len(sent) < 3000 and not list((tmp_path / "cache" / "indexes").iterdir())


def test_a_shard_that_stalls_or_never_ends_is_an_error_or_goes_on(site, tmp_path):
    source = opened(f"{site.url}/a.tar", tmp_path / "cache", download_timeout=1.0)
    content, turn, release = (site.folder / "a.tar").read_bytes(), [], threading.Event()

    def stalling():
        turn.append(1)
        yield content[:5000]
        if len(turn) == 1:
            release.wait(30)
        yield content[5000:]

    site.answer = lambda path: (200, {"Content-Length": str(len(content))}, stalling())
    assert source.read(0).captions and len(turn) == 2
    release.set()


def test_passwords_and_signatures_are_never_shown(site, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    url = f"http://user:hunter2@127.0.0.1:{site.port}/{{a,b}}.tar?sig=hunter2,hunter2&x"
    source = opened(f"http://user:hunter2@127.0.0.1:{site.port}/a.tar?sig=hunter2#hunter2", tmp_path / "cache")
    assert source.keys[0] == "a/one" and any("hunter2" in asked for asked in site.asked)
    site.answer = lambda path: (503, {"Content-Length": "0"}, [])
    (next((tmp_path / "cache" / "shards").glob("*"), tmp_path / "none")).unlink(missing_ok=True)
    errors = []
    for work in (
        lambda: source.read(0),
        lambda: opened(f"ftp://user:hunter2@127.0.0.1:{site.port}/x.json", tmp_path / "cache"),
        lambda: opened(f"{site.url}/x.json?sig=hunter2", tmp_path / "cache"),
        lambda: opened(f"{url.split(',hunter2')[0]},local.tar", tmp_path / "cache"),
    ):
        with pytest.raises((UsageError, OSError)) as error:
            work()
        errors.append(format_error(error.value) + repr(error.value))
    config = make_config("tiny", data=url, eval_data=url)
    record = evaluation_record([], url)
    for text in [*errors, caplog.text, json.dumps(shown({"data": {"data": url}})), json.dumps(record)]:
        assert "hunter2" not in text
    (tmp_path / "config.json").write_text(
        json.dumps({"config": shown({"data": vars(config.data), "model": vars(config.model),
                                     "objectives": vars(config.objectives)})})
    )  # fmt: skip
    assert "hunter2" not in (tmp_path / "config.json").read_text()
    check_same_run(tmp_path, make_config("tiny", data=url.replace("hunter2", "renewed"), eval_data=url))
    with pytest.raises(UsageError, match="resume: expected data .*, got"):
        check_same_run(tmp_path, make_config("tiny", data=url.replace("{a,b}", "c"), eval_data=url))


def test_left_overs_in_the_cache_are_passed_over_or_named(site, tmp_path):
    folder = tmp_path / "cache"
    source = opened(f"{site.url}/a.tar", folder)
    expected = source.read(1)
    (index,), (shard,) = (folder / "indexes").glob("*.jsonl"), (folder / "shards").iterdir()
    for name in ("notes.txt", "odd.partial", "x.y.partial", "letter.from.me.12.partial"):
        (folder / "shards" / name).write_text("of another program")
    (folder / "shards" / "folder").mkdir()
    whole = index.read_bytes()
    for left in (b"", b"\0" * len(whole), whole[: len(whole) // 2]):
        index.write_bytes(left)
        shard.write_bytes(b"half")
        assert opened(f"{site.url}/a.tar", folder).read(1) == expected
    assert (folder / "shards" / "notes.txt").exists() and (folder / "shards" / "letter.from.me.12.partial").exists()
    shard.unlink()
    shard.mkdir()
    with pytest.raises(UnreachableFile, match="a.tar: the cache cannot be used: .*[Dd]irectory"):
        opened(f"{site.url}/a.tar", folder).read(1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cache_dir: expected a folder to write to, .*file"):
        opened(f"{site.url}/a.tar", tmp_path / "file" / "cache")


def test_files_of_other_users_are_read_but_not_removed(site, tmp_path, monkeypatch):
    def denied(self, *arguments, **options):
        raise PermissionError(1, "Operation not permitted", str(self))

    source = opened(f"{site.url}/a.tar", tmp_path / "cache")
    expected, (shard,) = source.read(0), (tmp_path / "cache" / "shards").iterdir()
    monkeypatch.setattr("os.utime", denied)
    assert source.read(0) == expected
    monkeypatch.setattr(Path, "unlink", denied)
    cache = ShardCache(tmp_path / "cache", shard.stat().st_size, Downloader(1, 1.0))
    with pytest.raises(UsageError, match="cache_dir: .* bytes that this user cannot remove"):
        cache.open(f"{site.url}/b.tar", 100)


def test_workers_get_no_open_session(site, tmp_path):
    import pickle

    source = opened(f"{site.url}/a.tar", tmp_path / "cache")
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert isinstance(copy, RemoteShardSource) and copy.load(source.locate(1)) == source.read(1)

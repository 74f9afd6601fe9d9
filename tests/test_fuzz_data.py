"""Damaged archives, tables, lists and texts: each ends soon, with samples or with one line, never with a traceback.

`RUNS` sets how many, 300 by default; the seed is fixed.
"""

import csv
import io
import json
import os
import signal
import tarfile
import time
from contextlib import contextmanager

import numpy as np
import pytest
from shard_files import encode

from softmask_fast.data.images import check_image
from softmask_fast.data.sources import open_source
from softmask_fast.data.tables import read_tables
from softmask_fast.data.types import BadSample
from softmask_fast.errors import UsageError
from softmask_fast.tasks.datasets import open_examples, open_expressions
from softmask_fast.tasks.entailment import EntailmentModel

RUNS = int(os.environ.get("RUNS", 300))
SECONDS = 5
KINDS = ("tar", "pax.tar", "txt.tar", "csv", "tsv", "json", "jsonl", "list.json", "boxes.json", "labels.json",
         "coco.json", "karpathy.json", "state.json", "tif", "parquet", "arrow")  # fmt: skip
JPEG = encode(np.arange(12 * 8 * 3, dtype=np.uint8).reshape(8, 12, 3))
NASTY = (b"\0", b'"', b"\n", b"\r", b"\t", b",", b"\xff", b"[" * 3000, b"{", b"}", b"]", b"NaN", b"1e999", b"-1",
         b"null", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\x1b[2J", b"\x80" + b"\xff" * 11, b"7" * 11)  # fmt: skip


def archive(format, *members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def whole_files():
    """A good file of each kind."""
    phrase = {"caption": "a red cat", "text": "cat", "first_word": 2, "n_words": 1, "boxes": [[0, 0, 0.5, 1]]}
    sample = json.dumps({"captions": ["a red cat", "two"], "phrases": [phrase]}).encode()
    long = "folder/" * 20 + "café." + "x" * 60
    pairs = [("i.jpg", "a red cat"), ("i.jpg", 'a "blue" dog, sitting'), ("none.jpg", "x")]
    objects = [{"image": image, "caption": caption, "phrases": [phrase]} for image, caption in pairs]
    quoted = io.StringIO()
    csv.writer(quoted).writerows([("image", "caption"), *pairs])
    tabs = "".join("\t".join(row) + "\n" for row in [("image", "caption"), *pairs])
    boxes = [{"image": "i.jpg", "text": "a cat", "box": [1, 1, 5, 5], "proposals": [[0, 0, 4, 4]]}] * 2
    return {
        "tar": archive(tarfile.USTAR_FORMAT, ("a.jpg", JPEG), ("a.json", sample), ("b.v.jpg", JPEG), ("b.v.txt", b"b")),
        "pax.tar": archive(tarfile.PAX_FORMAT, (f"{long}.jpg", JPEG), (f"{long}.json", sample)),
        "txt.tar": archive(tarfile.GNU_FORMAT, (f"{long}.jpg", JPEG), (f"{long}.txt", "one\r\ntwo\u2028x\n".encode())),
        "csv": quoted.getvalue().encode(),
        "tsv": tabs.encode(),
        "json": json.dumps(objects).encode(),
        "jsonl": "\n".join(map(json.dumps, objects)).encode(),
        "list.json": json.dumps(objects).encode(),
        "boxes.json": json.dumps(boxes).encode(),
        "coco.json": json.dumps({
            "images": [{"id": 7, "file_name": "i.jpg"}, {"id": 8, "file_name": "none.jpg"}],
            "annotations": [{"image_id": 7, "caption": "a red cat"}, {"image_id": 8, "caption": "x"}],
        }).encode(),
        "karpathy.json": json.dumps({"images": [
            {"filepath": ".", "filename": "i.jpg", "split": "val", "sentences": [{"raw": "a red cat"}]},
        ]}).encode(),
        "state.json": json.dumps({"_data_files": [{"filename": "f.arrow"}], "_split": None}).encode(),
        "tif": encode(np.arange(12 * 8 * 3, dtype=np.uint8).reshape(8, 12, 3), "TIFF", compression="tiff_lzw"),
        **columnar_files(),
        "labels.json": json.dumps([{"image": "i.jpg", "sentence": "a cat", "label": "neutral"}] * 2).encode(),
    }  # fmt: skip


def columnar_files():
    """The same table, of images with their bytes, in Parquet and in Arrow."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": JPEG, "path": f"{number}.jpg"} for number in range(3)]
    table = pyarrow.table({"image": images, "caption": [["a red cat", "two"], [], ["x"]]})
    in_parquet, in_arrow = io.BytesIO(), io.BytesIO()
    parquet.write_table(table, in_parquet, row_group_size=2)
    with pyarrow.ipc.new_stream(in_arrow, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return {"parquet": in_parquet.getvalue(), "arrow": in_arrow.getvalue()}


def damaged(content, draw):
    """The content after one to three accidents."""
    for _ in range(draw.integers(1, 4)):
        size = len(content)
        at, end = sorted(draw.integers(0, size + 1, 2).tolist())
        if draw.random() < 0.5:  # near each other, so that most of the file stays
            end = min(end, at + int(draw.integers(1, 20)))
        nasty = NASTY[draw.integers(len(NASTY))]
        content = (
            content[:at],
            content[:at] + content[end:],
            content[:at] + nasty + content[at:],
            content[:at] + nasty + content[at + len(nasty) :],
            content[:at] + draw.bytes(end - at) + content[end:],
            content[:at] + content[at:end] * 3 + content[end:],
            with_checksum(content, at - at % 512, nasty, int(draw.integers(0, 500))),
        )[draw.integers(7)]
    return content


def with_checksum(content, block, nasty, at):
    """A tar header changed in one place, its checksum set right, so that it is believed."""
    header = bytearray(content[block : block + 512].ljust(512, b"\0"))
    header[at : at + len(nasty)] = nasty[: 512 - at]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:block] + bytes(header) + content[block + 512 :]


@contextmanager
def time_limit(seconds):
    def stop(*_):
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_all(kind, path):
    """Everything that is in a file; what is wrong with single samples is counted."""
    if kind in ("csv", "tsv", "json", "jsonl"):
        return len(read_tables([(path, None)], "image", "caption")[0].entries), 0
    if kind == "tif":
        try:
            return check_image(path.read_bytes()).height, 0
        except BadSample as error:
            raise UsageError(f"{path.name}: {error}") from error
    options = {"split": "val", "seed": 0, "image_size": 16}
    if kind == "boxes.json":
        source = open_expressions(str(path), **options)
    elif kind == "labels.json":
        source = open_examples(str(path), "entailment", EntailmentModel.form, **options)
    else:
        source = open_source(str(path.parent if kind == "state.json" else path))
    bad = 0
    for index in range(len(source)):
        try:
            for image in source.read(index).images:
                check_image(image)
        except BadSample as error:
            one_line(error)
            bad += 1
    return len(source), bad


def one_line(error):
    assert str(error).isprintable() and 0 < len(str(error)) < 1000


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_soon_and_in_one_line(kind, tmp_path, caplog):
    content = whole_files()[kind]
    (tmp_path / "i.jpg").write_bytes(JPEG)
    if kind == "state.json":
        (tmp_path / "f.arrow").write_bytes(whole_files()["arrow"])
    path = tmp_path / (kind if kind == "state.json" else f"f.{kind}")
    path.write_bytes(content)
    assert read_all(kind, path)[0] >= 1
    refused = 0
    for number in range(RUNS // len(KINDS)):
        draw = np.random.default_rng([KINDS.index(kind), number])
        path.unlink()  # it may be mapped
        path.write_bytes(damaged(content, draw))
        try:
            with time_limit(SECONDS):
                read_all(kind, path)
        except UsageError as error:
            one_line(error)
            assert path.name in str(error)
            refused += 1
    assert refused
    assert all(record.message.isprintable() for record in caplog.records)


def test_the_guard_stops_what_does_not_end():
    with pytest.raises(AssertionError, match="still running"), time_limit(0.05):
        while True:
            time.sleep(0.01)

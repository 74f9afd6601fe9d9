"""Preparation: the shards hold what the table lists, byte for byte or made smaller; what is bad is named, not lost."""

import csv
import io
import json
import os
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image
from shard_files import encode

from softmask_fast.cli import main
from softmask_fast.data import prepare as prepare_module
from softmask_fast.data.prepare import make_shards
from softmask_fast.data.shards import read_index
from softmask_fast.data.sources import open_source
from softmask_fast.data.tables import read_tables
from softmask_fast.errors import UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
IMAGES = {
    "a.jpg": encode(PIXELS), "b.png": encode(PIXELS, "PNG"), "sub/c.webp": encode(PIXELS, "WEBP"),
    "d.jpg": encode(PIXELS[::-1]), "cut.jpg": encode(PIXELS)[:300], "e.gif": encode(PIXELS, "GIF"),
    "f.jpg": encode(PIXELS[:, ::-1]),
}  # fmt: skip
ROWS = [
    ("a.jpg", "a dog"), ("b.png", 'a "red" cat, sitting'), ("cut.jpg", "cut"), ("a.jpg", "the same dog"),
    ("sub/c.webp", "caf\u00e9"), ("", "no image"), ("../secret.jpg", "outside"), ("e.gif", "a gif"), ("d.jpg", "!!"),
    ("missing.jpg", "gone"), ("f.jpg", "fine"), ("f.jpg", "..."),
]  # fmt: skip
GOOD = {
    "a.jpg": ["a dog", "the same dog"],
    "b.png": ['a "red" cat, sitting'],
    "sub/c.webp": ["caf\u00e9"],
    "f.jpg": ["fine"],
}
REASONS = {
    (3, "cut.jpg"): "cannot be decoded",
    (6, ""): "no image in column 'image'",
    (7, "../secret.jpg"): "lies outside",
    (8, "e.gif"): "GIF is not supported",
    (9, "d.jpg"): "no usable caption",
    (10, "missing.jpg"): "does not exist",
}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for name, content in IMAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (tmp_path / "secret.jpg").write_bytes(IMAGES["a.jpg"])
    return folder


def write_table(path):
    """ROWS as a table of the kind that the name says."""
    objects = [{"image": image or None, "caption": caption} for image, caption in ROWS]
    if path.suffix == ".json":
        path.write_text(json.dumps(objects))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, objects)) + "\n\n")
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(objects), path)
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".tsv":
                file.writelines("\t".join(row) + "\n" for row in [("image", "caption"), *ROWS])
            else:
                csv.writer(file).writerows([("image", "caption"), *ROWS])
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_good_pairs_become_shards_and_bad_ones_are_listed(kind, images, tmp_path):
    done = make_shards(write_table(tmp_path / f"pairs.{kind}"), images, tmp_path / "out", shard_size=3, workers=1)
    assert (done.listed, done.samples, done.shards, done.skipped_captions) == (10, 4, 3, 1)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        f"shard-00000{number}.tar"
        for number in (0, 1, 3)  # all of the third are bad
    ]
    source = open_source(str(tmp_path / "out"))
    samples = {name: source.read(i) for i, name in enumerate(GOOD)}
    assert source.keys[:2] == ["shard-000000/000000000", "shard-000000/000000001"]
    assert {name: sample.captions for name, sample in samples.items()} == GOOD
    assert {name: sample.image for name, sample in samples.items()} == {name: IMAGES[name] for name in GOOD}
    with open(tmp_path / "out" / "bad.csv", newline="") as file:
        listed = {(int(row["row"]), row["image"]): row["reason"] for row in csv.DictReader(file)}
    assert listed.keys() == REASONS.keys() and all(REASONS[at] in reason for at, reason in listed.items())
    figures = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert figures["samples"] == 4 and figures["bad"] == 6 and figures["plan"]["shard_size"] == 3
    assert not list((tmp_path / "out").glob("*.partial")) and not (tmp_path / "out" / "unfinished").exists()


def test_the_indexes_beside_the_shards_are_theirs(images, tmp_path):
    make_shards(write_table(tmp_path / "pairs.csv"), images, tmp_path / "out", shard_size=3, workers=1)
    for shard in (tmp_path / "out").glob("*.tar"):
        content = shard.read_bytes()
        for name, members in read_index(shard.with_name(shard.name + ".index.jsonl")):
            offset, size = members["json"]
            text = json.loads(content[offset : offset + size])
            assert GOOD[text["image"]] == text["captions"] and name.isdigit()


def test_larger_images_are_made_smaller_upright_and_opaque(images, tmp_path):
    across, down = np.meshgrid(np.linspace(0, 255, 36), np.linspace(0, 255, 24))
    smooth = np.stack([across, down, 255 - across], axis=2).astype(np.uint8)
    rotated, see_through = io.BytesIO(), io.BytesIO()
    (images / "a.jpg").write_bytes(encode(smooth))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth).save(rotated, "JPEG", exif=exif)
    (images / "rotated.jpg").write_bytes(rotated.getvalue())
    Image.fromarray(PIXELS).convert("RGBA").save(see_through, "PNG")
    (images / "alpha.png").write_bytes(see_through.getvalue())
    (images / "grey.jpg").write_bytes(encode(PIXELS, mode="L"))
    (images / "small.jpg").write_bytes(encode(PIXELS[:16]))
    names = ["a.jpg", "rotated.jpg", "alpha.png", "grey.jpg", "small.jpg"]
    (tmp_path / "pairs.json").write_text(json.dumps([{"image": name, "caption": "a dog"} for name in names]))
    make_shards(tmp_path / "pairs.json", images, tmp_path / "out", short_side=16, workers=1)
    source = open_source(str(tmp_path / "out"))
    pictures = [Image.open(io.BytesIO(source.read(i).image)) for i in range(5)]
    assert [picture.size for picture in pictures] == [(24, 16), (16, 24), (24, 16), (24, 16), (36, 16)]
    assert [picture.mode for picture in pictures] == ["RGB", "RGB", "RGB", "L", "RGB"]
    assert source.read(4).image == (images / "small.jpg").read_bytes()
    expected = np.asarray(Image.fromarray(smooth).resize((24, 16), Image.Resampling.LANCZOS), np.float32)
    assert np.abs(np.asarray(pictures[0], np.float32) - expected).mean() < 4  # JPEG's loss
    assert np.abs(np.asarray(pictures[1], np.float32) - np.rot90(expected, -1)).mean() < 4


def test_an_interrupted_run_goes_on_to_the_same_bytes(images, tmp_path, monkeypatch):
    table = write_table(tmp_path / "pairs.csv")
    make_shards(table, images, tmp_path / "whole", shard_size=2, workers=2)
    with pytest.raises(UsageError, match="whole is already complete"):
        make_shards(table, images, tmp_path / "whole", shard_size=2)
    made, sample = [], prepare_module._sample

    def interrupted(entry, plan):
        made.append(entry.image)
        if len(made) == 6:
            raise KeyboardInterrupt
        return sample(entry, plan)

    monkeypatch.setattr(prepare_module, "_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_shards(table, images, tmp_path / "out", shard_size=2, workers=1)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(UsageError, match="started with shard_size 2, got 3"):
        make_shards(table, images, tmp_path / "out", shard_size=3, workers=1)
    plan = tmp_path / "out" / "unfinished" / "plan.json"
    begun = json.loads(plan.read_text())
    plan.write_text(json.dumps({name: value for name, value in begun.items() if name != "split"} | {"short_side": 9}))
    with pytest.raises(UsageError, match="started with short_side 9, got None"):  # split is of later versions
        make_shards(table, images, tmp_path / "out", shard_size=2, workers=1)
    plan.write_text(json.dumps(begun))
    make_shards(table, images, tmp_path / "out", shard_size=2, workers=1)
    assert made[6:] == made[4:5] + [entry.image for entry in read_tables([(table, None)])[0].entries][5:]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_each_of_several_tables_has_its_own_images(tmp_path):
    for folder, other, color in (("a", "b", "red"), ("b", "a", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), color).save(tmp_path / folder / "0.png")
        (tmp_path / folder / "metadata.csv").write_text(
            f"file_name,text\n0.png,a {color} square\n../{other}/0.png,of another\n"
        )
    report = make_shards(tmp_path / "*" / "metadata.csv", None, tmp_path / "out", workers=1)
    assert report.samples == 2
    assert [(row, reason.split(" of ")[0]) for row, _, reason in report.bad] == [(2, "image lies outside")] * 2
    source = open_source(str(tmp_path / "out"))
    for sample in map(source.read, range(2)):
        with Image.open(io.BytesIO(sample.image)) as picture:
            color = {(255, 0, 0): "red", (0, 0, 255): "blue"}[picture.getpixel((0, 0))]
        assert sample.captions == [f"a {color} square"]


def test_a_table_without_entries_has_no_say_in_the_columns(images, tmp_path):
    (images / "1.jsonl").write_text('{"file": "a.jpg", "text": "a dog", "split": "val"}')
    for other in ("", '{"caption": "a cat", "split": "train", "image": "b.png"}'):
        (images / "2.jsonl").write_text(other)
        report = make_shards(images / "*.jsonl:val", None, tmp_path / f"out{len(other)}", workers=1)
        assert (report.listed, report.bad) == (1, [])
    (images / "2.jsonl").write_text(other.replace("train", "val"))
    with pytest.raises(UsageError, match="pairs: expected tables with the same columns, got .'file', 'text'. and"):
        make_shards(images / "*.jsonl:val", None, tmp_path / "out", workers=1)


def test_phrases_and_other_columns(images, tmp_path):
    phrase = {"caption": "a dog", "text": "a dog", "first_word": 0, "n_words": 2, "boxes": [[0, 0, 0.5, 1]]}
    rows = [
        {"file": "a.jpg", "texts": ["a dog", "two"], "phrases": [phrase]},
        {"file": "b.png", "texts": "a cat", "phrases": [{"text": "a cat"}]},
        {"file": str(images / "d.jpg"), "texts": "by its whole path"},
        {"file": "f.jpg", "texts": 7},
        {"file": "half \ud83d.jpg", "texts": "a"},
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    columns = {"image_column": "file", "caption_column": "texts"}
    done = make_shards(tmp_path / "pairs.json", images, tmp_path / "out", workers=1, **columns)
    assert [reason.split(":")[0] for _, _, reason in done.bad] == [
        '"phrases", entry 0',
        "column 'texts' must be a string or a list of strings, got [7]",
        "image does not exist",
    ]
    source = open_source(str(tmp_path / "out"))
    assert source.read(0).phrases[0].boxes == [(0.0, 0.0, 0.5, 1.0)] and source.read(0).captions == ["a dog", "two"]
    assert source.read(1).captions == ["by its whole path"]


def test_commands(images, tmp_path, capsys):
    table, out = write_table(tmp_path / "pairs.csv"), tmp_path / "out"
    command = ["prepare", "--pairs", str(table), "--images", str(images), "--out", str(out), "--workers", "1"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert f"4 of 10 images written to 1 shards in {out}" in shown.out and "1 captions without a word" in shown.out
    assert "row 7: ../secret.jpg: image lies outside" in shown.err and "bad.csv lists them" in shown.err
    before = (out / "shard-000000.tar.index.jsonl").read_bytes()
    (out / "shard-000000.tar.index.jsonl").unlink()
    assert main(["index", str(out)]) == 0 and "1 indexes written" in capsys.readouterr().out
    assert (out / "shard-000000.tar.index.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "table, content, options, message",
    [
        (
            "pairs.csv",
            "image,words\na.jpg,x\n",
            {},
            "no column 'caption'; .* are 'image', 'words': see --caption_c",
        ),
        ("pairs.csv", "", {}, "no column 'image'"),
        ("pairs.csv", "image,caption\n", {}, "lists no images"),
        ("pairs.csv", 'image,caption\na.jpg,"open\n', {}, "cannot be read"),
        ("pairs.csv", "image,caption\na.jpg,caf\udce9\n", {}, "cannot be read: 'utf-8'"),
        ("pairs.json", "{", {}, "cannot be read"),
        ("pairs.json", '{"a": 1}', {}, "expected a list of objects, or an object with .images.*, got {'a': 1}"),
        ("pairs.json", "[1]", {}, "row 1 must be an object"),
        ("pairs.xlsx", "", {}, "expected a table"),
        ("pairs.csv", "image,caption\na.jpg,x\n", {"shard_size": 0}, "shard_size: expected at least 1, got 0"),
        ("pairs.csv", "image,caption\na.jpg,x\n", {"short_side": 3}, "short_side: expected at least 16, got 3"),
        ("pairs.csv", "image,caption\na.jpg,x\n", {"images": "nowhere"}, "images: expected a folder, got nowhere"),
        ("pairs.csv", "image,caption\na.jpg,x\n", {"out": "images"}, "expected a new or empty folder"),
        ("pairs.csv", "image,caption\na.jpg,x\n", {"caption_column": "image"}, "caption_column: expected another"),
        (
            "pairs.csv",
            "image,text,title\na.jpg,x,y\n",
            {},
            "columns 'text', 'title' may all hold the caption",
        ),
        (
            "pairs.csv",
            "image,caption\nx/a.jpg,x\nx/d.jpg,y\n",
            {},
            "2 of 2 images do not exist, first: .*x/a.jpg, see",
        ),
        ("pairs.csv", "image,caption\nhttps://x/a.jpg,x\n", {}, "images by URL are not downloaded: img2dataset"),
        ("pairs.csv:val", "image,caption\na.jpg,x\n", {}, "no split 'val'; it has no splits"),
        ("pairs.csv", "image,caption,split\na.jpg,x,train\nd.jpg,y,test\n", {}, "as in .*pairs.csv:train"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(images, tmp_path, table, content, options, message):
    (tmp_path / table.split(":")[0]).write_bytes(content.encode("utf-8", "surrogateescape"))
    arguments = {"images": images, "out": tmp_path / "out"}
    if options.get("images"):
        arguments["images"] = tmp_path.__class__(options["images"])
    if options.get("out"):
        arguments["out"] = tmp_path / options["out"]
    rest = {name: value for name, value in options.items() if name not in arguments}
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir(images))
    with pytest.raises(UsageError, match=message):
        make_shards(tmp_path / table, arguments["images"], arguments["out"], **rest)
    assert (sorted(os.listdir(tmp_path)), sorted(os.listdir(images))) == before


def test_parquet_without_pyarrow_says_what_to_install(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1")
    command = ["prepare", "--pairs", str(tmp_path / "pairs.parquet"), "--images", str(images)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert "needs pyarrow; install it with: pip install" in shown and "[parquet]" in shown


def test_names_of_bad_images_are_listed_escaped(images, tmp_path, capsys):
    name = "no \x1b[31mred\n\u202ename.jpg"
    (tmp_path / "pairs.json").write_text(
        json.dumps([{"image": "a.jpg", "caption": "x"}, {"image": name, "caption": "y"}])
    )
    command = ["prepare", "--pairs", str(tmp_path / "pairs.json"), "--images", str(images), "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    shown, listed = capsys.readouterr().err, (tmp_path / "out" / "bad.csv").read_text()
    for text in (shown, listed):
        assert r"no \x1b[31mred\n\u202ename.jpg" in text and "\x1b" not in text and "\u202e" not in text


def test_a_killed_process_is_a_message(images, tmp_path, monkeypatch):
    def killed(*arguments):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(prepare_module, "_write_shard", killed)
    with pytest.raises(UsageError, match="workers: a process was killed; run the same command again"):
        make_shards(write_table(tmp_path / "pairs.csv"), images, tmp_path / "out", workers=1)

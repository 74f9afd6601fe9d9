"""Sources: what is read from shards and lists, what is refused before training, and what makes a sample bad."""

import io
import json
import logging
import tarfile

import numpy as np
import pytest
from PIL import Image
from shard_files import encode, scene_files, write_shard, write_tar

from softmask_fast.data.images import check_image, convert_image
from softmask_fast.data.sources import open_source
from softmask_fast.data.types import BadSample
from softmask_fast.errors import UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
JPEG = encode(PIXELS)


def captions(*texts):
    return json.dumps({"captions": texts}).encode()


def test_members_of_a_shard_are_read_by_offset(tmp_path):
    png, webp = encode(PIXELS, "PNG"), encode(PIXELS, "WEBP")
    phrase = {"caption": "a dog", "text": "a dog", "first_word": 0, "n_words": 2, "boxes": [[0, 0, 0.5, 1]]}
    write_shard(tmp_path / "a.tar", {
        "one": {"jpg": JPEG, "json": json.dumps({"captions": [" a dog ", "two"], "phrases": [phrase]}).encode()},
        "folder/two": {"txt": b"first line\n\nsecond line\n", "png": png},
        "three": {"WEBP": webp, "json": b'{"caption": "from img2dataset", "width": 3}', "txt": b"other"},
        "four": {"jpeg": JPEG, "json": b'{"width": 3}', "txt": b"only here", "cls": b"7"},
    })  # fmt: skip
    source = open_source(str(tmp_path / "a.tar"))
    assert source.keys == ["a/one", "a/folder/two", "a/three", "a/four"]
    samples = [source.read(i) for i in range(4)]
    assert [sample.image for sample in samples] == [JPEG, png, webp, JPEG]
    assert [sample.captions for sample in samples] == [
        ["a dog", "two"], ["first line", "second line"], ["from img2dataset"], ["only here"],
    ]  # fmt: skip
    assert samples[0].phrases[0].boxes == [(0.0, 0.0, 0.5, 1.0)] and samples[0].phrases[0].n_words == 2
    assert source.image_ids.dtype == np.int64 and len(set(source.image_ids)) == 4


def test_odd_names_and_characters_are_taken(tmp_path):
    content = write_shard(tmp_path / "s.tar", {"cafe": {"jpg": JPEG, "json": rb'{"captions": ["half \ud83d of it"]}'}})
    shard = content.read_bytes()
    for place in (0, shard.index(b"cafe.json")):
        header = bytearray(shard[place : place + 512])
        header[3] = 0xE9
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        shard = shard[:place] + bytes(header) + shard[place + 512 :]
    content.write_bytes(shard)
    source = open_source(str(content))
    assert source.keys == [r"s/caf\xe9"] and source.read(0).captions == ["half ? of it"]


def test_patterns_lists_and_folders_name_the_same_shards(tmp_path):
    for shard in range(3):
        write_shard(tmp_path / f"s-{shard}.tar", {f"{i}": scene_files(i) for i in range(2)})
    expected = [f"s-{shard}/{i}" for shard in range(3) for i in range(2)]
    folder = str(tmp_path)
    patterns = ["s-{0..2}.tar", "s-{0,1,2}.tar", "", "s-?.tar", f"s-{{0..1}}.tar,{folder}/s-2.tar"]
    for data in [f"{folder}/{pattern}" for pattern in patterns] + [[f"{folder}/s-0.tar", f"{folder}/s-{{1..2}}.tar"]]:
        assert open_source(data).keys == expected


def test_a_key_that_is_there_twice_stays_distinguishable(tmp_path):
    files = scene_files(0)
    twice = write_tar(tmp_path / "t.tar", [(f"x.{kind}", files[kind]) for kind in ("jpg", "json")] * 2)
    source = open_source([str(twice), str(twice)])
    assert source.keys == ["t/x", "t/x#2", "t/x#3", "t/x#4"]
    assert len(set(source.image_ids)) == 4
    for name in ("cc", "sbu"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "0.tar", {"x": files})
    assert open_source(f"{tmp_path}/{{cc,sbu}}/0.tar").keys == ["cc/0/x", "sbu/0/x"]


def test_albef_lists(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(JPEG)
    entries = [
        {"image": "images/a.jpg", "caption": "one"},
        {"image": str(tmp_path / "images" / "a.jpg"), "caption": ["two", "", "three"]},
        {"image": "images/none.jpg", "caption": "no file"},
        {"image": "images/a.jpg"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    source = open_source(str(tmp_path / "list.json"))
    assert source.keys == ["a.jpg", "a.jpg#2", "none.jpg", "a.jpg#3"]
    assert source.image_ids[0] == source.image_ids[1] != source.image_ids[2]
    assert source.read(0).image == JPEG
    assert (source.read(1).captions, source.read(1).skipped_captions) == (["two", "three"], 1)
    with pytest.raises(BadSample, match="none.jpg"):
        source.read(2)
    with pytest.raises(BadSample, match="caption"):
        source.read(3)
    write_shard(tmp_path / "s.tar", {"x": scene_files(0)})
    joined = open_source([str(tmp_path / "list.json"), str(tmp_path / "s.tar")])
    assert joined.keys == ["s/x", *source.keys] and joined.read(1).captions == ["one"]
    assert len(joined) == len(joined.image_ids) == 5


def test_what_is_missing_or_damaged_is_an_error_with_its_name(tmp_path):
    good = write_shard(tmp_path / "good.tar", {f"{i}": scene_files(i) for i in range(3)})
    (tmp_path / "text.tar").write_text("not a tar file at all " * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    with tarfile.open(good) as archive:
        second = archive.getmembers()[2]
    content = good.read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: second.offset + 100])  # within a header
    (tmp_path / "garbled.tar").write_bytes(content[: second.offset] + b"x" * 512 + content[second.offset + 512 :])
    write_tar(tmp_path / "none.tar", [("readme.md", b"hello")])
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "nothing.json").write_text("[]")
    (tmp_path / "wrong.json").write_text('[{"img": "x.jpg"}]')
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    shards, lists = ["text", "empty", "cut", "garbled", "none"], ["broken", "object", "nothing", "wrong"]
    for name in [f"{name}.tar" for name in shards] + [f"{name}.json" for name in lists] + ["file.txt"]:
        with pytest.raises(UsageError, match=name):
            open_source(str(tmp_path / name))
    for name in ("absent-{0..2}.tar", "folder", "x*.tar"):
        with pytest.raises(UsageError, match=name.split("{")[0].replace("*", ".")):
            open_source(str(tmp_path / name))
    with pytest.raises(UsageError, match="good.tar is local"):
        open_source(f"s3://bucket/a.tar,{good}")
    with pytest.raises(UsageError, match="pipe"):
        open_source("pipe:cat a.tar")
    for data in ("", [], "a-{0..2.tar"):
        with pytest.raises(UsageError, match="data"):
            open_source(data)


def test_a_cut_off_last_file_makes_one_bad_sample(tmp_path, caplog):
    good = write_shard(tmp_path / "good.tar", {f"{i}": scene_files(i) for i in range(3)})
    with tarfile.open(good) as archive:
        last = archive.getmembers()[-1]
    good.write_bytes(good.read_bytes()[: last.offset_data + last.size - 5])
    with caplog.at_level(logging.WARNING):
        source = open_source(str(good))
    assert "good.tar is cut off" in caplog.text and len(source) == 3
    assert source.read(1).captions
    with pytest.raises(BadSample, match="ends inside its .json"):
        source.read(2)


BAD_FILES = {
    "no image": ({"json": captions("a")}, "no .jpg"),
    "gif": ({"gif": encode(PIXELS, "GIF"), "json": captions("a")}, "gif"),
    "no captions": ({"jpg": JPEG}, "no caption file"),
    "invalid json": ({"jpg": JPEG, "json": b"{"}, "invalid .json"),
    "deep json": ({"jpg": JPEG, "json": b"[" * 100_000}, "invalid .json"),
    "not an object": ({"jpg": JPEG, "json": b"[1]"}, "object"),
    "no list": ({"jpg": JPEG, "json": b'{"captions": 3}'}, "captions"),
    "other key": ({"jpg": JPEG, "json": b"{}"}, 'no "captions"'),
    "no words": ({"jpg": JPEG, "json": captions("", " ", "!?")}, "no usable caption"),
    "empty text": ({"jpg": JPEG, "txt": b"\n"}, "no usable caption"),
    "not UTF-8": ({"jpg": JPEG, "txt": b"\xff\xfe\xff"}, "UTF-8"),
    "phrases": ({"jpg": JPEG, "json": b'{"captions": ["a"], "phrases": [{"text": "a"}]}'}, "phrases"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_samples_say_why(kind, tmp_path):
    files, reason = BAD_FILES[kind]
    source = open_source(str(write_shard(tmp_path / "s.tar", {"x": files})))
    with pytest.raises(BadSample, match=reason):
        source.read(0)


BAD_IMAGES = {
    "empty": (b"", "0 bytes"),
    "text": (b"<html>404</html>", "cannot be decoded"),
    "cut": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "gif in disguise": (encode(PIXELS, "GIF"), "GIF"),
    "damaged png": (encode(PIXELS, "PNG")[:200] + b"?" * 50 + encode(PIXELS, "PNG")[250:], "cannot be decoded"),
    "too large": (encode(np.zeros((50, 50, 3), np.uint8)), "too large: 50 x 50"),
    "empty array": (np.zeros((0, 4, 3), np.uint8), "array"),
    "float array": (np.zeros((4, 4, 3), np.float32), "float32"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_say_why(kind):
    image, reason = BAD_IMAGES[kind]
    with pytest.raises(BadSample, match=reason):
        check_image(image, max_pixels=2000)


@pytest.mark.parametrize("mode, kind", [("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG"),
                                        ("L", "JPEG"), ("L", "PNG"), ("I;16", "PNG")])  # fmt: skip
def test_other_color_modes_become_rgb(mode, kind):
    image = encode(PIXELS, kind, mode) if mode != "I;16" else encode(PIXELS[..., 0].astype(np.uint16) * 257, kind, mode)
    facts = check_image(image)
    assert (facts.width, facts.height) == (30, 20)
    assert facts.convert == (mode != "L")
    assert check_image(convert_image(image)) == check_image(encode(PIXELS, "PNG"))


def test_alpha_is_left_out():
    picture = Image.fromarray(PIXELS)
    picture.putalpha(100)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True)
    assert check_image(buffer.getvalue()).convert
    converted = Image.open(io.BytesIO(convert_image(buffer.getvalue())))
    assert converted.mode == "RGB" and (np.asarray(converted) == PIXELS).all()

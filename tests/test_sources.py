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
    write_shard(
        tmp_path / "a.tar",
        {
            "one": {"jpg": JPEG, "json": json.dumps({"captions": [" a dog ", "two"], "phrases": [phrase]}).encode()},
            "folder/two": {"txt": b"first line\n\nsecond line\n", "png": png},
            "three": {"WEBP": webp, "json": b'{"caption": "from img2dataset", "width": 3}', "txt": b"other"},
            "four": {"jpeg": JPEG, "json": b'{"width": 3}', "txt": b"only here", "cls": b"7"},
        },
    )
    source = open_source(str(tmp_path / "a.tar"))
    assert source.keys == ["a/one", "a/folder/two", "a/three", "a/four"]
    samples = [source.read(i) for i in range(4)]
    assert [sample.image for sample in samples] == [JPEG, png, webp, JPEG]
    assert [sample.captions for sample in samples] == [
        ["a dog", "two"],
        ["first line", "second line"],
        ["from img2dataset"],
        ["only here"],
    ]
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


def test_names_with_dots_are_pairs_and_what_has_no_partner_is_named(tmp_path, caplog):
    files = [
        ("shop/shoe.v2.jpg", JPEG), ("shop/shoe.v2.txt", b"a shoe"), ("1.5 m.png", encode(PIXELS, "PNG")),
        ("1.5 m.json", captions("a stick")), ("1.6 m.jpg", JPEG), ("1.6 m.txt", b"another"), ("cat.jpg", JPEG),
        ("cat.mask.png", encode(PIXELS, "PNG")), ("cat.txt", b"a cat"), ("x.in.jpg", JPEG), ("x.out.txt", b"lost"),
        ("cat.npy", b""), ("._cat.jpg", b""), ("both.jpg", JPEG), ("both.png", JPEG), ("both.txt", b"one image"),
    ]  # fmt: skip
    source = open_source(str(write_tar(tmp_path / "s.tar", files)))
    assert source.keys == ["s/shop/shoe.v2", "s/1.5 m", "s/1.6 m", "s/cat", "s/both"]
    captions_read = [source.read(i).captions for i in range(5)]
    assert captions_read == [["a shoe"], ["a stick"], ["another"], ["a cat"], ["one image"]]
    (warning,) = caplog.records
    expected = "4 images or captions without a partner (the first is 'cat.mask.png'), 2 other files (the first is"
    assert expected in warning.message and warning.levelno == logging.WARNING
    write_tar(tmp_path / "none.tar", [("a.x.jpg", JPEG), ("a.y.txt", b"a"), ("\x1b[2Jread.me", b"")])
    with pytest.raises(UsageError, match=r"no samples .*none.tar; it has 2 images or .*'a.x.jpg'.*1 other .*x1b\[2J"):
        open_source(str(tmp_path / "none.tar"))


def test_links_are_not_read_and_named(tmp_path, caplog):
    with tarfile.open(tmp_path / "l.tar", "w") as archive:
        for name, content in (("a.jpg", JPEG), ("a.txt", b"a"), ("b.txt", b"b")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        archive.addfile(link)
    assert open_source(str(tmp_path / "l.tar")).keys == ["l/a", "l/b"] and "'b.jpg'" in caplog.text


def tar_header(name, size, kind=b"0"):
    header = bytearray(512)
    header[: len(name)], header[100:108], header[124:136] = name, b"0000644\0", size
    header[136:148], header[156:157], header[257:265] = b"0" * 11 + b"\0", kind, b"ustar  \0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", [-512, -1, -(2**60), 10**15, 2**70], ids=str)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
def test_an_impossible_size_in_an_archive_is_an_error_at_once(tmp_path, size, kind):
    start = tar_header(b"a.txt", b"00000000003\0") + b"abc" + bytes(509)
    number = (size + 2**96 if size < 0 else size + (0x80 << 88)).to_bytes(12, "big")
    path = tmp_path / "s.tar"
    path.write_bytes(start + tar_header(b"a.jpg", number, kind) + bytes(1024))
    with pytest.raises(UsageError, match=r"s.tar is not a readable tar file .*: damaged .* at byte 1024 of 2560"):
        open_source(str(path))


def test_many_continued_headers_are_an_error(tmp_path):
    continued = tar_header(b"././@LongLink", b"00000000003\0", b"L") + b"abc" + bytes(509)
    (tmp_path / "s.tar").write_bytes(continued * 2000)
    with pytest.raises(UsageError, match="s.tar is not a readable tar"):
        open_source(str(tmp_path / "s.tar"))


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"one\r\ntwo\rthree\nfour", ["one", "two", "three", "four"]),
        ("a\u2028b\nc\x85d\ne\x0cf\ng\x1dh\ni\u2029j".encode(), ["a\u2028b", "c\x85d", "e\x0cf", "g\x1dh", "i\u2029j"]),
        (b"\xef\xbb\xbfa cat\n\n \n\xef\xbb\xbf\na dog", ["a cat", "a dog"]),
        ("a cat".encode("utf-16"), "not UTF-8"),
        ("a cat".encode("utf-16-le"), "NUL at byte 1"),
        (b"a\ncaf\xe9", "not UTF-8: .* at byte 5"),
    ],
)
def test_lines_of_a_text_file(tmp_path, content, expected):
    source = open_source(str(write_shard(tmp_path / "s.tar", {"x": {"jpg": JPEG, "txt": content}})))
    if isinstance(expected, list):
        assert source.read(0).captions == expected
    else:
        with pytest.raises(BadSample, match=expected):
            source.read(0)


def test_marks_and_nul_leave_captions_of_json(tmp_path):
    files = {"jpg": JPEG, "json": b"\xef\xbb\xbf" + json.dumps({"captions": ["\ufeffa\0 cat\0"]}).encode()}
    assert open_source(str(write_shard(tmp_path / "s.tar", {"x": files}))).read(0).captions == ["a cat"]
    (tmp_path / "i.jpg").write_bytes(JPEG)
    (tmp_path / "l.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([{"image": "i.jpg", "caption": "\0a"}]).encode())
    assert open_source(str(tmp_path / "l.json")).read(0).captions == ["a"]


def test_what_is_too_large_for_the_memory_is_not_read(tmp_path, monkeypatch):
    content = json.dumps([{"image": "large.jpg", "caption": "a"}, {"image": "/dev/zero", "caption": "b"}])
    (tmp_path / "l.json").write_text(content)
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate((1 << 30) + 1)  # without a byte on the disk
    source = open_source(str(tmp_path / "l.json"))
    with pytest.raises(BadSample, match="image has 1073741825 bytes, the limit is 1073741824"):
        source.read(0)
    with pytest.raises(BadSample, match="image is not a file: /dev/zero"):
        source.read(1)
    monkeypatch.setattr("softmask_fast.utils.MAX_LIST_BYTES", 20)
    with pytest.raises(UsageError, match=f"l.json has {len(content)} bytes, the limit is 20"):
        open_source(str(tmp_path / "l.json"))
    monkeypatch.setattr("softmask_fast.data.shards._MAX_TEXT_BYTES", 20)
    source = open_source(str(write_shard(tmp_path / "s.tar", {"x": {"jpg": JPEG, "txt": b"a" * 21}})))
    with pytest.raises(BadSample, match="its .txt file has 21 bytes, the limit is 20"):
        source.read(0)
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(UsageError, match="expected files, got .*folder.tar"):
        open_source(f"{tmp_path}/*.tar")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"boxes": [[20, 30, 60, 70]]}, r'entry 0: "boxes": expected .* as fractions .*, got \[\[20'),
        ({"boxes": [[0.1, float("nan"), 0.5, 0.5]]}, "boxes"),
        ({"boxes": [[0.5, 0.1, 0.5, 0.2]]}, "boxes"),
        ({"boxes": [[0, 0, 1]]}, "boxes"),
        ({"boxes": [["0", "0", "1", "1"]]}, "boxes"),
        ({"boxes": 3}, "boxes"),
        ({"first_word": -1}, r'"first_word": expected .* 0 to 2, got -1'),
        ({"first_word": 3}, "first_word"),
        ({"first_word": 1.5}, "first_word"),
        ({"n_words": 3}, r'"n_words": expected 1 to 2, got 3'),
        ({"n_words": 0}, "n_words"),
        ({"text": None}, '"text": expected a string, got None'),
    ],
)
def test_a_phrase_that_is_wrong_makes_a_bad_sample(tmp_path, change, reason):
    phrase = {"caption": "a brown cow", "text": "brown cow", "first_word": 1, "n_words": 2, "boxes": [[0, 0, 0.5, 1.2]]}
    for number, one in enumerate((phrase, phrase | change)):
        content = json.dumps({"captions": ["a brown cow"], "phrases": [one]}).encode()
        source = open_source(str(write_shard(tmp_path / f"{number}.tar", {"x": {"jpg": JPEG, "json": content}})))
        if one is phrase:
            assert source.read(0).phrases[0].boxes == [(0.0, 0.0, 0.5, 1.2)]
        else:
            with pytest.raises(BadSample, match=reason):
                source.read(0)


def test_nested_lists_are_an_error_of_one_line(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 50_000)
    with pytest.raises(UsageError, match="deep.json cannot be read: it is nested too deep"):
        open_source(str(tmp_path / "deep.json"))
    deep = json.loads("[" * 500 + "]" * 500)
    (tmp_path / "i.jpg").write_bytes(JPEG)
    (tmp_path / "odd.json").write_text(json.dumps([{"image": "i.jpg", "caption": deep}]))
    with pytest.raises(BadSample, match=r"caption.* must be a string or a list of strings, got \[None\]"):
        open_source(str(tmp_path / "odd.json")).read(0)

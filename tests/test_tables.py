"""Tables: every row is read as it stands, or the line that is wrong is named; no row vanishes in another."""

import json
import logging

import pytest

from softmask_fast.data import columnar
from softmask_fast.data.tables import read_tables
from softmask_fast.errors import UsageError


@pytest.fixture
def read(tmp_path):
    """Writes a table and gives its (image, captions)."""

    def written(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [(entry.image, entry.captions) for entry in read_tables([(path, None)], "image", "caption")[0].entries]

    return written


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("quotes.tsv", 'image\tcaption\na\t"open\nb\tsays "x"\nc\tclose"\n', ['"open', 'says "x"', 'close"']),
        ("inside.csv", 'image,caption\na.jpg,5" nails\nb.jpg,"a ""red"" hat, new"\n', ['5" nails', 'a "red" hat, new']),
        ("lines.csv", 'image,caption\na.jpg,"two\nlines, of text"\nb.jpg,x\n', ["two\nlines, of text", "x"]),
        ("mark.csv", b"\xef\xbb\xbfimage,caption\r\na.jpg,x\r\n\r\nb.jpg,y\r\n", ["x", "y"]),
        ("breaks.csv", "image,caption\na.jpg,one\u2028two\x85three\x0cfour\n", ["one\u2028two\x85three\x0cfour"]),
        ("breaks.tsv", "image\tcaption\na.jpg\tone\u2028two\n", ["one\u2028two"]),
        ("breaks.jsonl", '{"image": "a", "caption": "x\u2028y"}\n{"image": "b", "caption": "z"}\n', ["x\u2028y", "z"]),
        ("mark.json", b'\xef\xbb\xbf[{"image": "a", "caption": "x"}]', ["x"]),
    ],
)
def test_rows_are_read_as_they_stand(read, name, content, expected):
    assert [captions for _, captions in read(name, content)] == [[caption] for caption in expected]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("comma.csv", "image,caption\na.jpg,x\nb.jpg,Red, new, low\n", "row 2, line 3 has 4 fields, the header has 2"),
        ("short.csv", "image,caption,source\na.jpg,x\n", "row 1, line 2 has 2 fields, the header has 3"),
        ("tab.tsv", "image\tcaption\n\na.jpg\tx\ty\n", "row 1, line 3 has 3 fields, the header has 2"),
        ("twice.csv", "image,caption,image\na.jpg,x,b.jpg\n", "two columns are named 'image'"),
        ("phrases.tsv", "image\tcaption\tphrases\tphrases\na\tb\tc\td\n", "two columns are named 'phrases'"),
        ("stray.csv", 'image,caption\na.jpg,"old\nb.jpg,x\nc.jpg,y"\nd,z\n', "row 1, line 2 to 4: .*b.jpg,x.*closed"),
        ("open.csv", 'image,caption\na.jpg,x\nb.jpg,"never\nc.jpg,y\n', "row 2, line 3: unexpected end"),
        ("inner.csv", 'image,caption\na.jpg,"a "new" hat"\n', "row 1, line 2: ',' expected after"),
        ("long.csv", f"image,caption\na.jpg,x\nb.jpg,{'x' * 200_000}\n", "row 2, line 3: field larger than"),
        ("nul.csv", b"image,caption\na.jpg,a\0b\n", "row 1, line 2.* NUL"),
        ("utf16.csv", "image,caption\na.jpg,x\n".encode("utf-16"), "'utf-8' codec"),
        ("line.jsonl", '{"image": "a"}\n\n{"image": \n', "line 3: Expecting value"),
        ("deep.jsonl", '{"image": "a"}\n' + "[" * 100_000, "line 2: it is nested too deep"),
        ("deep.json", "[" * 100_000, "nested too deep"),
        ("name.json", '[{"image": "a", "caption": "x", "caption": "y"}]', "an object has 'caption' twice"),
        ("name.jsonl", '{"image": "a", "image": "b"}', "line 1: an object has 'image' twice"),
    ],
)
def test_what_is_wrong_with_a_table_is_named_with_its_line(read, name, content, message):
    with pytest.raises(UsageError, match=rf"pairs: .*{name} cannot be read: .*{message}") as error:
        read(name, content)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_quotes_that_may_be_meant_otherwise_are_counted(read, caplog):
    read("a.csv", 'image,caption\na.jpg,"two\nlines"\nb.jpg,"two\nlines"\n')
    read("a.tsv", 'image\tcaption\na.jpg\tx\nb.jpg\t"in quotes"\n')
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    first, second = (record.message for record in caplog.records)
    assert "a.csv: 2 rows, the first in line 2, have quoted line breaks" in first
    assert "a.tsv: 1 rows, the first in line 3, have texts in quotes, which a .tsv takes literally" in second


def test_nested_values_are_cut_where_no_sample_has_use_for_them(read):
    deep = "[" * 300 + "]" * 300
    (entry,) = read("a.json", f'[{{"image": "a", "caption": ["x", {deep}]}}]')
    assert entry == ("a", ["x", None])


def test_tables_of_several_columns_of_one_name_in_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table([["a"], ["x"], ["y"]], names=["image", "caption", "caption"])
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UsageError, match="two columns are named 'caption'"):
        read_tables([(tmp_path / "t.parquet", None)], "image", "caption")


def test_a_table_that_is_too_large_is_refused_at_once(read, tmp_path, monkeypatch):
    with open(tmp_path / "large.csv", "wb") as file:
        file.truncate(5 << 30)  # without a byte on the disk
    with pytest.raises(UsageError, match="large.csv has 5368709120 bytes, the limit is 4294967296"):
        read_tables([(tmp_path / "large.csv", None)], "image", "caption")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(columnar, "MAX_ROWS", 10)
    parquet.write_table(pyarrow.table({"image": ["a"] * 11, "caption": ["x"] * 11}), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match="has 11 rows, the limit is 10"):
        read_tables([(tmp_path / "t.parquet", None)], "image", "caption")


def test_numbers_and_names_of_images_are_shown_short(read):
    rows = [{"image": 7, "caption": "x"}, {"image": [["a"]] * 1000, "caption": "y"}]
    (first, _), (second, _) = read("a.json", json.dumps(rows))
    assert first == "7" and len(second) < 200

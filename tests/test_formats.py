"""What people have: each format as they know it, two photographs small, read by `--data` and by `prepare` alike."""

import io
import json
import logging

import numpy as np
import pytest
from PIL import Image
from shard_files import encode

from softmask_fast.config import DataConfig
from softmask_fast.data import columnar, folders
from softmask_fast.data.images import check_image, convert_image, decode_image
from softmask_fast.data.prepare import make_shards
from softmask_fast.data.sources import open_as_configured, open_source, shared_files
from softmask_fast.data.tables import read_tables
from softmask_fast.data.types import BadSample
from softmask_fast.errors import UsageError
from softmask_fast.tasks.recipes import TASKS

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
DOG, SURF = encode(PIXELS), encode(PIXELS[::-1])
CAPTIONS = {"dog.jpg": ["A dog runs .", "The brown dog ."], "surf.jpg": ["A man surfs ."]}
COCO = """{"info": {"year": 2017}, "licenses": [], "images": [
    {"license": 3, "file_name": "dog.jpg", "height": 12, "width": 18, "id": 391895},
    {"license": 4, "file_name": "surf.jpg", "height": 12, "width": 18, "id": 522418}],
  "annotations": [{"image_id": 391895, "id": 770337, "caption": "A dog runs ."},
    {"image_id": 522418, "id": 681330, "caption": "A man surfs ."},
    {"image_id": 391895, "id": 771687, "caption": "The brown dog ."}]}"""
KARPATHY = """{"dataset": "coco", "images": [
    {"filepath": "val2014", "sentids": [0, 1], "filename": "dog.jpg", "imgid": 0, "split": "test", "cocoid": 391895,
     "sentences": [{"tokens": ["a", "dog", "runs"], "raw": "A dog runs .", "imgid": 0, "sentid": 0},
                   {"tokens": ["the", "brown", "dog"], "raw": "The brown dog .", "imgid": 0, "sentid": 1}]},
    {"filepath": "val2014", "sentids": [2], "filename": "surf.jpg", "imgid": 1, "split": "restval", "cocoid": 522418,
     "sentences": [{"tokens": ["a", "man", "surfs"], "raw": "A man surfs .", "imgid": 1, "sentid": 2}]},
    {"filepath": "val2014", "sentids": [3], "filename": "surf.jpg", "imgid": 2, "split": "train", "cocoid": 7,
     "sentences": [{"tokens": ["a", "wave"], "raw": "A wave .", "imgid": 2, "sentid": 3}]}]}"""
ROWS = [("dog.jpg", "A dog runs ."), ("dog.jpg", "The brown dog ."), ("surf.jpg", "A man surfs .")]


def objects(image, caption):
    return [{image: name, caption: text} for name, text in ROWS]


TEXTS = {
    "captions_val2017.json": COCO,
    "open_clip.csv": "filepath,title\n" + "".join(",".join(row) + "\n" for row in ROWS),
    "pairs.tsv": "image\tcaption\n" + "".join("\t".join(row) + "\n" for row in ROWS),
    "pairs.jsonl": "".join(json.dumps(row) + "\n" for row in objects("image_path", "text")),
    "numbered.csv": "image,caption_0,caption_1\ndog.jpg,A dog runs .,The brown dog .\nsurf.jpg,A man surfs .,\n",
    "metadata.csv": "file_name,text\n" + "".join(",".join(row) + "\n" for row in ROWS),
    "metadata.jsonl": "".join(json.dumps(row) + "\n" for row in objects("file_name", "text")),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "val2014").mkdir()
    for place in (tmp_path, tmp_path / "val2014"):
        (place / "dog.jpg").write_bytes(DOG)
        (place / "surf.jpg").write_bytes(SURF)
    return tmp_path


def content(source):
    """The captions by image, from what is read, not from names."""
    samples = [source.read(index) for index in range(len(source))]
    assert len(set(source.keys)) == len(samples)
    names = {DOG: "dog.jpg", SURF: "surf.jpg"}
    return {names[sample.image]: sample.captions for sample in samples}


@pytest.mark.parametrize("name", TEXTS)
def test_tables_of_texts(folder, name, caplog):
    caplog.set_level(logging.INFO)
    (folder / name).write_text(TEXTS[name])
    data = str(folder if name.startswith("metadata") else folder / name)
    assert content(open_source(data)) == CAPTIONS
    said = [record.message for record in caplog.records if "from column" in record.message]
    assert len(said) == (name not in ("captions_val2017.json", "pairs.tsv"))
    if name == "open_clip.csv":
        assert said[0].endswith("open_clip.csv: images from column 'filepath', captions from 'title'")
    make_shards(data, None, folder / "out", workers=1)
    assert content(open_source(str(folder / "out"))) == CAPTIONS


def test_splits_of_karpathy(folder):
    path = folder / "dataset_coco.json"
    path.write_text(KARPATHY)
    with pytest.raises(
        UsageError, match=r"has the splits test \(1 rows\), .*: name one .*, as in /.*/dataset_coco.json:test"
    ):
        open_source(str(path))
    with pytest.raises(UsageError, match="no split 'val'; it has test"):
        open_source(f"{path}:val")
    assert content(open_source(f"{path}:test")) == {"dog.jpg": CAPTIONS["dog.jpg"]}
    train = open_source(f"{path}:train+restval")
    assert [train.read(i).captions for i in range(2)] == [["A man surfs ."], ["A wave ."]]
    assert train.image_ids[0] == train.image_ids[1]
    assert shared_files(f"{path}:train", f"{path}:test") == []
    for some in (f"{path}:train+test", str(path), f"{path}:test"):
        assert shared_files(some, f"{path}:test") == [str(path)]
    make_shards(f"{path}:test", folder, folder / "out", workers=1)
    assert content(open_source(str(folder / "out"))) == {"dog.jpg": CAPTIONS["dog.jpg"]}


def test_a_table_takes_the_folder_that_holds_its_images(folder):
    """COCO's training and validation images lie in folders of their own."""
    (folder / "train2017").mkdir()
    (folder / "captions_val2017.json").write_text(COCO)
    for roots in ("train2017,val2014", "val2014,train2017", "val2014"):
        rooted = ",".join(f"{folder}/{name}" for name in roots.split(","))
        source = open_source(str(folder / "captions_val2017.json"), image_root=rooted)
        assert content(source) == CAPTIONS and source._entries[0].image == str(folder / "val2014" / "dog.jpg")


def test_a_dead_first_image_chooses_no_folder(folder, caplog):
    (folder / "empty").mkdir()
    (folder / "pairs.csv").write_text("image,caption\ngone.jpg,A cat .\n" + TEXTS["open_clip.csv"].split("\n", 1)[1])
    source = open_source(str(folder / "pairs.csv"), image_root=f"{folder}/empty,{folder}/val2014", max_missing=0.5)
    assert source.read(1).image == DOG and "1 of 3 images do not exist, first" in caplog.text


def test_arrow_has_the_bounds_of_parquet(folder, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(
        {"image": pyarrow.nulls(1 << 20, pyarrow.string()), "caption": pyarrow.nulls(1 << 20, pyarrow.string())}
    )
    with pyarrow.OSFile(str(folder / "t.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    monkeypatch.setattr(columnar, "MAX_ROWS", 1 << 19)
    with pytest.raises(UsageError, match="it has more than 524288 rows"):
        open_source(str(folder / "t.arrow"))
    stored_table(folder / "u.arrow", (b"0" * (1 << 20),) * 2, captions=["a dog"] * 2)
    monkeypatch.setattr(columnar, "MAX_GROUP_BYTES", 1 << 20)
    assert len(open_source(str(folder / "u.arrow"))) == 2  # mapped


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("new", ["new_stream", "new_file"])
def test_a_compressed_arrow_file_is_refused_before_it_is_unpacked(folder, monkeypatch, compression, new):
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(columnar, "MAX_GROUP_BYTES", 1 << 21)
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)

    def write(images):
        captions = pyarrow.array(["a dog"] * len(images)).dictionary_encode()
        table = pyarrow.table({"image": pyarrow.array(images), "caption": captions})
        with pyarrow.OSFile(str(folder / "c.arrow"), "wb") as file:
            with getattr(pyarrow.ipc, new)(file, table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=1)
        return str(folder / "c.arrow")

    assert content(open_source(write([DOG, SURF]))) == {"dog.jpg": ["a dog"], "surf.jpg": ["a dog"]}
    path = write([bytes(1 << 20)] * 2)
    unpack = pyarrow.ipc.open_stream
    monkeypatch.setattr(pyarrow.ipc, "open_stream", lambda source: pytest.fail("unpacked"))
    with pytest.raises(UsageError, match="c.arrow cannot be read: it is compressed, and has more than 2097152 bytes"):
        open_source(path)
    monkeypatch.setattr(pyarrow.ipc, "open_stream", unpack)
    monkeypatch.setattr(columnar, "MAX_GROUP_BYTES", (1 << 21) + 1000)  # images, and few bytes more
    assert len(open_source(path)) == 2


def test_an_arrow_file_that_was_cut_is_refused(folder):
    pyarrow = pytest.importorskip("pyarrow")
    table, path = pyarrow.table({"image": ["dog.jpg", "surf.jpg"], "caption": ["a", "b"]}), folder / "f.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
        end = file.tell()
    whole = path.read_bytes()
    assert len(open_source(str(path))) == 2
    half = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(half, table.schema) as writer:
        writer.write_table(table[:1])
    one = half.getvalue().to_pybytes()
    other = one[: one.rindex(b"\xff\xff\xff\xff\0\0\0\0")] + whole[end:]  # one batch, and the footer of two
    garbage = whole[:end] + b"x" * len(whole[end:])
    for stored, reason in (
        (whole[:end], ".*"),
        (garbage, ".*"),
        (other, "its footer lists 2 record batches, it has 1"),
    ):
        path.write_bytes(stored)
        with pytest.raises(UsageError, match=f"f.arrow cannot be read: {reason}"):
            open_source(str(path))


def test_a_list_of_albef_has_a_sample_for_each_entry(folder):
    """Its epochs are counted in entries; tables in others."""
    (folder / "coco.json").write_text(json.dumps(objects("image", "caption")))
    source = open_source(str(folder / "coco.json"))
    assert source.keys == ["dog.jpg", "dog.jpg#2", "surf.jpg"] and source.image_ids[0] == source.image_ids[1]
    assert len(read_tables([(folder / "coco.json", None)])[0].entries) == 2


def stored_table(path, images=(DOG, SURF), names=("dog.jpg", "surf.jpg"), captions=None, **options):
    """A file as `datasets` writes it, with image bytes and names, or bytes alone."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = [{"bytes": image, "path": name} for image, name in zip(images, names, strict=True)] if names else images
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]) if names else pyarrow.binary()
    columns = {"image": pyarrow.array(values, kind), "caption": captions or list(CAPTIONS.values())}
    table = pyarrow.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, **options)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, **options)
    return path


def save_to_disk(folder, **table):
    name = "data-00000-of-00001.arrow"
    stored_table(folder / name, **table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_split": None}))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("kind", ["hub", "bytes alone", "save_to_disk", "dictionary of splits"])
def test_images_inside_of_tables(tmp_path, kind):
    """As `push_to_hub` and `save_to_disk` of Hugging Face's `datasets` store them."""
    data = str(tmp_path / "set")
    if kind == "hub":
        stored_table(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", row_group_size=1)
        stored_table(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
        with pytest.raises(UsageError, match="has the splits test, train: name one after a colon, as in .*set:test"):
            open_source(data)
        data += ":train"
    elif kind == "bytes alone":
        data = str(stored_table(tmp_path / "set.parquet", names=()))
    elif kind == "save_to_disk":
        save_to_disk(tmp_path / "set", max_chunksize=1)
    else:
        save_to_disk(tmp_path / "set" / "test")
        (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        with pytest.raises(UsageError, match="has the splits train, test: name one"):
            open_source(data)
        data += ":test"
    source = open_source(data)
    assert content(source) == CAPTIONS and len(set(source.image_ids)) == 2
    assert source.load(source.locate(1)).image == SURF  # what a worker is sent is enough
    make_shards(data, None, tmp_path / "out", workers=1)
    assert content(open_source(str(tmp_path / "out"))) == CAPTIONS
    if kind == "hub":
        visited = list(source.sampler.indices(0, 0, 0, 1))
        assert sorted(visited) == [0, 1]
        with pytest.raises(UsageError, match="cannot be mixed with shards"):
            open_source([data, str(tmp_path / "out")])


def test_stored_images_of_one_name_are_one_image_if_they_are(tmp_path):
    texts = ["A dog runs .", "The brown dog .", "A man surfs ."]
    same = stored_table(tmp_path / "a.parquet", (DOG, DOG, SURF), ("dog.jpg", "dog.jpg", "surf.jpg"), texts)
    assert content(open_source(str(same))) == CAPTIONS
    other = stored_table(tmp_path / "b.parquet", (DOG, SURF, SURF), ("0.jpg", "0.jpg", "1.jpg"), texts)
    source = open_source(str(other))
    assert len(source) == 3 and len(set(source.image_ids)) == 3


def test_paths_in_tables_of_datasets(folder):
    """`save_to_disk` of images that are files stores where they are."""
    stored_table(folder / "t.arrow", (None, None), [str(folder / name) for name in CAPTIONS])
    stored_table(folder / "t.parquet", (None, None), list(CAPTIONS))
    for name in ("t.arrow", "t.parquet"):
        assert content(open_source(str(folder / name))) == CAPTIONS


def test_files_called_as_splits_are_not_one_dataset(folder):
    (folder / "hub").mkdir()
    for name in ("train", "test"):
        stored_table(folder / "hub" / f"{name}.parquet", (DOG,), ["0.jpg"], [f"a dog of {name}"])
    with pytest.raises(UsageError, match="hub has the splits test, train: name one after a colon"):
        open_source(str(folder / "hub"))
    assert open_source(f"{folder}/hub:test").read(0).captions == ["a dog of test"]
    (folder / "hub" / "train.parquet").rename(folder / "hub" / "train-00000-of-00003.parquet")
    with pytest.raises(UsageError, match="data: .*hub: expected 3 parts of train, got 1"):
        open_source(f"{folder}/hub:train")
    with pytest.raises(UsageError, match="pairs: 1 of 1 files do not exist"):
        make_shards(folder / "nope.csv", None, folder / "out")


def test_a_digest_beside_paths_is_no_image(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    digests = pyarrow.array([b"abc", b"def"], pyarrow.binary())
    columns = {"file_name": list(CAPTIONS), "caption": list(CAPTIONS.values()), "md5": digests}
    parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
    assert content(open_source(str(folder / "t.parquet"))) == CAPTIONS


def test_of_several_tables_some_may_lack_the_split(folder, caplog):
    for name, rows in (("a", "dog.jpg,A dog runs .,val\n"), ("b", "surf.jpg,A wave .,train\n"), ("c", "")):
        (folder / f"part-{name}.csv").write_text("image,caption,split\n" + rows)
    source = open_source(f"{folder}/part-*.csv:val")
    assert content(source) == {"dog.jpg": ["A dog runs ."]}
    (said,) = (record.message for record in caplog.records if "split" in record.message)
    assert said == f"split val: 2 of 3 tables have no row of it: {folder}/part-b.csv, {folder}/part-c.csv"
    assert len(open_source(f"{folder}/part-*.csv:train+val")) == 2
    make_shards(f"{folder}/part-*.csv:train", None, folder / "out", workers=1)
    assert content(open_source(str(folder / "out"))) == {"surf.jpg": ["A wave ."]}
    none = r"data: .*/part-a.csv and 2 more tables: no split 'test'; they have val \(1 rows\), train \(1 rows\)"
    for data in (f"{folder}/part-*.csv:test", f"{folder}/part-*.csv:val+test"):
        with pytest.raises(UsageError, match=none):
            open_source(data)
    with pytest.raises(UsageError, match="part-c.csv: no split 'val'; it has no splits"):
        open_source(f"{folder}/part-c.csv:val")


def test_only_tables_have_splits(folder):
    (folder / "pairs.csv").write_text(TEXTS["open_clip.csv"])
    make_shards(folder / "pairs.csv", folder, folder / "out", workers=1)
    with pytest.raises(UsageError, match="data: expected a split only of a table with splits, got .*000000.tar:val"):
        open_source(f"{folder}/out/shard-000000.tar:val")


def test_columns_are_named_for_tables_alone(folder):
    (folder / "pairs.csv").write_text("photo,words\ndog.jpg,A dog runs .\n")
    make_shards(folder / "pairs.csv", folder, folder / "out", image_column="photo", caption_column="words", workers=1)
    options = {"split": "train", "seed": 0, "image_size": 16}
    named = {"image_column": "photo", "caption_column": "words"}
    shards, table = f"{folder}/out", str(folder / "pairs.csv")
    for data in ("shapes:num=2", shards, "https://host/a.tar"):
        with pytest.raises(UsageError, match=f"image_column: expected only for tables .*, got 'photo' for {data}"):
            open_source(data, **named)
        with pytest.raises(UsageError, match=f"image_column: expected only for tables .*, got 'photo' for {data}"):
            open_as_configured(data, DataConfig(data=data, **named), **options)
    for task in ("grounding", "vqa"):
        with pytest.raises(UsageError, match="caption_column: expected only for tables"):
            TASKS[task].open("shapes:num=2", DataConfig(caption_column="words"), **options)
    for config in (
        DataConfig(data=shards, eval_data=table, **named),
        DataConfig(data=table, eval_data=shards, **named),
    ):
        for data in (config.data, config.eval_data):
            assert open_as_configured(data, config, **options).read(0).captions == ["A dog runs ."]


def test_row_groups_have_a_bound_and_few_are_kept(tmp_path, monkeypatch):
    path = stored_table(
        tmp_path / "t.parquet", (DOG, SURF) * 4, [f"{i}.jpg" for i in range(8)], ["a dog"] * 8, row_group_size=1
    )
    monkeypatch.setattr(columnar, "CACHE_BYTES", 3 * len(DOG))
    source = open_source(str(path))
    assert [source.read(index).image for index in range(8)] == [DOG, SURF] * 4
    assert 2 <= len(columnar._GROUPS._groups) <= 3 and len(columnar._GROUPS._sizes) == len(columnar._GROUPS._groups)
    monkeypatch.setattr(columnar, "MAX_GROUP_BYTES", 100)
    with pytest.raises(UsageError, match="row group 0 have .* bytes, the limit is 100; write it again with fewer rows"):
        open_source(str(path))
    with pytest.raises(BadSample, match="no image in column 'image'"):
        monkeypatch.undo()
        open_source(str(stored_table(tmp_path / "n.parquet", (None, SURF)))).read(0)


def test_images_that_do_not_exist_are_said_at_once(folder, monkeypatch, caplog):
    rows = [{"image": f"gone/{n}.jpg", "caption": "x"} for n in range(60)]
    path = folder / "list.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(
        UsageError, match=r"data: .*list.json: 60 of 60 images do not exist, first: .*/gone/0.jpg, see --image_root"
    ):
        open_source(str(path))
    monkeypatch.setattr(folders, "LOOKED_FOR", 20)
    path.write_text(json.dumps(rows + [{"image": "dog.jpg", "caption": "x"}]))
    looked_for = "15 of 16 checked images, of 61 in all, do not exist"
    with pytest.raises(UsageError, match=looked_for):
        open_source(str(path), max_missing=0.5)
    assert len(open_source(str(path))) == 61 and looked_for in caplog.text
    path.write_text(json.dumps([{"image": "dog.jpg", "caption": "x"}] * 9 + rows[:1]))
    assert len(open_source(str(path), max_missing=0.1)) == 10
    assert "1 of 10 images do not exist, first: " in caplog.text
    with pytest.raises(UsageError, match="1 of 10 images do not exist"):
        open_source(str(path), max_missing=0.01)


@pytest.mark.parametrize(
    "content, message",
    [
        (COCO.replace('"caption": "A dog', '"bbox": "A dog'), '"annotations", entry 0: .* captions_.*json'),
        (COCO.replace('"image_id": 522418', '"image_id": 5'), '"annotations", entry 1: "image_id": .* got 5'),
        (COCO.replace('id": 522418', 'id": 391895'), '"images", entry 1: "id": expected one of its own, got 391895'),
        (KARPATHY.replace("sentences", "captions"), '"images", entry 0: "sentences": expected a list of objects'),
        ('{"images": [1]}', '"images", entry 0: expected an object'),
        ('{"image": "a.jpg", "caption": "x"}', 'expected a list of objects, or an object with "images"'),
    ],
)
def test_what_is_wrong_with_a_layout_is_named(folder, content, message):
    (folder / "c.json").write_text(content)
    with pytest.raises(UsageError, match=f"data: .*c.json cannot be read: {message}"):
        open_source(str(folder / "c.json"))


def tiff(*pictures, **options):
    buffer = io.BytesIO()
    first, *others = map(Image.fromarray, pictures)
    first.save(buffer, "TIFF", **({"save_all": True, "append_images": others} if others else {}), **options)
    return buffer.getvalue()


def test_tiff_of_pictures(folder):
    """Aerial images in 8 bits, of several compressions, upright and with a copy made smaller."""
    for name in (None, "tiff_lzw", "tiff_deflate", "packbits"):
        image = tiff(PIXELS, compression=name)
        assert check_image(image).convert and (np.asarray(decode_image(convert_image(image))) == PIXELS).all()
    turned = check_image(tiff(PIXELS, tiffinfo={274: 6}))
    assert (turned.width, turned.height) == (12, 18) == decode_image(tiff(PIXELS, tiffinfo={274: 6})).size
    several = tiff(PIXELS, PIXELS[::2, ::2])
    with pytest.raises(BadSample, match="TIFF with several pages: page 2 is not a smaller copy"):
        check_image(several)
    gray, alpha = tiff(PIXELS[..., 0]), tiff(np.dstack([PIXELS, PIXELS[..., 0]]))
    assert check_image(gray) == check_image(alpha) and decode_image(gray).mode == "RGB"
    assert (np.asarray(decode_image(alpha)) == PIXELS).all()
    (folder / "field.tif").write_bytes(tiff(PIXELS))
    (folder / "rsicd.csv").write_text("filename,captions\nfield.tif,many green fields\n")
    make_shards(folder / "rsicd.csv", None, folder / "out", workers=1)
    assert open_source(str(folder / "out")).read(0).image == tiff(PIXELS)


ALPHA = bytes.fromhex("520103000100000002")  # ExtraSamples: one, alpha


@pytest.mark.parametrize(
    "image, message",
    [
        (tiff(PIXELS[..., 0].astype(np.uint16)), "TIFF with 1 bands of 16 bits, unsigned: .*; scale it to 8 bits"),
        (tiff(PIXELS[..., 0].astype(np.float32)), "1 bands of 32 bits, floating point"),
        (
            tiff(np.dstack([PIXELS, PIXELS[..., 0]])).replace(ALPHA, ALPHA[:8] + b"\0"),
            "TIFF with 4 bands: .*; choose three bands",
        ),
        (b"II*\0\x08\0\0\0" + bytes(50), "TIFF of a kind that PIL cannot read: expected 8 bits"),
    ],
    ids=["16 bits", "floats", "near infrared", "no tags"],
)
def test_tiff_of_measurements_are_refused(image, message):
    with pytest.raises(BadSample, match=message):
        check_image(image)

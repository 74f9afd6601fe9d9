"""What a run says before its first step."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sample_files import GOOD
from shard_files import write_shard
from small_models import small_tokenizer

from softmask_fast.data.sources import open_source, shared_files
from softmask_fast.data.types import Batch
from softmask_fast.errors import UsageError
from softmask_fast.model.vision import VisionEncoder
from softmask_fast.training.first_screen import CaptionWatch, doubts, first_screen
from softmask_fast.training.options import make_config
from softmask_fast.training.run_record import changes


def record_of(config, **changed) -> dict:
    about = {"versions": {}, "device": "CPU, 2 threads", "operators": {"focal_itc": "cpp", "word_mask": "cpp"}}
    counts = {"parameters": 1_887_385, "world_size": 1, "samples": 65_536, "steps": 1000}
    stored = json.loads(json.dumps(asdict(config)))  # as config.json has it
    return about | counts | {"config": stored, "deepspeed": {"zero_optimization": {"stage": 1}}} | changed


def evaluator_of(data: str, count: int):
    return SimpleNamespace(count=count, evaluation=SimpleNamespace(data=data))


def test_six_lines():
    config = make_config("tiny", output_dir="runs/a", bf16=False, compile=False)
    lines = first_screen(record_of(config), evaluator_of("shapes:objects=3", 256), None).splitlines()
    assert lines == [
        "model    preset tiny, images of 64 px, from random weights, 1.89 M parameters",
        "data     shapes:objects=3, 65,536 samples; held out: 256 unseen scenes",
        "steps    1,000 of 32 samples, 0.488 epochs",
        "device   CPU, 2 threads, float32; operators: cpp",
        "folder   runs/a: config.json has every option, metrics.jsonl the log",
        "to stop  Ctrl-C: the run saves and ends; resume with --output_dir runs/a --resume true",
    ]


def test_urls_are_shown_without_secrets():
    config = make_config("tiny", output_dir="runs/a", bf16=False, compile=False)
    text = first_screen(record_of(config), evaluator_of("https://me:secret@host/b.tar?sig=secret", 4), None)
    assert "held out: 4 of https://host/b.tar\n" in text and "secret" not in text


def test_the_lines_of_a_large_run():
    options = {"data": "cc/{000..331}.tar", "batch_size": 64, "gradient_accumulation_steps": 2}
    config = make_config("base", output_dir="runs/b", bf16=True, compile=True, **options)
    about = {"device": "H200", "world_size": 8, "steps": 500, "operators": {"focal_itc": "triton", "word_mask": "cuda"}}
    text = first_screen(record_of(config, **about), None, "after step 20; seed 0 -> 1")
    assert "images of 256 px, from timm and google-bert/bert-base-uncased" in text
    assert "cc/{000..331}.tar, 65,536 samples; held out: none (--eval_data)" in text
    assert "500 of 1,024 samples (8 devices x 64 x 2 accumulated), 7.81 epochs" in text
    assert "H200, bfloat16; operators: triton (focal_itc), cuda (word_mask); layers compiled" in text
    assert text.splitlines()[-1] == "resumed  after step 20; seed 0 -> 1" and len(text.splitlines()) == 7


def test_what_a_resumed_run_changes():
    config = make_config("tiny", output_dir="runs/a", batch_size=8)
    before = record_of(config)
    now = replace(config, train=replace(config.train, batch_size=16, resume=True, output_dir="/moved/a"))
    after = record_of(now, world_size=2, deepspeed={"zero_optimization": {"stage": 3}})
    stages = "zero_optimization {'stage': 1} -> {'stage': 3}"
    assert changes(before, after) == [stages, "batch_size 8 -> 16", "world_size 1 -> 2"]
    assert changes(before, before) == []
    del before["config"]["train"]["batch_size"]  # an option that did not exist then
    assert "batch_size" not in " ".join(changes(before, after))


def test_doubtful_data_get_a_line_each(tmp_path):
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", dict(list(GOOD.items())[:6]))
    data, held_out = f"{tmp_path}/{{a,b}}.tar", f"{tmp_path}/b.tar"
    loader = SimpleNamespace(source=open_source(data))
    samples = len(loader.source)
    assert list(doubts(loader, data, None, samples)) == []
    assert list(doubts(loader, data, evaluator_of(f"{tmp_path}/c.tar".replace("c", "a"), 4), samples)) == [
        f"eval_data: {tmp_path}/a.tar is also training data, so the evaluation measures memorization"
    ]
    assert shared_files(data, str(tmp_path)) == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert shared_files(f"{tmp_path}/a.tar", held_out) == []
    assert shared_files("https://host/{0..2}.tar", "https://host/{2..3}.tar") == ["https://host/2.tar"]
    assert shared_files("shapes:num=8", "shapes:num=8") == []
    assert list(doubts(loader, data, None, samples + 1)) == [
        f"data: a step takes {samples + 1} samples, but there are only {samples}: each step repeats some"
    ]


def test_one_image_alone_is_doubtful(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "one.json").write_text(json.dumps([{"image": "a.png", "caption": f"a thing {n}"} for n in range(3)]))
    one = SimpleNamespace(source=open_source(str(tmp_path / "one.json")))
    alone = "data: all 3 samples have the same image, so there is nothing to tell apart"
    assert list(doubts(one, "one.json", None, 2)) == [alone]
    ids = np.zeros(150, np.int64)
    many = SimpleNamespace(source=type("Source", (), {"image_ids": ids, "__len__": lambda self: 150})())
    assert len(list(doubts(many, "a.json", None, 2))) == 1
    ids[149] = 1
    assert list(doubts(many, "a.json", None, 2)) == []


def test_captions_that_say_nothing_are_named_once():
    tokenizer = small_tokenizer()
    words = tokenizer(["a red circle", "!", "漢字"], padding=True, return_tensors="pt")["input_ids"]
    nothing = {name: None for name in Batch.__dataclass_fields__ if name not in ("input_ids", "keys")}
    batch = Batch(**nothing, input_ids=words, keys=["x/1", "x/2\x1b[2J", "x/3"])
    loader = SimpleNamespace(tokenizer=tokenizer, skipped_captions=0)
    watch = CaptionWatch(loader)
    assert list(watch.doubts(batch)) == [
        "data: the tokenizer knows no word in 2 of the first 3 captions, for example in that of x/2\\x1b[2J"
    ]
    assert list(watch.doubts(batch)) == []
    loader.skipped_captions = 2
    assert list(watch.doubts(batch)) == ["data: dropped captions without a letter or digit"]
    assert list(watch.doubts(batch)) == []
    good = Batch(**nothing, input_ids=words[:1], keys=["x/1"])
    assert list(CaptionWatch(SimpleNamespace(tokenizer=tokenizer, skipped_captions=0)).doubts(good)) == []


@pytest.mark.parametrize("size, nearest", [(100, "96 or 104"), (12, "8 or 16")])
def test_an_image_size_that_the_patch_does_not_divide_is_refused(size, nearest):
    config = make_config("tiny", image_size=size)
    message = rf"image_size: expected a multiple of the patch side, 8 pixels \({nearest}\), got {size}"
    with pytest.raises(UsageError, match=message):
        VisionEncoder(config.model)

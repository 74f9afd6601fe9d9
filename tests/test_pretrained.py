"""`load_model`: what it returns, the hub's format, and what is sent to the hub."""

import io
import json
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from PIL import Image
from safetensors.torch import load_file
from small_models import small_pair

from softmask_fast import hub, load_model
from softmask_fast.data.pixels import evaluation_pixels
from softmask_fast.data.sources import open_source
from softmask_fast.errors import UsageError
from softmask_fast.model.export import save_model
from softmask_fast.model.pretrained import Pretrained

RECORD = {
    "step": 40, "model": "/home/someone/model", "data": "/home/someone/val.tar", "size": 8,
    "reports": {"retrieval": {"images": 8, "skipped": {"a.jpg": "/home/someone/a.jpg"}, "itm": None,
                              "itc": {"text_to_image": {"recall@1": 0.25}}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: a model and its evaluation."""
    folder = tmp_path_factory.mktemp("run")
    model, tokenizer = small_pair(open_source("shapes:num=8", split="val", image_size=32))
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own
    save_model(model, tokenizer, folder / "model")
    (folder / "evaluation.json").write_text(json.dumps(RECORD))
    return folder


def picture(mode="RGB", size=(50, 34)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_images_and_texts_go_in_as_they_come(run):
    model, tokenizer, preprocess = load_model(run / "model")
    texts = ["a red circle left of a small blue square", "a " * 100]
    with torch.no_grad():
        tokens, image = model.encode_image(preprocess(picture("P"))[None])
        _, text = model.encode_text(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))
    assert not model.training and tokens.shape == (1, 17, 32) and (image @ text.T).shape == (1, 2)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "I;16"])
def test_an_image_is_prepared_as_in_evaluation(run, mode):
    made = picture() if mode == "I;16" else picture(mode)
    if mode == "I;16":
        made = Image.fromarray(np.asarray(made, np.uint16)[..., 0] * 257)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    made.save(file, {"CMYK": "JPEG"}.get(mode, "PNG"), exif=exif)
    pixels = load_model(run / "model").preprocess(Image.open(file))
    assert torch.equal(pixels, evaluation_pixels([file.getvalue()], 32, impl="pil")[0])
    with pytest.raises(UsageError, match="image: expected a PIL image, got ndarray"):
        load_model(run / "model").preprocess(np.asarray(picture()))


def test_a_folder_is_saved_as_the_hub_has_it(run, tmp_path):
    loaded = load_model(run / "model")
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "notes.txt").write_text("mine")
    loaded.save_pretrained(tmp_path / "sent")
    files = {path.name for path in (tmp_path / "sent").iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer", "README.md", "evaluation.json", "notes.txt"}
    assert files == expected
    again = Pretrained.from_pretrained(tmp_path / "sent")
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), loaded.model.parameters(), strict=True))
    assert again.evaluation == loaded.evaluation and again.preprocess == loaded.preprocess
    card = (tmp_path / "sent" / "README.md").read_text()
    parameters = sum(tensor.numel() for tensor in load_file(run / "model" / "model.safetensors").values())
    assert "library_name: softmask_fast" in card and f"{parameters:,} parameters" in card and "32 x 32 pixels" in card
    assert "| reports, retrieval, itc, text to image, recall@1 | 0.25 |" in card
    sent = card + (tmp_path / "sent" / "evaluation.json").read_text()
    assert "someone" not in sent and str(run) not in sent  # paths of a machine
    shutil.copytree(run / "model", tmp_path / "model")
    for stale in ("evaluation.json", "task.json"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / stale).write_text('{"task": "vqa"}')
    load_model(tmp_path / "model").save_pretrained(tmp_path / "bare")
    load_model(tmp_path / "bare")
    assert "Evaluation" not in (tmp_path / "bare" / "README.md").read_text()
    assert not (tmp_path / "bare" / "evaluation.json").exists()


def test_what_is_sent_to_the_hub(run, monkeypatch):
    sent = {}

    def upload(self, *, repo_id, folder_path, delete_patterns, **options):
        sent[repo_id] = {path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*.*")}
        assert delete_patterns == ["evaluation.json", "task.json", "*.onnx"]  # of the model that was there before
        assert Pretrained.from_pretrained(folder_path).evaluation["step"] == 40
        return "its address"

    created = huggingface_hub.RepoUrl("https://huggingface.co/me/shapes")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, **options: created)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert load_model(run / "model").push_to_hub("me/shapes", delete_patterns="*.onnx") == "its address"
    tokenizer = {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    assert sent == {"me/shapes": {"README.md", "config.json", "evaluation.json", "model.safetensors", *tokenizer}}


def test_a_name_is_taken_from_the_cache_and_else_from_the_hub(run, tmp_path, monkeypatch):
    """The hub is stood in for by a function; its cache has the hub's own layout."""
    asked = []

    def snapshot(name, *, local_files_only=False, allow_patterns=None, **options):
        asked.append((name, local_files_only, options.get("revision")))
        if local_files_only and not (tmp_path / "cached").exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        if not local_files_only:
            assert {"config.json", "model.safetensors", "tokenizer/*"} <= set(allow_patterns)
            assert not {"*", "*.bin", "*.py"} & set(allow_patterns)
            shutil.copytree(run / "model", tmp_path / "cached")
        return tmp_path / "cached"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: huggingface_hub.ModelInfo(id="me/shapes"))
    first, second = (Pretrained.from_pretrained("me/shapes", revision="v1") for _ in range(2))
    assert torch.equal(first.model.log_temperature, second.model.log_temperature)
    assert asked == [("me/shapes", True, "v1"), ("me/shapes", False, "v1"), ("me/shapes", True, "v1")]
    (tmp_path / "cached" / "config.json").write_text('{"auto_map": {}}')
    with pytest.raises(UsageError, match=r"config.json has unknown options \['auto_map'\]"):
        load_model("me/shapes")


def cached(root, files, listed=None):
    """The hub's cache of "me/model" after some of its files have come; listed: what the client knows of the others."""
    folder = root / "models--me--model"
    for path, text in {"refs/main": SHA, **{f"snapshots/{SHA}/{name}": "{}" for name in files}}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    if listed is not None:
        (folder / "trees").mkdir()
        entries = {name: {"size": 2, "blob_id": "0" * 40} for name in listed}
        (folder / "trees" / f"{SHA}.json").write_text(json.dumps({"format_version": 1, "files": entries}))
    return folder / "snapshots" / SHA


SHA = "0123456789abcdef" * 2 + "01234567"
OWN = ["config.json", "model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
PARTS = ("config.json", "model.safetensors", "tokenizer")


@pytest.mark.parametrize(
    ("files", "listed", "parts"),
    [
        (OWN[:3], OWN, PARTS),
        (["config.json"], None, ()),
        (["config.json", "model.safetensors"], ["config.json", "model.safetensors", "tokenizer.json"], ()),
        (["config.json", "model-00001-of-00002.safetensors"], None, ()),
        (["config.json", "pytorch_model-00002-of-00002.bin"], None, ()),
        (["config.json", "model.safetensors.index.json", "pytorch_model.bin"], None, ()),
    ],
)
def test_a_part_of_a_model_in_the_cache_is_not_taken_for_the_whole(files, listed, parts, tmp_path, monkeypatch):
    cached(tmp_path, files, listed)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", MagicMock(side_effect=ConnectionError("no route")))
    part = "model: me/model is not a folder, and the cache holds only a part of it"
    with pytest.raises(UsageError, match=f"{part}, and the hub cannot be reached"):
        hub.model_folder("me/model", "model", parts, cache_dir=tmp_path)
    with pytest.raises(UsageError, match=f"{part}; with a network"):
        hub.model_folder("me/model", "model", parts, cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("files", "listed", "parts"),
    [
        (OWN, [*OWN, "README.md"], PARTS),
        (["config.json", "model.safetensors"], ["config.json", "model.safetensors", "pytorch_model.bin"], ()),
        (["open_clip_config.json", "a.bin"], ["open_clip_config.json", "a.bin", "a.onnx"], ()),
        (["config.json", "a-1-of-2.bin", "a-2-of-2.bin"], None, ()),
        (["config.json", "a.safetensors"], ["config.json", "a.safetensors", "README.md", ".gitattributes"], ()),
        (["config.json", "a.bin", "a-1-of-2.safetensors"], None, ()),
    ],
)
def test_what_is_left_out_on_purpose_is_not_missed(files, listed, parts, tmp_path):
    folder = cached(tmp_path, files, listed)
    assert hub.model_folder("me/model", "model", parts, cache_dir=tmp_path, local_files_only=True) == folder


def test_files_that_need_not_exist_are_not_missed(tmp_path):
    folder = cached(tmp_path, OWN, [*OWN, "evaluation.json"])
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert hub.model_folder("me/model", "model", PARTS, ("evaluation.json",), **options) == folder


def test_why_the_cache_did_not_do_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", MagicMock(side_effect=ConnectionError("no route")))

    def message():
        load = MagicMock(side_effect=ValueError("header of model.safetensors is\ntoo short"))
        with pytest.raises(UsageError) as caught:
            hub.from_hub("me/model", "text_weights", "start anew", load)
        return str(caught.value)

    assert message().startswith("text_weights: me/model is neither a folder nor in the cache, and the hub cannot")
    cached(tmp_path, ["config.json"])
    assert (
        "me/model is in the cache, but cannot be loaded from there (header of model.safetensors is too short), "
        in message()
    )


def test_a_damaged_record_is_named(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    (tmp_path / "evaluation.json").write_text("[1]")
    with pytest.raises(UsageError, match="evaluation.json: expected a mapping"):
        load_model(tmp_path / "model")


def test_the_demo_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_model("demo").preprocess.image_size == 64
    (tmp_path / "demo").mkdir()
    with pytest.raises(UsageError, match="demo lacks"):
        load_model("demo")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (errors.RevisionNotFoundError, "me/shapes has no revision 'v9' on the hub"),
        (errors.GatedRepoError, "me/shapes is gated: accept its terms on the hub"),
        (errors.RepositoryNotFoundError, "no folder and no public model on the hub is called me/shapes"),
    ],
)
def test_the_hub_says_why_not(kind, reason, monkeypatch, tmp_path):
    def refuse(self, name, **options):
        raise kind("refused", response=MagicMock())

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(UsageError, match=f"model: {reason}"):
        Pretrained.from_pretrained("me/shapes", revision="v9", cache_dir=tmp_path)


def test_a_silent_hub_is_asked_once_and_not_for_long(monkeypatch):
    monkeypatch.setattr(hub, "LIMIT", 0.05)
    asked = []

    def silent(self, name, **options):
        asked.append(name)
        torch.multiprocessing.get_context().Event().wait(1)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    with pytest.raises(UsageError) as caught:
        load_model("me/no-such-model")
    assert asked == ["me/no-such-model"] and "\n" not in str(caught.value)
    assert str(caught.value).startswith(
        "model: me/no-such-model is neither a folder nor in the cache, and the hub cannot"
    )
    with pytest.raises(UsageError, match="model: expected a folder or a name on the hub, got runs/photos/model"):
        load_model("runs/photos/model")

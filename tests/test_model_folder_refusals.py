"""A model folder, and weights to start from, are data: what is wrong in them is one line, and no code in them runs."""

import io
import json
import pickle
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from softmask_fast.adapters.hub import open_model
from softmask_fast.config import DataConfig, TrainConfig
from softmask_fast.errors import UsageError
from softmask_fast.model.convert_albef import load_albef
from softmask_fast.model.export import read_model
from softmask_fast.model.initialize import load_pretrained, weights_config
from softmask_fast.model.text import load_bert
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.tasks.models import load_task_model
from softmask_fast.tasks.options import TaskConfig

STORED = Path(__file__).parent / "stored" / "run" / "model"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    def request(*args, **options):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr(huggingface_hub.file_download, "_get_metadata_or_catch_error", request)
    return Path(shutil.copytree(STORED, tmp_path / "m"))


def line(work) -> str:
    with pytest.raises(UsageError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message and "trust_remote_code" not in message and "weights_only" not in message, message
    return message


def changed(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("text_heads", "2", "expected an integer, got '2'"),
        ("text_heads", 3, "text_width: expected a multiple of text_heads=3, got 8"),
        ("vision_heads", 3, "vision_width: expected a multiple of vision_heads=3, got 8"),
        ("vision_width", [8], r"expected an integer, got \[8\]"),
        ("vision_width", 6, "vision_width: expected a multiple of 4, got 6"),
        ("vision_depth", 0, "expected from 1 to 1024, got 0"),
        ("vision_depth", 10**9, "expected from 1 to 1024, got 1000000000"),
        ("vision_patch_size", 32, "expected at most image_size=16, got 32"),
        ("vision_mlp_ratio", float("inf"), "expected a finite number, got inf"),
        ("vision_model", "resnet18", "'resnet18' cannot have these sizes: .*img_size"),
        ("vision_model", "local-dir:/tmp", "expected the name of a model in timm, got 'local-dir:/tmp'"),
        ("vision_model", None, "expected a string, got None"),
        ("text_mlp_ratio", 10**400, "expected a finite number, got 1000"),
        ("text_mlp_ratio", -1, "expected above 0, at most 1000, got -1"),
        ("hidden_dropout", float("nan"), "expected a finite number, got nan"),
        ("hidden_dropout", True, "expected a finite number, got True"),
        ("max_tokens", 2.5, "expected an integer, got 2.5"),
        ("max_tokens", 2, "expected at least 3"),
        ("soft_mask_layer", -1, "expected a layer before the last of fusion_layers=2"),
        ("vocab_size", 2**40, "expected from 1 to 16777216, got 1099511627776"),
        ("embed_dim", False, "expected an integer, got False"),
    ],
)
def test_every_field_of_a_configuration_is_checked(folder, name, value, expected):
    changed(folder / "config.json", **{name: value})
    error = line(lambda: read_model(folder))
    assert error.startswith(f"model: {folder}/config.json: ") and name.split("_")[0] in error
    assert re.search(expected, error), error


def test_sizes_beyond_the_weights_take_no_memory(folder):
    changed(folder / "config.json", text_width=1 << 16, vocab_size=1 << 24)  # 4 TiB of embeddings
    assert "config.json describes 1," in (error := line(lambda: read_model(folder))) and "at most the" in error


def test_damaged_configurations_are_named(folder):
    path = folder / "config.json"
    for text, expected in [
        ("[" * 100_000, "is not valid JSON: "),
        ("null", "expected a mapping of options, got NoneType"),
        ("\xff", "is not valid JSON: "),
        (" " * (1 << 26) + "{}", "expected at most 67,108,864 bytes, got 67,108,866"),
    ]:
        path.write_text(text, encoding="latin-1")
        assert expected in (error := line(lambda: read_model(folder))) and f"model: {path}" in error


def test_damaged_weights_are_named(folder):
    path, state = folder / "model.safetensors", load_file(STORED / "model.safetensors")
    whole = path.read_bytes()
    for content in (
        b"", whole[:-1], whole[:100], (1 << 62).to_bytes(8, "little") + whole[8:], (1 << 25).to_bytes(8, "little") +
        b" " * (1 << 25), whole.replace(b'"F32"', b'"F99"', 1), b"\x80\x04N." * 9,
    ):  # fmt: skip
        path.write_bytes(content)
        assert line(lambda: read_model(folder)).startswith(f"model: {path} cannot be read: ")
    name = "match_head.bias"
    for tensor, expected in [
        (torch.zeros(2, dtype=torch.int64), f"{name} has dtype torch.int64, expected torch.float32"),
        (torch.zeros(3), f"{name} has size (3,), expected (2,)"),
    ]:
        save_file(state | {name: tensor}, path)
        assert line(lambda: read_model(folder)) == f"model: {path}: weights: {expected}"
    save_file(state | {f"more{i}": torch.zeros(1) for i in range(20)}, path)
    assert line(lambda: read_model(folder)).endswith("more15 is unexpected; and 12 more")
    path.unlink()
    path.mkdir()
    assert f"model: {path} cannot be read: " in line(lambda: read_model(folder))


def test_damaged_tokenizers_are_named(folder):
    tokenizer = folder / "tokenizer"
    whole = json.loads((tokenizer / "tokenizer.json").read_text())
    for name, content, expected in [
        ("tokenizer.json", "{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read: "),
        ("tokenizer.json", json.dumps(whole | {"model": 3}), "tokenizer.json cannot be read: "),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a mapping, got list"),
        ("tokenizer_config.json", '{"tokenizer_class": "NoSuch"}', "it lacks ['[PAD]'"),
        ("config.json", "[" * 100_000, "config.json is not valid JSON"),
    ]:
        before = (tokenizer / name).read_text() if (tokenizer / name).exists() else None
        (tokenizer / name).write_text(content)
        assert expected in (error := line(lambda: read_model(folder))) and str(tokenizer) in error, error
        (tokenizer / name).unlink() if before is None else (tokenizer / name).write_text(before)
    whole["added_tokens"].append(whole["added_tokens"][0] | {"id": 64, "content": "[more]"})
    (tokenizer / "tokenizer.json").write_text(json.dumps(whole))
    expected = f"model: {tokenizer} has ids up to 64, expected below 64, vocab_size of config.json"
    assert line(lambda: read_model(folder)) == expected


CODE = "open(__file__ + '.ran', 'w')\nfrom transformers import PreTrainedTokenizerFast as Other, CLIPConfig\n"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("where", ["other.Other", "someone/repository--other.Other"])
def test_a_tokenizer_runs_no_code_and_asks_nothing(folder, name, where, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question was asked"))
    path = folder / "tokenizer" / name
    path.write_text("{}") if not path.exists() else None
    changed(path, tokenizer_class="Other", auto_map={"AutoTokenizer": [None, where]})
    (folder / "tokenizer" / "other.py").write_text(CODE)
    assert f"tokenizer: {path}: auto_map: expected a tokenizer without its own code" in line(lambda: read_model(folder))
    assert not list(folder.rglob("*.ran"))


def test_models_of_others_run_no_code_and_ask_nothing(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question was asked"))
    (folder / "other.py").write_text(CODE)
    content = {"model_type": "others", "architectures": ["CLIPModel"], "auto_map": {"AutoConfig": "other.CLIPConfig"}}
    (folder / "config.json").write_text(json.dumps(content))
    expected = f"--model: {folder} cannot be opened: it asks for code of its own, which is never run"
    assert line(lambda: open_model(folder)) == expected
    (folder / "config.json").write_text('{"model_type": "clip", "architectures": ["pipeline"]}')
    assert line(lambda: open_model(folder)).startswith("--model: expected a model of transformers, got ")
    text = {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"trust_remote_code": True}, "width": 16, "heads": 2,
            "layers": 1}  # fmt: skip
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1}
    content = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    changed(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "other.Other"]})
    shutil.copytree(folder / "tokenizer", folder, dirs_exist_ok=True)
    assert line(lambda: open_model(folder)).startswith(f"--model: {folder} cannot be opened: ")
    assert not list(folder.rglob("*.ran"))


def test_task_records_are_checked(folder):
    path = folder / "task.json"
    for content, expected in [
        ("[]", "expected a mapping of options, got list"),
        ("{}", "task: expected a string, got None"),
        ('{"task": "vqa", "answers": 3}', "answers: expected a list of strings, got 3"),
        ('{"task": "vqa", "answers": ["a"], "candidates": "9"}', "candidates: expected an integer of at least 1"),
        ('{"task": "vqa", "answers": ["a"], "other": 1}', "unexpected keyword argument 'other'"),
    ]:
        path.write_text(content)
        error = line(lambda: load_task_model(folder, "vqa"))
        assert error.startswith(f"model: {path}: ") and expected in error


class Call:
    def __reduce__(self):
        return open, (str(self.path), "w")


def weights(tmp_path, name, content) -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


def saved(content) -> bytes:
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


def test_weights_to_start_from_are_tensors_or_refused(tmp_path):
    call = Call()
    call.path = tmp_path / "ran"
    squeezed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"x": torch.zeros(1 << 20)}))) as whole:
        with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry in whole.infolist():
                archive.writestr(entry.filename, whole.read(entry))
    contents = {
        "calls.pth": saved({"model": call}), "plain.pth": pickle.dumps([call]), "text.pth": b"weights, please",
        "empty.pth": b"", "part.pth": saved({"x": torch.zeros(999)})[:-300], "bomb.pth": squeezed.getvalue(),
    }  # fmt: skip
    with pytest.raises(UsageError, match="^model_weights: expected a folder with model.safetensors"):
        weights_config(tmp_path)
    config = weights_config(STORED)
    for name, content in contents.items():
        path = weights(tmp_path, name, content)
        start = VisionLanguageModel(replace(config, model_weights=None, vision_weights=path))
        assert line(lambda m=start: load_pretrained(m)).startswith(f"vision_weights: {path} cannot be read as tensors")
        assert line(lambda p=path: weights_config(p)).startswith(f"model_weights: {path} cannot be read as tensors: ")
        assert line(lambda p=path: load_albef(p)).startswith(f"path: {path} cannot be read as tensors: ")
    assert not call.path.exists()
    for content in ([torch.zeros(1)], {"model": {3: torch.zeros(1)}}, {"model": {"x": "y"}}):
        path = weights(tmp_path, "other.pth", saved(content))
        assert line(lambda p=path: load_albef(p)) == f"path: expected a state dict, alone or under 'model', in {path}"
    for state in ({}, {"cls_token": torch.zeros(1)}, {"pos_embed": torch.zeros(3)}, {"visual.proj": torch.zeros(2, 2)}):
        path = weights(tmp_path, "fits.pth", saved(state))
        start = VisionLanguageModel(replace(config, model_weights=None, vision_weights=path))
        assert f"vision_weights: '{path}' does not fit" in line(lambda m=start: load_pretrained(m))


def test_a_bert_that_brings_code_or_is_damaged_is_refused(tmp_path):
    config = replace(weights_config(STORED), model_weights=None, text_weights=str(tmp_path))
    (tmp_path / "other.py").write_text(CODE)
    for content in ("{", "[]", '{"model_type": "bert", "auto_map": {"AutoModel": "other.Other"}}'):
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "pytorch_model.bin").write_bytes(b"no weights")
        assert line(lambda: load_bert(config)).startswith(f"text_weights: '{tmp_path}' cannot be loaded (")
    assert not list(tmp_path.glob("*.ran"))


def test_options_of_a_run_are_checked_by_type():
    for make, expected in [
        (lambda: TrainConfig(batch_size=8.5), "batch_size: expected an integer, got 8.5"),
        (lambda: TrainConfig(learning_rate="fast"), "learning_rate: expected a finite number, got 'fast'"),
        (lambda: DataConfig(flip=1), "flip: expected true or false, got 1"),
        (lambda: DataConfig(data=["a.tar"]), "data: expected a string, got ['a.tar']"),
        (lambda: TaskConfig("folder", layer="last"), "layer: expected an integer, got 'last'"),
    ]:
        assert line(make) == expected
    assert TrainConfig(learning_rate=1).learning_rate == 1

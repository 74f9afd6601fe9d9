"""Models of others from a folder to a figure, a table and arrays, by the command line; what is said without a hub."""

import json
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from hub_folders import FOLDERS
from PIL import Image
from pyarrow import parquet

from softmask_fast.adapters.hub import explain_image, open_model
from softmask_fast.cli import main

TEXT = "a small red circle"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in (("tall.png", (20, 40)), ("wide.png", (48, 24))):
        pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return {name: make(root / name) for name, make in FOLDERS.items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_explain_and_features(name, folders, pictures, tmp_path, capsys):
    images = [str(pictures / "tall.png"), str(pictures / "wide.png")]
    command = ["--model", str(folders[name]), "--text", TEXT, "--image", *images]
    command += ["--answer", "a blue square"] * (name == "llava")
    assert main(["explain", *command, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "words.json"),
                 "--npy", str(tmp_path / "maps.npz")]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tall.png", "wide.png"}
    tall, wide = records = json.loads((tmp_path / "words.json").read_text())
    arrays = np.load(tmp_path / "maps.npz")
    words = [word["word"] for word in wide["words"]]
    if "clip" in name:
        assert words == [TEXT, *TEXT.split()]
    else:
        assert " ".join(words).startswith(TEXT) or TEXT in " ".join(words)
    assert "red" in printed and printed.count("written to") == 4
    for record in records:
        assert record["text"] == TEXT and np.isfinite(record["value"])
        heats = [arrays[f"{record['image'].split('/')[-1]}/{number:03d}"] for number in range(len(record["words"]))]
        assert max(heat.max() for heat in heats) > 0
        for heat, word in zip(heats, record["words"], strict=True):
            assert word["mean"] == pytest.approx(float(heat.mean()), rel=1e-5)
            assert 0 <= word["entropy"] <= 1.0001
    if name == "llava" or "clip" in name:  # the processor sees the center of the picture alone
        assert heats[0].shape == (4, 8) and (heats[0][:, :2] == 0).all() and (heats[0][:, 6:] == 0).all()
    else:
        assert heats[0].shape == (4, 4)
    if name == "llava":
        assert wide["answer"] == "a blue square" and wide["notes"] == []
        assert [word["part"] for word in wide["words"]][:4] == ["prompt"] * 4

    assert main(["features", *command, "--out", str(tmp_path / "f.parquet")]) == 0
    table = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert table["word"] == [w["word"] for r in records for w in r["words"]]
    assert set(table) >= {"image", "mean", "q95", "entropy", "centroid_x", "red_mean", "f0", "f15"}
    assert np.allclose(table["mean"], [w["mean"] for r in records for w in r["words"]], rtol=1e-5)
    if name == "blip":
        assert main(["features", *command, "--out", str(tmp_path / "f.npz")]) == 0
        same = np.load(tmp_path / "f.npz")
        assert {key: same[key].tolist() for key in same} == table


def test_pooled_features_are_the_mean_under_the_map(folders, pictures):
    model, processor = open_model(folders["blip"])
    picture = Image.open(pictures / "wide.png")
    kept = {}
    value = model.text_encoder.encoder.layer[1].crossattention.self.value
    value.register_forward_hook(lambda module, args, output: kept.update(value=output[0]))
    explanation = explain_image(model, processor, picture, TEXT, layer=1)
    word = explanation.words[0]
    assert explanation.notes == [] and explain_image(model, processor, picture, TEXT, layer=2).notes == [
        "zero, not read by the score: a small red circle"
    ]
    assert word.features.shape == (32,)
    values = kept["value"].detach().numpy()
    assert (values.min(0) - 1e-5 <= word.features).all() and (word.features <= values.max(0) + 1e-5).all()


def test_an_answer_or_a_caption_can_be_given(folders, pictures):
    picture = Image.open(pictures / "tall.png")
    model, processor = open_model(folders["llava"])
    explanation = explain_image(model, processor, picture, TEXT, answer="a blue square")
    assert explanation.answer == "a blue square"
    answered = [word for word in explanation.words if word.part == "answer"]
    assert [word.text for word in answered] == ["a", "blue", "square"]
    assert all(word.heat.max() > 0 for word in answered)
    assert explain_image(model, processor, picture, TEXT, max_new_tokens=2).answer
    for name in ("captioner", "blip_captioner"):
        model, processor = open_model(folders[name])
        assert explain_image(model, processor, picture, "a blue square").answer == "a blue square"
        said = explain_image(model, processor, picture, max_new_tokens=4)
        assert said.answer and said.text == ""


def test_mistakes_are_named(folders, pictures, tmp_path, capsys):
    image, out = str(pictures / "tall.png"), str(tmp_path / "out.png")

    def message(*arguments):
        assert main([*map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("softmask-fast: error: ") and error.count("\n") == 1
        return error

    start = ["explain", "--model", folders["clip"]]
    assert "--text: expected at least one word, got none" in message(*start, "--image", image, "--out", out)
    two = [*start, "--text", "a", "--image", image, str(pictures / "wide.png")]
    assert "--out: expected a folder for several images, got" in message(*two, "--out", out)
    same = [*start, "--text", "a", "--image", image, image, "--out", str(tmp_path / "two")]
    assert "--image: expected files with different names" in message(*same)
    one = [*start, "--text", "a", "--image", image, "--out", out]
    assert "--npy: expected a name that ends in .npz, got x.npy" in message(*one, "--npy", "x.npy")
    assert "layer: expected a number from 0 to 1 of CLIPModel, got 7" in message(*one, "--layer", "7")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert", "architectures": ["NoSuchModel"]}')
    other = [*start[:2], tmp_path / "other", *one[3:]]
    assert "expected a model of transformers, got" in message(*other)
    features = ["features", *one[1:-1], tmp_path / "out.csv"]
    assert "--out: expected a name that ends in .parquet or .npz" in message(*features)
    assert not (tmp_path / "out.png").exists()


def run_without_a_hub(endpoint, pictures, tmp_path):
    code = f"import os, sys; os.environ |= {dict(HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))!r}\n"
    code += "from softmask_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ["explain", "--model", "someone/model", "--text", "a", "--image", str(pictures / "tall.png")]
    command += ["--out", str(tmp_path / "x.png")]
    return subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("hub", ["refuses", "is silent"])
def test_without_a_network_one_line_says_what_to_do(hub, pictures, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never answers
        port = server.getsockname()[1]
        if hub == "refuses":
            server.close()
        started = time.monotonic()
        done = run_without_a_hub(f"http://127.0.0.1:{port}", pictures, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "someone/model is neither a folder nor in the cache, and the hub cannot be reached" in done.stderr
    assert "hf download someone/model --local-dir DIR" in done.stderr
    assert time.monotonic() - started < 20  # 4 on a machine that does nothing else, 3 of them waiting

"""The command line: its output, its files, and its messages about user errors."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shard_files import write_shard
from spellings import check_both_spellings, options_of

from softmask_fast import __version__
from softmask_fast.cli import _parser, main
from softmask_fast.data.sources import open_source
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.model.export import save_model
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.training.options import make_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small random model, and an image."""
    folder = tmp_path_factory.mktemp("cli")
    shapes = open_source("shapes:num=8", split="val", image_size=32)
    tokenizer = train_tokenizer([c for i in range(len(shapes)) for c in shapes.read(i).captions], 200)
    torch.manual_seed(0)
    config = make_config(
        "tiny", image_size=32, vision_width=32, vision_depth=1, vision_heads=2, text_width=32, text_heads=2,
        vision_contrast_blocks=0, text_contrast_layers=0, text_layers=1, fusion_layers=2, embed_dim=16,
        vocab_size=len(tokenizer), soft_mask_layer=0,
    )  # fmt: skip
    save_model(VisionLanguageModel(config.model), tokenizer, folder / "model")
    Image.fromarray(shapes.read(0).image).save(folder / "scene.jpg")
    return folder


def test_evaluate_retrieval(folder, tmp_path, capsys):
    out = tmp_path / "results" / "retrieval.json"
    command = ["evaluate", "--model", str(folder / "model"), "--data", "shapes:num=16", "--task", "retrieval"]
    assert main([*command, "--json", str(out), "--rerank", "10"]) == 0
    printed = capsys.readouterr().out
    assert "Retrieval among 16 images and 64 captions, all of each" in printed and "ITM on the best 10" in printed
    record = json.loads(out.read_text())
    report = record["reports"]["retrieval"]
    assert record["data"] == "shapes:num=16" and record["model"] == str(folder / "model") and report["images"] == 16
    assert f"{100 * report['itc']['text_to_image']['recall@10']:.1f}" in printed
    assert [path.name for path in out.parent.iterdir()] == ["retrieval.json"]


def test_evaluate_grounding(folder, tmp_path, capsys):
    out = tmp_path / "grounding.json"
    command = ["evaluate", "--model", str(folder / "model"), "--data", "shapes:num=16", "--task", "grounding"]
    assert main([*command, "--json", str(out), "--limit", "4", "--layer", "0"]) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    report = record["reports"]["grounding"]
    assert record["size"] == 4 and report["images"] == 4 and report["layer"] == 0
    assert f"Grounding of {report['phrases']} phrases in 4 images, fusion layer 0" in printed
    assert f"{100 * report['pointing_game']['center']:.1f}" in printed


def test_evaluate_maps(folder, tmp_path, capsys):
    out = tmp_path / "maps.json"
    command = ["evaluate", "--model", str(folder / "model"), "--data", "shapes:num=16", "--task", "maps"]
    assert main([*command, "--json", str(out), "--limit", "4"]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())["reports"]["maps"]
    assert f"Maps of {report['phrases']} phrases in 4 images, fusion layer 0" in printed
    assert "attention rollout" in printed and f"{100 * report['iou']['rollout']:.1f}" in printed


def test_explain(folder, tmp_path, capsys):
    out = tmp_path / "words.png"
    command = ["explain", "--model", str(folder / "model"), "--image", str(folder / "scene.jpg")]
    assert main([*command, "--text", "a red circle", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "chance to match" in printed and "circle" in printed and str(out) in printed
    with Image.open(out) as picture:
        picture.load()


def test_the_demo_is_a_model_in_half_precision_that_needs_no_training_library(folder, tmp_path):
    """Exported, explained on a scene and evaluated, in one process where DeepSpeed, DALI and others are missing."""
    code = """if True:
        import sys
        from pathlib import Path
        missing = ("deepspeed", "nvidia.dali", "tensorboard", "braceexpand", "aiohttp", "s3fs", "pyarrow")
        sys.modules |= dict.fromkeys(missing)
        from softmask_fast import cli, hub
        hub.DEMO = Path("demo model/demo")
        def run(*arguments):
            assert cli.main(arguments) == 0, arguments
        run("export", "--model", sys.argv[1], "--out", "demo model/demo")
        run("explain", "--model", "demo", "--out", "words.png")
        run("explain", "--model", "demo", "--image", "shapes:3", "shapes:4", "--text", "a circle", "--out", "scenes")
        data = ("--model", "demo", "--data", "shapes:num=4,objects=3")
        run("evaluate", *data, "--task", "grounding", "--heatmaps", "page.png")
    """
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder / "model")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Grounding of" in result.stdout and "in 4 images" in result.stdout
    pictures = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert pictures == {"words.png", "page.png", "scenes/shapes-3.png", "scenes/shapes-4.png"}
    full, half = (load_file(f / "model.safetensors") for f in (folder / "model", tmp_path / "demo model" / "demo"))
    assert full.keys() == half.keys() and {x.dtype for x in half.values()} == {torch.float16}
    for name, tensor in full.items():
        torch.testing.assert_close(half[name].float(), tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate", "--model", "nowhere"], "--model: expected a model directory, got nowhere"),
        (["evaluate", "--data", "missing.tar"], "missing.tar"),
        (["evaluate", "--task", "grounding", "--layer", "5"], "layer: expected a fusion layer from 0 to 0, got 5"),
        (
            ["evaluate", "--task", "grounding", "--data", "boxes.json", "--image_column", "url"],
            "image_column: expected only for tables of images and captions, got 'url' for boxes.json",
        ),
        (["evaluate", "--rerank", "3"], "rerank: expected 0, or at least 10"),
        (["evaluate", "--device", "abacus"], "--device"),
        (["evaluate", "--device", "cuda:99"], "--device: expected one of 0 CUDA devices, got cuda:99"),
        (["evaluate", "--json", "."], "--json: expected a file name"),
        (["explain", "--image", "missing.jpg"], "missing.jpg: No such file or directory"),
        (
            ["explain", "--image", "shapes:9999"],
            "--image: expected a scene from shapes:0 to shapes:4095, got shapes:9999",
        ),
        (["explain", "--out", "words.jpg"], "--out: expected a name that ends in .png, got words.jpg"),
        (["explain", "--text", " "], "--text: expected at least one word"),
        (["explain", "--image", __file__], "image cannot be decoded"),
    ],
)
def test_user_errors_get_a_message_and_no_traceback(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    defaults = {
        "evaluate": {"--model": str(folder / "model"), "--data": "shapes:num=12", "--task": "retrieval"},
        "explain": {
            "--model": str(folder / "model"),
            "--image": str(folder / "scene.jpg"),
            "--text": "a circle",
            "--out": "words.png",
        },
    }[arguments[0]]
    options = defaults | dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert main([arguments[0], *(part for option in options.items() for part in option)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("softmask-fast: error: ")
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["explain", "features"])
def test_a_photograph_needs_a_text(folder, tmp_path, capsys, command):
    out = str(tmp_path / ("a.png" if command == "explain" else "a.npz"))
    image = str(folder / "scene.jpg")
    assert main([command, "--model", str(folder / "model"), "--image", image, "--out", out]) == 2
    said = f"--text: expected a caption of {image}, right or wrong, got none; only scenes have their own\n"
    assert capsys.readouterr().err == f"softmask-fast: error: {said}"


def test_re_ranking_has_its_default_in_both_helps():
    shown = [
        subprocess.run([sys.executable, "-m", "softmask_fast.cli", command, "--help"], capture_output=True, text=True,
                       env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}).stdout
        for command in ("evaluate", "finetune")
    ]  # fmt: skip
    for text in shown:
        assert "128" in text and "16" in text and "--rerank" in text and "--candidates" in text


def test_debug_shows_the_traceback(folder):
    command = ["evaluate", "--model", "nowhere", "--data", "shapes", "--task", "retrieval", "--debug"]
    with pytest.raises(ValueError, match="--model"):
        main(command)


def test_unknown_options_end_with_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--task", "juggling", "--model", "m", "--data", "shapes"])
    assert stopped.value.code == 2
    assert "invalid choice: 'juggling'" in capsys.readouterr().err


def test_a_mistyped_option_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--task", "vqa", "--model", "m", "--data", "shapes", "--lim", "3"])
    assert stopped.value.code == 2
    assert "unknown option: --lim; did you mean --limit?" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    """--help and --version answer without loading torch."""
    code = (
        "import sys; from softmask_fast.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == __version__
    for command in ([], ["train"], ["finetune", "--task", "vqa"], ["evaluate"], ["explain"], ["prepare"], ["doctor"]):
        shown = subprocess.run(
            [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=True
        )
        assert "usage: softmask-fast" in shown.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["index", "a.tar"], ["index", "b.tar", "2>&1"]])
def test_a_reader_that_has_gone_ends_a_command_in_silence(arguments, tmp_path):
    write_shard(tmp_path / "a.tar", {"cat": {"jpg": b"", "txt": b"a cat"}})
    reader, writer = os.pipe()
    os.close(reader)
    error = writer if arguments[-1] == "2>&1" else subprocess.PIPE
    command = [sys.executable, "-m", "softmask_fast.cli", *arguments[:2]]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=writer, stderr=error, text=True, cwd=tmp_path, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr or "") == (141, "")


def test_output_that_cannot_be_written_is_said_in_a_line():
    command = [sys.executable, "-m", "softmask_fast.cli", "--version"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    ours, theirs = socket.socketpair()
    theirs.close()
    full = "softmask-fast: error: the output cannot be written: No space left on device\n"
    with ours, open("/dev/full", "wb") as disk:
        for output, expected in ((disk, (2, full)), (ours, (141, ""))):
            done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, env=environment)
            assert (done.returncode, done.stderr) == expected


def test_a_reader_that_has_gone_hides_no_fault(monkeypatch):
    monkeypatch.setattr("softmask_fast.cli._doctor", MagicMock(side_effect=ZeroDivisionError))
    monkeypatch.setattr("builtins.print", MagicMock(side_effect=BrokenPipeError))
    monkeypatch.setattr("softmask_fast.errors._is_unread", lambda stream: False)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_a_pipe_of_something_else_is_an_error(monkeypatch):
    monkeypatch.setattr("softmask_fast.cli._doctor", MagicMock(side_effect=BrokenPipeError(32, "a worker's")))
    with pytest.raises(BrokenPipeError):
        main(["doctor"])


def test_every_option_of_every_command_takes_both_spellings():
    (commands,) = (action for action in _parser()._actions if action.choices)
    for command in commands.choices.values():
        required = [
            part
            for action in command._actions
            if action.required
            for part in (*action.option_strings[:1], action.choices[0] if action.choices else "1")
        ]
        for option in options_of(command):
            check_both_spellings(command, option, tuple(required))
    (prepare,) = (command for name, command in commands.choices.items() if name == "prepare")
    assert "--short_side" in prepare.format_help() and "--short-side" not in prepare.format_help()


@pytest.mark.parametrize("name", ["meta", "xla", "nothing", "cuda:99"])
def test_a_device_that_runs_nothing_is_refused(name, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    model = Path(__file__).parent / "stored" / "run" / "model"
    files = ["--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "o.png")]
    assert main(["explain", "--model", str(model), "--text", "a", *files, "--device", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("softmask-fast: error: --device: ") and error.count("\n") == 1


def test_what_is_no_url_is_refused(capsys):
    model = str(Path(__file__).parent / "stored" / "run" / "model")
    assert main(["evaluate", "--model", model, "--task", "retrieval", "--data", "https://[::1/val.tar"]) == 2
    assert "data: https://[::1/val.tar is not a URL: " in capsys.readouterr().err

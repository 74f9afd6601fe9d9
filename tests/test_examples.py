"""examples/: configurations are taken, notebooks run, the page's functions work without gradio, scripts fit."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist
import yaml
from PIL import Image
from runs import ROOT, SMALL
from small_models import tutorial_folder

from softmask_fast import cli, load_model, train
from softmask_fast.data.sources import open_source
from softmask_fast.errors import UsageError
from softmask_fast.evaluation import report
from softmask_fast.training.launch import prepare_run
from softmask_fast.training.meters import FlopCount
from softmask_fast.training.options import parse_arguments

EXAMPLES = ROOT / "examples"
CONFIGURATIONS = sorted(EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_every_option_of_a_configuration_is_taken(file):
    config, _ = parse_arguments(["--config", str(file)])
    taken = {"preset": config.preset}
    for section in (config.model, config.objectives, config.data, config.train):
        taken |= asdict(section)
    given = yaml.safe_load(file.read_text())
    assert {name: taken[name] for name in given} == given
    assert f"softmask-fast train --config examples/{file.name}\n" in file.read_text()


def test_the_paper_has_its_batch():
    assert parse_arguments(["--config", str(EXAMPLES / "paper.yaml")])[0].train.batch_size * 8 == 512


# ---- notebooks


def run_notebook(name, shell=None):
    """Its code cells, in order, in one namespace; lines of a shell go to `shell`."""
    notebook = json.loads((EXAMPLES / name).read_text())
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    namespace = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            for line in cell["source"] if cell["source"][0].startswith("!") else ():
                shell(shlex.split(line.removeprefix("!")))
            if not cell["source"][0].startswith("!"):
                exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), namespace)
    return SimpleNamespace(**namespace)


def test_heat_map(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_notebook("heat_map.ipynb")
    assert [word["word"] for word in found.shown["words"]] == found.caption.split()
    assert found.maps.amax((1, 2)).count_nonzero() >= len(found.caption.split())
    assert (tmp_path / "words.png").stat().st_size > 0


def test_open_clip_loss():
    pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    found = run_notebook("open_clip_loss.ipynb")
    assert found.ours.item() == pytest.approx(found.theirs.item(), rel=1e-5)
    assert found.losses[-1] < 0.9 * found.losses[0]


def test_own_pairs(tmp_path, monkeypatch, one_rank):
    """Its training is real: the notebook's configuration, with the sizes of the tests. What takes seconds and has tests
    of its own is left out: counting operations, drawing the run's figures."""
    monkeypatch.chdir(tmp_path)
    tutorial_folder(tmp_path)
    shutil.rmtree("runs")
    shutil.copy(EXAMPLES / "photographs.yaml", tmp_path)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)  # other tests go on in it
    monkeypatch.setattr(FlopCount, "count", lambda self: setattr(self, "operations", 1))
    small_figure = Image.new("RGB", (4, 4))
    monkeypatch.setattr(report, "plot_curves", lambda log, out, *rest: small_figure.save(out))
    monkeypatch.setattr(report.PretrainingEvaluation, "draw", lambda self, model, text, out: small_figure.save(out))
    stop = SimpleNamespace(agreed=lambda device: False, received=None, end=lambda: None)
    small = {name: value for name, value in SMALL.items() if name != "data"} | {"max_steps": 2, "log_steps": 2}
    small |= {"soft_mask_layer": 0, "vision_patch_size": 8, "eval_size": 2, "eval_epochs": 0}
    ran = []

    def shell(words):
        ran.append(words[1])
        if words[:2] != ["softmask-fast", "train"]:
            assert words[0] == "softmask-fast" and cli.main(words[1:]) == 0
            return
        flags = [text for name, value in small.items() for text in (f"--{name}", str(value))]
        train.work(*prepare_run(*parse_arguments([*words[2:], *flags])), stop)

    run_notebook("own_pairs.ipynb", shell)
    assert ran == ["prepare", "prepare", "train", "evaluate", "explain"]
    assert len((tmp_path / "runs/photos/metrics.jsonl").read_text().splitlines()) == 1


# ---- the page


@pytest.fixture(scope="module")
def page():
    """The module; it does not import gradio."""
    spec = spec_from_file_location("heatmap_page", EXAMPLES / "heatmap_page.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "gradio" not in sys.modules
    return module


def test_the_page_draws_the_words_and_lists_them(page):
    scene = open_source("shapes:objects=3", split="val", image_size=64).read(3)
    model, tokenizer, _ = load_model("demo")
    figure, rows = page.heat_maps(model, tokenizer, scene.image, scene.captions[0])
    assert figure.dtype == np.uint8 and figure.ndim == 3 and figure.shape[2] == 3 and figure.std() > 0
    assert [row[0] for row in rows] == scene.captions[0].split() and all(len(row) == len(page.COLUMNS) for row in rows)
    assert max(row[1] for row in rows) == 100 and all(0 <= place <= 100 for row in rows for place in row[2:])


def test_the_page_says_what_is_wrong(page, monkeypatch):
    class Error(Exception):
        def __init__(self, message, print_exception):
            super().__init__(message)

    def part(*arguments, **options):
        return SimpleNamespace(arguments=arguments, **options)

    gradio = ModuleType("gradio")
    vars(gradio).update(Error=Error, Image=part, Textbox=part, Dataframe=part, Interface=part)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    answer, inputs, outputs = page.make_page(None, None).arguments
    assert len(inputs) == len(outputs) == 2
    with pytest.raises(Error, match="image: expected one, got none"):
        answer(None, "a red circle")
    with pytest.raises(Error, match="text: expected at least one word, got none"):
        answer(np.zeros((8, 8, 3), np.uint8), " ")
    with pytest.raises(UsageError, match="image: expected one"):
        page.heat_maps(None, None, None, "a red circle")
    for module, arguments, message in (
        (None, [], "gradio.* install it with: pip install .*page"),
        (gradio, ["--model", "/nowhere"], "error: model: .*/nowhere"),
    ):
        monkeypatch.setitem(sys.modules, "gradio", module)
        monkeypatch.setattr(sys, "argv", ["heatmap_page.py", *arguments])
        with pytest.raises(SystemExit, match=message):
            page.main()


# ---- scripts


def test_the_slurm_script_starts_ranks_as_the_page_on_training_says(monkeypatch):
    script = (EXAMPLES / "slurm.sh").read_text()
    subprocess.run(["bash", "-n", EXAMPLES / "slurm.sh"], check=True)
    start, ranks = re.findall(r"^(?:export MASTER|srun).*$", (ROOT / "docs/training.md").read_text(), re.MULTILINE)
    assert start in script and ranks.split("softmask-fast")[0] in script
    options = re.search(r"softmask-fast train (.*)'$", script, re.MULTILINE)[1]
    monkeypatch.chdir(ROOT)
    nodes, tasks = (int(re.search(rf"--{name}=(\d+)", script)[1]) for name in ("nodes", "ntasks-per-node"))
    assert parse_arguments(shlex.split(options))[0].train.batch_size * nodes * tasks == 512


def test_the_image_has_what_a_build_needs():
    copied = {
        name
        for line in re.findall(r"^COPY (.*) \S+$", (EXAMPLES / "Dockerfile").read_text(), re.M)
        for name in line.split()
    }
    assert all((ROOT / name).exists() for name in copied)
    sources = set((ROOT / "MANIFEST.in").read_text().split()) & {"csrc", "build_backend.py", "constraints.txt"}
    assert (
        copied >= sources | {"softmask_fast", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
        and len(sources) == 3
    )

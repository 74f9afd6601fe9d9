"""README.md and docs/: every block of Python runs, every command is one that its program takes, every link leads on.

The site builds of them.
"""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hub_folders
import pytest
from code_blocks import PAGES, ROOT, blocks_of
from deepspeed.launcher import runner
from small_models import small_model, small_tokenizer, tutorial_folder

from softmask_fast import cli
from softmask_fast.model.convert_albef import save_albef
from softmask_fast.tasks.options import parse_arguments as parse_finetuning
from softmask_fast.training.options import parse_arguments

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMANDS = ("softmask-fast", "deepspeed", "make")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def albef():
    """A small checkpoint where the page has ALBEF's, and a tokeniser where it names BERT's."""
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained("google-bert/bert-base-uncased")
    save_albef(small_model(tokenizer), "ALBEF.pth")
    return {}


def word_maps():
    """Small random models where the page has the hub's, and an annotation file."""
    tutorial_folder(Path())
    names = {"llava": "llava-hf/llava-1.5-7b-hf", "clip": "openai/clip-vit-base-patch32"}
    for kind, name in names.items():
        hub_folders.FOLDERS[kind](Path(name))
    shape = {"size": [2, 2], "counts": [1, 1, 2]}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": shape}
    image = {"id": 1, "file_name": "dog.jpg", "height": 2, "width": 2}
    content = {"images": [image], "categories": [{"id": 1, "name": "dog"}], "annotations": [annotation]}
    Path("instances.json").write_text(json.dumps(content))
    return {}


def tutorial():
    tutorial_folder(Path())
    return {}


# What the blocks of a page find: the names that a function returns, the files that it writes to the working folder.
PREPARED = {
    "README.md": tutorial,
    "docs/albef.md": albef,
    "docs/models.md": tutorial,
    "docs/tutorial.md": tutorial,
    "docs/word_maps.md": word_maps,
}
# Pages whose `maps` (B, L, N) must not be zero for any word: a head that reads one row only would make them so.
EVERY_WORD = {"README.md", "docs/operators/word_gradcam.md"}
RUN_COMMANDS = {"docs/tutorial.md"}  # its softmask-fast commands run, too
# test_guide.py, test_dual_encoders.py, test_tasks.py
ELSEWHERE = {"docs/adapters.md", "docs/dual_encoders.md", "docs/tasks.md"}
RUN_HERE = [page for page in PAGES if blocks_of(page, "python") and name_of(page) not in ELSEWHERE]


@pytest.mark.parametrize("page", RUN_HERE, ids=name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace = PREPARED.get(name_of(page), dict)()
    for block in blocks_of(page):
        if block.language == "python":
            block.run(namespace)
        elif name_of(page) in RUN_COMMANDS:
            for words in commands(block):
                if words[0] == "softmask-fast":
                    assert cli.main(words[1:]) == 0, words
    if name_of(page) in EVERY_WORD:
        assert (namespace["maps"].amax(-1) > 0).all()


def test_blocks_are_found():
    """A fence that the helper does not see would be a block that never runs."""
    for page in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~)", page.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), name_of(page)


def commands(block):
    """The lines of a shell block that start with one of our commands, continued lines joined."""
    if block.language in ("", "sh", "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in COMMANDS:
                yield words


STORED = Path(__file__).parent / "stored" / "run" / "model"
ALL_COMMANDS = [(name_of(page), words) for page in PAGES for block in blocks_of(page) for words in commands(block)]


@pytest.mark.parametrize("words", [pytest.param(words, id=f"{page} {' '.join(words)}") for page, words in ALL_COMMANDS])
def test_commands_are_taken(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    pairs = zip(["", *words], words, strict=False)  # the weights of a run that a page made: their sizes are read
    words = [str(STORED) if before == "--model_weights" else word for before, word in pairs]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif any(word.startswith("[") for word in words):
        return  # a synopsis
    elif words[0] == "softmask-fast":
        options, others = cli._parser().parse_known_args(words[1:])
        if words[1] == "finetune":
            assert parse_finetuning(others)
        else:
            assert options.run and (not others or words[1] in ("train", "ablate"))  # which hand them on to training
            assert parse_arguments(others)
    else:
        launch = runner.parse_args(words[1:])
        script = importlib.import_module(launch.user_script.removesuffix(".py").replace("/", "."))
        assert script.parse_arguments(launch.user_args)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ +(.+?)[ ]*$", found.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            documented = set(re.findall(r"^::: (\S+)$", found.read_text(), re.MULTILINE))
            assert anchor in slugs | documented, target


def test_the_site_builds(tmp_path):
    """Strictly, without a network: a page that is missing, a link or a name in the API that leads nowhere, ends it."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "site"
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= {page.relative_to(site) for page in site.rglob("*.html")}
    # what the search needs where the site is opened from a disk
    assert (site / "search" / "search_index.js").is_file()
    assert "javascripts/iframe-worker.js" in (site / "index.html").read_text()
    elsewhere = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?:")
    assert not [page for page in pages if elsewhere.search((site / page).read_text())]
    navigation = re.search(r"<nav.*?</nav>", (site / "decisions.html").read_text(), re.DOTALL)
    menu = (site / "decisions.html").read_text()
    assert navigation and not [page for page in pages if f'href="{page}"' not in menu and page.stem != "decisions"]

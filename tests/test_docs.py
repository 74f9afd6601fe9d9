"""README.md and docs/: every block of Python runs, every command is one that its program takes, every link leads on."""

import re
import shlex

import pytest
import torch
from code_blocks import PAGES, ROOT, blocks_of
from transformers import BlipConfig, BlipForImageTextRetrieval

from softmask_fast import cli
from softmask_fast.config import make_config, parse_arguments
from softmask_fast.data.captions import open_source
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.model.checkpoints import save_albef
from softmask_fast.model.vision_language import VisionLanguageModel

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMANDS = ("softmask-fast", "deepspeed", "make")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def albef():
    """A small checkpoint where the page has ALBEF's, and a tokeniser where it names BERT's."""
    captions = open_source("shapes:num=8", split="val", image_size=32)
    tokenizer = train_tokenizer([caption for i in range(8) for caption in captions.read(i).captions], 200)
    tokenizer.save_pretrained("google-bert/bert-base-uncased")
    config = make_config(
        "tiny", image_size=32, vision_width=64, vision_depth=1, vision_heads=1, text_width=64, text_heads=1,
        text_layers=1, fusion_layers=3, embed_dim=16, vocab_size=len(tokenizer), soft_mask_layer=0,
    )  # fmt: skip
    save_albef(VisionLanguageModel(config.model), "ALBEF.pth")
    return {}


def transformers():
    """A small random BLIP and a batch for it."""
    sizes = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96)
    text = dict(sizes, vocab_size=60, encoder_hidden_size=64, is_decoder=True, bos_token_id=1, sep_token_id=2)
    config = BlipConfig(text_config=text, vision_config=dict(sizes, image_size=32, patch_size=8))
    inputs = dict(pixel_values=torch.randn(2, 3, 32, 32), input_ids=torch.randint(5, 60, (2, 7)))
    return {"model": BlipForImageTextRetrieval(config).eval(), "inputs": inputs}


# What the blocks of a page find: the names that a function returns, the files that it writes to the working folder.
PREPARED = {"docs/albef.md": albef, "docs/transformers.md": transformers}
ELSEWHERE = {"docs/adapters.md"}  # test_guide.py
RUN_HERE = [page for page in PAGES if blocks_of(page, "python") and name_of(page) not in ELSEWHERE]


@pytest.mark.parametrize("page", RUN_HERE, ids=name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace = PREPARED.get(name_of(page), dict)()
    for block in blocks_of(page, "python"):
        block.run(namespace)


def test_blocks_are_found():
    """A fence that the helper does not see would be a block that never runs."""
    for page in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~)", page.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), name_of(page)


def commands(page):
    """The lines of a page's shell blocks that start with one of our commands, continued lines joined."""
    for block in blocks_of(page):
        if block.language in ("", "sh", "bash"):
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in COMMANDS:
                    yield words


ALL_COMMANDS = [
    pytest.param(words, id=f"{name_of(page)} {' '.join(words)}") for page in PAGES for words in commands(page)
]


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_commands_are_taken(words):
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "softmask-fast":
        assert cli._parser().parse_args(words[1:]).run
    else:
        assert words[1] == "softmask_fast/train.py" and (ROOT / words[1]).exists()
        optional = [word for word in words[2:] if word.startswith("[")]
        assert optional or parse_arguments(words[2:])


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
            assert anchor in slugs, target

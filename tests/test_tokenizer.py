"""Tokenizers: trained deterministically, kept in a folder, and a clear error when there is none."""

import random
import subprocess
import sys

import huggingface_hub.constants
import pytest

from softmask_fast.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer, without_punctuation
from softmask_fast.errors import UsageError

CAPTIONS = [
    "a red circle left of a small blue square",
    "a large green star above a pink heart",
    "Two dogs, running!",
] * 3


def test_words_seen_often_become_one_piece():
    tokenizer = train_tokenizer(CAPTIONS, 200)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("A RED circle.")["input_ids"])
    assert pieces == ["[CLS]", "a", "red", "circle", "[UNK]", "[SEP]"]  # the full stop was never seen
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    assert len(tokenizer) <= 200


def test_training_is_the_same_in_every_order_and_process():
    code = (
        "import random, sys; from softmask_fast.data.tokenizer import train_tokenizer\n"
        f"captions = {CAPTIONS!r}; random.Random(int(sys.argv[1])).shuffle(captions)\n"
        "print(sorted(train_tokenizer(captions, 120).get_vocab().items()))"
    )
    runs = [subprocess.run([sys.executable, "-c", code, str(i)], capture_output=True, text=True) for i in range(2)]
    assert runs[0].stdout == runs[1].stdout != "", runs[0].stderr
    shuffled = random.Random(3).sample(CAPTIONS, len(CAPTIONS))
    assert str(sorted(train_tokenizer(shuffled, 120).get_vocab().items())) == runs[0].stdout.strip()


def test_a_saved_tokenizer_is_loaded_as_it_was(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, 200)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "a small heart left of unknown things"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.mask_token_id, loaded.pad_token_id) == (4, 0)
    assert loaded.decode(loaded("two dogs, running")["input_ids"], skip_special_tokens=True) == "two dogs, running"


def pre_caption(caption):
    """What ALBEF's data sets make of a caption, but for its cut after a number of words."""
    caption = "".join(letter for letter in caption.lower() if letter not in ",.'!?\"()*#:;~")
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(caption.split())


def test_punctuation_is_dropped_as_albef_does_where_asked(tmp_path):
    texts = ["A man's (red) well-known t-shirt, #1!", "<Person> runs: up/down; fast?", 'two  "dogs" ~ * .']
    plain = train_tokenizer([*CAPTIONS, *texts], 200)
    without_punctuation(plain).save_pretrained(tmp_path)
    dropping = load_tokenizer(str(tmp_path))
    for text in texts:
        assert dropping(text)["input_ids"] == plain(pre_caption(text))["input_ids"] != plain(text)["input_ids"]
    found = dropping(texts[0], return_offsets_mapping=True)
    words = [texts[0][start:end] for start, end in found["offset_mapping"]]
    assert "".join(words).lower() == "amansredwellknowntshirt1"  # each letter where it stands in the caption
    assert dropping.all_special_ids == plain.all_special_ids


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="(?s)no-such-owner/no-such.*save_pretrained.*--text_weights random"):
        load_tokenizer("no-such-owner/no-such")
    with pytest.raises(UsageError, match="cannot load"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UsageError, match="captions: expected at least one word"):
        train_tokenizer(["", "  "])
    with pytest.raises(UsageError, match="vocab_size: expected at least"):
        train_tokenizer(CAPTIONS, 10)

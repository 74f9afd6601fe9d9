"""BERT WordPiece tokenisers: loaded from a folder or the hub, or trained on the captions at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are 0 to 4 in a trained vocabulary
MAX_LETTERS = 1000


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Loads a tokeniser from a local folder, or by its name on the Hugging Face hub.

    Raises ValueError when it cannot be had or is no BERT-style tokeniser.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        where = (
            "the local folder" if Path(name_or_path).is_dir() else "neither a local folder nor on the hub from here:"
        )
        raise ValueError(
            f"tokenizer: cannot load {name_or_path!r} ({where} {name_or_path}). Give a folder written by "
            f"save_pretrained() (with tokenizer.json), download one where there is a network (hf download "
            f"google-bert/bert-base-uncased), or leave the name empty to train one on the captions. Reason: {error}"
        ) from error
    missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    if missing or not tokenizer.is_fast:
        raise ValueError(f"tokenizer: {name_or_path!r} is no fast BERT WordPiece tokeniser (it lacks {missing})")
    return tokenizer


def train_tokenizer(captions: Iterable[str], vocab_size: int = 30522) -> PreTrainedTokenizerFast:
    """Learns a lower-case BERT WordPiece vocabulary of at most `vocab_size` entries, special tokens included.

    Deterministic: the same captions, in any order, give the same vocabulary. Characters beyond the `MAX_LETTERS` most
    frequent become [UNK]. Raises ValueError when there is no word, or no room for the letters.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    texts = [normalizer.normalize_str(caption) for caption in captions]
    counts = Counter("".join(char for text in texts for char in text if not char.isspace()))
    if not counts:
        raise ValueError("captions: there is no word to train a tokenizer on")
    letters = sorted(sorted(counts, key=lambda char: (-counts[char], char))[:MAX_LETTERS])
    # The trainer numbers "##x" in the order of a hash map and breaks ties by number: named beforehand, they stay put.
    fixed = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    if vocab_size < len(fixed):
        raise ValueError(f"vocab_size must be at least {len(fixed)} for the {len(letters)} letters, got {vocab_size}")
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=fixed, limit_alphabet=len(letters), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)

    vocabulary = learner.get_vocab()
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )

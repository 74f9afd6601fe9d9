"""BERT WordPiece tokenizers: loaded from a folder or the hub, or trained on captions."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from softmask_fast.errors import UsageError, one_line
from softmask_fast.hub import from_hub
from softmask_fast.utils import read_json

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are 0 to 4 in a trained vocabulary
MAX_LETTERS = 1000
# What `pre_caption` of ALBEF (and almost that of BLIP) does to captions, apart from lower case and single spaces.
PREPARED = ((r"[,.'!?\"()*#:;~]", ""), ("[-/]", " "), ("(?i)<person>", "person"))


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a local folder, or by its name on the Hugging Face hub.

    Raises:
        UsageError: If it cannot be loaded, or is not a fast BERT WordPiece tokenizer.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        _check_files(folder)
    options = {"use_fast": True, "trust_remote_code": False, "local_files_only": folder.is_dir()}
    instead = (
        "pass a folder written by save_pretrained() (with tokenizer.json), copy the hub's cache from a machine with a "
        "network (`hf download google-bert/bert-base-uncased`), or --text_weights random to train one on the captions"
    )
    try:
        tokenizer = from_hub(
            name_or_path, "tokenizer", instead, lambda: AutoTokenizer.from_pretrained(name_or_path, **options)
        )
    except UsageError:
        raise
    except Exception as error:  # the tokenizers library raises plain `Exception`
        raise UsageError(f"tokenizer: cannot load {name_or_path!r} ({one_line(error)}); {instead}") from error
    known = set(tokenizer.get_vocab()).intersection(tokenizer.all_special_tokens)
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    if missing or not tokenizer.is_fast:
        raise UsageError(f"tokenizer: {name_or_path!r} is not a fast BERT WordPiece tokenizer (it lacks {missing})")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # the arguments of `encode_text`
    return tokenizer


def without_punctuation(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that first drops punctuation, as ALBEF's data sets do. Offsets stay those of the original caption.

    `save_pretrained` stores this step, so that a model always gets the kind of text it was trained on.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    steps = [normalizers.Replace(Regex(pattern), text) for pattern, text in PREPARED]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map)


def _check_files(folder: Path) -> None:
    """Raises UsageError for a tokenizer's files that are damaged or ask to run code: a folder is data."""
    for path in (folder / name for name in ("tokenizer.json", "tokenizer_config.json", "config.json")):
        if not path.is_file():
            continue
        content = read_json(path, "tokenizer")
        if not isinstance(content, dict):
            raise UsageError(f"tokenizer: {path}: expected a mapping, got {type(content).__name__}")
        code = content.get("auto_map")
        if code and not (isinstance(code, dict) and "AutoTokenizer" not in code):
            raise UsageError(
                f"tokenizer: {path}: auto_map: expected a tokenizer without its own code, got {code!r:.100}"
            )
        if path.name == "tokenizer.json":
            try:
                Tokenizer.from_str(path.read_text(encoding="utf-8"))
            except Exception as error:
                raise UsageError(f"tokenizer: {path} cannot be read: {one_line(error)}") from error


def train_tokenizer(captions: Iterable[str], vocab_size: int = 30522) -> PreTrainedTokenizerFast:
    """Trains a lowercase BERT WordPiece tokenizer with at most `vocab_size` entries, including special tokens.

    The same captions, in any order, give the same vocabulary. Characters beyond the `MAX_LETTERS` most frequent become
    [UNK].

    Raises:
        UsageError: If there is no word, or the letters do not fit into the vocabulary.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    texts = [normalizer.normalize_str(caption) for caption in captions]
    counts = Counter("".join(char for text in texts for char in text if not char.isspace()))
    if not counts:
        raise UsageError("captions: expected at least one word to train a tokenizer on, got none")
    letters = sorted(sorted(counts, key=lambda char: (-counts[char], char))[:MAX_LETTERS])
    # The trainer would number "##x" in the order of a hash map and break ties by number. Listing them fixes their ids.
    fixed = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    if vocab_size < len(fixed):
        raise UsageError(f"vocab_size: expected at least {len(fixed)} for {len(letters)} letters, got {vocab_size}")
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
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip

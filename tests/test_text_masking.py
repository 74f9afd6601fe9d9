"""BERT masking: proportions, specials untouched, labels that restore the caption."""

import numpy as np
import pytest

from softmask_fast.data.seeding import keyed_generator
from softmask_fast.data.text_masking import TextMasker
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.errors import UsageError

TEXT = "a red circle left of a small blue square, unbelievable !"
TOKENIZER = train_tokenizer([TEXT.replace("unbelievable", "un able ! v")] * 3, 150)
IDS = np.array(TOKENIZER(TEXT)["input_ids"])


def test_proportions_and_labels():
    masker = TextMasker(TOKENIZER, 0.15)
    kinds = {"mask": 0, "random": 0, "same": 0}
    chosen = 0
    for i in range(4000):
        masked = masker.mask(IDS, keyed_generator(i))
        restored = masked.ids.copy()
        restored[masked.positions] = masked.labels
        assert (restored == IDS).all()
        assert len(masked.positions) >= 1 and (np.diff(masked.positions) > 0).all()
        assert not np.isin(masked.labels, TOKENIZER.all_special_ids).any()
        now = masked.ids[masked.positions]
        kinds["mask"] += (now == TOKENIZER.mask_token_id).sum()
        kinds["same"] += (now == masked.labels).sum()
        kinds["random"] += ((now != masked.labels) & (now != TOKENIZER.mask_token_id)).sum()
        assert not np.isin(now[now != TOKENIZER.mask_token_id], TOKENIZER.all_special_ids).any()
        chosen += len(masked.positions)
    pieces = len(IDS) - 2
    # one is chosen where chance chose none
    assert chosen / 4000 == pytest.approx(0.15 * pieces + 0.85**pieces, rel=0.03)
    assert kinds["mask"] / chosen == pytest.approx(0.8, abs=0.02)
    assert kinds["random"] / chosen == pytest.approx(0.1, abs=0.02)
    assert kinds["same"] / chosen == pytest.approx(0.1, abs=0.02)


def test_the_word_is_a_first_piece_that_is_not_masked():
    masker = TextMasker(TOKENIZER, 0.15)
    pieces = TOKENIZER.convert_ids_to_tokens(IDS)
    words = {i for i, piece in enumerate(pieces) if piece.isalnum()}
    assert any(piece.startswith("##") for piece in pieces) and "," in pieces
    seen = set()
    for i in range(500):
        masked = masker.mask(IDS, keyed_generator(i))
        if not words <= set(masked.positions):
            assert masked.word_index not in masked.positions
        seen.add(masked.word_index)
    assert seen == words


def test_the_same_names_give_the_same_mask():
    masker = TextMasker(TOKENIZER, 0.3)
    first, again, other = (masker.mask(IDS, keyed_generator(*names)) for names in [(1, "a"), (1, "a"), (1, "b")])
    assert (first.ids == again.ids).all() and first.word_index == again.word_index
    assert not (first.ids == other.ids).all()


@pytest.mark.parametrize("probability", [0.0, 0.15, 1.0])
def test_short_captions(probability):
    masker = TextMasker(TOKENIZER, probability)
    cls, sep, unknown = TOKENIZER.cls_token_id, TOKENIZER.sep_token_id, TOKENIZER.unk_token_id
    a = TOKENIZER.convert_tokens_to_ids("a")
    one = masker.mask(np.array([cls, a, sep]), keyed_generator(0))
    assert one.word_index == 1 and list(one.positions) == ([1] if probability else [])
    nothing = masker.mask(np.array([cls, unknown, sep]), keyed_generator(0))
    assert nothing.word_index == 1 and len(nothing.positions) == 0
    assert masker.mask(np.array([cls, sep]), keyed_generator(0)).word_index == 1


def test_a_wrong_probability_is_named():
    with pytest.raises(UsageError, match="mask_probability"):
        TextMasker(TOKENIZER, 1.5)

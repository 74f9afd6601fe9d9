"""The public methods, called with what users have."""

from pathlib import Path

import pytest
import torch

from softmask_fast.errors import UsageError
from softmask_fast.model.export import read_model

STORED = Path(__file__).parent / "stored" / "run" / "model"


def test_a_tokenizers_own_mask_is_taken():
    model, tokenizer = read_model(STORED)
    text = tokenizer(["a red circle", "two blue squares left of a dog"], padding=True, return_tensors="pt")
    assert text["attention_mask"].dtype == torch.int64 and not text["attention_mask"].all()
    mask = text["attention_mask"].bool()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for ours, plain in zip(model.encode_text(**text), model.encode_text(text["input_ids"], mask), strict=True):
            assert torch.equal(ours, plain)
        for method in (model.match_logits, model.mlm_logits, model.word_relevance):
            found = method(pixels, text["input_ids"], text["attention_mask"])
            assert torch.equal(found, method(pixels, text["input_ids"], mask))


@pytest.mark.parametrize("size", [(2, 3, 32, 16), (3, 16, 16), (2, 1, 16, 16), (2, 16, 16, 3)])
def test_images_of_another_size_are_named(size):
    model, _ = read_model(STORED)
    with pytest.raises(UsageError, match=r"^pixels: expected size \(B, 3, 16, 16\), got \("):
        model.encode_image(torch.zeros(size))

"""Layers of the encoders that serve the contrast alone: what reads them, and how much of its gradient goes further."""

import pytest
import torch
import torch.nn.functional as F
from small_models import TWO_HEADS, small_model, small_tokenizer

from softmask_fast.config import ModelConfig, ObjectiveConfig
from softmask_fast.errors import UsageError
from softmask_fast.model.convert_albef import albef_tokenizer
from softmask_fast.model.packing import Packing
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.train import build_tokenizer
from softmask_fast.training.options import make_config
from softmask_fast.training.schedule import Schedule

OWN = ("vision.vit.blocks.2.", "vision.vit.norm.", "text.bert.encoder.layer.1.", "image_proj", "text_proj")


def make_model(**options):
    torch.manual_seed(0)
    branch = dict(vision_contrast_blocks=1, text_contrast_layers=1)
    options = TWO_HEADS | dict(vision_depth=3, text_layers=2) | branch | options
    return small_model(small_tokenizer(), **options).double().eval()


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(9) < torch.tensor([[9], [5], [7]])
    ids = torch.randint(5, 40, (3, 9), generator=generator) * mask
    return torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64), ids, mask


def features(model: VisionLanguageModel):
    pixels, ids, mask = make_inputs()
    return model.encode_image(pixels)[1], model.encode_text(ids, mask)[1]


def contrast_gradients(model):
    image, text = features(model)
    torch.einsum("id,td->it", image, text).diagonal().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def change(model, prefixes):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(prefixes):
                parameter.add_(0.1)


def test_fusion_reads_the_tokens_before_them():
    model = make_model()
    pixels, ids, mask = make_inputs()
    logits, before = model.match_logits(pixels, ids, mask), features(model)
    relevance = model.word_relevance(pixels, ids, mask)
    change(model, OWN)
    assert torch.equal(logits, model.match_logits(pixels, ids, mask))
    assert torch.equal(relevance, model.word_relevance(pixels, ids, mask))
    assert not any(torch.allclose(old, new) for old, new in zip(before, features(model), strict=True))
    assert torch.equal(model.encode_image(pixels)[0], model.vision(pixels))
    assert torch.equal(model.encode_text(ids, mask)[0], model.text(ids, mask))


def test_their_gradient_stops_or_is_scaled():
    shared, scaled, stopped = (contrast_gradients(make_model(contrast_gradient=share)) for share in (1.0, 0.3, 0.0))
    assert all(name.startswith(OWN) for name in stopped)
    assert any(name.startswith("vision.vit.blocks.0.") for name in shared)
    for name, gradient in shared.items():
        share = 1.0 if name.startswith(OWN) else 0.3
        torch.testing.assert_close(scaled[name], share * gradient)
        if name in stopped:
            torch.testing.assert_close(stopped[name], gradient)


def test_a_model_without_them_has_the_same_parameters():
    plain = make_model(vision_contrast_blocks=0, text_contrast_layers=0)
    assert plain.state_dict().keys() == make_model().state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(text_contrast_layers=2), "text_contrast_layers: expected fewer than text_layers=2, got 2"),
        (dict(vision_contrast_blocks=3), "vision_contrast_blocks: expected fewer than the 3 blocks of .*, got 3"),
        (dict(vision_contrast_blocks=-1), "vision_contrast_blocks: expected at least 0, got -1"),
        (dict(contrast_gradient=1.5), r"contrast_gradient: expected in \[0, 1\], got 1.5"),
        (dict(contrast_pooling="max"), "contrast_pooling: expected 'cls' or 'mean', got 'max'"),
    ],
)
def test_refuses_impossible_numbers(options, message):
    with pytest.raises(UsageError, match=message):
        make_model(**options)


def test_negatives_become_hard_at_their_share_of_the_run():
    schedule = Schedule.of(make_config("tiny", hard_negatives=True, hard_negatives_start=0.4), 10, 100)
    assert [schedule.settings(step, 0, 0).hard_negatives for step in range(10)] == [False] * 4 + [True] * 6
    with pytest.raises(UsageError, match="hard_negatives_start: expected 0 with gathered_negatives, got 0.4"):
        ObjectiveConfig(hard_negatives_start=0.4, gathered_negatives=True)


@pytest.mark.parametrize("branch", [0, 1])
def test_the_contrast_reads_cls_or_the_mean_of_the_tokens(branch):
    options = dict(vision_contrast_blocks=branch, text_contrast_layers=branch)
    pixels, ids, mask = make_inputs()
    for pooling in ("cls", "mean"):
        model = make_model(contrast_pooling=pooling, **options)
        image, text = model.vision(pixels), model.text(ids, mask)
        if branch:
            image = model.vision.vit.norm(model.vision.vit.blocks[2](image))
            packing = Packing.of(mask)
            text = packing.pad(model.text.bert.encoder.layer[1](packing.pack(text), packing, "auto"))
        one = (image[:, 0], text[:, 0]) if pooling == "cls" else (image.mean(1), mean_of_rows(text, mask))
        expected = [
            F.normalize(model.image_projection(one[0]), dim=-1),
            F.normalize(model.text_projection(one[1]), dim=-1),
        ]
        for ours, theirs in zip(features(model), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def mean_of_rows(text, mask):
    return torch.stack([row[kept].mean(0) for row, kept in zip(text, mask, strict=True)])


def test_matching_sees_the_image_through_the_words_alone():
    model = make_model(match_through_words=True)
    pixels, ids, mask = make_inputs()
    others = pixels.roll(1, 0)
    assert not torch.allclose(model.match_logits(pixels, ids, mask), model.match_logits(others, ids, mask))
    wordless, ends = ids[:, :2], torch.ones(3, 2, dtype=torch.bool)  # [CLS] and [SEP]
    assert torch.equal(model.match_logits(pixels, wordless, ends), model.match_logits(others, wordless, ends))
    relevance = model.word_relevance(pixels, ids, mask)
    for row, length in zip(relevance, mask.sum(1), strict=True):
        assert not row[0].any() and not row[length - 1 :].any() and row[1 : length - 1].flatten(1).any(1).all()
    last = model.config.fusion_layers - 1
    with pytest.raises(UsageError, match=f"layer: expected a fusion layer from 0 to {last - 1}, got {last}"):
        model.word_relevance(pixels, ids, mask, last)


def test_matching_through_words_needs_sep_behind_the_last(tmp_path, one_rank):
    """ALBEF's tokenizer has none: its last word would not see the image."""
    config, tokenizer = make_config("tiny"), small_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert len(build_tokenizer(config, None, tmp_path)) == len(tokenizer)
    albef_tokenizer(tokenizer).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="match_through_words: expected a tokenizer that adds"):
        build_tokenizer(config, None, tmp_path)


def test_the_paper_has_none_of_it():
    model, objectives = ModelConfig(), ObjectiveConfig()
    assert not model.match_through_words
    assert model.vision_contrast_blocks == model.text_contrast_layers == 0 and model.contrast_pooling == "cls"
    assert objectives.hard_negatives and not objectives.hard_negatives_start and not objectives.soft_masked_negatives

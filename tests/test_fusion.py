"""The fusion encoder against the plain way: full attention maps, re-projected images, full autograd."""

import pytest
import torch
from plain_attention import plain_attention

from softmask_fast.model.fusion import CrossAttention
from softmask_fast.model.packing import Packing
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.ops import word_soft_mask
from softmask_fast.training.options import make_config


@pytest.fixture
def model():
    torch.manual_seed(1)
    options = dict(vocab_size=50, image_size=32, fusion_layers=3, soft_mask_layer=1, match_through_words=False)
    model = VisionLanguageModel(make_config("tiny", **options).model).double().eval()
    for layer in model.fusion.layers:  # zero in a new model, which would hide whether the Grad-CAM sees it
        torch.nn.init.normal_(layer.cross_attention.value_bias, std=0.5)
    return model


@pytest.fixture
def pairs(model):
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    ids = torch.randint(5, 50, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 5:] = False
    return pixels, ids, mask


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_word_relevance_is_the_gradcam_of_full_attention_maps(model, pairs, layer, monkeypatch):
    pixels, ids, mask = pairs
    relevance = model.word_relevance(pixels, ids, mask, layer)
    maps = {}
    monkeypatch.setattr(CrossAttention, "forward", plain_attention(maps))
    texts, _ = model.encode_text(ids, mask)
    score = model.matched_score(model.fusion(texts, mask, model.fusion.keys_values(model.vision(pixels)))[:, 0]).sum()
    attention = maps[model.fusion.layers[layer].cross_attention]
    (gradient,) = torch.autograd.grad(score, attention)
    expected = (attention * gradient.clamp(min=0)).mean(1)
    assert expected.abs().max() > 0
    torch.testing.assert_close(relevance.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_sequences_share_the_keys_of_their_image(model, pairs):
    pixels, ids, mask = pairs
    images, _ = model.encode_image(pixels)
    texts, _ = model.encode_text(ids, mask)
    image_index = torch.tensor([2, 0, 0, 1, 2])
    rows = torch.tensor([0, 1, 2, 0, 1])
    shared = model.match_tokens(images, texts[rows], mask[rows], image_index)
    gathered = model.match_tokens(images[image_index], texts[rows], mask[rows])
    torch.testing.assert_close(shared, gathered)


def test_rows_beyond_the_last_token_change_nothing(model, pairs):
    """On a GPU there are more rows than tokens, as nobody waits for their number."""
    pixels, ids, mask = pairs
    images, _ = model.encode_image(pixels)
    texts, _ = model.encode_text(ids, mask)
    exact = Packing.of(mask)
    positions = (~mask.flatten()).to(torch.uint8).argsort(stable=True)
    boundaries = torch.cat([exact.boundaries, torch.tensor([mask.numel()], dtype=torch.int32)])
    assert len(positions) > len(exact.positions)
    outputs, gradients = [], []
    for packing in (exact, Packing(mask, positions, boundaries)):
        leaf = texts.detach().requires_grad_()
        outputs.append(model.fusion(leaf, mask, model.fusion.keys_values(images.detach()), packing=packing)[mask])
        parameters = [layer.cross_attention.value_bias for layer in model.fusion.layers]
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), [leaf, *parameters]))
    torch.testing.assert_close(*outputs)
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair)


def test_keep_is_attention_over_soft_masked_features(model, pairs):
    pixels, ids, mask = pairs
    images, _ = model.encode_image(pixels)
    texts, _ = model.encode_text(ids, mask)
    keys_values = model.fusion.keys_values(images)
    inputs = model.relevance_inputs(texts, mask, keys_values, layer=1)
    word = torch.tensor([1, 2, 3])
    masked_images, keep = word_soft_mask(*inputs, word, images, prefix_tokens=model.prefix_tokens)
    assert keep[:, model.prefix_tokens :].amin() == 0 and (keep[:, : model.prefix_tokens] == 1).all()
    fused = model.fusion(texts, mask, keys_values, keep=keep.double())
    expected = model.fusion(texts, mask, model.fusion.keys_values(masked_images))
    torch.testing.assert_close(fused, expected, rtol=1e-6, atol=1e-7)


def test_padding_changes_nothing(model, pairs):
    pixels, ids, mask = pairs
    logits = model.match_logits(pixels[1:2], ids[1:2], mask[1:2])
    torch.testing.assert_close(model.match_logits(pixels[1:2], ids[1:2, :5], mask[1:2, :5]), logits)


def test_relevance_leaves_no_trace(model, pairs):
    pixels, ids, mask = pairs
    model.train()
    model.word_relevance(pixels, ids, mask)
    assert model.training and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layer_out_of_range(model, pairs):
    with pytest.raises(ValueError, match="layer: expected a fusion layer from 0 to 2, got 3"):
        model.word_relevance(*pairs, layer=3)

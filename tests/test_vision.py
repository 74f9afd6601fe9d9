"""The image encoder's stem of convolutions."""

import pytest
import torch
from small_models import small_model, small_tokenizer

from softmask_fast.errors import UsageError
from softmask_fast.model.export import read_model, save_model
from softmask_fast.model.momentum import MomentumCopy
from softmask_fast.model.vision import ConvolutionalStem

STEM = dict(vision_stem="convolutions")


@pytest.mark.parametrize("patch_size", [2, 4, 16])
def test_a_stem_has_the_grid_of_patches_and_sees_around_each(patch_size):
    stem = ConvolutionalStem(48, patch_size).double()
    pixels = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    tokens = stem(pixels)
    assert tokens.shape == (2, 48, 64 // patch_size, 32 // patch_size)
    pixels[1] = pixels[0]
    assert torch.equal(*stem(pixels))  # norms do not mix images


def test_a_model_with_a_stem_trains_and_comes_back_from_a_folder(tmp_path):
    tokenizer = small_tokenizer()
    model = small_model(tokenizer, **STEM)
    stem = model.vision.vit.patch_embed.proj
    pixels = torch.randn(2, 3, 32, 32)
    model.encode_image(pixels)[1].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in stem.parameters())
    averaged = MomentumCopy(model, 0.0)
    with torch.no_grad():
        for weight in stem.parameters():
            weight.add_(0.1)
    averaged.update(model.named_parameters())
    save_model(model, tokenizer, tmp_path / "model")
    loaded, _ = read_model(tmp_path / "model")
    with torch.no_grad():
        expected = model.eval().encode_image(pixels)[0]
        assert torch.equal(loaded.encode_image(pixels)[0], expected)
        assert torch.equal(averaged.model.encode_image(pixels)[0], expected)


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(vision_stem="conv"), "vision_stem: expected 'patches' or 'convolutions', got 'conv'"),
        (dict(STEM, vision_weights="timm"), "vision_weights: expected 'random' with a stem of convolutions, got .*"),
        (
            dict(STEM, image_size=36, vision_patch_size=12),
            "vision_patch_size: expected a power of 2 that divides vision_width=64, for a stem of convolutions, got 12",
        ),
        (
            dict(STEM, vision_width=36),
            "vision_patch_size: expected a power of 2 that divides vision_width=36, for a stem of convolutions, got 8",
        ),
    ],
)
def test_what_a_stem_cannot_be(options, expected):
    with pytest.raises(UsageError, match=f"^{expected}$"):
        small_model(small_tokenizer(), **options)

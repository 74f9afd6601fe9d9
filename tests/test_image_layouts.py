"""Image tokens mapped back onto the pictures, family by family."""

from types import SimpleNamespace

import pytest
import torch
from small_decoders import FAMILIES, IMAGE, small_batch, small_decoder

from softmask_fast.adapters.image_layouts import Layout, Part, find_layouts, on_picture

# Of the two images of `small_batch`: (rows, columns, box, tokens that end a row) of every part.
WHOLE = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
EXPECTED = {
    "llava": [[(4, 4, WHOLE, 0)], [(4, 4, WHOLE, 0)]],
    "llava_next": [[(4, 4, WHOLE, 0), (8, 8, WHOLE, 1)], [(4, 4, WHOLE, 0), (2, 8, WHOLE, 1)]],
    "qwen2_vl": [[(2, 2, WHOLE, 0)], [(2, 4, WHOLE, 0)]],
    "internvl": [[(2, 2, WHOLE, 0)], [(2, 2, WHOLE, 0), (2, 2, LEFT, 0), (2, 2, RIGHT, 0)]],
    "paligemma": [[(4, 4, WHOLE, 0)], [(4, 4, WHOLE, 0)]],
    "idefics3": [[(2, 2, WHOLE, 0)], [(2, 2, WHOLE, 0), (2, 2, LEFT, 0), (2, 2, RIGHT, 0)]],
    "gemma3": [[(2, 2, WHOLE, 0)], [(2, 2, WHOLE, 0)]],
}
SAME = {"llava_onevision": "llava_next", "qwen2_5_vl": "qwen2_vl", "qwen3_vl": "qwen2_vl", "smolvlm": "idefics3"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model, (batch, _) = small_decoder(family), small_batch(family)
    tokens = batch["input_ids"] == IMAGE
    found = find_layouts(model, batch, tokens, [(16, 16), (16, 32)])
    parts = [[(p.rows, p.columns, p.box, p.row_ends) for p in image.parts] for [image] in found]
    assert parts == EXPECTED[SAME.get(family, family)]
    for sample, [image] in zip(tokens, found, strict=True):
        assert image.tokens == sample.sum()
        places = [  # every token is in one part, or ends a row
            part.first + row * (part.columns + part.row_ends) + column
            for part in image.parts
            for row in range(part.rows)
            for column in range(part.columns + part.row_ends)
        ]
        assert sorted(places) == list(range(image.tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_in_a_sample(family):
    """Both images in one sample, with a token between, as processors make them."""
    model, (batch, _) = small_decoder(family), small_batch(family)
    ids = torch.cat([batch["input_ids"].flatten(), torch.tensor([7])])[None]
    [first], [second] = find_layouts(model, batch, batch["input_ids"] == IMAGE, None)
    [images] = find_layouts(model, batch | dict(input_ids=ids), ids == IMAGE, None)
    assert images == [first, second]


def test_pixtral_rows():
    """LLaVA with Pixtral, and Mistral 3: any grid, each row ended by a token that is not the image's."""
    vision = SimpleNamespace(model_type="pixtral", patch_size=4)
    inputs = {"image_sizes": torch.tensor([[8, 12], [16, 8]])}
    for kind, options, grids in (
        ("llava", {}, [(2, 3), (4, 2)]),
        ("mistral3", {"spatial_merge_size": 2}, [(1, 1), (2, 1)]),
    ):
        model = SimpleNamespace(config=SimpleNamespace(model_type=kind, vision_config=vision, **options))
        rows = [[True] * columns + [False] for rows, columns in grids for _ in range(rows)]
        [images] = find_layouts(model, inputs, torch.tensor([sum(rows, [])]), None)
        assert [(image.parts[0].rows, image.parts[0].columns) for image in images] == grids


def test_relevance_is_spread_evenly_and_added():
    layout = Layout(4 + 6, (Part(0, 2, 2), Part(4, 1, 2, (0.0, 0.0, 0.5, 1.0), row_ends=1)))
    maps = torch.tensor([[1.0, 2, 3, 4, 10, 20, 99, 0, 0, 0]])
    picture = on_picture(maps, layout)
    assert picture.tolist() == [[[11, 22], [3, 4]]]
    assert on_picture(maps, layout, (4, 4)).sum() == 40
    wide = on_picture(maps, Layout(10, (Part(0, 2, 2),)), (3, 2))[0]
    torch.testing.assert_close(wide, torch.tensor([[2 / 3, 4 / 3], [4 / 3, 2], [2, 8 / 3]]))


def test_mistakes_are_named():
    model, (batch, _) = small_decoder("qwen2_vl"), small_batch("qwen2_vl")
    with pytest.raises(ValueError, match="image_tokens: expected 12 for the images of sample 0, got 18"):
        find_layouts(model, batch, torch.ones(2, 18, dtype=torch.bool), None)
    model.config.model_type = "unknown"
    with pytest.raises(ValueError, match=r"image grid is known \(gemma3, .*\), got unknown: use `maps` alone"):
        find_layouts(model, batch, batch["input_ids"] == IMAGE, None)

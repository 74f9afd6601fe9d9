"""ALBEF's checkpoints against a plain ALBEF."""

import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_albef import (
    EMBED,
    FUSION_LAYER,
    GRID,
    IMAGE_WIDTH,
    LAYERS,
    PATCH,
    POSITIONS,
    TEXT_WIDTH,
    VOCABULARY,
    Albef,
)

from softmask_fast.config import ObjectiveConfig
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.evaluation.heatmaps import explain
from softmask_fast.model.convert_albef import albef_state, load_albef, load_albef_state, save_albef
from softmask_fast.model.export import read_model
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.training.options import make_config


def our_answers(model, pixels, ids, mask):
    image, image_features = model.encode_image(pixels)
    text, text_features = model.encode_text(ids, mask)
    return {
        "image tokens": image,
        "image features": image_features,
        "text tokens": text,
        "text features": text_features,
        "ITM logits": model.match_logits(pixels, ids, mask),
        "MLM logits": model.mlm_logits(pixels, ids, mask),
    } | {f"Grad-CAM {i}": model.word_relevance(pixels, ids, mask, i) for i in range(LAYERS - FUSION_LAYER)}


def bicubic_weights(old, new, a=-0.75):
    """The (new, old) matrix of cubic convolution (Keys, 1981) between the pixel centres, borders repeated."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - tap)
            near, far = ((a + 2) * x - (a + 3)) * x * x + 1, a * (((x - 5) * x + 8) * x - 4)
            weights[row, min(max(tap, 0), old - 1)] += near if x <= 1 else far
    return weights


def resized(albef, grid):
    """The same weights for another size of the image."""
    state = albef.state_dict()
    resize = bicubic_weights(GRID, grid)
    for name in ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed"):
        first, patches = state[name][:, :1], state[name][:, 1:].double().unflatten(1, (GRID, GRID))
        patches = torch.einsum("ri,cj,bijw->brcw", resize, resize, patches).flatten(1, 2)
        state[name] = torch.cat([first, patches.to(first.dtype)], 1)
    other = Albef(grid).eval()
    other.load_state_dict(state)
    return other


@pytest.fixture(scope="module")
def albef():
    torch.manual_seed(2)
    return Albef().eval()


@pytest.fixture
def checkpoint(albef, tmp_path):
    torch.save({"model": albef.state_dict(), "optimizer": {"state": {}}, "epoch": 29}, tmp_path / "ALBEF.pth")
    return tmp_path / "ALBEF.pth"


def pairs(grid=GRID):
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 5:] = False
    return torch.randn(3, 3, grid * PATCH, grid * PATCH), torch.randint(5, VOCABULARY, (3, 9)), mask


def fine_tuned(albef):
    """The state dict as retrieval fine-tuning writes it: no MLM head, no `.bert`."""
    state = {name: tensor for name, tensor in albef.state_dict().items() if ".cls." not in name}
    return {re.sub(r"^text_encoder(_m)?\.bert\.", r"text_encoder\1.", name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("grid", [GRID, 6, 3])
def test_every_answer_is_albefs(albef, checkpoint, grid):
    model = load_albef(checkpoint, image_size=None if grid == GRID else grid * PATCH)
    pixels, ids, mask = pairs(grid)
    ours, theirs = our_answers(model, pixels, ids, mask), resized(albef, grid).answers(pixels, ids, mask)
    assert ours.keys() == theirs.keys() and not model.training
    for what, expected in theirs.items():
        actual = ours[what]
        if expected.shape[:2] == mask.shape:  # of text tokens: padding has no meaning
            actual, expected = actual[mask], expected[mask]
        # a Grad-CAM is small: 1e-5 of its own largest value
        allowed = 1e-5 * (expected.abs().max() if "Grad-CAM" in what else 1)
        assert actual.shape == expected.shape and (actual - expected).abs().max() <= allowed > 0, what
    assert model.temperature.item() == pytest.approx(albef.temp.item(), rel=1e-6)


def test_sizes_come_from_the_tensors(albef):
    config = load_albef_state(albef.state_dict())[0].config
    expected = dict(
        image_size=GRID * PATCH, vision_patch_size=PATCH, vision_width=IMAGE_WIDTH, vision_depth=2, vision_heads=2,
        vision_mlp_ratio=4, text_width=TEXT_WIDTH, text_heads=3, text_mlp_ratio=2, text_positions=POSITIONS,
        text_layers=FUSION_LAYER, fusion_layers=LAYERS - FUSION_LAYER, vocab_size=VOCABULARY, embed_dim=EMBED,
        max_tokens=30, soft_mask_layer=1,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_unused_tensors_are_logged(albef, tmp_path, caplog):
    state = albef.state_dict() | {"cls_head.0.weight": torch.zeros(2, 2)}
    _, report = load_albef_state(state)
    momentum = [name for name in state if name.split(".")[0].endswith("_m")]
    queues = ["image_queue", "text_queue", "queue_ptr"]
    keys = [f"text_encoder.bert.encoder.layer.{i}.crossattention.self.key.bias" for i in range(FUSION_LAYER, LAYERS)]
    assert report.unplaced == sorted([*momentum, *queues, *keys, "cls_head.0.weight"]) and not report.absent
    torch.save({"model": state}, tmp_path / "odd.pth")
    with caplog.at_level(logging.WARNING):
        load_albef(tmp_path / "odd.pth")
    assert f"queues (3), momentum copy ({len(momentum)}), key biases" in caplog.text and "cls_head (1)" in caplog.text


def test_a_fine_tuned_checkpoint_lacks_only_the_language_head(albef, tmp_path, caplog):
    torch.save(fine_tuned(albef), tmp_path / "refcoco.pth")  # the state dict itself, as this one was released
    model = load_albef(tmp_path / "refcoco.pth")
    assert "initialized at random: text_encoder.cls.predictions." in caplog.text and "itm_head" not in caplog.text
    inputs = pairs()
    ours, theirs = our_answers(model, *inputs), albef.answers(*inputs)
    for what in theirs.keys() - {"MLM logits", "text tokens", "Grad-CAM 0", "Grad-CAM 1", "Grad-CAM 2"}:
        torch.testing.assert_close(ours[what], theirs[what], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours["MLM logits"], theirs["MLM logits"], atol=1e-2)
    state = {name: tensor for name, tensor in fine_tuned(albef).items() if not name.startswith("itm_head.")}
    assert {"itm_head.weight", "itm_head.bias"} <= set(load_albef_state(state)[1].absent)


def test_the_way_back_is_exact(albef, checkpoint, tmp_path):
    model, teacher = load_albef(checkpoint), None
    for teacher in (None, MomentumTeacher(model, ObjectiveConfig(queue_size=6, momentum=0.9))):
        if teacher is not None:
            for parameter in teacher.model.parameters():
                parameter.data.mul_(0.5)
            teacher.queue.enqueue(*torch.randn(2, 4, EMBED), torch.arange(4))
        save_albef(model, tmp_path / "ours.pth", teacher)
        state = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
        for name, expected in albef.state_dict().items():
            if "queue" in name:
                assert (name in state) == (teacher is not None)
            elif name.endswith("crossattention.self.key.bias"):
                assert state[name].count_nonzero() == 0 and state[name].shape == expected.shape
            elif name == "temp":
                torch.testing.assert_close(state[name], expected)
            elif not name.split(".")[0].endswith("_m"):
                assert torch.equal(state[name], expected), name
    other = Albef().eval()
    other.load_state_dict(state)  # strict
    inputs = pairs()
    for what, expected in albef.answers(*inputs).items():
        torch.testing.assert_close(other.answers(*inputs)[what], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.vision_proj_m.weight, 0.5 * albef.vision_proj.weight)
    assert torch.equal(other.image_queue[:, :4].T, teacher.queue.image_queue[:4]) and other.queue_ptr.tolist() == [4]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_another_image_encoder_is_not_albefs():
    config = make_config("tiny", vocab_size=50, image_size=32, vision_model="vit_small_patch14_reg4_dinov2").model
    with pytest.raises(ValueError, match="model: expected ALBEF's image encoder.*5 prefix tokens.*reg_token"):
        albef_state(VisionLanguageModel(config))


def changed(albef, drop=None, **tensors):
    state = albef.state_dict()
    for name in [name for name in state if drop and re.search(drop, name)]:
        del state[name]
    return state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def test_what_does_not_fit_is_named(albef, tmp_path):
    with pytest.raises(ValueError, match="not a file"):
        load_albef(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match="text.pth.*cannot be read"):
        load_albef(tmp_path / "text.pth")
    torch.save({"model": Path("a stranger's class")}, tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match="pickle.pth.*cannot be read"):
        load_albef(tmp_path / "pickle.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a state dict"):
        load_albef(tmp_path / "list.pth")
    for state, options, message in [
        ({}, {}, "expected visual_encoder.pos_embed of 3 dimensions, got no such tensor"),
        (changed(albef, r"blocks\.1\.norm2\.bias"), {}, r"missing \['visual_encoder.blocks.1.norm2.bias'\]"),
        (changed(albef, r"itm_head\.bias"), {}, r"missing \['itm_head.bias'\]"),
        (changed(albef, r"layer\.3\.crossattention"), {}, r"upper layers.*got it in \[2, 4\] of 5"),
        (changed(albef, itm_head__bias=torch.zeros(3)), {}, r"itm_head.bias has size \(3,\), expected \(2,\)"),
        (changed(albef, temp=torch.tensor(0.0)), {}, "temp above 0, got 0.0"),
        (changed(albef, visual_encoder__pos_embed=torch.zeros(1, 13, IMAGE_WIDTH)), {}, "got 13 of them"),
        (albef.state_dict(), {"image_size": 30}, "image_size: expected a multiple of .* 8, got 30"),
        (albef.state_dict(), {"head_width": 60}, "head_width: expected a divisor of 128"),
        (
            changed(albef, text_encoder__cls__predictions__decoder__weight=torch.zeros(VOCABULARY, TEXT_WIDTH)),
            {},
            "decoder.weight equal to .*word_embeddings.weight, to which it is tied",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            load_albef_state(state, **options)


def test_the_lines_of_the_documentation(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert = train_tokenizer(["a red circle left of a small blue square", "two dogs run"], VOCABULARY)
    bert.save_pretrained("google-bert/bert-base-uncased")
    page = (Path(__file__).parents[1] / "docs" / "albef.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and Path("ours.pth").exists()
    model, tokenizer = read_model("albef")
    words = tokenizer("two dogs")["input_ids"]
    assert words == bert("two dogs")["input_ids"][:-1] and words[0] == tokenizer.cls_token_id
    shown = explain(model, tokenizer, np.zeros((40, 60, 3), np.uint8), "two dogs", "words.png")
    assert [word["word"] for word in shown["words"]] == ["two", "dogs"] and Path("words.png").exists()

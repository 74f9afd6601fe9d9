"""Ways to make maps compared on boxes, masks of COCO, and the numbers of a map."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_pair

from softmask_fast.adapters.hub import Explanation, WordMap
from softmask_fast.data.sources import open_source
from softmask_fast.errors import UsageError
from softmask_fast.evaluation import evaluate_grounding, evaluate_maps, map_methods
from softmask_fast.evaluation.boxes import box_coverage, region_score
from softmask_fast.evaluation.coco import decode_mask, mask_score, read_coco_masks
from softmask_fast.evaluation.map_methods import METHODS, method_maps
from softmask_fast.evaluation.map_statistics import color_statistics, map_statistics
from softmask_fast.word_maps import explain_files


@pytest.fixture(scope="module")
def shapes():
    return open_source("shapes:num=6", split="val", image_size=32)


@pytest.fixture(scope="module")
def model_and_tokenizer(shapes):
    return small_pair(shapes, vision_depth=2)


def test_the_table_has_every_method(model_and_tokenizer, shapes):
    model, tokenizer = model_and_tokenizer
    report = evaluate_maps(model, tokenizer, shapes, layer=0, batch_size=4)
    grounding = evaluate_grounding(model, tokenizer, shapes, layer=0)
    assert report.phrases == grounding.phrases and report.images == grounding.images == 6
    assert report.pointing_game["word_gradcam"] == pytest.approx(grounding.pointing_game["model"])
    assert report.pointing_game["random"] == pytest.approx(grounding.pointing_game["random"])
    assert report.mass_inside["word_gradcam"] == pytest.approx(grounding.mass_inside["model"], rel=1e-5)
    assert report.mass_inside["random"] == pytest.approx(grounding.mass_inside["even"])
    for scores in (report.pointing_game, report.iou, report.mass_inside):
        assert scores.keys() == METHODS.keys() and all(0 <= score <= 1 for score in scores.values())
    table = report.table()
    assert all(name in table for name in METHODS.values()) and "fusion layer 0" in table
    assert json.loads(json.dumps(report.as_dict()))["task"] == "maps"
    with pytest.raises(UsageError, match="layer: expected a fusion layer from 0 to 1, got 2"):
        evaluate_maps(model, tokenizer, shapes, layer=2)


def test_methods_by_their_definitions(model_and_tokenizer):
    """Plain attention by its rows' sums, rollout by attention maps of timm itself, Grad-CAM by autograd on its own."""
    model, _ = model_and_tokenizer
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(5, 60, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    maps = method_maps(model, pixels, ids, mask, 1)
    torch.testing.assert_close(maps["word_gradcam"], model.word_relevance(pixels, ids, mask, 1))
    torch.testing.assert_close(maps["attention"].sum(-1), torch.ones(2, 7))
    torch.testing.assert_close(maps["rollout"].sum(-1), torch.ones(2, 7))

    rolled, kept = torch.eye(17), []

    def run_plain(block, args):
        block.attn(block.norm1(args[0]))

    for block in model.vision.vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: kept.append(output))
        block.register_forward_pre_hook(run_plain)
    with torch.no_grad():
        tokens = model.vision(pixels)
    for attention in kept:
        rolled = (attention.mean(1) + torch.eye(17)) / 2 @ rolled
    torch.testing.assert_close(maps["rollout"], maps["attention"] @ rolled)

    tokens.requires_grad_()
    text, _ = model.encode_text(ids, mask)
    (slope,) = torch.autograd.grad(model.match_tokens(tokens, text, mask)[:, 1].sum(), tokens)
    expected = torch.einsum("bnc,bc->bn", tokens.detach(), slope[:, 1:].mean(1)).relu()
    torch.testing.assert_close(maps["gradcam"], expected[:, None].expand(-1, 7, -1))


def test_region_score_by_hand():
    heat = np.array([[0.0, 1.0], [0.6, 0.2]])
    assert region_score(heat, np.array([[0.0, 1.0], [1.0, 0.0]])) == 1
    assert region_score(heat, np.array([[1.0, 0.5], [0.0, 0.0]])) == pytest.approx(0.5 / 3)
    right = box_coverage([(0.5, 0.0, 1.0, 1.0)], 2, 2)
    assert region_score(heat, right) == pytest.approx(1 / 3)
    assert region_score(np.ones((2, 2)), right) == 0.5


def test_coco_masks(tmp_path):
    square = [[1, 1, 2, 1, 2, 2, 1, 2]]
    runs = {"size": [3, 4], "counts": [3, 2, 4, 3]}  # down the columns
    content = {
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": 3, "width": 4},
            {"id": 8, "file_name": "b.jpg", "height": 3, "width": 4},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "segmentation": square},
            {"id": 2, "image_id": 7, "category_id": 2, "segmentation": runs},
            {"id": 3, "image_id": 7, "category_id": 1, "segmentation": runs},
        ],
    }
    path = tmp_path / "masks.json"
    path.write_text(json.dumps(content))
    [image] = read_coco_masks(path)
    dog = np.array([[0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]], bool)
    box = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]], bool)
    assert image.file_name == "a.jpg" and image.masks.keys() == {"cat", "dog"}
    assert (image.masks["dog"] == dog).all() and (image.masks["cat"] == dog | box).all()
    # COCO's strings: the same mask, and runs of 100, 7, 3 and 900
    assert (decode_mask({"size": [3, 4], "counts": "3241"}, 3, 4) == dog).all()
    long = decode_mask({"size": [10, 101], "counts": "T373mk0"}, 10, 101).T.flatten()
    assert long[100:107].all() and long[110:].all() and long.sum() == 907

    heat = np.array([[0.1, 0.9]])
    hit, iou = mask_score(heat, dog)
    assert hit == 1 and iou == pytest.approx(3 / 8)  # the right half's center is pixel (3, 1); it is half covered
    content["annotations"][0]["segmentation"] = {"size": [3, 4], "counts": [3, 2]}
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="annotation 1 has no readable mask: .*3 x 4 pixels, got 5"):
        list(read_coco_masks(path))
    path.write_text("{}")
    with pytest.raises(UsageError, match="is not a COCO annotation file: KeyError 'categories'"):
        list(read_coco_masks(path))


def test_statistics_by_hand():
    one = map_statistics(np.array([[0.0, 0.0], [0.0, 3.0]]))
    assert (one["entropy"], one["centroid_x"], one["centroid_y"], one["spread_x"]) == (0, 0.75, 0.75, 0)
    assert one["mean"] == 0.75 and one["max"] == 3 and one["q50"] == 0
    assert one["spread"] == pytest.approx(1.299, abs=1e-3)
    even = map_statistics(np.zeros((2, 3)))
    assert even["entropy"] == pytest.approx(1) and even["centroid_x"] == pytest.approx(0.5)
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:, 2:, 0] = 255
    right = color_statistics(picture, np.array([[0.0, 0, 0, 1]]))
    assert right["red_mean"] == pytest.approx(1) and right["green_mean"] == 0
    whole = color_statistics(picture, np.zeros((1, 2)))
    assert whole["red_mean"] == pytest.approx(0.5) and whole["red_spread"] == pytest.approx(0.5)


def test_a_map_that_is_not_finite_is_an_error(model_and_tokenizer, shapes, monkeypatch):
    monkeypatch.setattr(
        map_methods, "method_maps", lambda *inputs: {n: m * torch.nan for n, m in method_maps(*inputs).items()}
    )
    with pytest.raises(UsageError, match="^model: its word_gradcam map of '.*' in .* is not finite$"):
        evaluate_maps(*model_and_tokenizer, shapes, limit=2)


def test_one_figure_is_the_named_file_whatever_the_case_of_its_ending(tmp_path):
    explanation = Explanation("dog", None, "score", 0.5, [WordMap("dog", "text", np.eye(2), np.ones(3))], [])
    explain_files(lambda _: (Image.new("RGB", (8, 8)), explanation), [tmp_path / "a.jpg"], tmp_path / "figure.PNG")
    assert (tmp_path / "figure.PNG").is_file()

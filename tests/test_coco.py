"""Masks of COCO's annotation files: what is wrong is named before memory is taken for it."""

import json

import pytest

from softmask_fast.errors import UsageError
from softmask_fast.evaluation.coco import read_coco_masks


@pytest.mark.parametrize("height, width", [(10**6, 10**6), (0, 5), (-3, -4), ("5", 4), (True, 4), (2.5, 4)])
def test_sizes_of_images_are_checked(tmp_path, height, width):
    image = {"id": 7, "file_name": "i.jpg", "height": height, "width": width}
    mask = {"id": 1, "image_id": 7, "category_id": 2, "segmentation": [[0, 0, 1, 0, 1, 1]]}
    content = {"categories": [{"id": 2, "name": "cat"}], "annotations": [mask], "images": [image]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="masks: .*a.json: image 7: expected 1 to 89478485 pixels, got"):
        list(read_coco_masks(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text(json.dumps(content | {"images": [image | {"height": 3, "width": 3}]}))
    assert [masks.file_name for masks in read_coco_masks(tmp_path / "a.json")] == ["i.jpg"]

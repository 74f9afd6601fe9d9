"""Captions in the JSON of COCO and of Karpathy's splits, as rows of a table: an image, its captions, its split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from softmask_fast.errors import short


def layout_rows(content: Any) -> Iterator[dict[str, Any]]:
    """Rows of {"image", "caption", "split"}. Raises ValueError for another layout."""
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        expected = 'a list of objects, or an object with "images" (COCO captions, Karpathy\'s splits)'
        raise ValueError(f"expected {expected}, got {short(content)}")
    for number, image in enumerate(images):
        if not isinstance(image, dict):
            raise ValueError(f'"images", entry {number}: expected an object, got {short(image)}')
    return _coco_rows(images, content["annotations"]) if "annotations" in content else _karpathy_rows(images)


def _coco_rows(images: list[dict[str, Any]], annotations: Any) -> Iterator[dict[str, Any]]:
    """{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}"""
    if not isinstance(annotations, list):
        raise ValueError(f'"annotations": expected a list of objects, got {short(annotations)}')
    captions: dict[int | str, list[Any]] = {}
    for number, image in enumerate(images):
        if not isinstance(image.get("id"), int | str) or image["id"] in captions:
            raise ValueError(f'"images", entry {number}: "id": expected one of its own, got {short(image.get("id"))}')
        captions[image["id"]] = []
    for number, annotation in enumerate(annotations):
        where = f'"annotations", entry {number}'
        if not isinstance(annotation, dict) or "caption" not in annotation:
            hint = "; COCO has captions in captions_*.json" if number == 0 else ""
            raise ValueError(f'{where}: expected an object with a "caption", got {short(annotation)}{hint}')
        owner = annotation.get("image_id")
        if not isinstance(owner, int | str) or owner not in captions:
            raise ValueError(f'{where}: "image_id": expected that of an image in "images", got {short(owner)}')
        captions[owner].append(annotation["caption"])
    for image in images:
        yield {"image": image.get("file_name"), "caption": captions[image["id"]]}


def _karpathy_rows(images: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """{"images": [{"filename", "filepath" (a folder; COCO alone has it), "sentences": [{"raw"}], "split"}]}"""
    for number, image in enumerate(images):
        sentences = image.get("sentences")
        if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
            raise ValueError(
                f'"images", entry {number}: "sentences": expected a list of objects, got {short(sentences)}'
            )
        name, folder = image.get("filename"), image.get("filepath")
        if isinstance(name, str) and isinstance(folder, str):
            name = f"{folder}/{name}"
        yield {"image": name, "caption": [one.get("raw") for one in sentences], "split": image.get("split")}

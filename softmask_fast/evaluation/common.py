"""What all evaluations share: the model's inputs, batches, and the work of several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from softmask_fast.data.images import check_image
from softmask_fast.data.pixels import evaluation_pixels
from softmask_fast.data.types import BadSample, CaptionSource, Sample
from softmask_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

    from softmask_fast.model.vision_language import VisionLanguageModel

Item = TypeVar("Item")


@dataclass
class Tokens:
    """Captions as the model reads them, padded on the right."""

    input_ids: Tensor  # (T, L) int64
    attention_mask: Tensor  # (T, L) bool, True = token
    offsets: list[list[tuple[int, int]]]  # of each token: [start, end) in the caption's characters
    truncated: int  # captions cut to the model's max_tokens


def tokenize(model: VisionLanguageModel, tokenizer: Tokenizer, captions: list[str]) -> Tokens:
    """Tokenizes captions, cut to the model's max_tokens, onto the model's device."""
    cut = dict(padding=True, padding_side="right", truncation=True, max_length=model.config.max_tokens)
    encoded = tokenizer(captions, **cut, return_tensors="pt", return_offsets_mapping=True)
    device = next(model.parameters()).device
    return Tokens(
        input_ids=encoded["input_ids"].to(device),
        attention_mask=encoded["attention_mask"].bool().to(device),
        offsets=encoded["offset_mapping"].tolist(),
        truncated=sum(bool(encoding.overflowing) for encoding in encoded.encodings),
    )


def image_pixels(model: VisionLanguageModel, samples: Sequence[Sample]) -> Tensor:
    """The samples' whole images, without augmentation, on the model's device: (images, 3, image_size, image_size)."""
    images = [image for sample in samples for image in sample.images]
    return evaluation_pixels(images, model.config.image_size, device=next(model.parameters()).device)


def usable_samples(
    source: CaptionSource, indices: Iterable[int], skipped: dict[str, str]
) -> Iterator[tuple[int, Sample]]:
    """Yields (index, sample) for each usable sample at `indices`; adds the others to `skipped`, key -> reason."""
    for index in indices:
        try:
            sample = source.read(index)
            for image in sample.images:
                check_image(image)
        except BadSample as error:
            skipped[source.keys[index]] = str(error)
        else:
            yield index, sample


def sample_count(source: CaptionSource, batch_size: int, limit: int | None) -> int:
    """The number of samples to evaluate. Raises UsageError for an empty source, a batch size or a limit below 1."""
    if batch_size < 1:
        raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit: expected at least 1 or None, got {limit}")
    size = len(source) if limit is None else min(limit, len(source))
    if size == 0:
        raise UsageError("source: expected at least one sample, got none")
    return size


def rank_indices(count: int) -> range:
    """The indices below `count` that this rank works on: all of them in a single process."""
    if not dist.is_initialized():
        return range(count)
    return range(dist.get_rank(), count, dist.get_world_size())


def gather_objects(own: Any) -> list[Any]:
    """The objects of all ranks, in rank order. A collective if there are several ranks."""
    if not dist.is_initialized():
        return [own]
    objects: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(objects, own)
    return objects


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switches dropout off, and afterwards restores the model's mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of `size` items; the last one may be shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

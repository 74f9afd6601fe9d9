"""What the evaluation tasks and the pictures share: inputs of a model, batches, tables."""

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
from softmask_fast.data.types import BadSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from softmask_fast.data.types import CaptionSource, Sample
    from softmask_fast.model.vision_language import VisionLanguageModel

Item = TypeVar("Item")


@dataclass
class Tokens:
    """Captions as a model reads them, padded on the right."""

    input_ids: Tensor  # (T, L) int64
    attention_mask: Tensor  # (T, L) bool
    offsets: list[list[tuple[int, int]]]  # of each token: its first character and the one after its last
    truncated: int  # captions longer than the model's max_tokens, and cut


def tokenize(model: VisionLanguageModel, tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tokens:
    """Captions cut to the model's max_tokens, on the model's device."""
    encoded = tokenizer(
        captions,
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=model.config.max_tokens,
        return_tensors="pt",
        return_offsets_mapping=True,
    )
    device = next(model.parameters()).device
    return Tokens(
        input_ids=encoded["input_ids"].to(device),
        attention_mask=encoded["attention_mask"].bool().to(device),
        offsets=encoded["offset_mapping"].tolist(),
        truncated=sum(bool(encoding.overflowing) for encoding in encoded.encodings),
    )


def image_pixels(model: VisionLanguageModel, samples: Sequence[Sample]) -> Tensor:
    """(images, 3, image_size, image_size): the whole images without distortion, sample after sample, on the model's
    device."""
    images = [image for sample in samples for image in sample.images]
    return evaluation_pixels(images, model.config.image_size, device=next(model.parameters()).device)


def usable_samples(
    source: CaptionSource, indices: Iterable[int], skipped: dict[str, str]
) -> Iterator[tuple[int, Sample]]:
    """The samples at these indices, with the index; those that cannot be used go to `skipped`, key -> reason."""
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
    """How many samples to evaluate; checks the options that every task has."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 or None, got {limit}")
    size = len(source) if limit is None else min(limit, len(source))
    if size == 0:
        raise ValueError("source: expected at least one sample, got none")
    return size


def share_of_rank(count: int) -> range:
    """The indices below count that this process evaluates: all of them where it is alone."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return range(rank, count, world)


def gathered(mine: Any) -> list[Any]:
    """What every rank has, in rank order. A collective where there are several."""
    if not dist.is_initialized():
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout, and afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one with what is left."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def titled(title: str, notes: dict[str, int]) -> str:
    """A title with the notes that count something."""
    told = ", ".join(f"{count} {what}" for what, count in notes.items() if count)
    return f"{title} ({told})" if told else title


def format_table(title: str, notes: dict[str, int], header: list[str], rows: list[list[str]]) -> str:
    """Plain-text table: first column to the left, numbers to the right; the title with its notes above."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        aligned = [cells[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join(aligned).rstrip()

    return "\n".join([titled(title, notes), line(header), "  ".join("-" * width for width in widths), *map(line, rows)])

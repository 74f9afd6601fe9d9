"""Samples and batches: what sources and loaders return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from softmask_fast.errors import UsageError

if TYPE_CHECKING:
    import torch


class BadSample(UsageError):
    """A sample that cannot be used; the message says why."""


class UnreachableFile(OSError):
    """A file that cannot be downloaded: `filename` is its URL, `strerror` names the attempts and the last cause."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class FinalError(OSError):
    """A failed download that another attempt cannot fix."""


@dataclass(frozen=True)
class Phrase:
    """Words of a caption that name something in the image.

    Boxes are (x1, y1, x2, y2) as fractions of the image's width and height.
    """

    caption: str
    text: str
    first_word: int  # counted in whitespace-separated words of the caption
    n_words: int
    boxes: list[tuple[float, float, float, float]]
    proposals: list[tuple[float, float, float, float]] = field(default_factory=list)  # candidate boxes, if any
    whole: bool = False  # the phrase is the whole caption, including [CLS] and [SEP]


@dataclass(frozen=True)
class Sample:
    """One image, not decoded yet, with its captions."""

    key: str
    image: bytes | np.ndarray  # an encoded file, or (H, W, 3) uint8
    captions: list[str]  # at least one, each with at least one letter or digit
    phrases: list[Phrase] = field(default_factory=list)
    skipped_captions: int = 0  # captions dropped because they contain no letter or digit

    @property
    def images(self) -> list[bytes | np.ndarray]:
        """The image alone; samples of some tasks have two."""
        return [self.image]


class CaptionSource(Protocol):
    """Samples by index. Reading is thread-safe and deterministic.

    A source may bring its own `sampler` (see `data.sampler`); otherwise the loader shuffles all of it.

    Worker processes receive a pickled copy of the source. A source whose copy would be large also defines two methods:
    `locate(index)` returns all that `load(located)` needs to read the sample. Only what `load` needs is pickled then.
    """

    keys: Sequence[str]  # unique
    image_ids: np.ndarray  # (n,) int64: equal ids are the same image
    encoded: bool  # True: images are encoded files; False: uint8 arrays

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """The sample at an index. Raises BadSample if it cannot be used."""
        ...


@dataclass
class Batch:
    """One batch, all tensors on the loader's device. L is the length of the longest caption in the batch."""

    pixels: torch.Tensor  # (B, 3, size, size) float32, normalized
    input_ids: torch.Tensor  # (B, L) int64, the clean caption: [CLS] ... [SEP] [PAD]
    masked_ids: torch.Tensor  # (B, L) int64, the caption after masking
    attention_mask: torch.Tensor  # (B, L) bool, True = token
    mlm_positions: torch.Tensor  # (P,) int64, flat positions in (B * L) of the masked tokens
    mlm_labels: torch.Tensor  # (P,) int64, the original ids there
    word_index: torch.Tensor  # (B,) int64, token position of one random word
    ids: torch.Tensor  # (B,) int64, identity of the image
    keys: list[str]
    token_count: int | None = None  # sum of attention_mask, known without a device synchronization
    most_tokens: int | None = None  # an upper bound of that sum, for batches without token_count

    @property
    def token_bounds(self) -> tuple[int, int]:
        """Bounds on the number of tokens, known without a device synchronization."""
        if self.token_count is not None:
            return self.token_count, self.token_count
        return 0, self.attention_mask.numel() if self.most_tokens is None else self.most_tokens

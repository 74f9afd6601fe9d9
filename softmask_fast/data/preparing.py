"""Preparing samples: everything that happens before their pixels are decoded.

Worker processes run this module, so neither it nor what it imports loads torch. The result for a sample depends only on
its key, the seed and the epoch, not on the thread or process that prepares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from softmask_fast.data.augment import AugmentConfig, draw_parameters, pack
from softmask_fast.data.images import ImageFacts, check_image, convert_image
from softmask_fast.data.seeding import keyed_generator
from softmask_fast.data.text_masking import TextMasker
from softmask_fast.data.types import BadSample, CaptionSource, Sample, UnreachableFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FACTS = np.dtype([("width", np.int32), ("height", np.int32), ("convert", bool)])  # ImageFacts; width 0: not checked yet


class Ragged(NamedTuple):
    """Arrays of different lengths, stored one after another."""

    values: np.ndarray  # (total,)
    lengths: np.ndarray  # (n,) int64

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> Ragged:
        """From any number of (length,) int64 arrays."""
        lengths = np.array([len(row) for row in rows], np.int64)
        return cls(np.concatenate([np.empty(0, np.int64), *rows]), lengths)

    def mask(self) -> np.ndarray:
        """(n, longest) bool: True where the padded rows hold values."""
        return np.arange(self.lengths.max()) < self.lengths[:, None]


def padded(values: np.ndarray, mask: np.ndarray, fill: int) -> np.ndarray:
    """Rows with the values where `mask` is True and `fill` elsewhere: of mask's shape and values' dtype."""
    rows = np.full(mask.shape, fill, values.dtype)
    rows[mask] = values
    return rows


Column = Ragged | np.ndarray | list  # one entry per sample


def cut(column: Column, start: int, stop: int) -> Column:
    """The entries from `start` to `stop`."""
    if not isinstance(column, Ragged):
        return column[start:stop]
    first, last = column.lengths[:start].sum(), column.lengths[:stop].sum()
    return Ragged(column.values[first:last], column.lengths[start:stop])


def join(columns: Sequence[Column]) -> Column:
    """The entries of all columns, which must be of one type."""
    if len(columns) == 1:
        return columns[0]
    if isinstance(columns[0], Ragged):
        return Ragged(*map(np.concatenate, zip(*columns, strict=True)))
    return sum(columns, []) if isinstance(columns[0], list) else np.concatenate(columns)


@dataclass(frozen=True)
class Job:
    """Visits to prepare, in their order."""

    epochs: list[int]
    keys: list[str]
    places: list[Any]  # of each sample: what the source's `locate` returns, or its index
    facts: np.ndarray  # (visits, images per sample) of FACTS


@dataclass
class Prepared:
    """The result of a job. Images, columns and parameters are those of its good samples, in their order."""

    problems: dict[int, BadSample | UnreachableFile]  # by number of the visit
    facts: np.ndarray  # those of the job, completed
    images: Sequence[bytes | np.ndarray]  # the images of each sample in turn
    columns: dict[str, Column]
    parameters: np.ndarray  # (images, width) float32 from `augment.pack`: the arguments of the DALI pipeline


class Preparer:
    """Reads and checks samples, draws their augmentation and tokenizes their texts. Thread-safe and picklable."""

    def __init__(
        self, source: CaptionSource, tokenizer: PreTrainedTokenizerFast, *, augment: AugmentConfig, image_size: int,
        max_tokens: int, max_pixels: int, seed: int,
    ) -> None:  # fmt: skip
        """The arguments are those of `SampleLoader`."""
        self._read = getattr(source, "load", source.read)
        self._augment, self._image_size, self._max_pixels, self.seed = augment, image_size, max_pixels, seed
        self._special = tokenizer("")["input_ids"]  # [CLS], and [SEP] where the tokenizer puts one
        self._room = max_tokens - len(self._special)
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def prepare(self, job: Job) -> Prepared:
        """Prepares the samples of a job. Their own errors become `problems`; all others are raised."""
        facts, problems = job.facts.copy(), {}
        images, parameters, samples, good = [], [], [], []
        for visit, (epoch, key, place) in enumerate(zip(job.epochs, job.keys, job.places, strict=True)):
            try:
                sample = self._read(place)
                checked = [self._check(image, facts[visit, number]) for number, image in enumerate(sample.images)]
            except (BadSample, UnreachableFile) as error:
                problems[visit] = error.with_traceback(None)
                continue
            for number, (image, (width, height, _)) in enumerate(zip(checked, facts[visit].tolist(), strict=True)):
                names = (self.seed, epoch, key, "image")
                generator = keyed_generator(*names, number) if number else keyed_generator(*names)
                parameters.append(draw_parameters(self._augment, generator, width, height, self._image_size))
                images.append(image)
            samples.append(sample)
            good.append((epoch, key))
        columns = self.columns(samples, good) if samples else {}
        columns["skipped_captions"] = np.array([sample.skipped_captions for sample in samples], np.int64)
        packed = pack(parameters, self._augment.arguments()) if samples else np.empty((0, 0), np.float32)
        return Prepared(problems, facts, images, columns, packed)

    def columns(self, samples: Sequence[Sample], visits: Sequence[tuple[int, str]]) -> dict[str, Column]:
        """What enters a batch besides the images.

        Args:
            samples: The good samples of a job.
            visits: Epoch and key of each.

        Returns:
            name -> one entry per sample. "tokens" is the length of its text before it was cut.
        """
        raise NotImplementedError

    def tokenize(self, texts: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Token ids of each text with special tokens, (length,) int64, cut to `max_tokens`; and (n,) uncut lengths."""
        first, *last = self._special
        encoded = [text.ids for text in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        rows = [np.array([first, *ids[: self._room], *last], np.int64) for ids in encoded]
        return rows, np.array([len(ids) + len(self._special) for ids in encoded])

    def _check(self, image: bytes | np.ndarray, known: np.void) -> bytes | np.ndarray:
        """The image to decode. At the first visit it is decoded in full to fill `known`, its entry of FACTS."""
        if not known["width"]:
            facts: ImageFacts = check_image(image, self._max_pixels)
            known["width"], known["height"], known["convert"] = facts.width, facts.height, facts.convert
        return convert_image(image) if known["convert"] else image


class PretrainingPreparer(Preparer):
    """Samples with captions: one of them is drawn and masked."""

    def __init__(
        self, source: CaptionSource, tokenizer: PreTrainedTokenizerFast, *, mask_probability: float, **options: Any
    ) -> None:
        super().__init__(source, tokenizer, **options)
        self._masker = TextMasker(tokenizer, mask_probability)

    def columns(self, samples: Sequence[Sample], visits: Sequence[tuple[int, str]]) -> dict[str, Column]:
        captions = []
        for sample, names in zip(samples, visits, strict=True):
            number = keyed_generator(self.seed, *names, "caption").integers(len(sample.captions))
            captions.append(sample.captions[number])
        rows, tokens = self.tokenize(captions)
        masked = [
            self._masker.mask(ids, keyed_generator(self.seed, *names, "mask"))
            for ids, names in zip(rows, visits, strict=True)
        ]
        return {
            "tokens": tokens,
            "input_ids": Ragged.of(rows),
            "masked_ids": Ragged.of([caption.ids for caption in masked]),
            "mlm_positions": Ragged.of([caption.positions for caption in masked]),
            "mlm_labels": Ragged.of([caption.labels for caption in masked]),
            "word_index": np.array([caption.word_index for caption in masked], np.int64),
        }

"""Training loaders: endless streams of batches in keyed order that survive bad samples and resume exactly."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from softmask_fast.data.augment import AugmentConfig, draw_parameters
from softmask_fast.data.images import MAX_PIXELS, ImageFacts, check_image, convert_image
from softmask_fast.data.sampler import HashSampler, WindowedSampler, local_ranks
from softmask_fast.data.seeding import keyed_generator
from softmask_fast.data.text_masking import TextMasker
from softmask_fast.data.types import BadSample, Batch, CaptionSource, Sample, UnreachableFile
from softmask_fast.errors import UsageError

if TYPE_CHECKING:
    from softmask_fast.data.dali_pipeline import DaliPipeline

logger = logging.getLogger(__name__)

_NAMED_IN_ERROR = 10  # bad samples that an error names
_SEARCHED = 1000  # samples that are read, at most, to find so many

BatchType = TypeVar("BatchType")


class BadDataError(RuntimeError):
    """More samples are bad than `max_bad_fraction` allows."""


@dataclass
class _LoadedSample:
    """One visit to a good sample: everything but its pixels."""

    index: int
    key: str
    epoch: int
    images: list[bytes | np.ndarray]
    parameters: list[dict[str, np.ndarray]]  # of each image
    content: Any  # what `_choose` returned
    skipped_captions: int


@dataclass
class _Progress:
    """Position in the stream after a batch; part of `state_dict`."""

    epoch: int = 0
    position: int = 0  # in this rank's order of the epoch
    truncated_captions: int = 0
    skipped_captions: int = 0


@dataclass
class _Selection:
    """The samples of the next batch, and the position in the stream after them."""

    progress: _Progress
    samples: list[_LoadedSample] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)  # new bad samples among them: key -> reason


class SampleLoader(Generic[BatchType]):
    """Endless iterator over the batches of this rank. Subclasses define a batch by `_choose` and `_collate`.

    Every epoch has its own order over the whole source, dealt to the ranks (see `data.sampler`). A bad sample is
    skipped and replaced by the next one; a batch may span the end of an epoch. Threads read and check images ahead of
    time, and DALI works on the next batch while the caller trains on this one. `bad` holds the bad samples so far, key
    -> reason.
    """

    def __init__(
        self, source: CaptionSource, tokenizer: PreTrainedTokenizerFast, *, batch_size: int, image_size: int,
        augment: AugmentConfig, max_tokens: int, seed: int, rank: int = 0, world_size: int = 1,
        device: torch.device | str = "cpu", max_bad_fraction: float = 0.01, max_pixels: int = MAX_PIXELS,
        num_threads: int | None = None, images_per_sample: int = 1,
    ):  # fmt: skip
        """Raises UsageError if an option is out of range.

        Args:
            batch_size: Samples per batch of this rank.
            max_tokens: Longest caption, including its special tokens; longer ones are cut.
            seed: Of the order, the augmentation and the masks.
            device: Where DALI works and batches are returned.
            max_bad_fraction: Largest fraction of bad samples among those visited.
            max_pixels: Largest image, width times height.
            num_threads: Threads that check images, and as many again for DALI; default: `default_threads()`.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
        if max_tokens < 3:
            raise UsageError(f"max_tokens: expected at least 3 ([CLS], a word piece, [SEP]), got {max_tokens}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")
        if len(source) < world_size:
            raise UsageError(f"data: {len(source)} samples are too few for world_size {world_size}")
        if not 0 <= max_bad_fraction <= 1:
            raise UsageError(f"max_bad_fraction: expected in [0, 1], got {max_bad_fraction}")
        self.source, self.tokenizer, self.batch_size, self.image_size = source, tokenizer, batch_size, image_size
        self.augment, self.max_tokens, self.seed = augment, max_tokens, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.max_bad_fraction, self.max_pixels = max_bad_fraction, max_pixels
        self.num_threads = default_threads() if num_threads is None else num_threads
        self.bad: dict[str, str] = {}

        self._rank_samples = len(range(rank, len(source), world_size))  # visits of this rank in an epoch
        self._sampler: HashSampler | WindowedSampler = getattr(source, "sampler", None) or HashSampler(source.keys)
        self._truncated_keys: set[str] = set()
        facts = [("width", np.int32), ("height", np.int32), ("convert", bool)]
        self._facts = np.zeros((len(source), images_per_sample), facts)
        self._special = tokenizer("")["input_ids"]  # [CLS], and [SEP] where the tokenizer puts one
        self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="softmask-data")
        self._closed = False
        self._progress = _Progress()
        self._visits: deque[tuple[int, int, int, Future[_LoadedSample]]] = deque()
        self._restart()

    def __iter__(self) -> Iterator[BatchType]:
        return self

    def _choose(self, sample: Sample, epoch: int) -> Any:
        """What enters the batch besides the images; depends only on the sample, the seed and the epoch."""
        raise NotImplementedError

    def _collate(self, selection: _Selection, pixels: torch.Tensor) -> BatchType:
        """Makes a batch. pixels: (batch_size * images_per_sample, 3, size, size), the images of each sample in turn."""
        raise NotImplementedError

    def __next__(self) -> BatchType:
        """Raises BadDataError if too many samples are bad, UnreachableFile if a shard cannot be downloaded."""
        if self._closed:
            raise ValueError("the loader is closed")
        if self._failure is not None:
            raise self._failure
        current, pixels = self._take()
        batch = self._collate(current, pixels)
        self.bad.update(current.bad)
        self._progress = current.progress
        with suppress(BadDataError, UnreachableFile):  # this batch is good; the next call raises
            self._schedule(self._select(current.progress))
        return batch

    @property
    def epoch(self) -> float:
        """Passes over the source so far."""
        return self._progress.epoch + self._progress.position / self._rank_samples

    @property
    def truncated_captions(self) -> int:
        """Captions cut to `max_tokens` so far, counted at every visit."""
        return self._progress.truncated_captions

    @property
    def skipped_captions(self) -> int:
        """Captions without a word dropped so far, counted at every visit to their image."""
        return self._progress.skipped_captions

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream after the last returned batch, JSON-serializable."""
        return {**asdict(self._progress), "bad": dict(self.bad), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues bit-identically after the batch at which `state` was taken.

        Raises UsageError if it belongs to another source, seed or number of ranks (see `redistributed`).
        """
        own = self._identity()
        for name in ("source", "seed", "world_size"):
            if state[name] != own[name]:
                raise UsageError(
                    f"state: was taken with another {name} ({state[name]}, now {own[name]}); "
                    f"continue with the same data and seed, or start a new run"
                )
        progress = _Progress(**{name: state[name] for name in _Progress.__dataclass_fields__})
        self._progress, self.bad = progress, dict(state["bad"])
        self._restart()

    def redistributed(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """This rank's state after a run of any number of ranks, whose states are given in rank order.

        With as many ranks as before the stream continues exactly. Otherwise the ranks divide what is left of the epoch
        and log how many samples are repeated in it: none if no sample was bad and the source is on a local disk.
        """
        if len(states) == self.world_size:
            return states[self.rank]
        positions = [(state["epoch"], state["position"]) for state in states]
        epoch, position, repeated = self._sampler.reshard(positions, self.rank, self.world_size)
        # whatever is summed over the ranks must be counted once
        bad = dict(item for state in states for item in state["bad"].items())
        own_bad = {key: bad[key] for key in list(bad)[self.rank :: self.world_size]}
        counts = {"truncated_captions": 0, "skipped_captions": 0}
        if self.rank == 0:
            counts = {name: sum(state[name] for state in states) for name in counts}
            logger.warning(
                "the data position is of %d ranks, now there are %d: continuing in epoch %d, where about %d of %d "
                "samples will be visited twice", len(states), self.world_size, epoch, repeated, len(self.source),
            )  # fmt: skip
        own = {"epoch": epoch, "position": position, "bad": own_bad, "world_size": self.world_size}
        return {**states[0], **counts, **own}

    def close(self) -> None:
        """Stops the threads and frees the pipeline."""
        if not self._closed:
            self._closed = True
            self._pool.shutdown(wait=True, cancel_futures=True)
            del self._pipeline

    def __enter__(self) -> SampleLoader[BatchType]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        source = f"{len(self.source)}-{self._sampler.fingerprint}"
        return {"source": source, "seed": self.seed, "world_size": self.world_size}

    def _restart(self) -> None:
        """Drops what was loaded ahead and continues after the last returned batch."""
        for *_, future in self._visits:
            future.cancel()
        self._known_bad = dict(self.bad)
        self._stream = self._visit_stream(self._progress.epoch, self._progress.position)
        self._visits.clear()
        self._scheduled: _Selection | None = None
        self._failure: BadDataError | UnreachableFile | None = None
        images = self._facts.shape[1] * self.batch_size
        self._pipeline = self._new_pipeline(images, arguments=self.augment.arguments(), num_threads=self.num_threads)

    def _new_pipeline(self, images: int, **options: Any) -> DaliPipeline:
        from softmask_fast.data.dali_pipeline import DaliPipeline  # evaluation imports this module, maybe without DALI

        return DaliPipeline(
            image_size=self.image_size, batch_size=images, encoded=self.source.encoded, device=self.device, **options
        )

    def _visit_stream(self, epoch: int, position: int) -> Iterator[tuple[int, int, int]]:
        """Endless (epoch, position, index) of this rank's visits, from this epoch and position on."""
        while True:
            indices = self._sampler.indices(self.seed, epoch, self.rank, self.world_size, position)
            for visit, index in enumerate(indices, position):
                yield epoch, visit, index
            epoch, position = epoch + 1, 0

    def _next_visit(self) -> tuple[int, int, int, Future[_LoadedSample]]:
        """The next visit; keeps the threads busy with those after it."""
        while len(self._visits) < 2 * self.batch_size:
            epoch, position, index = next(self._stream)
            self._visits.append((epoch, position, index, self._pool.submit(self._load_sample, epoch, index)))
        return self._visits.popleft()

    def _load_sample(self, epoch: int, index: int) -> _LoadedSample:
        """Runs in a thread. Raises BadSample or UnreachableFile."""
        key = self.source.keys[index]
        if key in self._known_bad:
            raise BadSample(self._known_bad[key])
        sample = self.source.read(index)
        images, parameters = [], []
        for number, image in enumerate(sample.images):
            facts = self._check(index, number, image)
            images.append(convert_image(image) if facts.convert else image)
            names = (self.seed, epoch, key, "image")
            generator = keyed_generator(*names, number) if number else keyed_generator(*names)
            parameters.append(draw_parameters(self.augment, generator, facts.width, facts.height, self.image_size))
        content = self._choose(sample, epoch)
        return _LoadedSample(index, key, epoch, images, parameters, content, sample.skipped_captions)

    def _check(self, index: int, number: int, image: bytes | np.ndarray) -> ImageFacts:
        """Checks the `number`-th image of a sample; decodes it in full at its first visit only."""
        known = self._facts[index, number]
        if known["width"]:
            return ImageFacts(int(known["width"]), int(known["height"]), bool(known["convert"]))
        facts = check_image(image, self.max_pixels)
        self._facts[index, number] = (facts.width, facts.height, facts.convert)
        return facts

    def _select(self, progress: _Progress) -> _Selection:
        """The next `batch_size` good samples after `progress`."""
        selection = _Selection(replace(progress))
        bad_in_a_row = 0
        while len(selection.samples) < self.batch_size:
            epoch, position, index, future = self._next_visit()
            selection.progress.epoch, selection.progress.position = epoch, position + 1
            try:
                sample = future.result()
            except BadSample as error:
                bad_in_a_row += 1
                self._note_bad(self.source.keys[index], str(error), selection, epoch)
                if bad_in_a_row >= self._rank_samples:
                    raise self._fail("no sample of this rank can be used") from error
                continue
            except UnreachableFile as error:  # continuing would skip its samples
                self._failure = error
                raise
            bad_in_a_row = 0
            selection.samples.append(sample)
            selection.progress.skipped_captions += sample.skipped_captions
        return selection

    def _note_bad(self, key: str, reason: str, selection: _Selection, epoch: int) -> None:
        if key in self._known_bad:
            return
        self._known_bad[key] = selection.bad[key] = reason
        logger.warning("skipped %s: %s", key, reason)
        # a rank sees other samples in every epoch
        seen = min(len(self.source), self._rank_samples * (epoch + 1))
        limit = int(self.max_bad_fraction * seen + 1e-9)
        if len(self._known_bad) > limit:
            self._search_bad()
            raise self._fail(
                f"more than {limit} of {seen} samples cannot be used (max_bad_fraction {self.max_bad_fraction:g})"
            )

    def _search_bad(self) -> None:
        """Reads some more samples, so that the error can name several bad ones."""
        for _ in range(min(_SEARCHED, self._rank_samples)):
            if len(self._known_bad) >= _NAMED_IN_ERROR:
                return
            _, _, index, future = self._next_visit()
            if isinstance(error := future.exception(), BadSample):
                self._known_bad.setdefault(self.source.keys[index], str(error))

    def _fail(self, message: str) -> BadDataError:
        """The error to raise, now and in every later call."""
        self.bad.update(self._known_bad)
        first = "\n".join(f"  {key}: {reason}" for key, reason in list(self.bad.items())[:_NAMED_IN_ERROR])
        self._failure = BadDataError(f"{message}; {len(self.bad)} bad so far, the first are:\n{first}")
        return self._failure

    def _schedule(self, selection: _Selection) -> None:
        self._pipeline.schedule(
            [image for sample in selection.samples for image in sample.images],
            [parameters for sample in selection.samples for parameters in sample.parameters],
        )
        self._scheduled = selection

    def _take(self) -> tuple[_Selection, torch.Tensor]:
        while True:
            if self._scheduled is None:
                self._schedule(self._select(self._progress))
            selection, self._scheduled = self._scheduled, None
            try:
                return selection, self._pipeline.result()
            except RuntimeError as error:
                self._drop_undecodable(selection, error)

    def _drop_undecodable(self, selection: _Selection, error: RuntimeError) -> None:
        """Marks the images that failed in DALI, though not in PIL, as bad and goes back to retry the batch."""
        undecodable = {}
        for sample in selection.samples:
            single = self._new_pipeline(len(sample.images))
            single.schedule(sample.images)
            try:
                single.result()
            except RuntimeError as reason:
                undecodable[sample.key] = f"image cannot be decoded by DALI: {str(reason).splitlines()[0]}"
        if not undecodable:
            raise error
        self._restart()
        for key, reason in undecodable.items():
            self._note_bad(key, reason, selection, selection.progress.epoch)
        self.bad.update(undecodable)

    def _tokenize(self, selection: _Selection, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text with special tokens, (L,) int64, cut to `max_tokens`; counts those that are cut."""
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        room = self.max_tokens - len(self._special)
        rows = []
        for sample, ids in zip(selection.samples, encoded["input_ids"], strict=True):
            if len(ids) > room:
                selection.progress.truncated_captions += 1
                if sample.key not in self._truncated_keys:  # logged at the first visit only
                    self._truncated_keys.add(sample.key)
                    total = len(ids) + len(self._special)
                    logger.info("text of %s cut from %d to %d tokens", sample.key, total, self.max_tokens)
            rows.append(np.array([self._special[0], *ids[:room], *self._special[1:]], np.int64))
        return rows

    def _padded(self, rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pads token rows: input_ids (B, L) int64 and attention_mask (B, L) bool, on the device."""
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, self.tokenizer.pad_token_id, np.int64)
        ids[mask] = np.concatenate(rows)
        return self._tensor(ids), self._tensor(mask)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)


class PretrainingLoader(SampleLoader[Batch]):
    """Batches of images and captions, with masked words."""

    def __init__(
        self, source: CaptionSource, tokenizer: PreTrainedTokenizerFast, *, mask_probability: float = 0.15, **options
    ):
        """mask_probability: fraction of the word pieces that are masked; options: those of `SampleLoader`."""
        self._masker = TextMasker(tokenizer, mask_probability)
        super().__init__(source, tokenizer, **options)

    def _choose(self, sample: Sample, epoch: int) -> str:
        """One of the captions."""
        return sample.captions[keyed_generator(self.seed, epoch, sample.key, "caption").integers(len(sample.captions))]

    def _collate(self, selection: _Selection, pixels: torch.Tensor) -> Batch:
        samples = selection.samples
        captions = self._tokenize(selection, [sample.content for sample in samples])
        masked = [
            self._masker.mask(ids, keyed_generator(self.seed, sample.epoch, sample.key, "mask"))
            for sample, ids in zip(samples, captions, strict=True)
        ]
        input_ids, attention_mask = self._padded(captions)
        masked_ids, _ = self._padded([caption.ids for caption in masked])
        length = input_ids.shape[1]
        positions = [caption.positions + row * length for row, caption in enumerate(masked)]
        return Batch(
            pixels=pixels,
            input_ids=input_ids,
            masked_ids=masked_ids,
            attention_mask=attention_mask,
            mlm_positions=self._tensor(np.concatenate(positions)),
            mlm_labels=self._tensor(np.concatenate([caption.labels for caption in masked])),
            word_index=self._tensor(np.array([caption.word_index for caption in masked], np.int64)),
            ids=self._tensor(self.source.image_ids[[sample.index for sample in samples]]),
            keys=[sample.key for sample in samples],
            token_count=sum(len(ids) for ids in captions),
        )


def default_threads() -> int:
    """The cores of this process divided by the ranks on this machine, from 1 to 16."""
    return max(1, min(16, len(os.sched_getaffinity(0)) // local_ranks()))

"""The training loaders: endless streams of batches in keyed order that survive bad samples and resume exactly."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from softmask_fast.data.augment import AugmentConfig, draw_parameters
from softmask_fast.data.dali_pipeline import DaliPipeline
from softmask_fast.data.images import MAX_PIXELS, ImageFacts, check_image, convert_image
from softmask_fast.data.remote.download import UnreachableFile
from softmask_fast.data.sampler import HashSampler, local_ranks
from softmask_fast.data.seeding import keyed_generator
from softmask_fast.data.text_masking import TextMasker
from softmask_fast.data.types import BadSample, Batch, CaptionSource, Sample

logger = logging.getLogger(__name__)

_NAMED = 10  # bad samples named in the error
_SEARCHED = 1000  # further samples looked at to find them

BatchType = TypeVar("BatchType")


class BadDataError(RuntimeError):
    """More samples cannot be used than `max_bad_fraction` allows."""


@dataclass
class _Prepared:
    """One visit to a sample that can be used: everything but its pixels."""

    index: int
    key: str
    epoch: int
    images: list[bytes | np.ndarray]
    parameters: list[dict[str, np.ndarray]]  # of each image
    content: Any  # what the loader chose of the sample beside its images
    skipped_captions: int


@dataclass
class _Progress:
    """Where the stream stands after a batch: what `state_dict` keeps."""

    epoch: int = 0
    position: int = 0  # in this rank's order of the epoch
    truncated_captions: int = 0
    skipped_captions: int = 0


@dataclass
class _Selection:
    """The samples of the next batch, and where the stream stands behind them."""

    progress: _Progress
    samples: list[_Prepared] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)  # found on the way


class SampleLoader(Generic[BatchType]):
    """Endless iterator over batches of this rank; a subclass says what a batch is, by `_choose` and `_collate`.

    Every epoch has its own order over the whole source, dealt to the ranks (data/sampler.py). A bad sample is skipped
    and the next one takes its place; a batch may reach over the end of an epoch. Images are read and checked by threads
    ahead of time, and DALI works on the next batch while the caller trains on this one.
    """

    def __init__(
        self,
        source: CaptionSource,
        tokenizer: PreTrainedTokenizerFast,
        *,
        batch_size: int,
        image_size: int,
        augment: AugmentConfig,
        max_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        max_bad_fraction: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        num_threads: int | None = None,
        images_per_sample: int = 1,
    ):
        """max_tokens: longest caption, with its special tokens; max_bad_fraction: of this rank's share of the source;
        max_pixels: largest image, width times height; num_threads: for checking images and for DALI each (default: the
        cores of this process, shared among the ranks of this machine, at most 16).
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if max_tokens < 3:
            raise ValueError(f"max_tokens must be at least 3 ([CLS], a word piece, [SEP]), got {max_tokens}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")
        if len(source) < world_size:
            raise ValueError(f"source has {len(source)} samples, too few for world_size {world_size}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {max_bad_fraction}")
        self.source, self.tokenizer, self.batch_size, self.image_size = source, tokenizer, batch_size, image_size
        self.augment, self.max_tokens, self.seed = augment, max_tokens, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.max_bad_fraction, self.max_pixels = max_bad_fraction, max_pixels
        self.num_threads = default_threads() if num_threads is None else num_threads
        self._cut: set[str] = set()  # keys whose caption was cut
        self.bad: dict[str, str] = {}  # key -> reason, in the order in which they were met

        self._share = len(range(rank, len(source), world_size))  # samples of this rank in one epoch
        self._order = getattr(source, "order", None) or HashSampler(source.keys)
        facts = [("width", np.int32), ("height", np.int32), ("convert", bool)]
        self._facts = np.zeros((len(source), images_per_sample), facts)
        self._special = tokenizer("")["input_ids"]  # [CLS], and [SEP] where the tokenizer puts one
        self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="softmask-data")
        self._closed = False
        self._progress = _Progress()
        self._visits: deque[tuple[int, int, int, Future[_Prepared]]] = deque()
        self._restart()

    def __iter__(self) -> Iterator[BatchType]:
        return self

    def _choose(self, sample: Sample, epoch: int) -> Any:
        """What of a sample beside its images enters the batch; a function of its key, the seed and the epoch alone."""
        raise NotImplementedError

    def _collate(self, selection: _Selection, pixels: torch.Tensor) -> BatchType:
        """pixels: of all images, (batch_size * images_per_sample, 3, size, size), sample after sample."""
        raise NotImplementedError

    def __next__(self) -> BatchType:
        """Raises BadDataError when too many samples are bad, UnreachableFile when a shard cannot be downloaded."""
        if self._closed:
            raise ValueError("the loader is closed")
        if self._failure is not None:
            raise self._failure
        current, pixels = self._take()
        batch = self._collate(current, pixels)
        self.bad.update(current.bad)
        self._progress = current.progress
        with suppress(BadDataError, UnreachableFile):  # the batch at hand is good: the error is due at the next call
            self._schedule(self._select(current.progress))
        return batch

    @property
    def epoch(self) -> float:
        """Passes over the source so far."""
        return self._progress.epoch + self._progress.position / self._share

    @property
    def batches_per_epoch(self) -> int:
        """Of this rank, when no sample is bad; the stream itself has no such border."""
        return max(1, self._share // self.batch_size)

    @property
    def truncated_captions(self) -> int:
        """Visits so far whose caption was cut to `max_tokens`."""
        return self._progress.truncated_captions

    @property
    def skipped_captions(self) -> int:
        """Captions without a word that were left out beside good ones, counted at every visit to their image."""
        return self._progress.skipped_captions

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch returned; JSON-able."""
        return {**asdict(self._progress), "bad": dict(self.bad), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues behind the batch after which `state` was taken, bit-identically.

        Raises ValueError when the state belongs to another source, seed or number of ranks (see `redistributed`).
        """
        own = self._identity()
        for name in ("source", "seed", "world_size"):
            if state[name] != own[name]:
                raise ValueError(
                    f"state: was taken with another {name} ({state[name]}, now {own[name]}); "
                    f"continue with the same data and seed, or start the data anew without this state"
                )
        progress = _Progress(**{name: state[name] for name in _Progress.__dataclass_fields__})
        self._progress, self.bad = progress, dict(state["bad"])
        self._restart()

    def redistributed(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """This rank's state after a run of any number of ranks, whose states are given in rank order.

        As many ranks as before go on exactly. Otherwise the ranks share what is left of the epoch; how many samples
        come twice in it is logged (none, where no sample was bad and the source is on a local disk).
        """
        if len(states) == self.world_size:
            return states[self.rank]
        places = [(state["epoch"], state["position"]) for state in states]
        epoch, position, twice = self._order.reshard(places, self.rank, self.world_size)
        if self.rank == 0:
            logger.warning(
                "the data position is of %d ranks, now there are %d: going on in epoch %d, where about %d of %d "
                "samples will be visited twice", len(states), self.world_size, epoch, twice, len(self.source),
            )  # fmt: skip
        bad = dict(item for state in states for item in state["bad"].items())
        counts = {
            name: sum(state[name] for state in states) if self.rank == 0 else 0
            for name in ("truncated_captions", "skipped_captions")
        }
        share = {key: bad[key] for key in list(bad)[self.rank :: self.world_size]}  # so that each is counted once
        own = {"epoch": epoch, "position": position, "bad": share, "world_size": self.world_size}
        return {**states[0], **counts, **own}

    def close(self) -> None:
        """Ends the threads and frees the pipeline."""
        if not self._closed:
            self._closed = True
            self._pool.shutdown(wait=True, cancel_futures=True)
            del self._pipeline

    def __enter__(self) -> PretrainingLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        source = f"{len(self.source)}-{self._order.fingerprint}"
        return {"source": source, "seed": self.seed, "world_size": self.world_size}

    def _restart(self) -> None:
        """Forgets what was prepared ahead and goes back to behind the last batch returned."""
        for *_, future in self._visits:
            future.cancel()
        self._known_bad = dict(self.bad)
        self._places = self._walk(self._progress.epoch, self._progress.position)
        self._visits.clear()
        self._scheduled: _Selection | None = None
        self._failure: BadDataError | UnreachableFile | None = None
        self._pipeline = DaliPipeline(
            image_size=self.image_size,
            batch_size=self._facts.shape[1] * self.batch_size,
            encoded=self.source.encoded,
            arguments=self.augment.arguments(),
            device=self.device,
            num_threads=self.num_threads,
        )

    def _walk(self, epoch: int, position: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, position, index) of this rank's samples, without end."""
        while True:
            order = self._order.indices(self.seed, epoch, self.rank, self.world_size, position)
            for place, index in enumerate(order, position):
                yield epoch, place, index
            epoch, position = epoch + 1, 0

    def _next_visit(self) -> tuple[int, int, int, Future[_Prepared]]:
        """The next sample in order; keeps the threads busy with those behind it."""
        while len(self._visits) < 2 * self.batch_size:
            epoch, position, index = next(self._places)
            self._visits.append((epoch, position, index, self._pool.submit(self._prepare, epoch, index)))
        return self._visits.popleft()

    def _prepare(self, epoch: int, index: int) -> _Prepared:
        """Runs in a thread. Raises BadSample."""
        key = self.source.keys[index]
        if key in self._known_bad:
            raise BadSample(self._known_bad[key])
        sample = self.source.read(index)
        images, parameters = [], []
        for number, image in enumerate(sample.images):
            facts = self._check((index, number), image)
            images.append(convert_image(image) if facts.convert else image)
            generator = keyed_generator(self.seed, epoch, key, "image", *[number] * (number > 0))
            parameters.append(
                draw_parameters(self.augment, generator, facts.width, facts.height, self.image_size)
            )
        content = self._choose(sample, epoch)
        return _Prepared(index, key, epoch, images, parameters, content, sample.skipped_captions)

    def _check(self, place: tuple[int, int], image: bytes | np.ndarray) -> ImageFacts:
        """Decodes an image in full at its first visit only. place: index of the sample, number of the image in it."""
        found = self._facts[place]
        if found["width"]:
            return ImageFacts(int(found["width"]), int(found["height"]), bool(found["convert"]))
        facts = check_image(image, self.max_pixels)
        self._facts[place] = (facts.width, facts.height, facts.convert)
        return facts

    def _select(self, progress: _Progress) -> _Selection:
        """The next `batch_size` good samples behind `progress`."""
        selection = _Selection(replace(progress))
        bad_in_a_row = 0
        while len(selection.samples) < self.batch_size:
            epoch, position, index, future = self._next_visit()
            selection.progress.epoch, selection.progress.position = epoch, position + 1
            try:
                prepared = future.result()
            except BadSample as error:
                bad_in_a_row += 1
                self._note_bad(self.source.keys[index], str(error), selection, epoch)
                if bad_in_a_row >= self._share:
                    raise self._fail("no sample of this rank can be used") from error
                continue
            except UnreachableFile as error:  # going on would leave its samples out
                self._failure = error
                raise
            bad_in_a_row = 0
            selection.samples.append(prepared)
            selection.progress.skipped_captions += prepared.skipped_captions
        return selection

    def _note_bad(self, key: str, reason: str, selection: _Selection, epoch: int) -> None:
        if key in self._known_bad:
            return
        self._known_bad[key] = selection.bad[key] = reason
        logger.warning("skipped %s: %s", key, reason)
        # over the epochs a rank meets ever more of the source
        met = min(len(self.source), self._share * (epoch + 1))
        limit = int(self.max_bad_fraction * met + 1e-9)
        if len(self._known_bad) > limit:
            self._search_bad()
            raise self._fail(
                f"more than {limit} of {met} samples cannot be used (max_bad_fraction {self.max_bad_fraction:g})"
            )

    def _search_bad(self) -> None:
        """Looks through some samples more, so that the error can name ten."""
        for _ in range(min(_SEARCHED, self._share)):
            if len(self._known_bad) >= _NAMED:
                return
            _, _, index, future = self._next_visit()
            if isinstance(error := future.exception(), BadSample):
                self._known_bad.setdefault(self.source.keys[index], str(error))

    def _fail(self, what: str) -> BadDataError:
        """The error that this and every later call raises."""
        self.bad.update(self._known_bad)
        first = "\n".join(f"  {key}: {reason}" for key, reason in list(self.bad.items())[:_NAMED])
        self._failure = BadDataError(f"{what}; {len(self.bad)} bad so far, the first are:\n{first}")
        return self._failure

    def _schedule(self, selection: _Selection) -> None:
        self._pipeline.schedule(
            [image for sample in selection.samples for image in sample.images],
            [parameters for sample in selection.samples for parameters in sample.parameters],
        )
        self._scheduled = selection

    def _take(self) -> tuple[_Selection, torch.Tensor]:
        """The scheduled batch and its pixels."""
        while True:
            if self._scheduled is None:
                self._schedule(self._select(self._progress))
            selection, self._scheduled = self._scheduled, None
            try:
                return selection, self._pipeline.result()
            except RuntimeError as error:
                self._drop_undecodable(selection, error)

    def _drop_undecodable(self, selection: _Selection, error: RuntimeError) -> None:
        """An image that PIL decodes and DALI does not ended the batch: marks it as bad and goes back to try again."""
        found = {}
        for sample in selection.samples:
            single = DaliPipeline(
                image_size=self.image_size,
                batch_size=len(sample.images),
                encoded=self.source.encoded,
                device=self.device,
            )
            single.schedule(sample.images)
            try:
                single.result()
            except RuntimeError as reason:
                found[sample.key] = f"image cannot be decoded by DALI: {str(reason).splitlines()[0]}"
        if not found:
            raise error
        self._restart()
        for key, reason in found.items():
            self._note_bad(key, reason, selection, selection.progress.epoch)
        self.bad.update(found)

    def _tokenize(self, selection: _Selection, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text with its special ones, at most `max_tokens` long; counts those that are cut."""
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        room = self.max_tokens - len(self._special)
        rows = []
        for sample, ids in zip(selection.samples, encoded["input_ids"], strict=True):
            if len(ids) > room:
                selection.progress.truncated_captions += 1
                if sample.key not in self._cut:  # a line at the first visit is enough
                    self._cut.add(sample.key)
                    total = len(ids) + len(self._special)
                    logger.info("text of %s cut from %d to %d tokens", sample.key, total, self.max_tokens)
            rows.append(np.array([self._special[0], *ids[:room], *self._special[1:]], np.int64))
        return rows

    def _padded(self, rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token rows of several lengths -> input_ids (B, L) int64 and attention_mask (B, L) bool, on the device."""
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
        """options: those of `SampleLoader`."""
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
        return Batch(
            pixels=pixels,
            input_ids=input_ids,
            masked_ids=masked_ids,
            attention_mask=attention_mask,
            mlm_positions=self._tensor(
                np.concatenate([caption.positions + row * length for row, caption in enumerate(masked)])
            ),
            mlm_labels=self._tensor(np.concatenate([caption.labels for caption in masked])),
            word_index=self._tensor(np.array([caption.word_index for caption in masked], np.int64)),
            ids=self._tensor(self.source.image_ids[[sample.index for sample in samples]]),
            keys=[sample.key for sample in samples],
            token_count=sum(len(ids) for ids in captions),
        )


def default_threads() -> int:
    """The cores of this process, shared among the ranks of this machine; at most 16."""
    return max(1, min(16, len(os.sched_getaffinity(0)) // local_ranks()))

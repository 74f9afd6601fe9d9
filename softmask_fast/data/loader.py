"""Training loaders: endless streams of batches in keyed order that survive bad samples and resume exactly.

This module decides the order, the replacement of bad samples and the position in the stream. Threads or worker
processes (`data.workers`) prepare the next visits of that order, and DALI makes the pixels.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from softmask_fast.data.augment import AugmentConfig
from softmask_fast.data.images import MAX_PIXELS
from softmask_fast.data.preparing import FACTS, Job, Preparer, PretrainingPreparer, padded
from softmask_fast.data.sampler import HashSampler, WindowedSampler
from softmask_fast.data.selection import Chunk, Progress, Selection
from softmask_fast.data.transfer import Transfer
from softmask_fast.data.types import BadSample, Batch, CaptionSource, UnreachableFile
from softmask_fast.data.workers import ThreadPool, WorkerError, WorkerPool, default_threads
from softmask_fast.errors import UsageError, printable

if TYPE_CHECKING:
    from softmask_fast.data.dali_pipeline import DaliPipeline

logger = logging.getLogger(__name__)

_NAMED_IN_ERROR = 10  # bad samples that an error names
_SEARCHED = 1000  # samples that are read, at most, to find that many
_JOB = 128  # visits that a worker process prepares at a time, at most

BatchType = TypeVar("BatchType")


class BadDataError(RuntimeError):
    """More samples are bad than `max_bad_fraction` allows. The message names the first ones."""


class SampleLoader(Generic[BatchType]):
    """Endless iterator over the batches of this rank. Subclasses define a batch by a `Preparer` and two methods.

    Every epoch has its own order over the whole source, dealt to the ranks (see `data.sampler`). A bad sample is
    skipped and replaced by the next one; a batch may span the end of an epoch. Threads or worker processes read and
    check images ahead of time, and DALI works on the next batch while the caller trains on this one.

    Attributes:
        bad: key -> reason, for the bad samples so far.
    """

    preparer: ClassVar[type[Preparer]]

    def __init__(
        self, source: CaptionSource, tokenizer: PreTrainedTokenizerFast, *, batch_size: int, image_size: int,
        augment: AugmentConfig, max_tokens: int, seed: int, rank: int = 0, world_size: int = 1,
        device: torch.device | str = "cpu", max_bad_fraction: float = 0.01, max_pixels: int = MAX_PIXELS,
        num_threads: int | None = None, workers: int = 0, images_per_sample: int = 1, **prepare: Any,
    ) -> None:  # fmt: skip
        """Starts to prepare the first samples.

        Args:
            source: The samples.
            tokenizer: Of their texts.
            batch_size: Samples per batch of this rank.
            image_size: Side of the square images, in pixels.
            augment: Which augmentations are on.
            max_tokens: Longest caption, including its special tokens; longer ones are cut.
            seed: Of the order, the augmentation and the masks.
            rank: This process, among `world_size`.
            world_size: Processes that share the source.
            device: Where DALI works and batches are returned.
            max_bad_fraction: Largest fraction of bad samples among those visited.
            max_pixels: Largest image, width times height.
            num_threads: Threads of DALI, and without workers as many again that prepare; default: `default_threads()`.
            workers: Processes that prepare the samples; 0: threads of this process. The batches are the same.
            images_per_sample: 2 for pairs of images.
            prepare: Further arguments of the `preparer`.

        Raises:
            UsageError: If an option is out of range.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
        if max_tokens < 3:
            raise UsageError(f"max_tokens: expected at least 3 ([CLS], a token, [SEP]), got {max_tokens}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")
        if len(source) < world_size:
            raise UsageError(f"data: {len(source)} samples are too few for world_size {world_size}")
        if not 0 <= max_bad_fraction <= 1:
            raise UsageError(f"max_bad_fraction: expected in [0, 1], got {max_bad_fraction}")
        if workers < 0:
            raise UsageError(f"data_workers: expected at least 0, got {workers}")
        if workers and type(source).__module__ == "__main__":
            raise UsageError("data_workers: expected 0, or a source defined in a module that workers can import")
        self.source, self.tokenizer, self.batch_size, self.image_size = source, tokenizer, batch_size, image_size
        self.augment, self.max_tokens, self.seed = augment, max_tokens, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.max_bad_fraction = max_bad_fraction
        self.num_threads = default_threads() if num_threads is None else num_threads
        self.bad: dict[str, str] = {}

        self._rank_samples = len(range(rank, len(source), world_size))  # visits of this rank in an epoch
        self._sampler: HashSampler | WindowedSampler = getattr(source, "sampler", None) or HashSampler(source.keys)
        self._padding = tokenizer.pad_token_id
        self._locate = getattr(source, "locate", None)
        self._truncated_keys: set[str] = set()
        self._facts = np.zeros((len(source), images_per_sample), FACTS)
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

        preparer = self.preparer(
            source, tokenizer, augment=augment, image_size=image_size, max_tokens=max_tokens, max_pixels=max_pixels,
            seed=seed, **prepare,
        )  # fmt: skip
        # Jobs have equal sizes. Small ones spread a batch over all threads; large ones cost this thread less.
        jobs = -(-batch_size // _JOB) if workers else min(batch_size, self.num_threads)
        self._job_size = -(-batch_size // jobs)
        # jobs held at a time: those of the batch in DALI, part of the next one, and those prepared ahead
        self._capacity = jobs + 1 + jobs + max(jobs, workers)
        self._pool: ThreadPool | WorkerPool
        if workers:
            self._pool = WorkerPool(preparer, workers, self._capacity)
        else:
            self._pool = ThreadPool(preparer, self.num_threads)
        self._closed = False
        self._progress = Progress()
        self._chunks: deque[Chunk] = deque()  # submitted, their images still needed, in order
        try:
            self._restart()
        except BaseException:
            self._pool.close()
            raise

    def __iter__(self) -> Iterator[BatchType]:
        return self

    def _arrays(self, selection: Selection) -> dict[str, np.ndarray]:
        """The arrays that go to the device with the pixels."""
        raise NotImplementedError

    def _batch(self, selection: Selection, pixels: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> BatchType:
        """Makes a batch from pixels, (batch_size * images_per_sample, 3, size, size) with the images of each sample in
        turn, and from the `_arrays` on the device."""
        raise NotImplementedError

    def __next__(self) -> BatchType:
        """The next batch.

        Raises:
            BadDataError: If too many samples are bad.
            UnreachableFile: If a shard cannot be downloaded.
            WorkerError: If a worker process was killed.
        """
        if self._closed:
            raise ValueError("the loader is closed")
        if self._failure is not None:
            raise self._failure
        current, pixels = self._take()
        batch = self._batch(current, pixels, current.transfer.tensors())
        self.bad.update(current.bad)
        self._progress = current.progress
        with suppress(BadDataError, UnreachableFile, WorkerError):  # this batch is good; the next call raises
            self._schedule(self._select(current.progress))
        return batch

    @property
    def epoch(self) -> float:
        """Passes over the source so far, with the fraction of the current one."""
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

        Raises:
            UsageError: If it belongs to another source, seed or number of ranks (see `redistributed`).
        """
        own = self._identity()
        for name in ("source", "seed", "world_size"):
            if state[name] != own[name]:
                raise UsageError(
                    f"state: expected {name} {own[name]}, got a state saved with {state[name]}; "
                    f"continue with the same data and seed, or start a new run"
                )
        progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
        self._progress, self.bad = progress, dict(state["bad"])
        self._restart()

    def redistributed(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """This rank's state after a run with any number of ranks.

        With as many ranks as before the stream continues exactly. Otherwise the ranks share what is left of the epoch,
        and the log says how many of its samples are repeated: none if no sample was bad and the source is local.

        Args:
            states: Those of the earlier run, in rank order.
        """
        if len(states) == self.world_size:
            return states[self.rank]
        positions = [(state["epoch"], state["position"]) for state in states]
        epoch, position, repeated = self._sampler.reshard(positions, self.rank, self.world_size)
        # counts that are summed over the ranks go to one rank only
        bad = dict(item for state in states for item in state["bad"].items())
        own_bad = {key: bad[key] for key in list(bad)[self.rank :: self.world_size]}
        counts = {"truncated_captions": 0, "skipped_captions": 0}
        if self.rank == 0:
            counts = {name: sum(state[name] for state in states) for name in counts}
            logger.warning(
                "the checkpoint's data position is for %d ranks, this run has %d: continuing in epoch %d, repeating "
                "about %d of %d samples", len(states), self.world_size, epoch, repeated, len(self.source),
            )  # fmt: skip
        own = {"epoch": epoch, "position": position, "bad": own_bad, "world_size": self.world_size}
        return {**states[0], **counts, **own}

    def close(self) -> None:
        """Stops the threads or worker processes and frees the pipeline."""
        if not self._closed:
            self._closed = True
            del self._pipeline
            self._pool.close()

    def __enter__(self) -> SampleLoader[BatchType]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        source = f"{len(self.source)}-{self._sampler.fingerprint}"
        return {"source": source, "seed": self.seed, "world_size": self.world_size}

    def _restart(self) -> None:
        """Drops what was loaded ahead and continues after the last returned batch."""
        self._pool.drop()
        self._chunks.clear()
        self._known_bad = dict(self.bad)
        self._stream = self._jobs(self._progress.epoch, self._progress.position)
        self._at = 0  # position in `_chunks` of the one to visit next
        self._scheduled: Selection | None = None
        self._failure: BadDataError | UnreachableFile | WorkerError | None = None
        images = self._facts.shape[1] * self.batch_size
        self._pipeline = self._new_pipeline(images, arguments=self.augment.arguments(), num_threads=self.num_threads)

    def _new_pipeline(self, images: int, **options: Any) -> DaliPipeline:
        from softmask_fast.data.dali_pipeline import DaliPipeline  # evaluation imports this module, maybe without DALI

        return DaliPipeline(
            image_size=self.image_size, batch_size=images, encoded=self.source.encoded, device=self.device, **options
        )

    def _jobs(self, epoch: int, position: int) -> Iterator[Chunk]:
        """This rank's visits from an epoch and position on, in endless jobs."""
        chunk = Chunk([], [], [], [])
        while True:
            indices = self._sampler.indices(self.seed, epoch, self.rank, self.world_size, position)
            while found := list(islice(indices, self._job_size - len(chunk.indices))):
                chunk.epochs += [epoch] * len(found)
                chunk.positions += range(position, position + len(found))
                chunk.indices += found
                position += len(found)
                if len(chunk.indices) == self._job_size:
                    chunk.keys += map(self.source.keys.__getitem__, chunk.indices)
                    yield chunk
                    chunk = Chunk([], [], [], [])
            epoch, position = epoch + 1, 0

    def _request(self) -> None:
        """Keeps the threads or workers busy."""
        while len(self._chunks) < self._capacity:
            chunk = next(self._stream)
            places = chunk.indices if self._locate is None else [*map(self._locate, chunk.indices)]
            self._pool.submit(Job(chunk.epochs, chunk.keys, places, self._facts[chunk.indices]))
            self._chunks.append(chunk)

    def _next_chunk(self, selection: Selection) -> Chunk:
        """The earliest chunk with a visit left, prepared."""
        if self._at < len(self._chunks) and self._chunks[self._at].visit == self._job_size:
            self._at += 1
            selection.finished += 1
        try:
            self._request()
            if self._at == len(self._chunks):  # this batch holds all chunks, as hardly any sample is good
                for prepared, *_ in selection.pieces:
                    prepared.images = [i.copy() if isinstance(i, np.ndarray) else i for i in prepared.images]
                self._release(selection)
                self._request()
            chunk = self._chunks[self._at]
            if chunk.prepared is None:
                self._receive(chunk)
        except BaseException as error:
            stopped = RuntimeError(f"the loader was interrupted by {type(error).__name__}; make a new one")
            self._failure = error if isinstance(error, Exception) else stopped
            raise
        return chunk

    def _receive(self, chunk: Chunk) -> None:
        chunk.prepared = self._pool.receive()
        self._facts[chunk.indices] = chunk.prepared.facts
        problems = dict(chunk.prepared.problems)
        if self._known_bad:  # also by DALI or in an earlier run
            known = {visit: key for visit, key in enumerate(chunk.keys) if key in self._known_bad}
            problems |= {visit: BadSample(self._known_bad[key]) for visit, key in known.items()}
        chunk.problems = dict(sorted(problems.items()))

    def _release(self, selection: Selection) -> None:
        """Drops the chunks that ended in a selection whose images are no longer needed."""
        for _ in range(selection.finished):
            self._chunks.popleft()
        self._at -= selection.finished
        selection.finished = 0

    def _visit(self, selection: Selection, most: int) -> BadSample | UnreachableFile | None:
        """Selects up to `most` good samples in a row, at least one; or skips the next one and returns its problem."""
        chunk = self._next_chunk(selection)
        first = chunk.visit
        stop = next((visit for visit in chunk.problems if visit >= first), self._job_size)
        problem = chunk.problems.get(first)
        if problem is None:
            chunk.visit = min(stop, first + most)
            end = chunk.row + chunk.visit - first
            selection.pieces.append((chunk.prepared, chunk.row, end))
            selection.keys += chunk.keys[first : chunk.visit]
            selection.indices += chunk.indices[first : chunk.visit]
            chunk.row = end
        else:
            chunk.visit += 1
            chunk.row += first not in chunk.prepared.problems
        last = chunk.visit - 1
        selection.last, selection.progress.epoch = chunk.keys[last], chunk.epochs[last]
        selection.progress.position = chunk.positions[last] + 1
        return problem

    def _select(self, progress: Progress) -> Selection:
        """The next `batch_size` good samples after `progress`."""
        selection = Selection(replace(progress))
        bad_in_a_row = 0
        while (missing := self.batch_size - len(selection.keys)) > 0:
            problem = self._visit(selection, missing)
            if problem is None:
                bad_in_a_row = 0
            elif isinstance(problem, UnreachableFile):  # continuing would silently skip its samples
                self._failure = problem
                raise problem
            else:
                bad_in_a_row += 1
                self._note_bad(selection.last, str(problem), selection)
                if bad_in_a_row >= self._rank_samples:
                    raise self._fail("no sample of this rank can be used") from problem
        selection.progress.skipped_captions += int(selection.column("skipped_captions").sum())
        self._count_cut_texts(selection)
        return selection

    def _note_bad(self, key: str, reason: str, selection: Selection) -> None:
        if key in self._known_bad:
            return
        self._known_bad[key] = selection.bad[key] = reason
        logger.warning("skipped %s: %s", printable(key), printable(reason))
        # a rank sees different samples in every epoch
        seen = min(len(self.source), self._rank_samples * (selection.progress.epoch + 1))
        limit = int(self.max_bad_fraction * seen + 1e-9)
        if len(self._known_bad) > limit:
            self._search_bad(selection)
            raise self._fail(
                f"more than {limit} of {seen} samples cannot be used (max_bad_fraction {self.max_bad_fraction:g})"
            )

    def _search_bad(self, selection: Selection) -> None:
        """Reads more samples, so that the error can name several bad ones."""
        for _ in range(min(_SEARCHED, self._rank_samples)):
            if len(self._known_bad) >= _NAMED_IN_ERROR:
                return
            if isinstance(problem := self._visit(selection, 1), BadSample):
                self._known_bad.setdefault(selection.last, str(problem))

    def _fail(self, message: str) -> BadDataError:
        """The error to raise, now and in every later call."""
        self.bad.update(self._known_bad)
        first = "\n".join(printable(f"  {key}: {reason}") for key, reason in list(self.bad.items())[:_NAMED_IN_ERROR])
        self._failure = BadDataError(f"{message}; {len(self.bad)} bad so far, the first are:\n{first}")
        return self._failure

    def _schedule(self, selection: Selection) -> None:
        selection.transfer = Transfer(self._arrays(selection), self.device, self._copies)
        each = self._facts.shape[1]
        self._pipeline.schedule(selection.images(each), selection.parameters(each))
        self._scheduled = selection

    def _take(self) -> tuple[Selection, torch.Tensor]:
        while True:
            if self._scheduled is None:
                self._schedule(self._select(self._progress))
            selection, self._scheduled = self._scheduled, None
            try:
                pixels = self._pipeline.result()
            except RuntimeError as error:
                self._drop_undecodable(selection, error)
                continue
            self._release(selection)
            return selection, pixels

    def _drop_undecodable(self, selection: Selection, error: RuntimeError) -> None:
        """Marks the images that fail in DALI though not in PIL as bad, and goes back to retry the batch."""
        undecodable = {}
        each = self._facts.shape[1]
        images = selection.images(each)
        for number, key in enumerate(selection.keys):
            single = self._new_pipeline(each)
            single.schedule(images[each * number : each * (number + 1)])
            try:
                single.result()
            except RuntimeError as reason:
                undecodable[key] = f"image cannot be decoded by DALI: {str(reason).splitlines()[0]}"
        if not undecodable:
            self._failure = error
            raise error
        self._restart()
        for key, reason in undecodable.items():
            self._note_bad(key, reason, selection)
        self.bad.update(undecodable)

    def _count_cut_texts(self, selection: Selection) -> None:
        tokens = selection.column("tokens")
        for row in np.flatnonzero(tokens > self.max_tokens):
            selection.progress.truncated_captions += 1
            key = selection.keys[row]
            if key not in self._truncated_keys:  # logged at the first visit only
                self._truncated_keys.add(key)
                logger.info("text of %s cut from %d to %d tokens", printable(key), tokens[row], self.max_tokens)


class PretrainingLoader(SampleLoader[Batch]):
    """Batches of images and captions, with masked tokens."""

    preparer = PretrainingPreparer

    def __init__(
        self, source: CaptionSource, tokenizer: PreTrainedTokenizerFast, *, mask_probability: float = 0.15, **options
    ) -> None:
        """Starts to prepare the first samples.

        Args:
            source: Images with captions.
            tokenizer: Of the captions.
            mask_probability: Fraction of the tokens that are masked.
            options: Those of `SampleLoader`.
        """
        super().__init__(source, tokenizer, mask_probability=mask_probability, **options)

    def _arrays(self, selection: Selection) -> dict[str, np.ndarray]:
        captions, positions = selection.column("input_ids"), selection.column("mlm_positions")
        mask = captions.mask()
        first = np.arange(len(mask)) * mask.shape[1]  # flat position of each row
        return {
            "input_ids": padded(captions.values, mask, self._padding),
            "masked_ids": padded(selection.column("masked_ids").values, mask, self._padding),
            "attention_mask": mask,
            "mlm_positions": positions.values + np.repeat(first, positions.lengths),
            "mlm_labels": selection.column("mlm_labels").values,
            "word_index": selection.column("word_index"),
            "ids": self.source.image_ids[selection.indices],
        }

    def _batch(self, selection: Selection, pixels: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> Batch:
        token_count = int(selection.column("input_ids").lengths.sum())
        return Batch(pixels=pixels, **tensors, keys=selection.keys, token_count=token_count)

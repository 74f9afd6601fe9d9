"""Whole pretraining steps as CUDA graphs: one launch instead of several thousand. For one rank with one GPU.

A graph repeats the captured kernels at the same addresses and with the same sizes. Therefore

- texts are padded to the longest caption allowed, the numbers of tokens and of masked tokens are rounded up (`Sizes`),
  and each pair of these numbers has a graph of its own;
- values that change from step to step live on the device: the batch, the learning rate, alpha, the seed of the
  negatives, the queue's position, AdamW's step count; every replay sets dropout's generator to the host's seed;
- settings that change which kernels run are part of the graph's `Key`: soft targets or not, the queue or not.

The first step of a key runs eagerly, which compiles and loads its kernels; the second is captured. So no step is
computed twice, and a key that occurs once needs no graph. After the first `MOST_GRAPHS` keys, new ones stay eager, on
the same padded batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor

from softmask_fast.config import TrainConfig
from softmask_fast.data.types import Batch
from softmask_fast.model.momentum import MomentumCopy, StepSettings, distills
from softmask_fast.model.pretraining import NOT_SCORED, PretrainingStep
from softmask_fast.training.step_times import StepTimes
from softmask_fast.training.updates import DirectUpdates, FiniteWatch

MOST_GRAPHS = 16
TOKENS, WORDS = 256, 64  # the numbers of tokens and of masked tokens are rounded up to multiples of these


class Sizes(NamedTuple):
    """The sizes of a batch that depend on its captions, rounded up: its numbers of tokens and of masked tokens."""

    tokens: int
    words: int

    @classmethod
    def of(cls, batch: Batch) -> Sizes:
        """The rounded sizes of a batch."""
        counts = batch.token_bounds[1], len(batch.mlm_positions)
        return cls(*(max(1, -(-count // unit)) * unit for count, unit in zip(counts, (TOKENS, WORDS), strict=True)))


class Key(NamedTuple):
    """What one graph is captured for."""

    sizes: Sizes
    distills: bool
    use_queue: bool


@dataclass
class Captured:
    """A captured step, and the tensors that every replay fills."""

    replay: Callable[[], None]
    numbers: Tensor  # (2 + metrics,) float32: loss, gradient norm, metrics
    names: list[str]  # of the metrics


class StaticBatch:
    """A batch at fixed addresses. It takes batches of one size, with captions of up to `length` tokens."""

    def __init__(self, like: Batch, length: int) -> None:
        self.length = length
        texts = ("input_ids", "masked_ids", "attention_mask")
        self.texts = {name: getattr(like, name).new_zeros(len(like.ids), length) for name in texts}
        self.others = {name: torch.empty_like(getattr(like, name)) for name in ("pixels", "word_index", "ids")}
        self.words: dict[int, dict[str, Tensor]] = {}  # number of masked tokens -> their positions and labels

    def fits(self, batch: Batch) -> bool:
        """Whether `fill` can take a batch."""
        return batch.pixels.shape == self.others["pixels"].shape and batch.input_ids.shape[1] <= self.length

    def fill(self, batch: Batch, sizes: Sizes) -> Batch:
        """Copy a batch to the fixed addresses, padded with [PAD] and with masked tokens that are not scored."""
        present, words = batch.input_ids.shape[1], len(batch.mlm_positions)
        for name, target in self.texts.items():
            target[:, :present] = getattr(batch, name)
            target[:, present:] = 0
        for name, target in self.others.items():
            target.copy_(getattr(batch, name), non_blocking=True)
        if sizes.words not in self.words:
            empty = batch.mlm_labels.new_empty(sizes.words)
            self.words[sizes.words] = {"mlm_positions": empty, "mlm_labels": empty.clone()}
        masked = self.words[sizes.words]
        rows = batch.mlm_positions // present
        masked["mlm_positions"][:words] = batch.mlm_positions + rows * (self.length - present)
        masked["mlm_positions"][words:] = 0
        masked["mlm_labels"][:words] = batch.mlm_labels
        masked["mlm_labels"][words:] = NOT_SCORED
        return replace(
            batch, **self.texts, **self.others, **masked, token_count=None,
            most_tokens=min(sizes.tokens, len(batch.ids) * self.length),
        )  # fmt: skip


class GraphedUpdates(DirectUpdates):
    """`DirectUpdates` that replays a pretraining step as a CUDA graph."""

    name = "direct, CUDA graphs"

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, teacher: MomentumCopy, watch: FiniteWatch, times: StepTimes
    ) -> None:
        super().__init__(engine, teacher, watch, times)
        self.batch: StaticBatch | None = None
        self.alpha, self.rate = (torch.zeros((), device=self.device) for _ in range(2))
        self.seed = torch.zeros((), device=self.device, dtype=torch.int64)
        self.graphs: dict[Key, Captured | None] = {}  # None: the key has occurred once
        self.pool = self.stream = None

    def after_loading(self) -> None:
        super().after_loading()
        self.graphs = {}  # the old ones hold the old addresses

    def step(self, batch: Batch, settings: StepSettings, step: int, rate: float) -> dict[str, Tensor]:
        """As in `DirectUpdates`, from a graph where there is one."""
        if self.batch is None:
            self.batch = StaticBatch(batch, self.module.model.config.max_tokens)
        if not self.batch.fits(batch):
            return super().step(batch, settings, step, rate)
        key = Key(Sizes.of(batch), distills(settings.alpha), settings.use_queue)
        static = self.batch.fill(batch, key.sizes)
        self.alpha.fill_(settings.alpha)
        self.seed.fill_(settings.seed)
        self.rate.fill_(rate)
        on_device = replace(settings, alpha=self.alpha if key.distills else 0.0, seed=self.seed)

        def work() -> tuple[Tensor, list[str]]:
            loss, metrics = self.accumulate(static, on_device)
            numbers = [loss, self.update(self.rate), *metrics.values()]
            return torch.stack([number.float() for number in numbers]), list(metrics)

        if key in self.graphs:
            if self.graphs[key] is None:
                self.graphs[key] = self.capture(work)
            captured = self.graphs[key]
            captured.replay()
            numbers, names = captured.numbers.clone(), captured.names  # the next replay overwrites them
        else:
            numbers, names = self.run_beside(work)
            if len(self.graphs) < MOST_GRAPHS:
                self.graphs[key] = None
        loss, norm, *values = numbers.unbind()
        metrics = dict(zip(names, values, strict=True))
        self.watch.add(loss, "loss", step, metrics, batch.keys)
        self.watch.add(norm, "gradient", step, metrics, batch.keys)
        self.count(rate)
        self.times.end("graph")
        return metrics

    def run_beside(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the stream that graphs are captured on, so that autograd's nodes never mix two streams."""
        if self.stream is None:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, work: Callable[[], tuple[Tensor, list[str]]]) -> Captured:
        """Capture `work` without running it. The loader's threads may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            numbers, names = work()
        return Captured(graph.replay, numbers, names)


def graph_refusal(step: torch.nn.Module, train: TrainConfig, device: torch.device) -> str | None:
    """Why a run with `DirectUpdates` cannot use CUDA graphs; None if it can."""
    if device.type != "cuda":
        return f"a {device.type.upper()}"
    if train.gradient_accumulation_steps > 1:
        return f"gradient_accumulation_steps {train.gradient_accumulation_steps}"
    if train.attention == "xformers":
        return "attention xformers, which reads lengths on the host"
    if not isinstance(step, PretrainingStep):
        return "fine-tuning"
    if not step.objectives.hard_negatives:
        return "hard_negatives false (uniform negatives are drawn on the host)"
    if start := step.objectives.hard_negatives_start:
        return f"hard_negatives_start {start} (uniform negatives are drawn on the host)"
    return None

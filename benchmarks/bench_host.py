"""Host time of a training step, without a GPU: base's depth at a width where arithmetic costs next to nothing.

What remains is the host's work for each step, whatever the model's width: dispatching operators, modules, hooks, the
optimizer's lists, the loader. On a GPU this time has to stay below that of the kernels. Times are processor time of the
main thread, which does everything except reading ahead, so other load on the machine matters little. Queue and
vocabulary are small, because their arithmetic is not.

- the bare step: forward, backward, the training's own optimizer, momentum copy, on a batch that is ready;
- an iteration of the real job: the same through `Trainer.train_step`, with engine, loader and a line of the log;
- a batch of 128 pairs from the loader.

    pytest benchmarks/bench_host.py --benchmark-only
    python benchmarks/bench_host.py [--compile] [--bf16] [--steps 20]
"""

from __future__ import annotations

import argparse
import atexit
import functools
import io
import logging
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from bench_step import SETTINGS, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from softmask_fast import train
from softmask_fast.data.augment import AugmentConfig
from softmask_fast.data.loader import PretrainingLoader, SampleLoader
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.model.momentum import MomentumCopy, MomentumTeacher
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.options import LaunchOptions
from softmask_fast.training.deepspeed_engine import create_optimizer
from softmask_fast.training.launch import StopRequest, prepare_run, start_distributed
from softmask_fast.training.options import make_config
from softmask_fast.training.trainer import Trainer
from softmask_fast.training.updates import DirectUpdates

DS_CONFIG = Path(__file__).resolve().parents[1] / "ds.json"
PAIRS, LOADED_PAIRS = 4, 128
TOY = dict(
    image_size=32, vision_width=48, vision_heads=3, text_width=48, text_heads=3, vision_weights="random",
    text_weights="random", queue_size=64, vocab_size=200, data="shapes:num=512", batch_size=PAIRS, log_steps=1,
    eval_size=2,
)  # fmt: skip


class OperatorCount(TorchDispatchMode):
    """Counts dispatched operators by the part that is running."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.parts, self.counts = parts, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[self.parts.running[-1]] += 1
        return function(*args, **(kwargs or {}))


class Parts:
    """Processor seconds of the parts of a step. The time of a part inside another counts only for the inner one."""

    def __init__(self, rest: str):
        self.rest, self.running = rest, [rest]
        self.seconds: dict[str, float] = defaultdict(float)
        self.since = time.thread_time()

    def _lap(self) -> None:
        now = time.thread_time()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._lap()
        self.running.append(name)
        try:
            yield
        finally:
            self._lap()
            self.running.pop()

    def timed(self, name: str, function):
        @functools.wraps(function)
        def run(*args, **keywords):
            with self.part(name):
                return function(*args, **keywords)

        return run

    @contextmanager
    def wrapping(self, **methods: tuple[object, str]) -> Iterator[None]:
        """A context that times methods of classes and modules wherever they are called: part -> (owner, method)."""
        with ExitStack() as stack:
            for name, (owner, method) in methods.items():
                stack.enter_context(patch.object(owner, method, self.timed(name, getattr(owner, method))))
            yield

    def measure(self, iteration, steps: int, compiled: bool, warmup: int = 3) -> dict[str, tuple[float, int]]:
        """Part -> median milliseconds and operators; "all" is the whole iteration, where alone operators are counted in
        compiled code."""
        for _ in range(warmup):
            iteration()
        rounds = []
        for _ in range(steps):
            self.seconds.clear()
            self.since = time.thread_time()
            iteration()
            self._lap()
            rounds.append(dict(self.seconds) | {"all": sum(self.seconds.values())})
        counter = OperatorCount(self)
        if compiled:
            counter.counts["all"] = compiled_operators(iteration)
        else:
            with counter:
                iteration()
            counter.counts["all"] = counter.counts.total()
        names = sorted(rounds[-1], key=lambda name: (name == "all", name == self.rest))
        return {n: (1e3 * statistics.median(r.get(n, 0.0) for r in rounds), counter.counts[n]) for n in names}


def compiled_operators(iteration) -> int:
    """Operators of a profile that no other operator calls: those of compiled code too, but not its kernels. A dispatch
    mode cannot count them, as nothing runs compiled under it."""
    with torch.profiler.profile() as profile:
        iteration()
    names = ("aten::", "softmask_fast::")
    operators = [event for event in profile.events() if event.name.startswith(names)]
    return sum(event.cpu_parent is None or not event.cpu_parent.name.startswith(names) for event in operators)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def bare_step(compile: bool = False, bf16: bool = False, steps: int = 20) -> dict[str, tuple[float, int]]:
    """Parts of forward, backward, optimizer and momentum copy, as `Parts.measure` returns them."""
    torch.manual_seed(0)
    config = make_config("base", **TOY)
    model = VisionLanguageModel(config.model)
    teacher = MomentumTeacher(model, config.objectives)
    for network in (model, teacher.model):
        network.set_execution(compile=compile)
    step = PretrainingStep(model, config.objectives, bf16)
    optimizer = create_optimizer(step, config.train)
    batch = make_batch(config.model, PAIRS, torch.device("cpu"))
    averages, weights = teacher.pairs((name, weight.detach()) for name, weight in model.named_parameters())
    parts = Parts("rest")

    def iteration() -> None:
        with parts.part("forward"):
            loss, _ = step(batch, teacher, SETTINGS)
        with parts.part("backward"):
            loss.backward()
        with parts.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        with parts.part("momentum"):
            teacher.move(averages, weights)

    with one_thread():
        return parts.measure(iteration, steps, compile)


@contextmanager
def trainer(folder: Path, **options) -> Iterator[Trainer]:
    """The real job's trainer. Its process group of one rank stays, as DeepSpeed accepts no second one in a process."""
    launch = LaunchOptions(str(DS_CONFIG), local_rank=-1)
    if not dist.is_initialized():
        start_distributed(launch)
        atexit.register(dist.destroy_process_group)
    config = make_config("base", **TOY, output_dir=str(folder), **options)
    config, deepspeed_config, output = prepare_run(config, launch)
    with redirect_stdout(io.StringIO()):  # the trainer prints the record of the run
        job = train.build_trainer(config, deepspeed_config, output, StopRequest())
    job.engine.train()
    yield job
    job.loader.close()
    job.log.close()


def job_iteration(compile: bool = False, bf16: bool = False, steps: int = 20) -> dict[str, tuple[float, int]]:
    """Parts of an iteration of the real job. The last one, "engine, hooks, loop", is what no other part covers."""
    parts = Parts("engine, hooks, loop")
    methods = {
        "loader": (SampleLoader, "__next__"),
        "forward": (PretrainingStep, "forward"),
        "backward": (torch.autograd, "backward"),
        "optimizer": (DirectUpdates, "update"),
        "momentum": (MomentumCopy, "move"),
        "log": (Trainer, "log_metrics"),
    }
    with tempfile.TemporaryDirectory() as folder, one_thread():
        with parts.wrapping(**methods), trainer(Path(folder) / "run", compile=compile, bf16=bf16) as job:

            def iteration() -> None:
                metrics = job.train_step()
                job.flops.count()  # counts only once
                job.log_metrics(metrics)

            return parts.measure(iteration, steps, compile)


def loader_milliseconds(workers: int, batches: int = 6) -> float:
    """Median processor time of the main thread for a batch of 128."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_config("base", **TOY | {"batch_size": LOADED_PAIRS})
        source, _ = train.open_sources(config, Path(folder))
        tokenizer = train_tokenizer(train.sample_captions(source, 1_000), config.model.vocab_size)
    options = dict(image_size=config.model.image_size, max_tokens=config.model.max_tokens, batch_size=LOADED_PAIRS)
    augment = AugmentConfig.of(config.data)
    seconds = []
    with PretrainingLoader(source, tokenizer, augment=augment, seed=0, workers=workers, **options) as loader:
        for _ in range(batches):
            began = time.thread_time()
            next(loader)
            seconds.append(time.thread_time() - began)
    return 1e3 * statistics.median(seconds[2:])


MEASUREMENTS = {"bare step": bare_step, "job iteration": job_iteration}


def lines(title: str, parts: dict[str, tuple[float, int]]) -> list[str]:
    return [f"{title:28} {name:20} {ms:8.2f} ms {count:7,} operators" for name, (ms, count) in parts.items()]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_host(benchmark, capsys, name, compile):
    torch._dynamo.reset()
    parts = benchmark.pedantic(MEASUREMENTS[name], (compile,), rounds=1, iterations=1)
    benchmark.extra_info["parts"] = parts
    with capsys.disabled():
        print("", *lines(f"{name}, {'compiled' if compile else 'eager'}", parts), sep="\n")


@pytest.mark.parametrize("workers", [0, 1])
def test_loader(benchmark, capsys, workers):
    milliseconds = benchmark.pedantic(loader_milliseconds, (workers,), rounds=1, iterations=1)
    benchmark.extra_info["milliseconds"] = milliseconds
    with capsys.disabled():
        print(f"\nloader with {workers} workers, main thread: {milliseconds:.1f} ms per {LOADED_PAIRS} pairs")


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time and dispatched operators of a step, on one thread.")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", choices=[*MEASUREMENTS, "loader"])
    options = parser.parse_args()
    for name, measure in MEASUREMENTS.items():
        if options.only in (None, name):
            parts = measure(options.compile, options.bf16, options.steps)
            print(*lines(f"{name}{', compiled' * options.compile}{', bf16' * options.bf16}", parts), sep="\n")
    if options.only in (None, "loader"):
        for workers in (0, 1):
            milliseconds = loader_milliseconds(workers)
            print(f"loader with {workers} workers, main thread: {milliseconds:.1f} ms per {LOADED_PAIRS} pairs")


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.WARNING)
    main()

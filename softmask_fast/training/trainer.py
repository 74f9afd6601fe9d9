"""The training loop that pretraining and fine-tuning share."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from softmask_fast.config import RunConfig
from softmask_fast.data.augment import AugmentConfig
from softmask_fast.data.loader import SampleLoader
from softmask_fast.data.workers import default_workers
from softmask_fast.errors import printable, without_secrets
from softmask_fast.evaluation.common import gather_objects
from softmask_fast.model.export import save_model
from softmask_fast.model.momentum import MomentumCopy
from softmask_fast.options import record_path, stored_record
from softmask_fast.training.checkpoint import full_state, load_checkpoint, newest_whole_checkpoint, save_checkpoint
from softmask_fast.training.cuda_graphs import GraphedUpdates, graph_refusal
from softmask_fast.training.deepspeed_engine import create_engine
from softmask_fast.training.first_screen import CaptionWatch, doubts, first_screen
from softmask_fast.training.launch import StopRequest
from softmask_fast.training.loggers import Reports
from softmask_fast.training.meters import DataTimer, FlopCount, StepProfiler, matmul_rate, peak_memory
from softmask_fast.training.metrics import MetricsLog
from softmask_fast.training.periodic_eval import Evaluator
from softmask_fast.training.ranks import AgreedUsageError, mean_over_ranks, run_on_all_ranks
from softmask_fast.training.run_record import changes, check_same_run, reported_options, run_record, store_record
from softmask_fast.training.schedule import Schedule
from softmask_fast.training.step_times import StepTimes
from softmask_fast.training.updates import DirectUpdates, EngineUpdates, FiniteWatch

logger = logging.getLogger("softmask_fast")


@dataclass
class TrainerState:
    """How far a run has come. Checkpoints store it."""

    step: int = 0  # optimizer steps done
    pairs: int = 0  # pairs seen by all ranks


class Trainer:
    """Trains a model to the end, or until a stop is requested. A resumed run is bit-identical to an uninterrupted
    one."""

    def __init__(
        self, step: nn.Module, teacher: MomentumCopy, loader: SampleLoader, config: RunConfig,
        deepspeed_config: dict[str, Any], output: Path, stop: StopRequest, evaluator: Evaluator | None = None,
    ) -> None:  # fmt: skip
        """Prepare the engine and, with `resume`, load the newest checkpoint. A collective, as are all methods.

        Args:
            step: its forward is (batch, teacher, settings) -> (loss, metrics); the teacher averages its `model`.
            teacher: the momentum teacher.
            loader: batches of this rank.
            config: of the run, with nothing left open; see `prepare_run`.
            deepspeed_config: see `read_deepspeed_config`.
            output: the run's folder.
            stop: asked before every step.
            evaluator: evaluates during the run and at its end; None: no evaluation.

        Raises:
            AgreedUsageError: when the checkpoint belongs to another run or cannot be loaded, or `cuda_graph` is true
                but cannot be.
        """
        self.config, self.options, self.output, self.stop = config, config.train, output, stop
        self.teacher, self.loader, self.evaluator = teacher, loader, evaluator
        for network in (step.model, teacher.model):
            network.set_execution(self.options.attention, self.options.activation_checkpointing, self.options.compile)
        through_engine = DirectUpdates.refusal(deepspeed_config)
        if self.options.cuda_graph and (reason := through_engine or graph_refusal(step, self.options, loader.device)):
            raise AgreedUsageError(f"cuda_graph: expected false with {reason}, got true")
        self.flops = FlopCount(step, teacher, loader.device)
        self.engine = create_engine(step, deepspeed_config, self.options)
        self.model, self.device = self.engine.module.model, self.engine.device
        self.rank, ranks = dist.get_rank(), dist.get_world_size()
        self.watch, self.times = FiniteWatch(), StepTimes(self.device)
        kind = EngineUpdates if through_engine else GraphedUpdates if self.options.cuda_graph else DirectUpdates
        self.updates = kind(self.engine, teacher, self.watch, self.times)

        # Count the steps.
        self.samples = len(loader.source)
        self.pairs_per_step = self.options.batch_size * self.options.gradient_accumulation_steps * ranks
        self.steps_per_epoch = max(1, self.samples // self.pairs_per_step)
        self.steps = self.options.max_steps or max(1, round(self.options.epochs * self.steps_per_epoch))
        self.schedule = Schedule.of(config, self.steps, self.steps_per_epoch)

        # Resume.
        self.state = TrainerState()
        before = stored_record(output)
        if self.options.resume:
            self.load()
        self.watch.saved_step = self.state.step
        if evaluator is not None:
            evaluator.begin(self.state.step, self.steps, self.steps_per_epoch)

        # Store the record of the run, and show what matters in it.
        rate = matmul_rate(self.device, torch.bfloat16 if self.options.bf16 else torch.float32)
        if self.rank == 0:
            counts = {"world_size": ranks, "samples": self.samples, "steps": self.steps}
            record = run_record(config, self.device, self.model, **counts) | {"deepspeed": deepspeed_config}
            record["updates"] = self.updates.name + (f" ({through_engine})" if through_engine else "")
            record["matmul_tflops"] = float(f"{rate / 1e12:.4g}")
            logger.debug(json.dumps(record, indent=2))
            resumed = None
            if self.options.resume:
                resumed = "; ".join([f"after step {self.state.step}", *changes(before or record, record)])
                if not self.state.step:
                    resumed = f"nothing: there is no {'checkpoint' if before else 'run'} yet, so it starts at step 0"
            store_record(output, self.state.step, record)
            print(first_screen(record, evaluator, resumed), flush=True)
            unfinished = self.schedule.unfinished()
            for doubt in [
                *doubts(loader, config.data.data, evaluator, self.pairs_per_step),
                *filter(None, [unfinished]),
            ]:
                logger.warning("warning: %s", printable(without_secrets(doubt)))

        # Start the meters.
        self.captions = CaptionWatch(loader)
        self.log = None
        if self.rank == 0:
            reports = Reports(self.options.report_to, output, self.state.step, reported_options(record))
            self.log = MetricsLog(output, self.state.step, self.steps, self.pairs_per_step, rate, reports)
        self.timer = DataTimer()
        self.profiler = StepProfiler(output / "trace.json", self.options.profile if self.rank == 0 else 0)

    def train(self) -> bool:
        """Train; returns whether the run reached its end and wrote output/model."""
        self.engine.train()
        while self.state.step < self.steps and not self.stop.agreed(self.device):
            # Evaluate after the checkpoint of this step, so that an interrupted evaluation is repeated on resume.
            if self.evaluator is not None and self.evaluator.due(self.state.step):
                self.evaluate(full_state(self.model))

            # Train on one batch of every rank and micro step.
            self.times.begin()
            metrics = self.train_step()
            self.flops.count()  # after the first step, which it would delay

            # Log, once in a while.
            if self.state.step % self.options.log_steps == 0 or self.state.step == self.steps:
                self.log_metrics(metrics)
            if self.log is not None:
                self.log.bar.update()
            self.profiler.step()
            self.times.end("the rest")
            if text := self.times.finish():
                logger.info(text)

            # Write a checkpoint, once in a while.
            if self.state.step % self.options.checkpoint_steps == 0 and self.state.step < self.steps:
                self.save()
        return self.finish()

    def train_step(self) -> dict[str, Tensor]:
        """Do one optimizer step; returns the metrics of its last micro step, 0-dim tensors.

        Raises:
            FloatingPointError: for a loss or gradient that is not finite. Weights and checkpoint are those of the step
                before.
        """
        rate = self.schedule.learning_rate(self.state.step)
        for micro_step in range(self.options.gradient_accumulation_steps):
            settings = self.schedule.settings(self.state.step, micro_step, self.rank)
            torch.manual_seed(settings.seed)  # dropout depends only on the step, so a resumed run draws the same
            batch = self.timer.next(self.loader)
            self.times.end("data")
            for doubt in self.captions.doubts(batch) if self.rank == 0 else ():
                logger.warning("warning: %s", doubt)
            self.flops.note(batch, settings)
            metrics = self.updates.step(batch, settings, self.state.step + 1, rate)
        self.state.step += 1
        self.state.pairs += self.pairs_per_step
        # Check this step's numbers only when the next step is queued, so that the GPU does not run dry.
        self.watch.check(self.state.step if self.device.type == "cuda" else math.inf)
        self.times.end("waiting for the GPU")
        schedule = {"learning_rate": rate, "alpha": settings.alpha}
        return metrics | {name: torch.tensor(value, dtype=torch.float64) for name, value in schedule.items()}

    def log_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Log the metrics of the last step; `MetricsLog` documents the keys."""
        self.watch.check()
        waited, memory = torch.tensor(self.timer.fraction()), torch.tensor(peak_memory(self.device) / 2**30)
        means = mean_over_ranks(metrics | {"data_wait": waited, "peak_memory_gib": memory}, self.device)
        counts = {"bad_samples": len(self.bad_samples()), "truncated_captions": self.loader.truncated_captions}
        if self.log is not None:
            progress = {"epoch": self.state.pairs / self.samples}
            operations = self.flops.operations * self.options.gradient_accumulation_steps
            self.log.write(self.state.step, means | progress | counts, operations)

    def bad_samples(self) -> dict[str, str]:
        """key -> reason, for all samples that any rank has skipped so far."""
        return {key: reason for bad in gather_objects(self.loader.bad) for key, reason in bad.items()}

    def evaluate(self, weights: dict[str, Tensor], final: bool = False) -> None:
        """Evaluate the model with `weights` (see `full_state`) on held-out data. The time does not count as
        training."""
        self.watch.check()
        began = time.monotonic()
        epoch = self.state.pairs / self.samples
        figures = self.evaluator.evaluate(self.state.step, epoch, self.model, self.loader.tokenizer, weights, final)
        seconds = time.monotonic() - began
        self.timer.exclude(seconds)
        if self.log is not None:
            self.log.write_held_out(self.state.step, figures, self.evaluator.page, seconds)

    def save(self) -> None:
        """Write a checkpoint."""
        self.watch.check()
        self.updates.before_saving()
        save_checkpoint(
            self.output / "checkpoints", self.engine, self.teacher, self.loader.tokenizer, asdict(self.state),
            self.loader.state_dict(), self.options.keep_checkpoints,
        )  # fmt: skip
        self.watch.saved_step = self.state.step

    def load(self) -> None:
        """Load the newest checkpoint, if there is one."""
        run_on_all_ranks(lambda: record_path(self.output).is_file() and check_same_run(self.output, self.config))
        found = newest_whole_checkpoint(self.output / "checkpoints")
        if found is None:
            return
        saved = run_on_all_ranks(lambda: load_checkpoint(found, self.engine, self.teacher))
        self.updates.after_loading()
        run_on_all_ranks(lambda: self.loader.load_state_dict(self.loader.redistributed(saved["loaders"])))
        self.state = TrainerState(step=saved["step"], pairs=saved["pairs"])

    def finish(self) -> bool:
        """Write what remains after the last step or a stop; returns whether the run reached its end."""
        self.profiler.stop()
        if self.state.step > self.watch.saved_step:
            self.save()
        if bad := self.bad_samples():
            reasons = "; ".join(f"{key} ({reason})" for key, reason in bad.items())
            logger.warning("skipped %d samples: %s", len(bad), printable(reasons))
        self.loader.close()
        ended = self.state.step == self.steps
        if ended:
            weights = full_state(self.model)
            if self.rank == 0:
                save_model(self.model, self.loader.tokenizer, self.output / "model", weights)
            if self.evaluator is not None:
                self.evaluate(weights, final=True)
        if self.log is not None:
            self.log.close()
        if not ended:
            resume = f"--output_dir {self.output} --resume true"
            logger.info("stopped by %s after step %d; resume with %s", self.stop.received, self.state.step, resume)
        dist.barrier()  # from here on every rank may read the model
        return ended


def loader_options(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """The arguments of this rank's `SampleLoader` that pretraining and fine-tuning share."""
    return {
        "batch_size": config.train.batch_size,
        "augment": AugmentConfig.of(config.data),
        "seed": config.train.seed,
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "device": device,
        "max_bad_fraction": config.data.max_bad_fraction,
        "num_threads": config.data.data_threads,
        "workers": default_workers(device) if config.data.data_workers is None else config.data.data_workers,
    }

"""The loop over steps that pretraining and fine-tuning share: rates, stops, logs, checkpoints, exact resuming."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from softmask_fast.config import RunConfig
from softmask_fast.data.augment import AugmentConfig
from softmask_fast.data.loader import SampleLoader
from softmask_fast.model.export import save_model
from softmask_fast.model.momentum import MomentumCopy, StepSettings
from softmask_fast.ops.registry import describe
from softmask_fast.training.checkpoint import checkpoints, full_state, full_weights, load_checkpoint, save_checkpoint
from softmask_fast.training.deepspeed_engine import create_engine
from softmask_fast.training.launch import StopRequest
from softmask_fast.training.metrics import FlopCount, RunLog, environment, matmul_rate, peak_memory, step_profiler
from softmask_fast.training.ranks import bad_samples, mean_over_ranks, run_on_all_ranks
from softmask_fast.training.schedule import distillation_share, learning_rate, step_seed
from softmask_fast.utils import write_json

if TYPE_CHECKING:
    from softmask_fast.training.periodic_eval import Evaluations

logger = logging.getLogger("softmask_fast")

# options that a resumed run may change: they decide nothing that is learned
MAY_CHANGE = (
    "data_threads", "eval_data", "eval_size", "eval_epochs",
    "cache_dir", "cache_gigabytes", "prefetch_shards", "download_tries", "download_timeout",
)  # fmt: skip


def loader_options(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """The arguments of this rank's loader that every run takes from the same options."""
    return {
        "batch_size": config.train.batch_size,
        "augment": AugmentConfig.of(config.data),
        "seed": config.train.seed,
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "device": device,
        "max_bad_fraction": config.data.max_bad_fraction,
        "num_threads": config.data.data_threads,
    }


def train(
    step: nn.Module,
    teacher: MomentumCopy,
    loader: SampleLoader,
    config: RunConfig,
    deepspeed_config: dict[str, Any],
    output: Path,
    stop: StopRequest,
    evaluations: Evaluations | None = None,
) -> bool:
    """Train to the end, or until a stop is requested; returns whether the end was reached and output/model written.

    step: its forward is (batch, teacher, alpha, seed, use_queue=...) -> (loss, figures), its `model` is what the
    teacher averages and the checkpoints keep. evaluations: measure the model on the way and at the end.
    """
    options, rank = config.train, dist.get_rank()
    for network in (step.model, teacher.model):
        network.set_execution(options.attention, options.activation_checkpointing, options.compile)
    engine = create_engine(step, deepspeed_config, options)
    device = engine.device
    samples, world = len(loader.source), dist.get_world_size()
    pairs_per_step = options.batch_size * options.gradient_accumulation_steps * world
    steps_per_epoch = max(1, samples // pairs_per_step)
    steps = options.max_steps or max(1, round(options.epochs * steps_per_epoch))

    done, pairs_seen = 0, 0
    found = checkpoints(output / "checkpoints")

    def load() -> tuple[int, int]:
        check_same_run(output, config)
        state = load_checkpoint(found[-1], engine, teacher)
        loader.load_state_dict(loader.redistributed(state["loaders"]))
        return state["step"], state["pairs"]

    if options.resume and found:
        done, pairs_seen = run_on_all_ranks(load)
    if evaluations:
        evaluations.begin(done, steps_per_epoch)
    announce(config, deepspeed_config, output, device, engine.module.model, samples, steps, done)
    rate_limit = matmul_rate(device, torch.bfloat16 if options.bf16 else torch.float32)
    log = RunLog(output, done, steps, pairs_per_step, rate_limit) if rank == 0 else None
    flops = FlopCount()

    def save() -> None:
        save_checkpoint(
            output / "checkpoints",
            engine,
            teacher,
            loader.tokenizer,
            {"step": done, "pairs": pairs_seen},
            loader.state_dict(),
            options.keep_checkpoints,
        )

    def forward_backward(batch: Any, alpha: float, seed: int) -> dict[str, torch.Tensor]:
        use_queue = done >= config.objectives.queue_warmup_steps
        loss, figures = engine(batch, teacher, StepSettings(alpha, seed, use_queue))
        copy = HostCopy(loss)
        engine.backward(loss)
        stop_if_not_finite(copy, figures, done + 1, batch, found_checkpoint=saved)
        return figures

    def evaluate(weights: dict[str, torch.Tensor]) -> None:
        nonlocal since
        began = time.monotonic()
        figures = evaluations.measure(done, pairs_seen / samples, engine.module.model, loader.tokenizer, weights)
        since += time.monotonic() - began
        if log:
            log.write_held_out(done, figures, time.monotonic() - began)

    engine.train()
    saved = done
    waited, since = 0.0, time.monotonic()
    profiler = step_profiler(output / "trace.json", options.profile if rank == 0 else 0).__enter__()
    while done < steps and not stop.agreed(device):
        if evaluations and evaluations.due(done):  # behind the checkpoint: resumed there, what was cut off is repeated
            evaluate(full_state(engine.module.model))
        rate = learning_rate(done, steps, options)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        alpha = distillation_share(done, steps_per_epoch, config.objectives)
        for micro_step in range(options.gradient_accumulation_steps):
            seed = step_seed(options.seed, done, micro_step, rank)
            torch.manual_seed(seed)  # dropout depends on the step alone, so a resumed run draws the same
            waiting = time.monotonic()
            batch = next(loader)
            waited += time.monotonic() - waiting
            figures = flops.run(lambda batch=batch, seed=seed: forward_backward(batch, alpha, seed))  # noqa: B023
            engine.step()
        teacher.update(full_weights(engine.module.model))
        done += 1
        pairs_seen += pairs_per_step
        if done % options.log_steps == 0 or done == steps:
            now = time.monotonic()
            figures["data_wait"] = torch.tensor(waited / (now - since))  # share of the time since the last line
            figures["peak_memory_gib"] = torch.tensor(peak_memory(device) / 2**30)
            waited, since = 0.0, now
            means = mean_over_ranks(figures, device)
            bad = bad_samples(loader)
            if log:
                log.write(
                    done,
                    means
                    | {"learning_rate": rate, "alpha": alpha, "epoch": pairs_seen / samples}
                    | {"bad_samples": len(bad), "truncated_captions": loader.truncated_captions},
                    flops.operations * options.gradient_accumulation_steps,
                )
        if log:
            log.advance()
        if profiler:
            profiler.step()
        if done % options.checkpoint_steps == 0 and done < steps:
            save()
            saved = done
    if profiler:
        profiler.stop()
    if done > saved:
        save()
    if bad := bad_samples(loader):
        logger.warning("skipped %d samples: %s", len(bad), "; ".join(f"{key} ({why})" for key, why in bad.items()))
    loader.close()
    weights = full_state(engine.module.model)
    if done == steps and rank == 0:
        save_model(engine.module.model, loader.tokenizer, output / "model", weights)
    if done == steps and evaluations:
        evaluate(weights)
    if log:
        log.close()
    if done < steps:
        logger.info(
            "stopped by %s after step %d; go on with --output_dir %s --resume true", stop.received, done, output
        )
        return False
    dist.barrier()  # every rank may now read the model
    return True


class HostCopy:
    """A scalar on its way to the host; `value` waits for it, and a GPU goes on with what is queued behind it."""

    def __init__(self, scalar: torch.Tensor):
        self.arrived = torch.cuda.Event() if scalar.is_cuda else None
        self.copy = torch.empty((), dtype=scalar.dtype, pin_memory=scalar.is_cuda)
        self.copy.copy_(scalar.detach(), non_blocking=True)
        if self.arrived:
            self.arrived.record()

    @property
    def value(self) -> float:
        if self.arrived:
            self.arrived.synchronize()
        return self.copy.item()


def stop_if_not_finite(loss: HostCopy, figures: dict, step: int, batch: Any, found_checkpoint: int) -> None:
    """A loss that is not a number ends the run before the weights are touched; the last checkpoint stays.

    It is asked for when the backward pass has been queued, so that a GPU never runs dry, and before the optimiser step.
    """
    if math.isfinite(loss.value):
        return
    losses = ", ".join(f"{name} {value.item():.6g}" for name, value in figures.items() if value.ndim == 0)
    raise FloatingPointError(
        f"step {step}: the loss is not finite ({losses}). Samples: {', '.join(batch.keys)}. "
        f"The last checkpoint is that of step {found_checkpoint}."
    )


def check_same_run(output: Path, config: RunConfig) -> None:
    """A run goes on with all that it began with but its TrainConfig. Raises ValueError naming what differs."""
    stored = json.loads((output / "config.json").read_text())["config"]
    for section, options in config.as_dict().items():
        if section == "train" or not isinstance(options, dict):
            continue
        for name, value in options.items():
            # an option younger than the run had its present default's effect
            if stored[section].get(name, value) != value and name not in MAY_CHANGE:
                raise ValueError(f"resume: {name} was {stored[section].get(name)!r} in {output}, got {value!r}")


def announce(config, deepspeed_config, output: Path, device, model, samples: int, steps: int, done: int) -> None:
    """Print and store the whole configuration, the versions, the device and the operators' implementations."""
    if dist.get_rank() != 0:
        return
    record = environment(device) | {
        "operators": {op: chosen.get(device.type) for op, chosen in describe().items()},
        "world_size": dist.get_world_size(),
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "samples": samples,
        "steps": steps,
        "config": config.as_dict(),
        "deepspeed": deepspeed_config,
    }
    print(json.dumps(record, indent=2), flush=True)
    logger.info("writing to %s%s", output, f", going on after step {done}" if done else "")
    path = output / "config.json"
    if done:
        path = output / f"config-from-step-{done:08d}.json"
    write_json(path, record)

"""Pretraining: `deepspeed softmask_fast/train.py --deepspeed ds.json [--preset tiny|small|base] [options]`."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    # Run as a script, Python puts this folder first, where our modules would hide others of the same name.
    sys.path[0] = os.path.dirname(sys.path[0])

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from softmask_fast import engine as engines
from softmask_fast.config import Config, LaunchOptions, ObjectiveConfig, TrainConfig, parse_arguments
from softmask_fast.data.captions import CaptionSource, open_source
from softmask_fast.data.distort import DistortionConfig
from softmask_fast.data.images import BadSample
from softmask_fast.data.loader import Batch, PretrainingLoader
from softmask_fast.data.remote_options import RemoteOptions
from softmask_fast.data.tokenizer import load_tokenizer, train_tokenizer
from softmask_fast.logs import FlopCount, RunLog, environment, matmul_rate, peak_memory, step_profiler
from softmask_fast.model.checkpoints import save_model
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.packing import choose_attention
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.vision_language import VisionLanguageModel, load_pretrained
from softmask_fast.ops.backend import describe
from softmask_fast.report import report_run

logger = logging.getLogger("softmask_fast")

# options of model, objectives and data that a resumed run may change: they decide nothing that is learned
MAY_CHANGE = (
    "data_threads", "eval_data", "eval_size",
    "cache_dir", "cache_gigabytes", "prefetch_shards", "download_tries", "download_timeout",
)  # fmt: skip


class StopRequest:
    """Notes SIGTERM, SIGINT and the launcher's death; the loop ends at the next step, on all ranks together."""

    def __init__(self):
        self.received: str | None = None
        # The launcher hands a signal of its process group on, but not one that was sent to its first process alone.
        self.launchers = [
            process for process in psutil.Process().parents()[:2] if "deepspeed" in " ".join(process.cmdline())
        ]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self.received = signal.Signals(number).name

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop. A collective: all ranks call it."""
        if self.received is None and any(has_ended(process) for process in self.launchers):
            self.received = "the launcher's end"
        if dist.get_world_size() == 1:
            return self.received is not None
        flag = torch.tensor(self.received is not None, dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def main(argv: list[str] | None = None) -> int:
    try:
        config, launch = parse_arguments(argv)
        start_distributed(launch)
        deepspeed_config = engines.read_deepspeed_config(launch.deepspeed, with_precision(config.train))
        check_execution(config.train, deepspeed_config)
        output = output_directory(config)
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO if dist.get_rank() == 0 else logging.WARNING, format="%(message)s")
    stop = StopRequest()
    rank = dist.get_rank()
    try:
        finished = pretrain(config, deepspeed_config, output, stop)
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        print(
            f"train.py: error: rank {rank} lost the connection to another rank ({str(error).splitlines()[0]}). "
            f"When all hosts are back, go on with --output_dir {output} --resume true",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # what is left of the process group would wait for the lost rank
    dist.destroy_process_group()
    if finished and rank == 0:
        report_run(output, config, get_accelerator().current_device_name())
    return 0


def lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone; its own error is in that rank's output."""
    return dist.get_world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def start_distributed(launch: LaunchOptions) -> None:
    """Join the launcher's process group; alone (also: by plain python) be a group of one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":  # on a port of its own, so that several runs fit on one machine
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.setdefault("LOCAL_RANK", "0")
    if launch.local_rank >= 0:
        os.environ["LOCAL_RANK"] = str(launch.local_rank)
    if get_accelerator().device_name() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:  # its shared-memory collectives need two minutes of compilation
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def with_precision(train: TrainConfig) -> TrainConfig:
    """bf16 decided where it was left open: on a GPU that has it."""
    if train.bf16 is None:
        train.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return train


def check_execution(train: TrainConfig, deepspeed_config: dict) -> None:
    """Raises ValueError when the layers cannot run as asked for."""
    device = torch.device(get_accelerator().current_device_name())
    choose_attention(train.attention, device, torch.bfloat16 if train.bf16 else torch.float32)
    if train.compile and deepspeed_config.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ValueError("compile: expected false with ZeRO stage 3, which gathers weights block by block, got true")


def output_directory(config: Config) -> Path:
    """The run's folder, agreed on by all ranks and made by the first.

    Raises ValueError when the folder already holds a run and --resume is not given, or not all hosts see it.
    """
    choice: list[str | None] = [config.train.output_dir]
    if choice[0] is None:
        number = 1
        while Path(f"runs/{config.preset}-{number}").exists():
            number += 1
        choice[0] = str(Path(f"runs/{config.preset}-{number}").absolute())
    dist.broadcast_object_list(choice, src=0)
    output = Path(choice[0])
    taken = (output / "config.json").exists()
    dist.barrier()  # all have looked before the first writes
    if taken and not config.train.resume:
        raise ValueError(f"output_dir: {output} holds a run; go on with --resume true, or choose another folder")
    config.train.output_dir = str(output)
    if dist.get_rank() == 0:
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (output / "checkpoints").is_dir())
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise ValueError(f"output_dir: expected a folder that all hosts share, ranks {blind} do not see {output}")
    return output


def prepare_tokenizer(config: Config, source: CaptionSource, output: Path):
    """The tokeniser of the run, kept in its folder: the named one, BERT's, or one trained on the captions."""
    folder = output / "tokenizer"
    if dist.get_rank() == 0 and not folder.exists():
        named = config.data.tokenizer or (None if config.model.text_weights == "random" else config.model.text_weights)
        if named:
            tokenizer = load_tokenizer(named)
        else:
            tokenizer = train_tokenizer(sample_captions(source), config.model.vocab_size)
        temporary = output / "tokenizer.partial"
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, folder)
    dist.barrier()
    tokenizer = load_tokenizer(str(folder))
    config.model.vocab_size = len(tokenizer)
    return tokenizer


def sample_captions(source: CaptionSource, images: int = 20_000) -> Iterator[str]:
    """The captions of up to `images` images spread evenly over the source: plenty for a vocabulary."""
    for index in range(0, len(source), math.ceil(len(source) / images)):
        try:
            yield from source.read(index).captions
        except BadSample:  # the loader will count and name it
            continue


def distortions(config: Config) -> DistortionConfig:
    data = config.data
    return DistortionConfig(
        crop=data.crop,
        crop_scale=(data.crop_scale, 1.0),
        flip=data.flip,
        rand_augment=data.rand_augment,
        colour=data.colour,
        blur=data.blur,
    )


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """Linear warm-up, then a cosine from learning_rate to final_learning_rate at the last step."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, steps - train.warmup_steps)
    swing = (train.learning_rate - train.final_learning_rate) / 2
    return train.final_learning_rate + swing * (1 + math.cos(math.pi * min(1.0, progress)))


def distillation_share(step: int, steps_per_epoch: int, objectives: ObjectiveConfig) -> float:
    """alpha, ramped up linearly (ALBEF: over the first epoch)."""
    ramp = objectives.distill_ramp_steps if objectives.distill_ramp_steps is not None else steps_per_epoch
    return objectives.distill_alpha * min(1.0, step / max(1, ramp))


def pretrain(config: Config, deepspeed_config: dict, output: Path, stop: StopRequest) -> bool:
    """Train to the end or until a stop is requested; returns whether the end was reached."""
    train, rank, world = config.train, dist.get_rank(), dist.get_world_size()
    device = torch.device(get_accelerator().current_device_name())
    torch.manual_seed(train.seed)
    source = open_source(
        config.data.data,
        split="train",
        seed=train.seed,
        image_size=config.model.image_size,
        remote=RemoteOptions.of(config.data),
    )
    tokenizer = prepare_tokenizer(config, source, output)
    loader = PretrainingLoader(
        source,
        tokenizer,
        batch_size=train.batch_size,
        image_size=config.model.image_size,
        distortions=distortions(config),
        max_tokens=config.model.max_tokens,
        mask_probability=config.objectives.mask_probability,
        seed=train.seed,
        rank=rank,
        world_size=world,
        device=device,
        max_bad_fraction=config.data.max_bad_fraction,
        num_threads=config.data.data_threads,
    )
    pairs_per_step = train.batch_size * train.gradient_accumulation_steps * world
    steps_per_epoch = max(1, len(source) // pairs_per_step)
    steps = train.max_steps or max(1, round(train.epochs * steps_per_epoch))

    model = VisionLanguageModel(config.model, config.objectives.temperature)
    load_pretrained(model)
    teacher = MomentumTeacher(model, config.objectives, train.seed).to(device)
    for network in (model, teacher.model):
        network.set_execution(train.attention, train.activation_checkpointing, train.compile)
    step_module = PretrainingStep(model, config.objectives, bf16=train.bf16)
    engine = engines.create_engine(step_module, deepspeed_config, train)

    done, pairs_seen = 0, 0
    found = engines.checkpoints(output / "checkpoints")
    if train.resume and found:
        check_same_run(output, config)
        state = engines.load_checkpoint(found[-1], engine, teacher)
        loader.load_state_dict(loader.redistributed(state["loaders"]))
        done, pairs_seen = state["step"], state["pairs"]
    announce(config, deepspeed_config, output, device, model, len(source), steps, done)
    rate_limit = matmul_rate(device, torch.bfloat16 if train.bf16 else torch.float32)
    log = RunLog(output, done, steps, pairs_per_step, rate_limit) if rank == 0 else None
    flops = FlopCount()

    def save() -> None:
        engines.save_checkpoint(
            output / "checkpoints",
            engine,
            teacher,
            tokenizer,
            {"step": done, "pairs": pairs_seen},
            loader.state_dict(),
            train.keep_checkpoints,
        )

    def forward_backward(batch: Batch, alpha: float, seed: int) -> dict[str, torch.Tensor]:
        use_queue = done >= config.objectives.queue_warmup_steps
        loss, figures = engine(batch, teacher, alpha, seed, use_queue=use_queue)
        copy = HostCopy(loss)
        engine.backward(loss)
        stop_if_not_finite(copy, figures, done + 1, batch, found_checkpoint=saved)
        return figures

    engine.train()
    saved = done
    waited, since = 0.0, time.monotonic()
    profiler = step_profiler(output / "trace.json", train.profile if rank == 0 else 0).__enter__()
    while done < steps and not stop.agreed(device):
        rate = learning_rate(done, steps, train)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        alpha = distillation_share(done, steps_per_epoch, config.objectives)
        for micro_step in range(train.gradient_accumulation_steps):
            seed = step_seed(train.seed, done, micro_step, rank)
            torch.manual_seed(seed)  # dropout depends on the step alone, so a resumed run draws the same
            waiting = time.monotonic()
            batch = next(loader)
            waited += time.monotonic() - waiting
            figures = flops.run(lambda batch=batch, seed=seed: forward_backward(batch, alpha, seed))  # noqa: B023
            engine.step()
        teacher.update(engines.full_weights(engine.module.model))
        done += 1
        pairs_seen += pairs_per_step
        if done % train.log_steps == 0 or done == steps:
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
                    | {"learning_rate": rate, "alpha": alpha, "epoch": pairs_seen / len(source)}
                    | {"bad_samples": len(bad), "truncated_captions": loader.truncated_captions},
                    flops.operations * train.gradient_accumulation_steps,
                )
        if log:
            log.advance()
        if profiler:
            profiler.step()
        if done % train.checkpoint_steps == 0 and done < steps:
            save()
            saved = done
    if profiler:
        profiler.stop()
    if done > saved:
        save()
    if log:
        log.close()
    if bad := bad_samples(loader):
        logger.warning("skipped %d samples: %s", len(bad), "; ".join(f"{key} ({why})" for key, why in bad.items()))
    loader.close()
    weights = engines.full_state(engine.module.model)
    if done < steps:
        logger.info(
            "stopped by %s after step %d; go on with --output_dir %s --resume true", stop.received, done, output
        )
        return False
    if rank == 0:
        save_model(engine.module.model, tokenizer, output / "model", weights)
    return True


def step_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """One number per (run, step, micro step, rank), well apart from its neighbours."""
    mixed = torch.Generator().manual_seed(seed)
    base = int(torch.randint(2**31, (), generator=mixed))
    return (base + 1_000_003 * step + 10_007 * micro_step + rank) % 2**31


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


def stop_if_not_finite(loss: HostCopy, figures: dict, step: int, batch: Batch, found_checkpoint: int) -> None:
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


def mean_over_ranks(figures: dict, device: torch.device) -> dict[str, float]:
    """The figures' means over all ranks, in one reduction."""
    values = torch.stack([value.to(device, torch.float64).reshape(()) for value in figures.values()])
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return {name: value / dist.get_world_size() for name, value in zip(figures, values.tolist(), strict=True)}


def bad_samples(loader: PretrainingLoader) -> dict[str, str]:
    """key -> reason of the samples that any rank had to skip so far, each once. A collective: all ranks call it."""
    found: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, loader.bad)
    return {key: reason for of_rank in found for key, reason in of_rank.items()}


def check_same_run(output: Path, config: Config) -> None:
    """A run goes on with the model, objectives and data it began with. Raises ValueError naming what differs."""
    stored = json.loads((output / "config.json").read_text())["config"]
    current = config.as_dict()
    for section in ("model", "objectives", "data"):
        for name, value in current[section].items():
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
    text = json.dumps(record, indent=2)
    print(text, flush=True)
    logger.info("writing to %s%s", output, f", going on after step {done}" if done else "")
    path = output / "config.json"
    if done:
        path = output / f"config-from-step-{done:08d}.json"
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())

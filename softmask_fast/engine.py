"""What DeepSpeed needs: process group, configuration, engine, the full weights under every ZeRO stage, checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from torch import Tensor, nn

from softmask_fast.config import LaunchOptions, RunConfig, TrainConfig
from softmask_fast.mistakes import UsageError, is_mistake, one_line
from softmask_fast.model.checkpoints import load_own_state, own_state, save_model, save_state
from softmask_fast.model.momentum import MomentumCopy
from softmask_fast.model.packing import choose_attention

TRAINING_STATE, TEACHER, MODEL = "training_state.json", "teacher.safetensors", "model"
Result = TypeVar("Result")


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


def together(work: Callable[[], Result]) -> Result:
    """What `work` returns on this rank. Where it meets a mistake of the user on any rank, all raise that of the first.

    A collective, so that no rank waits for one that has found a mistake. Raises UsageError.
    """
    result, mistake = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        if not is_mistake(error):
            raise
        mistake = one_line(error)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mistake)
    told = [(rank, text) for rank, text in enumerate(found) if text is not None]
    if told:
        rank, text = told[0]
        raise UsageError(text if len(told) == len(found) or rank == 0 else f"{text} (found by rank {rank})")
    return result


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


def output_directory(config: RunConfig) -> Path:
    """The run's folder, agreed on by all ranks and made by the first.

    Raises UsageError when the folder already holds a run and --resume is not given, cannot be made, or not all hosts
    see it.
    """
    choice: list[str | None] = [config.train.output_dir]
    if choice[0] is None:
        number = 1
        while Path(f"runs/{config.name}-{number}").exists():
            number += 1
        choice[0] = str(Path(f"runs/{config.name}-{number}").absolute())
    dist.broadcast_object_list(choice, src=0)
    output = Path(choice[0])

    def check_free() -> None:
        if (output / "config.json").exists() and not config.train.resume:
            raise ValueError(f"output_dir: {output} holds a run; go on with --resume true, or choose another folder")

    together(check_free)  # all have looked before the first writes
    config.train.output_dir = str(output)
    together(lambda: dist.get_rank() or (output / "checkpoints").mkdir(parents=True, exist_ok=True))
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (output / "checkpoints").is_dir())
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise UsageError(f"output_dir: expected a folder that all hosts share, ranks {blind} do not see {output}")
    return output


def read_deepspeed_config(path: str, train: TrainConfig) -> dict[str, Any]:
    """The DeepSpeed configuration with every "auto" filled in from ours.

    Raises ValueError when the file contradicts a field of ours: each number has one place.
    """
    if not Path(path).is_file():
        raise ValueError(f"--deepspeed: expected a JSON file, got {path!r}, which is no file")
    try:
        config = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"--deepspeed: {path} is not valid JSON: {error}") from error
    ours = {
        "train_micro_batch_size_per_gpu": ("batch_size", train.batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", train.gradient_accumulation_steps),
        "gradient_clipping": ("gradient_clipping", train.gradient_clipping),
    }
    for name, (option, value) in ours.items():
        if config.setdefault(name, "auto") not in ("auto", value):
            raise ValueError(f'{path}: {name} is {config[name]}, but --{option} is {value}; write "auto" in the file')
        config[name] = value
    if config.get("bf16", {}).get("enabled") and not train.bf16:
        raise ValueError(f"{path}: bf16 is enabled, so --bf16 true is expected too")
    return config


def create_engine(step: nn.Module, config: dict[str, Any], train: TrainConfig) -> deepspeed.DeepSpeedEngine:
    """Wrap the step. The optimiser is AdamW, unless the DeepSpeed configuration names one (for offloading, say)."""
    decayed = [p for p in step.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in step.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = None if "optimizer" in config else torch.optim.AdamW(groups, lr=train.learning_rate)
    engine, *_ = deepspeed.initialize(model=step, model_parameters=groups, optimizer=optimiser, config=config)
    return engine


def full_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 tensor) of every parameter, under every ZeRO stage. A collective: all ranks iterate."""
    for name, parameter in module.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        if sharded or parameter.dtype != torch.float32:  # else the parameter itself is the optimiser's fp32 weight
            yield name, safe_get_full_fp32_param(parameter)
        else:
            yield name, parameter.detach()


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """`own_state` of the module with whole fp32 parameters, on the CPU. A collective: all ranks call it."""
    state = {name: weight.cpu() for name, weight in full_weights(module)}
    return {name: state.get(name, tensor) for name, tensor in own_state(module).items()}


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path for path in directory.glob("step-????????") if (path / TRAINING_STATE).is_file())


def save_checkpoint(
    directory: Path,
    engine: deepspeed.DeepSpeedEngine,
    teacher: MomentumCopy,
    tokenizer,
    state: dict[str, Any],
    loader_state: dict[str, Any],
    keep: int,
) -> Path:
    """Write directory/step-<state["step"]>, whole or not at all, and keep the newest `keep`. All ranks call it.

    It holds DeepSpeed's shards, the momentum copy with its queues, the model as a folder that `load_model` reads, and a
    JSON with the step and the position of every rank's data.
    """
    final = directory / f"step-{state['step']:08d}"
    partial = directory / f"partial-{final.name}"
    if engine.global_rank == 0:
        for unfinished in directory.glob("partial-*"):  # of a run that was killed while writing
            shutil.rmtree(unfinished)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(directory), tag=partial.name, save_latest=False)
    weights = full_state(engine.module.model)
    loader_states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(loader_states, loader_state)
    if engine.global_rank == 0:
        save_state(own_state(teacher), partial / TEACHER)
        save_model(engine.module.model, tokenizer, partial / MODEL, weights)
        text = json.dumps(state | {"world_size": dist.get_world_size(), "loaders": loader_states})
        (partial / TRAINING_STATE).write_text(text)
    dist.barrier()  # every rank has written its part
    if engine.global_rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(path: Path, engine: deepspeed.DeepSpeedEngine, teacher: MomentumCopy) -> dict[str, Any]:
    """Restore engine and momentum copy; returns the saved state, with the data positions of all its ranks in "loaders".

    Written by another number of ranks, the shards of ZeRO go through DeepSpeed's universal format, once, in a folder of
    their own. All ranks call it.
    """
    state = json.loads((path / TRAINING_STATE).read_text())
    source, universal = path, None
    if state["world_size"] != dist.get_world_size() and engine.zero_optimization():
        source = universal = path.with_name(f"universal-{path.name}")
        together(lambda: dist.get_rank() or to_universal(path, universal))
    engine._config.load_universal_checkpoint = universal is not None
    groups = engine.optimizer.param_groups
    settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    loaded, _ = engine.load_checkpoint(str(source.parent), tag=source.name)
    engine._config.load_universal_checkpoint = False
    if loaded is None:
        raise ValueError(f"resume: {path} holds no DeepSpeed checkpoint")
    if universal:  # under ZeRO-3 all groups now have the first one's weight decay, and share one counter of steps
        for group, own in zip(groups, settings, strict=True):
            group.update(own)
        for moments in engine.optimizer.optimizer.state.values():
            if isinstance(moments.get("step"), Tensor):
                moments["step"] = moments["step"].clone()
        dist.barrier()  # every rank has read
        if engine.global_rank == 0:
            shutil.rmtree(universal)
    load_own_state(teacher, load_file(path / TEACHER))
    return state


def to_universal(path: Path, target: Path) -> None:
    """Write a checkpoint in DeepSpeed's universal format, which any number of ranks can load."""
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed while converting
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(path), "--output_folder", str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (target.parent / "latest_universal").unlink(missing_ok=True)  # its path to the newest; ours is the name
    if done.returncode:
        raise ValueError(f"resume: {path} could not be converted for another number of ranks:\n{done.stdout[-2000:]}")

"""Checkpoints of a run, written whole or not at all, and the full weights under every ZeRO stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from softmask_fast.errors import UsageError
from softmask_fast.evaluation.common import gather_objects
from softmask_fast.model.export import save_model
from softmask_fast.model.momentum import MomentumCopy
from softmask_fast.model.state import load_own_state, own_state, save_state
from softmask_fast.training.ranks import run_on_all_ranks

TRAINING_STATE, TEACHER, MODEL = "training_state.json", "teacher.safetensors", "model"


def full_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 tensor) of every parameter, under every ZeRO stage. A collective: all ranks iterate."""
    for name, parameter in module.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        if sharded or parameter.dtype != torch.float32:  # else the parameter itself is the optimizer's fp32 weight
            yield name, safe_get_full_fp32_param(parameter)
        else:
            yield name, parameter.detach()


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """`own_state` of the module with whole fp32 parameters, on the CPU. A collective."""
    state = {name: weight.cpu() for name, weight in full_weights(module)}
    return {name: state.get(name, tensor) for name, tensor in own_state(module).items()}


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path for path in directory.glob("step-????????") if (path / TRAINING_STATE).is_file())


def save_checkpoint(
    directory: Path, engine: deepspeed.DeepSpeedEngine, teacher: MomentumCopy, tokenizer: PreTrainedTokenizerFast,
    state: dict[str, Any], loader_state: dict[str, Any], keep: int,
) -> None:  # fmt: skip
    """Write directory/step-<state["step"]>, whole or not at all, and keep the newest `keep`. A collective.

    A checkpoint holds DeepSpeed's shards, the teacher with its queue, the model as a folder that `load_model` reads,
    and a JSON file with `state` and the data position of every rank.
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
    loader_states = gather_objects(loader_state)
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


def load_checkpoint(path: Path, engine: deepspeed.DeepSpeedEngine, teacher: MomentumCopy) -> dict[str, Any]:
    """Restore engine and teacher. A collective.

    ZeRO shards that another number of ranks wrote are converted to DeepSpeed's universal format, in a temporary folder.
    Returns the saved state, with the data positions of all ranks that wrote it under "loaders". Raises UsageError when
    the folder holds no DeepSpeed checkpoint or cannot be converted.
    """
    state = json.loads((path / TRAINING_STATE).read_text())
    universal = None
    if state["world_size"] != dist.get_world_size() and engine.zero_optimization():
        universal = path.with_name(f"universal-{path.name}")
        run_on_all_ranks(lambda: to_universal(path, universal))
    source = universal or path
    optimizer = engine.basic_optimizer
    engine._config.load_universal_checkpoint = universal is not None
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    loaded, _ = engine.load_checkpoint(str(source.parent), tag=source.name)
    engine._config.load_universal_checkpoint = False
    if loaded is None:
        raise UsageError(f"resume: {path} holds no DeepSpeed checkpoint")
    # A checkpoint of before has another implementation of AdamW among the groups' settings. What loads the universal
    # format gives all groups the first one's weight decay under ZeRO-3, and one step counter.
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for weight, moments in optimizer.state.items():
        if isinstance(moments.get("step"), Tensor):
            moments["step"] = moments["step"].to(weight.device, copy=True)
    if universal:
        dist.barrier()  # every rank has read
        if engine.global_rank == 0:
            shutil.rmtree(universal)
    load_own_state(teacher, load_file(path / TEACHER))
    return state


def to_universal(path: Path, target: Path) -> None:
    """On rank 0, convert a checkpoint to DeepSpeed's universal format, which any number of ranks can load."""
    if dist.get_rank() != 0:
        return
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed while converting
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(path), "--output_folder", str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (target.parent / "latest_universal").unlink(missing_ok=True)  # we name the folder instead
    if done.returncode:
        raise UsageError(f"resume: {path} could not be converted for another number of ranks:\n{done.stdout[-2000:]}")

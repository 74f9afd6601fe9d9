"""Checkpoints, written whole or not at all, and the full weights under every ZeRO stage."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from softmask_fast.errors import UsageError, format_error
from softmask_fast.evaluation.common import gather_objects
from softmask_fast.model.export import save_model
from softmask_fast.model.momentum import MomentumCopy
from softmask_fast.model.state import load_own_state, own_state, save_state
from softmask_fast.training.ranks import AgreedUsageError, run_on_all_ranks
from softmask_fast.utils import file_sha256, flush, flush_entry, move, naming, write_text

logger = logging.getLogger(__name__)

TRAINING_STATE, TEACHER, MODEL = "training_state.json", "teacher.safetensors", "model"


def full_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole float32 tensor) of every parameter, under every ZeRO stage. A collective: all ranks iterate."""
    for name, parameter in module.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        if sharded or parameter.dtype != torch.float32:  # otherwise the parameter is the optimizer's float32 weight
            yield name, safe_get_full_fp32_param(parameter)
        else:
            yield name, parameter.detach()


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """`own_state` of the module, with whole float32 parameters on the CPU. A collective."""
    state = {name: weight.cpu() for name, weight in full_weights(module)}
    return {name: state.get(name, tensor) for name, tensor in own_state(module).items()}


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(directory.glob("step-????????"))


def save_checkpoint(
    directory: Path, engine: deepspeed.DeepSpeedEngine, teacher: MomentumCopy, tokenizer: PreTrainedTokenizerFast,
    state: dict[str, Any], loader_state: dict[str, Any], keep: int,
) -> None:  # fmt: skip
    """Write directory/step-<state["step"]>, whole or not at all, and keep the newest `keep` ones. A collective.

    A checkpoint holds DeepSpeed's shards, the teacher with its queue, the model as a folder that `read_model` reads,
    and a JSON file with `state`, the data position of every rank, and the size and SHA-256 of the other files. It is
    flushed to the disk before it gets its name.

    Raises:
        AgreedUsageError: when it cannot be written, for example on a full disk.
    """
    final = directory / f"step-{state['step']:08d}"
    partial, first = directory / f"partial-{final.name}", engine.global_rank == 0
    try:
        _write(partial, engine, teacher, tokenizer, state, loader_state)
    except AgreedUsageError as error:
        whole = checkpoints(directory)
        kept = f"that of step {_step(whole[-1])} is intact" if whole else "there is no earlier one"
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise AgreedUsageError(
            f"output_dir: {error} (checkpoint of step {state['step']} not written; {kept}); "
            f"resume with --output_dir {directory.parent} --resume true"
        ) from error
    if first:
        move(partial, final)
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def _write(
    partial: Path, engine: deepspeed.DeepSpeedEngine, teacher: MomentumCopy, tokenizer: PreTrainedTokenizerFast,
    state: dict[str, Any], loader_state: dict[str, Any],
) -> None:  # fmt: skip
    first = engine.global_rank == 0
    prints: dict[str, list[Any]] = {}  # of the files that this rank wrote: on NFS another rank may not see them yet

    def begin() -> None:
        if first:
            for unfinished in partial.parent.glob("partial-*"):  # of a run that was killed while writing
                shutil.rmtree(unfinished)
            partial.mkdir(parents=True)
            for log in partial.parent.parent.glob("*.jsonl"):  # their lines up to this step will not be written again
                flush(log)

    def write_shards() -> None:
        failures = []

        def save(state_dict: dict[str, Any], path: str) -> None:
            try:
                with naming(partial.parent):
                    with open(path, "wb") as file:
                        torch.save(state_dict, file)
                    flush_entry(Path(path))
                prints[str(Path(path).relative_to(partial))] = _fingerprint(Path(path))
            except OSError as error:  # raised later, as the other ranks wait for this one in a collective
                failures.append(error)

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(engine.checkpoint_engine, "save", save))
            patches.enter_context(mock.patch.object(engine, "_copy_recovery_script"))  # model/ holds the whole weights
            engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False)
        if failures:
            raise failures[0]

    def write_rest() -> None:
        if first:
            with naming(partial.parent):
                save_state(own_state(teacher), partial / TEACHER)
                save_model(engine.module.model, tokenizer, partial / MODEL, weights)

    def finish() -> None:
        if first:
            with naming(partial.parent):
                for path in sorted(path for path in partial.rglob("*") if path.is_file()):
                    if (name := str(path.relative_to(partial))) not in files:
                        files[name] = _fingerprint(path)
                about = {"world_size": dist.get_world_size(), "loaders": loader_states, "files": files}
                write_text(partial / TRAINING_STATE, json.dumps(state | about))
                flush(partial)

    run_on_all_ranks(begin)
    run_on_all_ranks(write_shards)
    weights = full_state(engine.module.model)
    loader_states = gather_objects(loader_state)
    run_on_all_ranks(write_rest)
    files = {name: found for written in gather_objects(prints) for name, found in written.items()}
    run_on_all_ranks(finish)


def _fingerprint(file: Path) -> list[Any]:
    return [file.stat().st_size, file_sha256(file)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_whole_checkpoint(directory: Path) -> Path | None:
    """The newest undamaged checkpoint, None if there is no checkpoint at all. A collective.

    Damaged ones that are newer are logged and renamed to "damaged-...".

    Raises:
        AgreedUsageError: when all are damaged.
    """
    found = checkpoints(directory)
    for path in reversed(found):
        damages = [damage for damage in gather_objects(_damage(path)) if damage]
        if not damages:
            return path
        aside = path.with_name(f"damaged-{path.name}")
        if path == found[0]:
            raise AgreedUsageError(f"resume: {damages[0]}, and {directory} has no earlier checkpoint")

        def put_aside(path: Path = path, aside: Path = aside) -> None:
            if dist.get_rank() == 0:
                move(path, aside)

        run_on_all_ranks(put_aside)
        if dist.get_rank() == 0:
            logger.warning("%s; renamed it to %s, resuming from the checkpoint before it", damages[0], aside.name)
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with this rank's part of a checkpoint. Checkpoints of earlier versions list no sizes or digests."""
    state = path / TRAINING_STATE
    try:
        stored = json.loads(state.read_text("utf-8"))
        if absent := {"step", "pairs", "world_size", "loaders"} - stored.keys():
            return f"{state} is damaged: it lacks {', '.join(sorted(absent))}"
        files = stored.get("files", {})
        for name in list(files)[dist.get_rank() :: dist.get_world_size()]:
            (size, digest), found = files[name], _fingerprint(path / name)
            if found[0] != size:
                return f"{path / name} is damaged: {found[0]} bytes instead of {size}"
            if found[1] != digest:
                return f"{path / name} is damaged: its content is not what was written"
    except OSError as error:
        return format_error(error)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        return f"{state} is damaged: {error}"
    return None


def load_checkpoint(path: Path, engine: deepspeed.DeepSpeedEngine, teacher: MomentumCopy) -> dict[str, Any]:
    """Restore engine and teacher. A collective.

    ZeRO shards that another number of ranks wrote are converted to DeepSpeed's universal format, in a temporary folder.

    Returns:
        The saved state: "step" and "pairs" of `TrainerState`, the "world_size" that wrote it, the data position of each
        of its ranks under "loaders", and "files".

    Raises:
        UsageError: when the folder holds no DeepSpeed checkpoint, or it cannot be converted.
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
    # Checkpoints of earlier versions name another implementation of AdamW in the groups' settings. DeepSpeed's loader
    # of the universal format gives all groups the weight decay of the first one (under ZeRO-3), and one step counter.
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
    """On rank 0, convert a checkpoint to DeepSpeed's universal format, which any number of ranks can load.

    Raises:
        UsageError: when DeepSpeed's converter fails, with the end of its output.
    """
    if dist.get_rank() != 0:
        return
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed while converting
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(path), "--output_folder", str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (target.parent / "latest_universal").unlink(missing_ok=True)  # not needed: the folder is named when it is loaded
    if done.returncode:
        raise UsageError(f"resume: {path} could not be converted for another number of ranks:\n{done.stdout[-2000:]}")

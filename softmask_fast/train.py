"""Pretraining: `deepspeed softmask_fast/train.py --deepspeed ds.json [--preset tiny|small|base] [options]`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    # Run as a script, Python puts this folder first, where our modules would hide others of the same name.
    sys.path[0] = os.path.dirname(sys.path[0])

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from softmask_fast.config import Config
from softmask_fast.data.loader import PretrainingLoader
from softmask_fast.data.remote.options import RemoteOptions
from softmask_fast.data.sources import open_source
from softmask_fast.data.tokenizer import load_tokenizer, train_tokenizer
from softmask_fast.data.types import BadSample, CaptionSource
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.report import held_out_source, report_run
from softmask_fast.model.initialize import load_pretrained, weights_tokenizer
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.options import parse_arguments
from softmask_fast.training.launch import StopRequest, run_script
from softmask_fast.training.ranks import run_on_all_ranks
from softmask_fast.training.trainer import loader_options, train


def main(argv: list[str] | None = None) -> int:
    return run_script("train.py", argv, parse_arguments, work)


def work(config: Config, deepspeed_config: dict[str, Any], output: Path, stop: StopRequest) -> None:
    finished = pretrain(config, deepspeed_config, output, stop)
    rank = dist.get_rank()
    dist.destroy_process_group()
    if finished and rank == 0:
        report_run(output, config, get_accelerator().current_device_name())


def prepare_tokenizer(config: Config, source: CaptionSource, output: Path):
    """The tokeniser of the run, kept in its folder: the named one, that of the weights to start from, or one trained on
    the captions."""
    folder = output / "tokenizer"

    def make() -> None:
        if dist.get_rank() or folder.exists():
            return
        named = config.data.tokenizer or (None if config.model.text_weights == "random" else config.model.text_weights)
        if config.model.model_weights:
            tokenizer = weights_tokenizer(config.model.model_weights, config.data.tokenizer)
        elif named:
            tokenizer = load_tokenizer(named)
        else:
            tokenizer = train_tokenizer(sample_captions(source), config.model.vocab_size)
        temporary = output / "tokenizer.partial"
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, folder)

    run_on_all_ranks(make)
    tokenizer = run_on_all_ranks(lambda: load_tokenizer(str(folder)))
    if config.model.model_weights and len(tokenizer) != config.model.vocab_size:
        raise UsageError(
            f"tokenizer: expected the {config.model.vocab_size} entries of the model that model_weights names, got "
            f"{len(tokenizer)}"
        )
    config.model.vocab_size = len(tokenizer)
    return tokenizer


def sample_captions(source: CaptionSource, images: int = 20_000) -> Iterator[str]:
    """The captions of up to `images` images spread evenly over the source: plenty for a vocabulary."""
    for index in range(0, len(source), math.ceil(len(source) / images)):
        try:
            yield from source.read(index).captions
        except BadSample:  # the loader will count and name it
            continue


def pretrain(config: Config, deepspeed_config: dict[str, Any], output: Path, stop: StopRequest) -> bool:
    """Train to the end or until a stop is requested; returns whether the end was reached.

    Raises UsageError before the first step for what the run lacks.
    """
    torch.manual_seed(config.train.seed)
    source = run_on_all_ranks(lambda: open_sources(config))
    tokenizer = prepare_tokenizer(config, source, output)
    step, teacher, loader = run_on_all_ranks(lambda: prepare(config, source, tokenizer))
    return train(step, teacher, loader, config, deepspeed_config, output, stop)


def open_sources(config: Config) -> CaptionSource:
    """The pairs to learn from. Those to measure on are looked at, too: a mistake in them shall not wait for the end."""
    source = open_source(
        config.data.data,
        split="train",
        seed=config.train.seed,
        image_size=config.model.image_size,
        remote=RemoteOptions.of(config.data),
        image_root=config.data.image_root,
    )
    if dist.get_rank() == 0:
        held_out_source(config)
    return source


def prepare(config: Config, source: CaptionSource, tokenizer):
    """The module that DeepSpeed owns, the momentum copy, and the loader."""
    device = torch.device(get_accelerator().current_device_name())
    loader = PretrainingLoader(
        source,
        tokenizer,
        image_size=config.model.image_size,
        max_tokens=config.model.max_tokens,
        mask_probability=config.objectives.mask_probability,
        **loader_options(config, device),
    )
    model = VisionLanguageModel(config.model, config.objectives.temperature)
    load_pretrained(model)
    teacher = MomentumTeacher(model, config.objectives, config.train.seed).to(device)
    return PretrainingStep(model, config.objectives, bf16=config.train.bf16), teacher, loader


if __name__ == "__main__":
    sys.exit(main())

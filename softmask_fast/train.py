"""Pretraining: `deepspeed softmask_fast/train.py --deepspeed ds.json [--preset tiny|small|base] [options]`."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    # Python puts the folder of a script first, where our modules would hide others of the same name.
    sys.path[0] = os.path.dirname(sys.path[0])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while this imports ends it without a traceback

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from softmask_fast.config import Config
from softmask_fast.data.loader import PretrainingLoader
from softmask_fast.data.sources import open_as_configured
from softmask_fast.data.tokenizer import load_tokenizer, train_tokenizer, without_punctuation
from softmask_fast.data.types import BadSample, CaptionSource
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.report import PretrainingEvaluation, held_out_pairs, report_run
from softmask_fast.model.initialize import load_pretrained, weights_tokenizer
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.training.deepspeed_engine import this_device
from softmask_fast.training.launch import StopRequest, run_script
from softmask_fast.training.options import parse_arguments
from softmask_fast.training.periodic_eval import Evaluator
from softmask_fast.training.ranks import run_on_all_ranks
from softmask_fast.training.trainer import Trainer, loader_options
from softmask_fast.utils import replacing


def main(argv: list[str] | None = None, name: str = "train.py") -> int:
    return run_script(name, argv, parse_arguments, work)


def work(config: Config, deepspeed_config: dict[str, Any], output: Path, stop: StopRequest) -> None:
    """Pretrains and then shows how good the model is."""
    trainer = build_trainer(config, deepspeed_config, output, stop)
    finished, rank = trainer.train(), dist.get_rank()
    dist.destroy_process_group()
    if finished:
        stop.end()
    if finished and rank == 0:
        evaluator = trainer.evaluator
        shown = (evaluator.evaluation, evaluator.reports, evaluator.curves()) if evaluator else (None, [], [])
        report_run(output, config, *shown, trainer.schedule.events())
        if evaluator and len(shown[2]) > 1:
            print(evaluator.summary(), flush=True)


def build_trainer(config: Config, deepspeed_config: dict[str, Any], output: Path, stop: StopRequest) -> Trainer:
    """Builds all that a pretraining run needs. A collective. Raises AgreedUsageError for anything missing or unfit."""
    torch.manual_seed(config.train.seed)
    source, evaluator = run_on_all_ranks(lambda: open_sources(config, output))
    tokenizer = build_tokenizer(config, source, output)
    config = replace(config, model=replace(config.model, vocab_size=len(tokenizer)))
    step, teacher, loader = run_on_all_ranks(lambda: build_step(config, source, tokenizer))
    return Trainer(step, teacher, loader, config, deepspeed_config, output, stop, evaluator)


def open_sources(config: Config, output: Path) -> tuple[CaptionSource, Evaluator | None]:
    """The training pairs, and the evaluator. It opens the held-out pairs, so that their errors surface before
    training."""
    options = {"split": "train", "seed": config.train.seed, "image_size": config.model.image_size}
    source = open_as_configured(config.data.data, config.data, **options)
    held_out = held_out_pairs(config)
    return source, Evaluator(PretrainingEvaluation(config, held_out), output, config.train) if held_out else None


def build_tokenizer(config: Config, source: CaptionSource, output: Path) -> PreTrainedTokenizerFast:
    """The run's tokenizer, stored in its folder: the one that is named, that of the starting weights, or a new one.

    Raises AgreedUsageError when it cannot be loaded, or does not fit the weights.
    """
    folder = output / "tokenizer"

    def make() -> None:
        if dist.get_rank() != 0 or folder.exists():
            return
        named = config.data.tokenizer
        if named is None and config.model.text_weights != "random":
            named = config.model.text_weights
        if config.model.model_weights:
            tokenizer = weights_tokenizer(config.model.model_weights, config.data.tokenizer)
        elif named is not None:
            tokenizer = load_tokenizer(named)
        else:
            images = 20_000 if source.encoded else 1_000  # drawn scenes have few words
            tokenizer = train_tokenizer(sample_captions(source, images), config.model.vocab_size)
        if config.data.drop_punctuation:
            tokenizer = without_punctuation(tokenizer)
        with replacing(folder) as temporary:
            tokenizer.save_pretrained(temporary)

    def load() -> PreTrainedTokenizerFast:
        tokenizer = load_tokenizer(str(folder))
        expected, size = config.model.vocab_size, len(tokenizer)
        if config.model.model_weights and size != expected:
            raise UsageError(f"tokenizer: expected the {expected} entries of the model in model_weights, got {size}")
        if config.model.match_through_words and tokenizer("a").input_ids[-1] != tokenizer.sep_token_id:
            raise UsageError("match_through_words: expected a tokenizer that adds [SEP], got one without (ALBEF's)")
        return tokenizer

    run_on_all_ranks(make)
    return run_on_all_ranks(load)


def sample_captions(source: CaptionSource, images: int) -> Iterator[str]:
    """The captions of up to `images` images, spread evenly over the source. Raises UsageError if it can use none."""
    indices, used, first = range(0, len(source), math.ceil(len(source) / images)), False, ""
    for index in indices:
        try:
            yield from source.read(index).captions
            used = True
        except BadSample as error:  # the loader counts and names it
            first = first or f"{source.keys[index]}: {error}"
    if not used:
        raise UsageError(f"data: none of {len(indices)} samples that were tried can be used; the first, {first}")


def build_step(
    config: Config, source: CaptionSource, tokenizer: PreTrainedTokenizerFast
) -> tuple[PretrainingStep, MomentumTeacher, PretrainingLoader]:
    """The module that DeepSpeed wraps, the momentum teacher, and the loader."""
    device = this_device()
    loader = PretrainingLoader(
        source, tokenizer, image_size=config.model.image_size, max_tokens=config.model.max_tokens,
        mask_probability=config.objectives.mask_probability, **loader_options(config, device),
    )  # fmt: skip
    model = VisionLanguageModel(config.model, config.objectives.temperature)
    load_pretrained(model)
    teacher = MomentumTeacher(model, config.objectives, config.train.seed).to(device)
    return PretrainingStep(model, config.objectives, bf16=config.train.bf16), teacher, loader


if __name__ == "__main__":
    sys.exit(main())

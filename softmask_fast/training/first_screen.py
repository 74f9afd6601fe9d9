"""What a run prints before its first step: six lines about itself, and a line about each thing that looks wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from softmask_fast.data.loader import SampleLoader
from softmask_fast.data.sources import shared_files
from softmask_fast.data.text_masking import TextMasker
from softmask_fast.data.types import Batch
from softmask_fast.errors import printable, without_secrets
from softmask_fast.training.periodic_eval import Evaluator


def first_screen(record: dict[str, Any], evaluator: Evaluator | None, resumed: str | None) -> str:
    """The lines about a run.

    Args:
        record: the content of config.json.
        evaluator: of the run; None without held-out data.
        resumed: where a resumed run continues and what has changed; None for a new run.
    """
    config, train, ranks = record["config"], record["config"]["train"], record["world_size"]
    batch, accumulated = train["batch_size"], train["gradient_accumulation_steps"]
    pairs = ranks * batch * accumulated
    parts = [f"{ranks} devices"] * (ranks > 1) + [f"{batch}"] + [f"{accumulated} accumulated"] * (accumulated > 1)
    product = f" ({' x '.join(parts)})" if len(parts) > 1 else ""
    epochs = record["steps"] * pairs / record["samples"]
    dtype = "bfloat16" if train["bf16"] else "float32"
    compiled = "; layers compiled, up to a minute at the first step" if train["compile"] else ""
    again = f"--output_dir {train['output_dir']} --resume true"
    lines = {
        "model": f"{_model(config)}, {record['parameters'] / 1e6:.3g} M parameters",
        "data": f"{config['data']['data']}, {record['samples']:,} samples; held out: {_held_out(evaluator)}",
        "steps": f"{record['steps']:,} of {pairs:,} samples{product}, {epochs:.3g} epochs",
        "device": f"{record['device']}, {dtype}; {_operators(record['operators'])}{compiled}",
        "folder": f"{train['output_dir']}: config.json has every option, metrics.jsonl the log",
        "to stop": f"Ctrl-C: the run saves and ends; resume with {again}",
    }
    if resumed:
        lines["resumed"] = resumed
    return "\n".join(f"{name:<9}{text}" for name, text in lines.items())


def _model(config: dict[str, Any]) -> str:
    if "task" in config:
        return f"task {config['task']}, from {config['options']['model']}"
    model = config["model"]
    parts = dict.fromkeys((model["vision_weights"], model["text_weights"]))
    start = model["model_weights"] or " and ".join("random weights" if part == "random" else part for part in parts)
    return f"preset {config['preset']}, images of {model['image_size']} px, from {start}"


def _held_out(evaluator: Evaluator | None) -> str:
    if evaluator is None:
        return "none (--eval_data)"
    data = without_secrets(evaluator.evaluation.data)
    return f"{evaluator.count:,} {'unseen scenes' if data.split(':')[0] == 'shapes' else f'of {data}'}"


def _operators(chosen: dict[str, str]) -> str:
    kinds: dict[str, list[str]] = {}
    for operator, kind in chosen.items():
        kinds.setdefault(kind, []).append(operator)
    return "operators: " + ", ".join(
        kind if len(kinds) == 1 else f"{kind} ({', '.join(names)})" for kind, names in kinds.items()
    )


def doubts(loader: SampleLoader, data: str, evaluator: Evaluator | None, pairs_per_step: int) -> Iterator[str]:
    """A line for each property of the data that is probably a mistake, or from which nothing can be learned."""
    samples, ids = len(loader.source), loader.source.image_ids
    first = ids[np.arange(min(samples, 100))]  # more only if these are equal, as ids by URL take time
    if evaluator is not None and (shared := shared_files(data, evaluator.evaluation.data)):
        yield f"eval_data: {shared[0]} is also training data, so the evaluation measures memorization"
    if samples < pairs_per_step:
        yield f"data: a step takes {pairs_per_step} samples, but there are only {samples}: each step repeats some"
    if (first == first[0]).all() and (ids[np.arange(samples)] == first[0]).all():
        yield f"data: all {samples} samples have the same image, so there is nothing to tell apart"


class CaptionWatch:
    """Looks for captions without content."""

    def __init__(self, loader: SampleLoader) -> None:
        self.loader, self.looked, self.dropped = loader, False, False

    def doubts(self, batch: Any) -> Iterator[str]:
        """A line if captions of the first batch have no word that the tokenizer knows, and one, once, as soon as
        captions were dropped."""
        if isinstance(batch, Batch) and not self.looked:
            is_word = torch.from_numpy(TextMasker(self.loader.tokenizer).word_start)
            wordless = (~is_word[batch.input_ids.cpu()].any(1)).nonzero().flatten().tolist()
            if wordless:
                some, first = f"{len(wordless)} of the first {len(batch.keys)}", printable(batch.keys[wordless[0]])
                yield f"data: the tokenizer knows no word in {some} captions, for example in that of {first}"
        if self.loader.skipped_captions and not self.dropped:
            self.dropped = True
            yield "data: dropped captions without a letter or digit"
        self.looked = True

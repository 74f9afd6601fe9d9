"""Loaders of small images, and when two of their batches are the same."""

import torch

from softmask_fast.data.augment import AugmentConfig
from softmask_fast.data.loader import PretrainingLoader
from softmask_fast.data.synthetic import ShapesSource
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.data.types import Batch

SHAPES = ShapesSource(num=40, image_size=24)
TOKENIZER = train_tokenizer([text for i in range(40) for text in SHAPES.read(i).captions], 200)


def loader(source=SHAPES, **options) -> PretrainingLoader:
    defaults = {
        "batch_size": 8,
        "image_size": 16,
        "augment": AugmentConfig(),
        "max_tokens": 20,
        "seed": 3,
        "num_threads": 2,
    }
    return PretrainingLoader(source, TOKENIZER, **(defaults | options))


def same(first: Batch, second: Batch) -> bool:
    def alike(one, other) -> bool:
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    return all(alike(value, getattr(second, name)) for name, value in vars(first).items())

"""The pretraining step, the ALBEF way (`reference_step.py`) against ours: forward, backward, AdamW, momentum copy.

Captions have the lengths of Flickr8k's 5 x 1,500 first ones under a WordPiece of 4,000 (14.3 +- 4.1 tokens, [CLS] and [SEP]
included). The peak memory of a step is what it holds beyond weights, gradients, optimiser state and queues, which stand
before it starts.

    pytest benchmarks/bench_step.py --benchmark-only
    python benchmarks/bench_step.py --preset small --batch_size 32      # interleaved medians and extra memory, as a table
"""

from __future__ import annotations

import numpy as np
import torch
from reference_step import ReferenceStep, update_teacher

from softmask_fast.config import make_config
from softmask_fast.data.loader import Batch
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.vision_language import VisionLanguageModel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"base": 128} if DEVICE.type == "cuda" else {"tiny": 32, "small": 32}  # preset: pairs in a batch
ALPHA, SEED = 0.4, 5


def make_batch(config, pairs: int, device: torch.device = DEVICE) -> Batch:
    """Pairs of noise; caption lengths, masked words and the word of the soft mask drawn as the loader would."""
    generator = np.random.default_rng(0)
    lengths = np.clip(np.rint(generator.normal(14.25, 4.13, pairs)), 5, config.max_tokens).astype(int)
    longest = lengths.max()
    mask = np.arange(longest) < lengths[:, None]
    words = mask & (np.arange(longest) > 0) & (np.arange(longest) < lengths[:, None] - 1)
    chosen = words & (generator.random(words.shape) < 0.15)
    chosen[:, 1] = True
    ids = generator.integers(5, config.vocab_size, mask.shape) * mask
    masked = np.where(chosen, 4, ids)
    positions = np.flatnonzero(chosen)

    def tensor(values):
        return torch.from_numpy(values).to(device)

    return Batch(
        pixels=torch.randn(pairs, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0)).to(
            device
        ),
        input_ids=tensor(ids),
        masked_ids=tensor(masked),
        attention_mask=tensor(mask),
        mlm_positions=tensor(positions),
        mlm_labels=tensor(ids.flat[positions]),
        word_index=tensor(generator.integers(1, lengths - 1)),
        ids=tensor(np.arange(pairs)),
        keys=[str(i) for i in range(pairs)],
    )


class Problem:
    """One training step of a preset, by either way; each has its own optimiser and momentum copy of one model."""

    def __init__(self, preset: str, pairs: int, bf16: bool = DEVICE.type == "cuda", **options):
        torch.manual_seed(0)
        config = make_config(preset, vision_weights="random", text_weights="random", **options)
        self.pairs, self.objectives, self.bf16 = pairs, config.objectives, bf16
        self.model = VisionLanguageModel(config.model).to(DEVICE)
        self.teacher = MomentumTeacher(self.model, config.objectives.queue_size, config.objectives.momentum).to(DEVICE)
        self.batch = make_batch(config.model, pairs)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def reference(self):
        loss, _ = ReferenceStep(self.model, self.objectives, self.bf16)(self.batch, self.teacher, ALPHA)
        self._update(loss)
        update_teacher(self.teacher, self.model)

    def fast(self):
        loss, _ = PretrainingStep(self.model, self.objectives, self.bf16)(self.batch, self.teacher, ALPHA, SEED)
        self._update(loss)
        self.teacher.update(self.model.named_parameters())

    def _update(self, loss):
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=False)

    def variants(self):
        return {"reference": self.reference, "fast": self.fast}

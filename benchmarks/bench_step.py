"""The pretraining step, ALBEF's way against ours: forward, backward, AdamW, momentum copy.

Captions are as long as the first 7,500 of Flickr8k under a WordPiece of 4,000 (14.25 +- 4.13 tokens, [CLS] and [SEP]
included). The peak memory of a step excludes weights, gradients, optimizer state and queues, which exist before it
starts.

`OperationCounter` counts the operations of each variant in one step. It leaves out the products of our word maps and of
our contrastive loss.

    pytest benchmarks/bench_step.py --benchmark-only
    python benchmarks/bench_step.py --preset small --batch_size 32   # interleaved medians, extra memory
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import pytest
import torch
from measure import Variant, extra_memory, interleaved, synchronised

from softmask_fast.data.types import Batch
from softmask_fast.model.momentum import MomentumTeacher, StepSettings
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.pretraining_reference import ReferenceStep, update_teacher
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.training.meters import OperationCounter
from softmask_fast.training.options import make_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"base": 128} if DEVICE.type == "cuda" else {"tiny": 32, "small": 32}  # preset: pairs in a batch
SETTINGS = StepSettings(alpha=0.4, seed=5)


def make_batch(config, pairs: int, device: torch.device = DEVICE) -> Batch:
    """Pairs of noise, with caption lengths, masked tokens and the soft mask's word drawn as the loader draws them."""
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
        pixels=tensor(generator.standard_normal((pairs, 3, config.image_size, config.image_size), np.float32)),
        input_ids=tensor(ids),
        masked_ids=tensor(masked),
        attention_mask=tensor(mask),
        mlm_positions=tensor(positions),
        mlm_labels=tensor(ids.flat[positions]),
        word_index=tensor(generator.integers(1, lengths - 1)),
        ids=tensor(np.arange(pairs)),
        keys=[str(i) for i in range(pairs)],
        token_count=int(lengths.sum()),
    )


class Problem:
    """One training step of a preset, ALBEF's way or ours. Each has its own optimizer and momentum copy of the same
    model."""

    def __init__(self, preset: str, pairs: int, bf16: bool = DEVICE.type == "cuda", **options):
        torch.manual_seed(0)
        config = make_config(preset, vision_weights="random", text_weights="random", **options)
        self.preset, self.pairs, self.objectives, self.bf16 = preset, pairs, config.objectives, bf16
        self.model = VisionLanguageModel(config.model).to(DEVICE)
        self.teacher = MomentumTeacher(self.model, config.objectives).to(DEVICE)
        self.batch = make_batch(config.model, pairs)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def reference(self):
        loss, _ = ReferenceStep(self.model, self.objectives, self.bf16)(self.batch, self.teacher, SETTINGS)
        self._update(loss)
        update_teacher(self.teacher, self.model)

    def fast(self):
        loss, _ = PretrainingStep(self.model, self.objectives, self.bf16)(self.batch, self.teacher, SETTINGS)
        self._update(loss)
        self.teacher.update(self.model.named_parameters())

    def _update(self, loss):
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=False)

    def _variant(self, step, **options) -> Variant:
        with OperationCounter() as counter:
            step()
        return Variant(both=step, work={"both": counter.operations}, **options)

    def variants(self) -> dict[str, Variant]:
        return {"reference": self._variant(self.reference), "fast": self._variant(self.fast, ours=True)}


def check(problem: Problem) -> None:
    """Both steps compute the same losses.

    Only the contrastive and the language loss are compared, as the drawn negatives differ. tests/test_reference_step.py
    compares every gradient, with dropout off and the same negatives.
    """
    was_training = problem.model.training
    problem.model.eval()
    with torch.no_grad():
        _, fast = PretrainingStep(problem.model, problem.objectives, problem.bf16)(
            problem.batch, copy.deepcopy(problem.teacher), SETTINGS
        )
    _, reference = ReferenceStep(problem.model, problem.objectives, problem.bf16)(
        problem.batch, copy.deepcopy(problem.teacher), SETTINGS
    )
    problem.model.train(was_training)
    tolerance = 2e-2 if problem.bf16 else 1e-4
    for name in ("itc", "mlm"):
        torch.testing.assert_close(fast[name], reference[name].float(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("preset", SIZES)
def test_step(comparison, preset):
    problem = Problem(preset, SIZES[preset])
    check(problem)
    case = {"preset": preset, "pairs": problem.pairs}
    comparison("step", case, problem.variants(), "reference", "matmul", tolerance=0, seconds=20)


def main():
    parser = argparse.ArgumentParser(description="Reference step against fast step: interleaved medians, extra memory.")
    parser.add_argument("--preset", default=next(reversed(SIZES)))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    problem = Problem(options.preset, options.batch_size)
    check(problem)
    variants = {name: synchronised(variant.both, DEVICE) for name, variant in problem.variants().items()}
    times = interleaved(variants, rounds=options.rounds, warmup=1)
    memory = {name: extra_memory(run, DEVICE) for name, run in variants.items()}
    print(f"{options.preset}, {options.batch_size} pairs, {DEVICE}, {torch.get_num_threads()} threads")
    for name, seconds in times.items():
        print(
            f"{name:10} {1e3 * seconds:9.1f} ms  {options.batch_size / seconds:8.1f} pairs/s  "
            f"{times['reference'] / seconds:5.2f} x faster than reference  {memory[name] / 2**20:8.1f} MiB  "
            f"{memory[name] / memory['reference']:5.2f} of its memory"
        )


if __name__ == "__main__":
    main()

"""word_soft_mask against attention maps and their gradients by autograd, and against eager PyTorch.

Bytes that any implementation must move: K, V, X read and X' written once, 2 B H N D + 2 B N C elements. "bytes" does just
that much in plain PyTorch, as a measure of the machine.

    pytest benchmarks/bench_word_mask.py --benchmark-only
    python benchmarks/bench_word_mask.py        # interleaved medians and extra memory, as one table
"""

from __future__ import annotations

import pytest
import torch
from measure import extra_memory, interleaved, synchronised

from softmask_fast.ops import attention_output_gradient, backend, word_soft_mask

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# B, H, L, N, D, C
SIZES = (256, 12, 30, 257, 64, 768) if DEVICE.type == "cuda" else (16, 12, 30, 257, 64, 768)
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


class Problem:
    """Random attention of a fusion layer and a score on top of it: mean over words, a linear layer, "matched"."""

    def __init__(self, sizes=SIZES, dtype=DTYPE, device=DEVICE):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        images, heads, length, tokens, width, channels = sizes
        self.query = draw(images, heads, length, width)
        self.key, self.value = draw(images, heads, tokens, width), draw(images, heads, tokens, width)
        self.features = draw(images, tokens, channels)
        self.weight = draw(heads * width, 2) / 8
        self.word_index = torch.randint(0, length, (images,), generator=generator).to(device)
        self.masked = torch.empty_like(self.features)
        self.bytes_moved = (2 * self.key.numel() + 2 * self.features.numel()) * self.features.element_size()
        output = torch.nn.functional.scaled_dot_product_attention(self.query, self.key, self.value)
        self.grad_output = attention_output_gradient(self.score, output)

    def score(self, output):
        return (output.transpose(1, 2).flatten(2).mean(1) @ self.weight)[:, 1]

    def hooks(self):
        """Full attention maps and their gradients, as ALBEF saves them, then the row of the word."""
        attention = (self.query @ self.key.mT * self.query.shape[-1] ** -0.5).softmax(-1).requires_grad_()
        (gradient,) = torch.autograd.grad(self.score(attention @ self.value).sum(), attention)
        maps = (attention.detach() * gradient.relu()).mean(1)
        cam = maps[torch.arange(len(maps), device=maps.device), self.word_index]
        patches = cam[:, 1:]
        low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
        keep = torch.cat((torch.ones_like(cam[:, :1]), 1 - (patches - low) / (high - low)), 1)
        return self.features * keep[:, :, None]

    def bytes(self):
        """Reads K, V, X and writes X' once."""
        return self.key.sum(), self.value.sum(), torch.mul(self.features, 0.5, out=self.masked)

    def fused(self, impl):
        return word_soft_mask(
            self.query, self.key, self.value, self.grad_output, self.word_index, self.features, impl=impl
        )[0]

    def variants(self):
        names = backend.runnable("word_mask", DEVICE, DTYPE, self.query.shape[3])
        return {"bytes": self.bytes, "hooks": self.hooks} | {name: lambda name=name: self.fused(name) for name in names}


def check(problem):
    """What is timed computes the same."""
    tolerance = 1e-4 if DTYPE == torch.float32 else 0.1
    expected = problem.hooks()
    for name in problem.variants().keys() - {"bytes", "hooks"}:
        torch.testing.assert_close(problem.fused(name), expected, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def problem():
    made = Problem()
    check(made)
    return made


@pytest.mark.parametrize("name", Problem((1, 1, 1, 2, 16, 1)).variants())
def test_word_soft_mask(benchmark, problem, name):
    run = synchronised(problem.variants()[name], DEVICE)
    benchmark.group = f"word_soft_mask {DEVICE.type} {SIZES} {DTYPE}"
    benchmark.extra_info |= {"bytes_moved": problem.bytes_moved, "extra_memory": extra_memory(run, DEVICE)}
    benchmark.pedantic(run, rounds=30, warmup_rounds=3)


def main():
    problem = Problem()
    check(problem)
    variants = {name: synchronised(run, DEVICE) for name, run in problem.variants().items()}
    times = interleaved(variants)
    print(f"word_soft_mask, (B, H, L, N, D, C) = {SIZES}, {DTYPE}, {DEVICE}, {torch.get_num_threads()} threads")
    for name, seconds in times.items():
        rate, memory = problem.bytes_moved / seconds / 1e9, extra_memory(variants[name], DEVICE) / 2**20
        print(
            f"{name:10} {1e3 * seconds:8.2f} ms  {seconds / times['bytes']:6.2f} x bytes  "
            f"{times['hooks'] / seconds:6.2f} x faster than hooks  {rate:6.1f} GB/s  {memory:8.1f} MiB"
        )


if __name__ == "__main__":
    main()

"""soft_masked_attention, forward and backward, against masking and gathering keys for SDPA.

Operations of the forward pass: 4 S H L N D; of the backward pass 10 S H L N D (five products, two of them recomputed).
"sdpa_gathered" is what a user writes today; "sdpa_unmasked" is a lower bound that ignores the masks: all sequences of an
image stacked in one plain SDPA call.

    pytest benchmarks/bench_soft_masked_attention.py --benchmark-only
    python benchmarks/bench_soft_masked_attention.py        # interleaved medians and extra memory, as one table
"""

from __future__ import annotations

import pytest
import torch
from measure import extra_memory, interleaved, synchronised

from softmask_fast.ops import backend, soft_masked_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# B, sequences per image, H, L, N, D
SIZES = (256, 4, 12, 30, 257, 64) if DEVICE.type == "cuda" else (8, 4, 12, 30, 257, 64)
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


class Problem:
    def __init__(self, sizes=SIZES, dtype=DTYPE, device=DEVICE):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

        self.images, self.passes, heads, length, tokens, width = sizes
        sequences = self.images * self.passes
        self.query = draw(sequences, heads, length, width)
        self.key, self.value = draw(self.images, heads, tokens, width), draw(self.images, heads, tokens, width)
        self.keep = torch.rand(sequences, tokens, generator=generator).to(device)
        self.image_index = torch.arange(sequences, device=device) % self.images
        self.grad = draw(sequences, heads, length, width).detach()
        self.operations = 14 * sequences * heads * length * tokens * width

    def sdpa_gathered(self):
        keep = self.keep[:, None, :, None].to(self.key.dtype)
        key, value = self.key[self.image_index] * keep, self.value[self.image_index] * keep
        return torch.nn.functional.scaled_dot_product_attention(self.query, key, value)

    def sdpa_unmasked(self):
        stacked = self.query.unflatten(0, (self.passes, self.images)).permute(1, 2, 0, 3, 4).flatten(2, 3)
        output = torch.nn.functional.scaled_dot_product_attention(stacked, self.key, self.value)
        return output.unflatten(2, (self.passes, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1)

    def fused(self, impl):
        return soft_masked_attention(
            self.query, self.key, self.value, self.keep, image_index=self.image_index, impl=impl
        )

    def with_gradients(self, forward):
        output = forward()
        return output, *torch.autograd.grad(output, (self.query, self.key, self.value), self.grad)

    def variants(self):
        names = backend.runnable("soft_masked_attention", DEVICE, DTYPE, self.query.shape[3])
        forwards = {"sdpa_gathered": self.sdpa_gathered, "sdpa_unmasked": self.sdpa_unmasked}
        forwards |= {name: lambda name=name: self.fused(name) for name in names}
        return {name: lambda run=run: self.with_gradients(run) for name, run in forwards.items()}


def check(problem):
    """What is timed computes the same."""
    tolerance = 1e-4 if DTYPE == torch.float32 else 0.1
    variants = problem.variants()
    expected = variants["sdpa_gathered"]()
    for name in variants.keys() - {"sdpa_gathered", "sdpa_unmasked"}:
        for actual, truth in zip(variants[name](), expected, strict=True):
            torch.testing.assert_close(actual, truth, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def problem():
    made = Problem()
    check(made)
    return made


@pytest.mark.parametrize("name", Problem((1, 1, 1, 1, 2, 16)).variants())
def test_soft_masked_attention(benchmark, problem, name):
    run = synchronised(problem.variants()[name], DEVICE)
    benchmark.group = f"soft_masked_attention {DEVICE.type} {SIZES} {DTYPE}"
    benchmark.extra_info |= {"operations": problem.operations, "extra_memory": extra_memory(run, DEVICE)}
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)


def main():
    problem = Problem()
    check(problem)
    variants = {name: synchronised(run, DEVICE) for name, run in problem.variants().items()}
    times = interleaved(variants, rounds=10, warmup=2)
    print(f"forward + backward, (B, S / B, H, L, N, D) = {SIZES}, {DTYPE}, {DEVICE}, {torch.get_num_threads()} threads")
    for name, seconds in times.items():
        rate, memory = problem.operations / seconds / 1e9, extra_memory(variants[name], DEVICE) / 2**20
        print(
            f"{name:14} {1e3 * seconds:8.2f} ms  {times['sdpa_gathered'] / seconds:6.2f} x faster than sdpa_gathered  "
            f"{rate:7.1f} GFLOP/s  {memory:8.1f} MiB"
        )


if __name__ == "__main__":
    main()

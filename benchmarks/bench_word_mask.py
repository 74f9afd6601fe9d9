"""word_soft_mask against ALBEF's hooks, the minimum cost of attention maps, and eager and compiled PyTorch.

| variant | what it is |
| --- | --- |
| ALBEF hooks | what ALBEF does: a backward pass through the layer, in which a hook keeps the maps' gradients |
| maps | the minimum cost of maps: only they and their gradients, by autograd ("hooks" in older results) |
| reference | only the chosen row, eager: `impl="reference"` |
| compiled | `torch.compile` of it |
| bytes | a lower bound: reads K, V, X and writes X' once, into memory that is already allocated |
| the others | ours, by the name of the implementation |

"word_soft_mask_keep" is the mask alone, without X and X': what the training step needs.

Fused attention (SDPA, flex_attention) gives no maps, so it is not compared here, but in bench_soft_masked_attention.py.

| counted | bytes |
| --- | --- |
| every variant | K, V, X read and X' written once: (2 B H N D + 2 B N C) elements; keep alone, K and V: 2 B H N D |

Together these tensors exceed the last-level cache. All variants but the first two get the gradient dS/dO, which is made
beforehand. It costs a partial backward pass through the layers above, here one linear layer; the first two include it.

    pytest benchmarks/bench_word_mask.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch
from measure import DEVICE, DTYPE, ON_GPU, Variant

from softmask_fast.ops import attention_output_gradient, registry, word_soft_mask
from softmask_fast.ops.word_mask import reference

IMAGES = 256 if ON_GPU else 16
HEADS, LENGTH, WIDTH, CHANNELS = 12, 30, 64, 768


class Problem:
    """Random attention of a fusion layer and a score on top of it: mean over words, a linear layer, "matched"."""

    def __init__(self, images: int, tokens: int, heads=HEADS, length=LENGTH, width=WIDTH, channels=CHANNELS):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)

        self.case = {"B": images, "H": heads, "L": length, "N": tokens, "D": width, "C": channels}
        self.query = draw(images, heads, length, width)
        self.key, self.value = draw(images, heads, tokens, width), draw(images, heads, tokens, width)
        self.features = draw(images, tokens, channels)
        self.weight = draw(heads * width, 2) / 8
        self.word_index = torch.randint(0, length, (images,), generator=generator).to(DEVICE)
        self.masked = torch.empty_like(self.features)
        self.key_bytes = 2 * self.key.numel() * self.key.element_size()
        self.bytes_moved = self.key_bytes + 2 * self.features.numel() * self.features.element_size()
        output = torch.nn.functional.scaled_dot_product_attention(self.query, self.key, self.value)
        self.grad_output = attention_output_gradient(self.score, output)

    def score(self, output):
        return (output.transpose(1, 2).flatten(2).mean(1) @ self.weight)[:, 1]

    def attention(self, query, key):
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)

    def masked_by_maps(self, attention, gradient, alone=False):
        maps = (attention.detach() * gradient.relu()).mean(1)
        cam = maps[torch.arange(len(maps), device=maps.device), self.word_index]
        patches = cam[:, 1:]
        low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
        keep = torch.cat((torch.ones_like(cam[:, :1]), 1 - (patches - low) / (high - low)), 1)
        return keep.float() if alone else self.features * keep[:, :, None]

    def hooks(self, alone=False):
        query, key, value = (x.detach().requires_grad_() for x in (self.query, self.key, self.value))
        attention, gradients = self.attention(query, key), []
        attention.register_hook(gradients.append)
        self.score(attention @ value).sum().backward()
        return self.masked_by_maps(attention, gradients[0], alone)

    def maps(self, alone=False):
        attention = self.attention(self.query, self.key).requires_grad_()
        (gradient,) = torch.autograd.grad(self.score(attention @ self.value).sum(), attention)
        return self.masked_by_maps(attention, gradient, alone)

    def bytes(self, alone=False):
        self.key.sum(), self.value.sum()
        if not alone:
            torch.mul(self.features, 0.5, out=self.masked)

    def fused(self, impl, alone=False):
        inputs = (self.query, self.key, self.value, self.grad_output, self.word_index)
        return word_soft_mask(*inputs, impl=impl) if alone else word_soft_mask(*inputs, self.features, impl=impl)[0]

    def compiled(self, alone=False):
        run, scale = torch.compile(reference.word_soft_mask, dynamic=False), self.query.shape[-1] ** -0.5
        features = None if alone else self.features
        return lambda: run(
            self.query, self.key, self.value, self.grad_output, self.word_index, features, 1, None, scale
        )[int(alone)]

    def variants(self, alone=False) -> dict[str, Variant]:
        """The bytes of the masked features, or of keep alone."""
        work = {"forward": self.key_bytes if alone else self.bytes_moved}
        found = {
            "bytes": Variant(lambda: self.bytes(alone), checked=False, work=work),
            "ALBEF hooks": Variant(lambda: self.hooks(alone), work=work),
            "maps": Variant(lambda: self.maps(alone), work=work),
            "compiled": Variant(self.compiled(alone), work=work),
        }
        for name in reversed(registry.runnable("word_mask", DEVICE, DTYPE, WIDTH)):
            ours = name != "reference"
            found[name] = Variant(lambda name=name: self.fused(name, alone), ours=ours, work=work)
        return found


@pytest.mark.parametrize("alone", [False, True], ids=["features", "keep"])
@pytest.mark.parametrize("tokens", [257, 577, 1025])
def test_word_soft_mask(comparison, tokens, alone):
    problem = Problem(IMAGES if ON_GPU or not alone else 4 * IMAGES, tokens)  # larger than the caches without features
    tolerance = 1e-4 if DTYPE == torch.float32 else 0.05
    name, variants = "word_soft_mask_keep" if alone else "word_soft_mask", problem.variants(alone)
    comparison(name, problem.case, variants, "ALBEF hooks", "copy", tolerance, seconds=4)

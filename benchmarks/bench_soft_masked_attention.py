"""soft_masked_attention, forward and backward, against masking and gathering keys for PyTorch's attention.

| variant | what it is |
| --- | --- |
| eager | keys gathered and masked, full attention maps |
| compiled | `torch.compile` of it |
| sdpa_gathered | keys gathered and masked, then SDPA; the usual way |
| flex | compiled flex_attention; its score_mod multiplies the logits by keep; keys gathered, values masked too |
| projected | ALBEF: features gathered and masked, projected to keys and values for every sequence, then SDPA |
| sdpa_unmasked | a lower bound that ignores the masks: all sequences of an image stacked in one plain SDPA call |
| *+ projection* | ours, each image projected once before it: the same work as "projected" |
| the others | ours, by the name of the implementation |

| counted | operations |
| --- | --- |
| forward | 4 S H L N D: logits and output |
| backward, eager and compiled | 8 S H L N D: the gradients of A, V, Q and K |
| backward of the others | 10 S H L N D: the logits once more, as no maps are stored |
| projections | "projected" 4 S N C C for keys and values, ours 4 B N C C (C = H D); twice that in the backward |

Not counted: the logits and the gradient of A once more, where a backward pass has a kernel for Q and one for K and V
("flex"; "triton" where an image has more rows than a tile).

    pytest benchmarks/bench_soft_masked_attention.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch
from measure import DEVICE, DTYPE, ON_GPU, Variant
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from softmask_fast.ops import plan_image_index, registry, soft_masked_attention

IMAGES = 256 if ON_GPU else 8
PASSES, HEADS, LENGTH, WIDTH = 4, 12, 30, 64


class Problem:
    def __init__(self, images: int, tokens: int, passes=PASSES, heads=HEADS, length=LENGTH, width=WIDTH):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)

        sequences, channels = images * passes, heads * width
        self.case = {"S": sequences, "B": images, "H": heads, "L": length, "N": tokens, "D": width}
        self.images, self.passes, self.heads = images, passes, heads
        self.query = draw(sequences, heads, length, width).requires_grad_()
        self.features = draw(images, tokens, channels).requires_grad_()
        self.weight = (draw(2 * channels, channels) * channels**-0.5).requires_grad_()
        self.key, self.value = (part.detach().requires_grad_() for part in self.project(self.features))
        self.keep = torch.rand(sequences, tokens, generator=generator).to(DEVICE)
        self.image_index = torch.arange(sequences, device=DEVICE) % images
        self.plan = plan_image_index(self.image_index, images)  # made once for all layers of a step
        self.grad = draw(sequences, heads, length, width)
        self.product = 2 * sequences * heads * length * tokens * width
        self.projection = 2 * 2 * tokens * channels**2  # of one image

    def project(self, features):
        return (features @ self.weight.T).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def gathered(self):
        keep = self.keep[:, None, :, None].to(DTYPE)
        return self.key[self.image_index] * keep, self.value[self.image_index] * keep

    def eager(self):
        key, value = self.gathered()
        return (self.query @ key.mT * self.query.shape[-1] ** -0.5).softmax(-1) @ value

    def sdpa_gathered(self):
        return scaled_dot_product_attention(self.query, *self.gathered())

    def sdpa_unmasked(self):
        stacked = self.query.unflatten(0, (self.passes, self.images)).permute(1, 2, 0, 3, 4).flatten(2, 3)
        output = scaled_dot_product_attention(stacked, self.key, self.value)
        return output.unflatten(2, (self.passes, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1)

    def flex(self):
        keep = self.keep

        def logit_factor(score, sequence, head, word, token):
            return score * keep[sequence, token]

        value = self.value[self.image_index] * keep[:, None, :, None].to(DTYPE)
        query = (
            self.query if torch.is_grad_enabled() else self.query.detach()
        )  # it refuses inputs with a gradient on the CPU
        return flex_attention(query, self.key[self.image_index], value, score_mod=logit_factor)

    def projected(self):
        features = self.features[self.image_index] * self.keep[:, :, None].to(DTYPE)
        return scaled_dot_product_attention(self.query, *self.project(features))

    def fused(self, impl, projection=False):
        key, value = self.project(self.features) if projection else (self.key, self.value)
        return soft_masked_attention(self.query, key, value, self.keep, image_index=self.plan, impl=impl)

    def variant(self, forward, recomputed=1, projected=0, **options) -> Variant:
        """`recomputed`: products of the forward that the backward makes again; `projected`: images or sequences."""
        inputs = (self.query, self.features, self.weight) if projected else (self.query, self.key, self.value)
        projection = projected * self.projection
        work = {
            "forward": 2 * self.product + projection,
            "both": (6 + recomputed) * self.product + 3 * projection,
        }

        def inference():
            with torch.no_grad():
                return forward()

        def both():
            output = forward()
            return output.detach(), *torch.autograd.grad(output, inputs, self.grad)

        return Variant(inference, both, work=work, **options)

    def variants(self) -> dict[str, Variant]:
        no_backward = {} if ON_GPU else {"both": "flex_attention has no backward pass on the CPU"}
        found = {
            "eager": self.variant(self.eager, recomputed=0),
            "compiled": self.variant(torch.compile(self.eager, dynamic=False), recomputed=0),
            "sdpa_gathered": self.variant(self.sdpa_gathered),
            "flex": self.variant(torch.compile(self.flex, dynamic=False), missing=no_backward),
            "sdpa_unmasked": self.variant(self.sdpa_unmasked, checked=False),
        }
        for name in reversed(registry.runnable("soft_masked_attention", DEVICE, DTYPE, WIDTH)):
            found[name] = self.variant(lambda name=name: self.fused(name), ours=True)
        return found

    def variants_with_projection(self) -> dict[str, Variant]:
        best = registry.resolve("soft_masked_attention", None, DEVICE, DTYPE, WIDTH).name
        return {
            "projected": self.variant(self.projected, projected=len(self.query)),
            f"{best} + projection": self.variant(lambda: self.fused(best, True), projected=self.images, ours=True),
        }


TOKENS = pytest.mark.parametrize("tokens", [257, 577, 1025])
TOLERANCE = 1e-4 if DTYPE == torch.float32 else 0.05


@TOKENS
def test_soft_masked_attention(comparison, tokens):
    problem = Problem(IMAGES, tokens)
    variants = problem.variants()
    comparison("soft_masked_attention", problem.case, variants, "sdpa_gathered", "matmul", TOLERANCE, seconds=6)


@TOKENS
def test_soft_masked_attention_projected(comparison, tokens):
    problem = Problem(IMAGES, tokens)
    variants = problem.variants_with_projection()
    comparison("soft_masked_attention_projected", problem.case, variants, "projected", "matmul", TOLERANCE, seconds=3)

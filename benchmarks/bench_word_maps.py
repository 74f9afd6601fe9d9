"""Word maps of a decoder's layer against eager attention, which computes its whole map: a layer like Qwen2.5-VL's.

| variant | what it is |
| --- | --- |
| eager | what users do: attention with its map, and the map's gradient from the output's, both stored whole |
| eager forward | only the first half of it, which gives no word maps |
| ours | `AttentionRecord.maps`: only the words' rows, their log-sum-exp over all tokens, the image's keys and values |

28 query heads, 4 key heads; 4,096 tokens, of which 2,048 are the image's, followed by 64 words. Both get the gradient
of the layer's output, as both need the same partial backward pass for it.

| counted | operations |
| --- | --- |
| eager, eager forward | 2 D H L L (logits), as many for the output; eager as many again for the map's gradient |
| ours | 2 D H words (L + 2 N): logits with all tokens, logits and the map's gradient with the image's |

    pytest benchmarks/bench_word_maps.py --benchmark-only
"""

from __future__ import annotations

import torch
from measure import DEVICE, DTYPE, Variant

from softmask_fast.adapters.attention_record import AttentionRecord

HEADS, KEY_HEADS, WIDTH = 28, 4, 128
TOKENS, IMAGE, WORDS = 4096, 2048, 64
FIRST = 16  # tokens before the image


class Problem:
    """Random attention of one layer, causal, and a random gradient of its output."""

    def __init__(self, tokens: int = TOKENS, image: int = IMAGE, words: int = WORDS):
        generator = torch.Generator().manual_seed(0)

        def draw(heads):
            return torch.randn(1, heads, tokens, WIDTH, generator=generator).to(DEVICE, DTYPE)

        self.case = {"H": HEADS, "Hk": KEY_HEADS, "L": tokens, "N": image, "words": words, "D": WIDTH}
        self.query, self.key, self.value, self.gradient = draw(HEADS), draw(KEY_HEADS), draw(KEY_HEADS), draw(HEADS)
        self.rows = torch.arange(tokens - words, tokens, device=DEVICE)[None]
        self.columns = torch.arange(FIRST, FIRST + image, device=DEVICE)[None]
        self.hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).triu_(1)
        self.record = AttentionRecord(self.query, self.key, self.value, self.query, WIDTH**-0.5, causal=True)
        unit = 2 * WIDTH * HEADS  # operations of one row with one token
        self.work = {
            "eager": {"forward": 3 * unit * tokens * tokens},
            "eager forward": {"forward": 2 * unit * tokens * tokens},
            "ours": {"forward": unit * words * (tokens + 2 * image)},
        }

    @property
    def map_bytes(self) -> int:
        """Bytes of the layer's whole map, in the model's dtype."""
        return HEADS * self.query.shape[2] ** 2 * self.query.element_size()

    @torch.no_grad()
    def eager_forward(self):
        key, value = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (self.key, self.value))
        logits = (self.query @ key.mT).mul_(WIDTH**-0.5).masked_fill_(self.hidden, float("-inf"))
        attention = logits.softmax(-1, dtype=torch.float32).to(self.query.dtype)
        return attention, attention @ value, value

    @torch.no_grad()
    def eager(self):
        attention, _, value = self.eager_forward()
        gradient = self.gradient @ value.mT
        rows, image = slice(-self.rows.shape[1], None), slice(FIRST, FIRST + self.columns.shape[1])
        return (attention[:, :, rows, image].float() * gradient[:, :, rows, image].float().relu()).mean(1)

    def ours(self):
        return self.record.maps(self.gradient, self.rows, self.columns, torch.ones_like(self.columns).bool())[0]

    def variants(self) -> dict[str, Variant]:
        return {
            "eager": Variant(self.eager, work=self.work["eager"]),
            "eager forward": Variant(lambda: self.eager_forward()[1], checked=False, work=self.work["eager forward"]),
            "ours": Variant(self.ours, ours=True, work=self.work["ours"]),
        }


def test_word_maps(comparison):
    problem = Problem()
    tolerance = 1e-4 if DTYPE == torch.float32 else 0.05
    comparison("word_maps", problem.case, problem.variants(), "eager", "matmul", tolerance, seconds=4)

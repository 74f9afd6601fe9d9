"""The functions of layers.py against the modules whose weights they take, and their compiled form."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from transformers.models.bert.modeling_bert import BertLayer

from softmask_fast.model.layers import after_attention, run_region, word_losses, word_probabilities
from softmask_fast.model.packing import Packing
from softmask_fast.model.text import MaskedLanguageHead, TextLayer, bert_config
from softmask_fast.model.vision import ImageBlock
from softmask_fast.training.options import make_config


def randomized(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


def test_an_image_block_is_timms():
    block = randomized(Block(24, 3, qkv_bias=True))
    assert ImageBlock.covers(block)
    tokens = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(ImageBlock(block)(tokens), block(tokens))


@pytest.mark.parametrize(
    "options", [dict(qk_norm=True), dict(init_values=0.1), dict(qkv_bias=False), dict(drop_path=0.1)]
)
def test_blocks_of_other_kinds_stay_as_they_are(options):
    assert not ImageBlock.covers(Block(24, 3, **{"qkv_bias": True} | options))


def test_a_text_layer_is_berts():
    config = bert_config(make_config("tiny", text_width=24, text_heads=3).model, 1)
    layer = randomized(BertLayer(config))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    packing = Packing.of(mask)
    text = torch.randn(2, 3, 24, dtype=torch.float64)
    expected = layer(text, torch.where(mask, 0.0, -torch.inf)[:, None, None].double())
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(TextLayer(layer)(packing.pack(text), packing, "auto"), packing.pack(expected))


def test_word_losses_are_cross_entropies():
    model = make_config("tiny", text_width=24, text_heads=3, vocab_size=11).model
    head = randomized(MaskedLanguageHead(model, torch.nn.Embedding(11, 24)))
    hidden, labels = torch.randn(6, 24, dtype=torch.float64), torch.randint(11, (6,))
    soft_labels = torch.rand(6, 11).softmax(-1)
    logits = head(hidden)
    torch.testing.assert_close(logits, head.decoder(head.transform(hidden)))
    logits = logits.float()
    hard, soft, accuracy = head(hidden, labels, soft_labels, function=word_losses)
    torch.testing.assert_close(hard, F.cross_entropy(logits, labels))
    torch.testing.assert_close(soft, F.cross_entropy(logits, soft_labels))
    assert accuracy == (logits.argmax(-1) == labels).float().mean()
    assert head(hidden, labels, None, function=word_losses)[1] == 0
    torch.testing.assert_close(head(hidden, function=word_probabilities), logits.softmax(-1))


@torch._inductor.config.patch(force_disable_caches=True)
def test_a_compiled_region_has_the_bits_of_any_run():
    """A resumed run compiles at another batch than the first one did. One graph serves all numbers of rows."""
    sizes = ((8, 8), (8,), (8,), (8,), (16, 8), (16,), (8, 16), (8,), (8,), (8,))
    weights = tuple(torch.randn(size, requires_grad=True) for size in sizes)

    def results(rows):
        generator = torch.Generator().manual_seed(rows)
        attended, text = (torch.randn(rows, 8, generator=generator) for _ in range(2))
        torch.manual_seed(rows)
        output = run_region(True, after_attention, weights, attended, text, 1e-12, 0.1)
        return output, *torch.autograd.grad(output.square().sum(), weights)

    found = []
    for first in (3, 4000):
        torch._dynamo.reset()
        results(first)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found.append([*results(500), *results(7)])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert all(map(torch.equal, *found))

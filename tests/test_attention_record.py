"""What a recorded layer's rows see, by every kind of mask that attention functions take."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers.modeling_utils import AttentionInterface

from softmask_fast.adapters.attention_record import REFUSED, AttentionRecord, observed_attention

LENGTH, TOKENS = 5, 8
ROWS = torch.tensor([[0, 2, 4], [1, 2, 3]])


def record(**options):
    query, key = torch.randn(2, 4, LENGTH, 8), torch.randn(2, 2, TOKENS, 8)
    return AttentionRecord(query, key, key, query, 1.0, **options)


def causal(offset, window=TOKENS):
    """(2, 3, TOKENS) bool."""
    keys = torch.arange(TOKENS)
    last = ROWS[..., None] + offset
    return (keys <= last) & (keys > last - window)


def test_without_a_mask():
    assert record().visible(ROWS).all()
    assert torch.equal(record(causal=True).visible(ROWS), causal(0))
    assert torch.equal(record(causal=True, aligned="end").visible(ROWS), causal(3))
    assert torch.equal(record(causal=True, aligned="end", window=2).visible(ROWS), causal(3, 2))


def test_masks_of_padding():
    """As flash attention has them: (B, N), beside causality."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :2] = 0
    expected = causal(3) & mask[:, None].bool()
    assert torch.equal(record(mask=mask, causal=True, aligned="end").visible(ROWS), expected)
    assert torch.equal(record(mask=mask.bool()).visible(ROWS), mask[:, None].bool().expand(2, 3, TOKENS))


@pytest.mark.parametrize("kind", ["bool", "additive", "one row", "longer", "block"])
def test_masks_of_rows(kind):
    allowed = torch.rand(2, 1, LENGTH, TOKENS) < 0.6
    if kind == "one row":
        allowed = allowed[:, :, :1]
    mask = allowed
    if kind == "additive":
        mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    if kind == "longer":  # of a cache that has room for more
        mask = torch.cat([allowed, torch.ones(2, 1, LENGTH, 4, dtype=torch.bool)], -1)
    if kind == "block":
        mask = create_block_mask(lambda b, h, q, k: allowed[b, 0, q, k], 2, None, LENGTH, TOKENS, device="cpu")
    rows = torch.zeros_like(ROWS) if kind == "one row" else ROWS
    expected = allowed[:, 0].gather(1, rows[..., None].expand(-1, -1, TOKENS))
    assert torch.equal(record(mask=mask).visible(ROWS), expected)


def test_biases_are_refused():
    slopes = torch.arange(TOKENS).float().expand(2, 1, LENGTH, TOKENS)
    heads = torch.ones(2, 4, LENGTH, TOKENS, dtype=torch.bool)
    heads[:, 1, :, 0] = False
    for mask in (slopes, heads):
        with pytest.raises(ValueError, match="attention_mask: expected .* got a bias of positions or heads"):
            record(mask=mask).visible(ROWS)


def test_a_capped_logit_and_many_rows_in_pieces(monkeypatch):
    """Against the whole map in float64, rows in chunks of one."""
    monkeypatch.setattr("softmask_fast.adapters.attention_record.LOGITS", 1)
    generator = torch.Generator().manual_seed(0)
    query, gradient = (torch.randn(2, 4, LENGTH, 8, generator=generator).double() for _ in range(2))
    key, value = (torch.randn(2, 2, TOKENS, 8, generator=generator).double() for _ in range(2))
    made = AttentionRecord(query, key, value, query, 0.7, causal=True, aligned="end", soft_cap=1.5)
    columns, exists = torch.tensor([[1, 2, 6], [0, 3, 0]]), torch.tensor([[True] * 3, [True, True, False]])
    maps, sees = made.maps(gradient, ROWS, columns, exists)
    keys, values = (x.repeat_interleave(2, 1) for x in (key, value))
    logits = 1.5 * (query @ keys.mT * 0.7 / 1.5).tanh()
    hidden = torch.arange(TOKENS) > torch.arange(LENGTH)[:, None] + 3
    whole = (logits.masked_fill(hidden, float("-inf")).softmax(-1) * (gradient @ values.mT).relu()).mean(1)
    for sample in range(2):
        for number, row in enumerate(ROWS[sample].tolist()):
            expected = whole[sample, row, columns[sample]] * exists[sample]
            torch.testing.assert_close(maps[sample, number], expected)
    assert maps.dtype == torch.float64 and sees.all()


@pytest.mark.parametrize("argument, what", REFUSED)
def test_what_changes_a_row_beside_its_mask_is_refused_by_name(argument, what):
    module, tensor = torch.nn.Identity(), torch.randn(1, 2, LENGTH, 8)
    attend = AttentionInterface().get_interface("sdpa", None)
    with observed_attention([module], lambda *_: None):
        watched = AttentionInterface().get_interface("sdpa", None)
        with pytest.raises(ValueError, match=f"expected attention without {what}, got Identity with it"):
            watched(module, tensor, tensor, tensor, None, **{argument: torch.zeros(1, 1, LENGTH, LENGTH)})
        output, _ = watched(torch.nn.Identity(), tensor, tensor, tensor, None)  # another module: as ever
    assert torch.equal(output, attend(torch.nn.Identity(), tensor, tensor, tensor, None)[0])
    assert not output.requires_grad

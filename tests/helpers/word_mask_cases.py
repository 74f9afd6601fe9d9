"""What each implementation of the word mask must do, wherever its kernels run: of `impl` on `device`."""

import itertools

import torch
from compare import assert_as_accurate
from word_masks import draw, full_maps, keep_from_map, of_word

from softmask_fast.ops import word_gradcam, word_soft_mask

# what word_gradcam takes beyond the usual attention, together
OPTIONS = [
    options
    for count in range(1, 5)
    for options in itertools.combinations(("log_sum_exp", "soft_cap", "gqa", "key_mask"), count)
    if options != ("key_mask",)
]


def map_matches_full_attention_maps(impl, sizes, dtype, masked, device):
    inputs, word_index = draw(sizes, dtype, device)
    key_mask = (torch.rand(sizes[0], sizes[3]) > 0.4).to(device) if masked else None
    truth = full_maps(*(tensor.double() for tensor in inputs), key_mask)
    baseline = full_maps(*inputs, key_mask)
    every = word_gradcam(*inputs, key_mask=key_mask, impl=impl)
    one = word_gradcam(*inputs, word_index, key_mask=key_mask, impl=impl)
    assert every.dtype == one.dtype == torch.float32
    assert_as_accurate(every, baseline, truth, dtype, "all words")
    assert_as_accurate(one, of_word(baseline, word_index), of_word(truth, word_index), dtype, "one word")


def saturated_softmax(impl, device):
    inputs, word_index = draw((2, 2, 3, 19, 16), torch.float32, device, spread=20.0)
    truth = of_word(full_maps(*(tensor.double() for tensor in inputs), scale=1.0), word_index)
    baseline = of_word(full_maps(*inputs, scale=1.0), word_index)
    assert_as_accurate(word_gradcam(*inputs, word_index, scale=1.0, impl=impl), baseline, truth, torch.float32)


def soft_mask(impl, dtype, prefix, masked, device):
    batch, tokens, channels = 4, 37, 21
    inputs, word_index = draw((batch, 3, 5, tokens, 16), dtype, device)
    features = torch.randn(batch, tokens, channels, dtype=dtype, device=device)
    key_mask = (torch.rand(batch, tokens) > 0.4).to(device) if masked else None
    truth = keep_from_map(
        of_word(full_maps(*(tensor.double() for tensor in inputs), key_mask), word_index), prefix, key_mask
    )
    baseline = keep_from_map(of_word(full_maps(*inputs, key_mask), word_index), prefix, key_mask)
    options = {"prefix_tokens": prefix, "key_mask": key_mask, "impl": impl}
    masked_features, keep = word_soft_mask(*inputs, word_index, features, **options)
    assert keep.dtype == torch.float32 and masked_features.dtype == dtype
    assert keep.min() >= 0 and keep.max() <= 1
    assert_as_accurate(keep, baseline, truth, dtype, "keep")
    assert_as_accurate(
        masked_features, baseline[:, :, None] * features, truth[:, :, None] * features.double(), dtype, "features"
    )
    alone = word_soft_mask(*inputs, word_index, **options)
    assert torch.equal(alone, keep)
    assert torch.equal(word_soft_mask(*inputs, word_index, **options), keep), "not reproducible"


def maps_without_a_spread_keep_everything(impl, device):
    (query, key, value, grad_output), word_index = draw((3, 2, 4, 9, 16), torch.float32, device)
    ones = torch.ones(3, 9, device=device)
    same = key[:, :, :1].expand_as(key), value[:, :, :1].expand_as(value)
    assert torch.equal(word_soft_mask(query, *same, grad_output, word_index, impl=impl), ones), "constant map"
    against = -grad_output[:, :, :1].expand_as(value)  # the gradient of the first word is negative at every token
    keep = word_soft_mask(query, key, against, grad_output, torch.zeros_like(word_index), impl=impl)
    assert torch.equal(keep, ones), "negative gradient everywhere"
    one_patch = [query, key[:, :, :2], value[:, :, :2], grad_output]
    assert torch.equal(word_soft_mask(*one_patch, word_index, impl=impl), ones[:, :2])
    assert torch.equal(word_soft_mask(*one_patch, word_index, prefix_tokens=2, impl=impl), ones[:, :2])


def images_of_padding_only(impl, device):
    inputs, word_index = draw((2, 2, 4, 9, 16), torch.float32, device)
    key_mask = torch.tensor([[False] * 9, [True] * 9], device=device)
    features = torch.randn(2, 9, 5, device=device)
    cam = word_gradcam(*inputs, word_index, key_mask=key_mask, impl=impl)
    masked, keep = word_soft_mask(*inputs, word_index, features, key_mask=key_mask, impl=impl)
    assert torch.equal(cam[0], torch.zeros_like(cam[0])) and cam[1].max() > 0
    assert torch.equal(masked[0], features[0]) and keep[1].min() == 0
    every = word_gradcam(*inputs, key_mask=key_mask, impl=impl)
    assert torch.equal(every[0], torch.zeros_like(every[0])) and torch.isfinite(every).all()


def nan_stays_nan_and_padding_is_not_read(impl, every_word, device):
    """A key reaches the whole map through the softmax, a value only its own token; padding reaches none. The mask of
    the other tokens is as if that token were not there.
    """
    (query, key, value, grad_output), word_index = draw((4, 2, 4, 9, 16), torch.float32, device)
    key_mask = torch.ones(4, 9, dtype=torch.bool, device=device)
    key_mask[:, 8] = False
    key[0, 1, 3], value[1, 1, 3], key[2, 1, 8], value[3, 1, 8] = (float("nan"),) * 4
    index = None if every_word else word_index
    maps = word_gradcam(query, key, value, grad_output, index, key_mask=key_mask, impl=impl)
    nan = maps.isnan() if every_word else maps.isnan()[:, None]
    assert nan[0, :, :8].all() and nan[1, :, 3].all() and nan[1].sum() == len(nan[1]) and not nan[2:].any()
    assert torch.equal(maps[..., 8], torch.zeros_like(maps[..., 8]))
    if not every_word:
        keep = word_soft_mask(query, key, value, grad_output, word_index, key_mask=key_mask, impl=impl)
        assert torch.equal(keep.isnan(), maps.isnan())
        known = key_mask & ~maps.isnan()
        expected = keep_from_map(maps, 1, known)[known]
        torch.testing.assert_close(keep[known], expected, rtol=0, atol=1e-6)
        assert keep[1, known[1]].min() == 0, "nothing is masked"


def any_strides(impl, device):
    inputs, word_index = draw((2, 3, 5, 11, 16), torch.float32, device)
    features = torch.randn(2, 11, 6, device=device)
    expected = word_soft_mask(*inputs, word_index, features, impl="reference")

    def as_projection(tensor):  # (B, L, H, D) seen as (B, H, L, D), the usual view of a linear layer's output
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    def reversed_dimensions(tensor):
        return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))

    def every_second(tensor):
        return torch.stack((tensor, tensor), -1).flatten(-2)[..., ::2]

    for layout in (as_projection, reversed_dimensions, every_second):
        strided = [layout(tensor) for tensor in inputs]
        strided_features = features if layout is as_projection else layout(features)
        actual = word_soft_mask(*strided, word_index, strided_features, impl=impl)
        for result, reference in zip(actual, expected, strict=True):
            torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5, msg=layout.__name__)


def gradient_flows_to_features_alone(impl, device):
    inputs, word_index = draw((2, 2, 4, 9, 16), torch.float32, device)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    features = torch.randn(2, 9, 5, device=device, requires_grad=True)
    masked, keep = word_soft_mask(*inputs, word_index, features, impl=impl)
    assert not keep.requires_grad and not word_gradcam(*inputs, word_index, impl=impl).requires_grad
    grad = torch.randn_like(masked)
    masked.backward(grad)
    torch.testing.assert_close(features.grad, grad * keep[:, :, None], rtol=0, atol=0)
    assert all(tensor.grad is None for tensor in inputs)


def empty_batch(impl, device):
    inputs, word_index = draw((0, 2, 3, 5, 16), torch.float32, device)
    masked, keep = word_soft_mask(*inputs, word_index.view(0), torch.ones(0, 5, 7, device=device), impl=impl)
    assert masked.shape == (0, 5, 7) and keep.shape == (0, 5)
    assert word_gradcam(*inputs, impl=impl).shape == (0, 3, 5)


def attention_of_other_models(impl, spread, dtype, options, device):
    """Keys that are a part of all, capped logits, fewer heads of keys than of queries; logits small, and cut off."""
    (query, key, value, grad_output), word_index = draw((2, 6, 4, 37, 24), dtype, device, spread)
    if "gqa" in options:
        key, value = key[:, ::3], value[:, ::3]
    key_mask = (torch.rand(2, 37) > 0.4).to(device) if "key_mask" in options else None
    inputs, arguments = (query, key, value, grad_output), {"key_mask": key_mask}
    if "soft_cap" in options:
        arguments["soft_cap"] = 3.0
    if "log_sum_exp" in options:
        logits = query.float() @ key.float().repeat_interleave(6 // key.shape[1], 1).mT * 24**-0.5
        cap = arguments.get("soft_cap", 1e9)
        arguments["log_sum_exp"] = (cap * (logits / cap).tanh()).logsumexp(-1) + torch.rand(2, 6, 4, device=device)
    truth = full_maps(*(tensor.double() for tensor in inputs), **arguments)
    baseline = full_maps(*inputs, **arguments)
    every = word_gradcam(*inputs, **arguments, impl=impl)
    one = word_gradcam(*inputs, word_index, **arguments, impl=impl)
    assert_as_accurate(every, baseline, truth, dtype, "all words")
    assert_as_accurate(one, of_word(baseline, word_index), of_word(truth, word_index), dtype, "one word")
    if options == ("gqa",):
        keep = word_soft_mask(*inputs, word_index, impl=impl)
        wide = [tensor.repeat_interleave(3, 1) for tensor in (key, value)]
        assert torch.equal(keep, word_soft_mask(query, *wide, grad_output, word_index, impl=impl))


def rows_without_any_key_give_zeros(impl, device):
    inputs, word_index = draw((2, 2, 3, 9, 16), torch.float32, device)
    log_sum_exp = torch.full((2, 2, 3), 4.0, device=device)
    log_sum_exp[0], log_sum_exp[1, 0] = float("-inf"), float("inf")
    for index in (None, word_index):
        maps = word_gradcam(*inputs, index, log_sum_exp=log_sum_exp, impl=impl)
        assert torch.equal(maps[0], torch.zeros_like(maps[0])) and maps[1].max() > 0
        assert torch.isfinite(maps).all()


def log_sum_exp_of_any_strides(impl, device):
    inputs, word_index = draw((2, 4, 3, 9, 16), torch.float32, device)
    log_sum_exp = 2 + torch.rand(2, 4, 3, device=device)
    for index in (None, word_index):
        expected = word_gradcam(*inputs, index, log_sum_exp=log_sum_exp, impl=impl)
        strided = torch.stack((log_sum_exp,) * 2, -1).permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)[..., 0]
        assert torch.equal(word_gradcam(*inputs, index, log_sum_exp=strided, impl=impl), expected)


# those without parameters
CASES = [
    saturated_softmax,
    maps_without_a_spread_keep_everything,
    images_of_padding_only,
    any_strides,
    gradient_flows_to_features_alone,
    empty_batch,
    rows_without_any_key_give_zeros,
    log_sum_exp_of_any_strides,
]

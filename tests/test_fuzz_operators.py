"""500 random calls of the operators: the default implementation against the definition, whatever comes in.

Sizes include 0 and 1, inputs any dtype, stride and offset, now and then infinity or NaN. A call gives what the
definition gives, up to the tolerance policy, NaN exactly where it is NaN, and twice the same bits; or both refuse it in
the same line.
"""

import faulthandler
import math
import random

import pytest
import torch
from compare import assert_as_accurate

from softmask_fast.ops import focal_itc_loss, word_gradcam, word_soft_mask
from softmask_fast.ops.soft_masked_attention import plan_image_index, soft_masked_attention

PARTS, CALLS = 10, 50
HANG = 300  # seconds for a part, which takes two
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
WRONG_NUMBERS = (math.inf, -math.inf, math.nan, 1e39, 1e-320, -1.0, 0.0, True, "1", 10**400)
WRONG_TENSORS = (
    lambda x: x[:-1], lambda x: x[..., None], lambda x: x.int(), lambda x: x.to("meta"), lambda x: x.to_sparse(),
    lambda x: x.to(torch.complex64), lambda x: x.tolist(), lambda x: torch.quantize_per_tensor(
        x.float(), 0.1, 0, torch.quint8
    ),
)  # fmt: skip


class Draw:
    """Random arguments, all from one seed."""

    def __init__(self, seed: int):
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.dtype = self.one_of(*DTYPES)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32

    def one_of(self, *choices):
        return self.random.choice(choices)

    def chance(self, probability):
        return self.random.random() < probability

    def size(self, largest):
        return self.one_of(1, 2, 3, self.random.randint(1, largest), self.random.randint(1, largest), largest) * (
            not self.chance(0.02)
        )

    def tensor(self, *sizes, unit=False, dtype=None):
        values = torch.randn(sizes, generator=self.generator, dtype=torch.float64)
        if unit:
            values = torch.nn.functional.normalize(values, dim=-1)
        elif self.chance(0.1):
            values = values * 8
        if self.chance(0.02) and values.numel():
            values.view(-1)[self.random.randrange(values.numel())] = self.one_of(math.inf, -math.inf, math.nan)
        values = self.laid_out(values.to(dtype or self.dtype), sizes)
        if self.chance(0.6):
            values.requires_grad_()
        return self.maybe_wrong(values)

    def laid_out(self, values, sizes):
        """The same values with other strides."""
        form = self.one_of("plain", "permuted", "spread", "offset", "expanded", "negative")
        if form == "permuted":
            order = self.random.sample(range(len(sizes)), len(sizes))
            return values.permute(order).contiguous().permute([order.index(i) for i in range(len(sizes))])
        if form == "spread":
            return torch.stack([values, torch.full_like(values, math.nan)], -1)[..., 0]
        if form == "offset":
            return torch.cat([values.new_full((1,), math.nan), values.flatten()])[1:].view(sizes)
        if form == "expanded" and sizes[0] > 1:
            return values[:1].expand(sizes)
        if form == "negative" and values.dtype in (torch.float32, torch.float64):
            return torch.complex(values, -values).conj().imag
        return values

    def maybe_wrong(self, tensor):
        return self.one_of(*WRONG_TENSORS)(tensor.detach()) if tensor.dim() and self.chance(0.005) else tensor

    def mask(self, *sizes):
        kept = torch.rand(sizes, generator=self.generator) < self.one_of(0.3, 0.8, 1.0)
        return self.one_of(None, self.maybe_wrong(kept), kept.t().contiguous().t())

    def index(self, count, below):
        low = -1 if self.chance(0.03) else 0
        return self.maybe_wrong(torch.randint(low, max(below, 1), (count,), generator=self.generator))

    def number(self, usual):
        """A number, or a 0-dim tensor of it where these are taken."""
        return self.one_of(*WRONG_NUMBERS) if self.chance(0.04) else usual * math.exp(self.random.gauss(0, 0.5))


def of_maps(draw):
    batch, groups, length, tokens, width = (draw.size(n) for n in (3, 3, 6, 40, 33))
    heads = draw.one_of(groups, 2 * groups)
    arguments = dict(
        query=draw.tensor(batch, heads, length, width),
        key=draw.tensor(batch, groups, tokens, width),
        value=draw.tensor(batch, groups, tokens, width),
        grad_output=draw.tensor(batch, heads, length, width),
        word_index=draw.index(batch, length),
        key_mask=draw.mask(batch, tokens),
        scale=draw.one_of(None, draw.number(0.3)),
    )
    if draw.chance(0.5):
        features = draw.one_of(None, draw.tensor(batch, tokens, draw.size(9)))
        return word_soft_mask, arguments | dict(features=features, prefix_tokens=draw.one_of(0, 1, 1, tokens))
    if draw.chance(0.5):
        arguments["word_index"] = None
    if draw.chance(0.3):
        arguments["log_sum_exp"] = draw.tensor(batch, heads, length, dtype=draw.wide)
    return word_gradcam, arguments | dict(soft_cap=draw.one_of(None, draw.number(5.0)))


def attention(draw):
    images, heads, length, tokens, width = (draw.size(n) for n in (3, 3, 6, 40, 33))
    sequences = draw.one_of(images, draw.size(6))
    arguments = dict(
        key=draw.tensor(images, heads, tokens, width),
        value=draw.tensor(images, heads, tokens, width),
        key_mask=draw.mask(images, tokens),
        value_bias=draw.one_of(None, draw.tensor(heads, width)),
        scale=draw.one_of(None, draw.number(0.3)),
        image_index=draw.one_of(None, draw.index(sequences, images)),
        keep=draw.one_of(None, draw.tensor(sequences, tokens, dtype=draw.wide)),
    )
    if draw.chance(0.3):
        lengths = torch.randint(0, 7, (sequences,), generator=draw.generator, dtype=torch.int32)
        boundaries = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        rows = int(boundaries[-1]) + draw.one_of(0, 0, 2, -1)
        arguments |= dict(query=draw.tensor(max(rows, 0), heads, width), boundaries=boundaries)
    else:
        arguments["query"] = draw.tensor(sequences, heads, length, width)
        if draw.chance(0.3) and isinstance(arguments["image_index"], torch.Tensor) and images:
            index = torch.randint(0, images, (sequences,), generator=draw.generator)
            arguments["image_index"] = plan_image_index(index, images)
    if isinstance(value := arguments["value"], torch.Tensor) and value.dtype == draw.dtype:
        value.requires_grad_()  # its gradient never cancels to nothing
    return soft_masked_attention, arguments


def loss(draw):
    batch, keys, width = draw.size(12), draw.size(40), draw.size(33)
    arguments = dict(image=draw.tensor(batch, width, unit=True), text=draw.tensor(batch, width, unit=True))
    if draw.chance(0.5):
        arguments |= {name: draw.tensor(keys, width, unit=True) for name in ("image_keys", "text_keys")}
        if draw.chance(0.4):
            arguments["row_offset"] = draw.random.randint(0, max(keys - batch, 0) + draw.chance(0.1))
    else:
        keys = batch
    temperature = draw.number(draw.one_of(0.07, 0.3, 1.0, 20.0))
    if draw.chance(0.5) and type(temperature) is float:
        temperature = torch.tensor(temperature, dtype=draw.wide, requires_grad=True)
    arguments |= dict(
        temperature=temperature,
        gamma=draw.one_of(0, 1, 2, 3, 0.5, draw.number(2.0)),
        reduction=draw.one_of("mean", "sum", "none"),
        return_stats=draw.chance(0.5),
        seed=draw.random.getrandbits(40),
    )
    if draw.chance(0.4):
        known = draw.index(keys, 5)
        chosen = torch.randint(0, max(keys, 1), (batch,), generator=draw.generator)
        if "image_keys" not in arguments:
            arguments["ids"] = known
        elif keys and isinstance(known, torch.Tensor) and known.shape == (keys,) and known.dtype == torch.int64:
            arguments |= dict(ids=known[chosen], key_ids=known)
    if draw.chance(0.25):
        return focal_itc_loss, arguments | dict(loss="sigmoid", bias=draw.one_of(None, draw.number(-2.0)))
    arguments["positives"] = draw.one_of("mean", "any")
    if draw.chance(0.5):
        arguments |= {name: draw.tensor(batch, width, unit=True) for name in ("teacher_image", "teacher_text")}
        arguments["alpha"] = draw.one_of(0.0, 0.4, 1.0, torch.tensor(0.3), draw.number(0.3))
    return focal_itc_loss, arguments


def outcome(function, arguments, impl, dtype=None):
    """What is compared of a call: its refusal, or its results, hard negatives, and gradients."""

    def cast(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        copy = value.detach() if dtype is None else value.detach().to(dtype)
        return copy.requires_grad_(value.requires_grad)

    inputs = {name: cast(value) for name, value in arguments.items()}
    try:
        result = function(**inputs, impl=impl)
    except (ValueError, TypeError) as error:
        assert "\n" not in str(error) and ": expected" in str(error), error
        return f"{type(error).__name__}: {error}", [], {}
    results, negatives = [result], []
    if isinstance(result, tuple):
        results = list(result)
        if len(result) == 2 and isinstance(result[1], tuple):
            results = [result[0], *result[1][:6]]
            negatives = list(result[1][6:])
    leaves = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    found = {}
    differentiable = [x for x in results if x.requires_grad]
    if differentiable and leaves:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in differentiable]
        gradients = torch.autograd.grad(differentiable, leaves.values(), weights, allow_unused=True)
        found = dict(zip(leaves, gradients, strict=True))
    return [x.detach() for x in results], negatives, found


def compare(actual, baseline, truth, dtype, what):
    """NaN and infinity where the definition has them, all else up to the policy."""
    assert actual.shape == baseline.shape and actual.dtype == baseline.dtype, what
    assert torch.equal(actual.isnan(), baseline.isnan()), f"{what}: NaN in other places than the definition's"
    ends = baseline.isinf()
    assert torch.equal(actual.isinf(), ends) and torch.equal(actual[ends], baseline[ends]), f"{what}: infinite"
    both = baseline.isfinite() & truth.isfinite()
    actual, baseline, truth = actual[both], baseline[both], truth[both]
    if dtype == torch.float64:  # nothing is a truth for it
        size = float(truth.abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(actual, baseline, rtol=0, atol=1e-13 * size, msg=lambda text: f"{what}: {text}")
    else:
        assert_as_accurate(actual, baseline, truth, dtype, what)


def pooled(gradients, arguments):
    """The gradients of a call as one vector, so that one that cancels to nothing is measured by those beside it.

    That of the temperature counts times it, as temperature and features share their scale.
    """
    temperature = arguments.get("temperature", 1.0)
    factors = {"temperature": temperature.detach() if isinstance(temperature, torch.Tensor) else temperature}
    found = [(gradient * factors.get(name, 1.0)).flatten() for name, gradient in gradients.items()]
    return torch.cat([x.to(torch.promote_types(x.dtype, torch.float32)) for x in found])


def check(seed):
    """Makes one call and compares; returns whether it was refused."""
    draw = Draw(seed)
    function, arguments = draw.one_of(of_maps, attention, loss)(draw)
    what = f"seed {seed}, {function.__name__}"
    # in float64 the default is the definition, so that of large matrices runs
    impl = "streamed" if function is focal_itc_loss and draw.dtype == torch.float64 else None
    results, negatives, gradients = outcome(function, arguments, impl)
    baseline, _, expected = outcome(function, arguments, "reference")
    if isinstance(results, str) or isinstance(baseline, str):
        assert results == baseline, what
        return True
    again = outcome(function, arguments, impl)
    for one, other in zip([*results, *negatives], [*again[0], *again[1]], strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), f"{what}: other bits the second time"
    for chosen in negatives:
        assert ((chosen >= -1) & (chosen < len(arguments.get("image_keys", arguments["image"])))).all(), what
    truth, _, exact = outcome(function, arguments, "reference", torch.float64)
    figures = list(zip(results, baseline, truth, strict=True))
    if negatives:  # entropies and probabilities; accuracies jump where two products are equal up to rounding
        figures = [figures[0], [torch.stack(list(x)[3:]) for x in (results, baseline, truth)]]
    for number, values in enumerate(figures):
        compare(*values, draw.dtype, f"{what}: result {number}")
    given = {name for name, gradient in expected.items() if gradient is not None}
    assert given == {name for name, gradient in gradients.items() if gradient is not None}, what
    for name in given:
        one, other = (x[name].isfinite().all() for x in (gradients, expected))
        assert torch.equal(gradients[name].nan_to_num(7), again[2][name].nan_to_num(7)), (what, name)
        assert one == other, f"{what}: gradient of {name}: finite {bool(one)}, that of the definition {bool(other)}"
    found = [pooled({name: x[name] for name in given}, arguments) for x in (gradients, expected, exact) if given]
    if given and found[1].isfinite().all():
        compare(*found, draw.dtype, f"{what}: gradients")
    return False


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part):
    faulthandler.dump_traceback_later(HANG, exit=True)
    refused = sum(check(seed) for seed in range(part * CALLS, (part + 1) * CALLS))
    faulthandler.cancel_dump_traceback_later()
    assert 0 < refused < CALLS / 2

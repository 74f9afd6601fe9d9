"""focal_itc_loss: the definition against independent formulas, its arguments, statistics and hard negatives."""

import pytest
import torch
import torch.nn.functional as F

from softmask_fast.ops.focal_itc import focal_itc_loss
from softmask_fast.ops.focal_itc.sampling import negative_log_exponential, row_keys

GAMMAS = (0.0, 0.5, 1.0, 2.0, 2.5, 3.0)


def features(rows, width, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def queue_case(batch=5, keys=13, width=8, dtype=torch.float64):
    """image, text, image_keys, text_keys, teacher_image, teacher_text"""
    sizes = (batch, batch, keys, keys, batch, batch)
    return [features(size, width, seed, dtype) for seed, size in enumerate(sizes)]


def plain_direction(rows, keys, temperature, target, gamma):
    """sum_j t_j (1 - p_j)^gamma (-log p_j), from the probabilities themselves."""
    logits = (rows[:, None] * keys[None]).sum(-1) / temperature
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    return (target * (1 - p) ** gamma * -p.log()).sum(1)


def plain_target(teacher, keys, temperature, alpha, hard):
    logits = (teacher[:, None] * keys[None]).sum(-1) / temperature
    return alpha * logits.exp() / logits.exp().sum(1, keepdim=True) + (1 - alpha) * hard


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("positives", ["mean", "any"])
def test_gradients_by_finite_differences(gamma, positives):
    tensors = queue_case(batch=3, keys=5, width=4)
    ids, key_ids = torch.tensor([7, 8, 7]), torch.tensor([7, 8, 7, 9, 7])
    inputs = [tensor.requires_grad_() for tensor in tensors[:4]]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(image, text, image_keys, text_keys, temperature):
        return focal_itc_loss(
            image, text, image_keys, text_keys, temperature=temperature, gamma=gamma, teacher_image=tensors[4],
            teacher_text=tensors[5], alpha=0.4, ids=ids, key_ids=key_ids, positives=positives, reduction="none",
            impl="reference",
        )  # fmt: skip

    # The teacher is a constant for the gradient, which finite differences over keys and temperature would move:
    # rows alone with the teacher, everything without it.
    assert torch.autograd.gradcheck(lambda image, text: loss(image, text, *inputs[2:], temperature), inputs[:2])

    def hard(image, text, image_keys, text_keys, temperature):
        return focal_itc_loss(
            image, text, image_keys, text_keys, temperature=temperature, gamma=gamma, ids=ids, key_ids=key_ids,
            positives=positives, reduction="none", impl="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(hard, (*inputs, temperature))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_value_and_gradients_against_the_plain_formula(gamma, alpha):
    tensors = queue_case()
    temperature = torch.tensor(0.2, dtype=torch.float64)
    offset = 3
    results = []
    for fused in (True, False):
        image, text, image_keys, text_keys = (tensor.clone().requires_grad_() for tensor in tensors[:4])
        tau = temperature.clone().requires_grad_()
        if fused:
            loss = focal_itc_loss(
                image, text, image_keys, text_keys, temperature=tau, gamma=gamma, teacher_image=tensors[4],
                teacher_text=tensors[5], alpha=alpha, row_offset=offset, reduction="sum", impl="reference",
            )  # fmt: skip
        else:
            hard = F.one_hot(torch.arange(5) + offset, 13).double()
            image_target = plain_target(tensors[4], tensors[3], temperature, alpha, hard)
            text_target = plain_target(tensors[5], tensors[2], temperature, alpha, hard)
            image_loss = plain_direction(image, text_keys, tau, image_target, gamma)
            text_loss = plain_direction(text, image_keys, tau, text_target, gamma)
            loss = (image_loss + text_loss).sum() / 2
        loss.backward()
        results.append([loss.detach(), image.grad, text.grad, image_keys.grad, text_keys.grad, tau.grad])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


def test_albef():
    """gamma = 0 with teachers and queues is ALBEF's ITC: cross-entropy with soft targets, mean of both directions."""
    image, text, image_keys, text_keys, teacher_image, teacher_text = queue_case()
    sim_targets = torch.zeros(5, 13, dtype=torch.float64).fill_diagonal_(1)
    losses = []
    for rows, keys, teacher in ((image, text_keys, teacher_image), (text, image_keys, teacher_text)):
        targets = 0.4 * F.softmax(teacher @ keys.T / 0.07, dim=1) + 0.6 * sim_targets
        losses.append(-(F.log_softmax(rows @ keys.T / 0.07, dim=1) * targets).sum(1).mean())
    fused = focal_itc_loss(
        image, text, image_keys, text_keys, temperature=0.07, gamma=0, teacher_image=teacher_image,
        teacher_text=teacher_text, alpha=0.4, impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(fused, sum(losses) / 2)


def test_clip():
    """gamma = 0, no teacher, no queue: CLIP's symmetric cross-entropy, the gradient reaches rows and keys."""
    image, text = (tensor.requires_grad_() for tensor in queue_case()[:2])
    logits = image @ text.T / 0.05
    labels = torch.arange(5)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    fused = focal_itc_loss(image, text, temperature=0.05, gamma=0, impl="reference")
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(torch.autograd.grad(fused, (image, text)), torch.autograd.grad(expected, (image, text)))


@pytest.mark.parametrize("positives", ["mean", "any"])
def test_ids_name_the_positives(positives):
    """Equal ids are positives, duplicates among the keys count."""
    image, text, image_keys, text_keys = queue_case()[:4]
    ids = torch.tensor([10, 11, 10, 12, 13])
    key_ids = torch.tensor([10, 11, 10, 12, 13, 10, 99, 98, 12, 97, 10, 96, 95])
    expected = []
    for rows, keys in ((image, text_keys), (text, image_keys)):
        p = torch.softmax(rows @ keys.T / 0.3, dim=1)
        per_row = []
        for i in range(5):
            positive = [j for j in range(13) if key_ids[j] == ids[i]]
            if positives == "mean":
                per_row.append(sum(-((1 - p[i, j]) ** 1.5) * p[i, j].log() for j in positive) / len(positive))
            else:
                mass = sum(p[i, j] for j in positive)
                per_row.append(-((1 - mass) ** 1.5) * mass.log())
        expected.append(torch.stack(per_row))
    fused = focal_itc_loss(
        image, text, image_keys, text_keys, temperature=0.3, gamma=1.5, ids=ids, key_ids=key_ids, positives=positives,
        reduction="none", impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(fused, (expected[0] + expected[1]) / 2)


def test_key_ids_default_to_ids_and_unique_ids_are_the_diagonal():
    image, text = queue_case()[:2]
    by_offset = focal_itc_loss(image, text, temperature=0.1, reduction="none")
    by_ids = focal_itc_loss(image, text, temperature=0.1, reduction="none", ids=torch.tensor([5, 3, 9, 1, 0]))
    torch.testing.assert_close(by_ids, by_offset)


def test_keys_that_are_given_need_ids_of_their_own():
    image, text = queue_case()[:2]
    with pytest.raises(ValueError, match="key_ids: expected the ids of the keys along with ids and image_keys"):
        focal_itc_loss(image, text, image, text, temperature=0.1, ids=torch.arange(5))


def test_teachers_get_no_gradient():
    image, text, image_keys, text_keys, teacher_image, teacher_text = (t.requires_grad_() for t in queue_case())
    loss = focal_itc_loss(
        image, text, image_keys, text_keys, temperature=0.1, teacher_image=teacher_image, teacher_text=teacher_text,
        alpha=0.5,
    )  # fmt: skip
    loss.backward()
    assert teacher_image.grad is None and teacher_text.grad is None
    assert all(tensor.grad.abs().max() > 0 for tensor in (image, text, image_keys, text_keys))


def test_second_derivatives_are_refused():
    image, text = (tensor.requires_grad_() for tensor in queue_case()[:2])
    loss = focal_itc_loss(image, text, temperature=0.1, impl="reference")
    (grad,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["one key", "equal keys", "p to 1", "p to 0", "positive twice"])
def test_edges_stay_finite(case, gamma, dtype):
    """Down to tau = 0.001, where exp(1 / tau) overflows: values and gradients stay finite, and where known, right."""
    width = 4
    image = torch.eye(width, dtype=dtype)[:3].clone()
    if case == "one key":
        image = image[:1].clone()
    text = {"p to 0": -image, "equal keys": torch.ones_like(image) / 2, "positive twice": image}.get(
        case, image
    ).clone()
    image, text = image.requires_grad_(), text.requires_grad_()
    temperature = torch.tensor(0.001, dtype=dtype, requires_grad=True)
    ids = torch.tensor([4, 4, 4]) if case == "positive twice" else None
    loss, stats = focal_itc_loss(
        image, text, temperature=temperature, gamma=gamma, ids=ids, reduction="none", return_stats=True,
        impl="reference",
    )  # fmt: skip
    loss.sum().backward()
    for tensor in (loss, image.grad, text.grad, temperature.grad, *stats):
        assert bool(tensor.isfinite().all())
    if case in ("one key", "p to 1"):
        torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-30, rtol=0)
        torch.testing.assert_close(image.grad, torch.zeros_like(image), atol=1e-30, rtol=0)
        assert stats.image_positive_probability == 1 and stats.image_entropy == 0
    if case == "p to 0":  # s = -1000 at the positive and 0 at two other keys
        torch.testing.assert_close(loss, torch.full_like(loss, 1000 + torch.log(torch.tensor(2.0)).item()))
    if case == "equal keys":  # p = 1/3 for each image row; each text row is uniform as well
        third = torch.tensor(1 / 3, dtype=dtype)
        torch.testing.assert_close(loss, (-((1 - third) ** gamma) * third.log()).expand(3))
    if case == "one key":
        assert stats.image_hard_negative.tolist() == [-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_sum_in_float32(dtype):
    tensors = queue_case(dtype=dtype)[:4]
    half = focal_itc_loss(*tensors, temperature=0.01)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, focal_itc_loss(*(tensor.float() for tensor in tensors), temperature=0.01))


def test_reductions():
    tensors = queue_case()[:4]
    rows = focal_itc_loss(*tensors, temperature=0.1, reduction="none")
    assert rows.shape == (5,)
    torch.testing.assert_close(focal_itc_loss(*tensors, temperature=0.1), rows.mean())
    torch.testing.assert_close(focal_itc_loss(*tensors, temperature=0.1, reduction="sum"), rows.sum())


@pytest.mark.parametrize("given_ids", [False, True])
def test_statistics_by_brute_force(given_ids):
    tensors = queue_case(batch=6, keys=11)[:4]
    ids = torch.tensor([1, 2, 3, 1, 2, 4]) if given_ids else None
    key_ids = torch.tensor([1, 2, 3, 4, 4, 1, 9, 9, 3, 2, 1]) if given_ids else None
    loss, stats = focal_itc_loss(
        *tensors, temperature=0.2, ids=ids, key_ids=key_ids, row_offset=2, return_stats=True, reduction="sum"
    )
    image, text, image_keys, text_keys = tensors
    for name, rows, keys in (("image", image, text_keys), ("text", text, image_keys)):
        correct = entropy = mass = 0.0
        for i in range(6):
            p = torch.softmax(rows[i] @ keys.T / 0.2, dim=0).tolist()
            positive = {j for j in range(11) if (key_ids[j] == ids[i] if given_ids else j == i + 2)}
            correct += p.index(max(p)) in positive
            entropy -= sum(q * torch.tensor(q, dtype=torch.float64).log().item() for q in p)
            mass += sum(p[j] for j in positive)
            assert getattr(stats, f"{name}_hard_negative")[i].item() not in positive
        assert getattr(stats, f"{name}_accuracy").item() == pytest.approx(correct / 6)
        assert getattr(stats, f"{name}_entropy").item() == pytest.approx(entropy / 6)
        assert getattr(stats, f"{name}_positive_probability").item() == pytest.approx(mass / 6)
    torch.testing.assert_close(
        loss, focal_itc_loss(*tensors, temperature=0.2, ids=ids, key_ids=key_ids, row_offset=2, reduction="sum")
    )


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_hard_negatives_follow_the_softmax_without_the_positives():
    """4,000 equal rows, 12 keys of which 3 are positives: the counts of the rest fit their probabilities."""
    rows, width = 4000, 8
    image, text = features(1, width, 0).expand(rows, width), features(1, width, 1).expand(rows, width)
    keys = features(12, width, 2)
    key_ids = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 0, 7, 8, 9])
    negatives = key_ids != 0
    _, stats = focal_itc_loss(
        image, text, keys, keys, temperature=0.4, ids=torch.zeros(rows, dtype=torch.int64), key_ids=key_ids,
        return_stats=True, seed=3,
    )  # fmt: skip
    for row, drawn in ((image[0], stats.image_hard_negative), (text[0], stats.text_hard_negative)):
        counts = torch.bincount(drawn, minlength=12)
        assert counts[~negatives].sum() == 0
        p = torch.softmax(row @ keys[negatives].T / 0.4, dim=0)
        assert chi_square(counts[negatives], p) < 26.12  # 8 degrees of freedom, 99.9 %


def test_hard_negatives_are_seeded_and_stay_in_their_range():
    tensors = queue_case(batch=8, keys=40)[:4]

    def draw(seed, **keywords):
        return focal_itc_loss(*tensors, temperature=1.0, return_stats=True, seed=seed, **keywords)[1]

    assert torch.equal(draw(1).image_hard_negative, draw(1).image_hard_negative)
    assert not torch.equal(draw(1).image_hard_negative, draw(2).image_hard_negative)
    assert not torch.equal(draw(1).image_hard_negative, draw(1 + 2**32).image_hard_negative)
    for seed in range(20):
        negatives = draw(seed, negative_range=(3, 8)).text_hard_negative
        assert bool(((negatives >= 3) & (negatives < 8)).all())
        assert bool((negatives != torch.arange(8)).all())
    assert draw(0, negative_range=(2, 2)).image_hard_negative.tolist() == [-1] * 8
    assert draw(0, negative_range=(2, 3)).image_hard_negative.tolist() == [2, 2, -1, 2, 2, 2, 2, 2]


def test_a_row_draws_the_same_negative_alone_as_in_its_batch():
    image, text, image_keys, text_keys = queue_case(batch=8, keys=40)[:4]
    whole = focal_itc_loss(image, text, image_keys, text_keys, temperature=0.5, return_stats=True, seed=5)[1]
    part = focal_itc_loss(
        image[3:6], text[3:6], image_keys, text_keys, temperature=0.5, return_stats=True, seed=5, row_offset=3
    )[1]
    assert torch.equal(part.image_hard_negative, whole.image_hard_negative[3:6])
    assert torch.equal(part.text_hard_negative, whole.text_hard_negative[3:6])


def test_sampler_noise_is_independent_and_exponential():
    noise = negative_log_exponential(row_keys(0, 64, torch.tensor(11), 0), 0, 4096, torch.float64)
    exponential = torch.exp(-noise)
    assert exponential.mean().item() == pytest.approx(1, abs=0.01)
    assert exponential.var().item() == pytest.approx(1, abs=0.03)
    uniform = torch.exp(-exponential)
    assert (
        chi_square(torch.histc(uniform, 64, 0, 1), torch.full((64,), 1 / 64)) < 103.4
    )  # 63 degrees of freedom, 99.9 %
    other = torch.exp(-negative_log_exponential(row_keys(0, 64, torch.tensor(11), 1), 0, 4096, torch.float64))
    pairs = [(uniform[:, 1:], uniform[:, :-1]), (uniform[1:], uniform[:-1]), (uniform, torch.exp(-other))]
    for first, second in pairs:
        assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()) < 0.01
    # any window of rows and columns gives the same numbers
    window = negative_log_exponential(row_keys(5, 3, torch.tensor(11), 0), 100, 7, torch.float64)
    assert torch.equal(window, noise[5:8, 100:107])


def call(**changes):
    image, text, image_keys, text_keys, teacher_image, teacher_text = queue_case()
    arguments = {
        "image": image, "text": text, "image_keys": image_keys, "text_keys": text_keys, "temperature": 0.1,
        "teacher_image": teacher_image, "teacher_text": teacher_text, "alpha": 0.4, **changes,
    }  # fmt: skip
    return focal_itc_loss(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": [1.0]}, TypeError, "image: expected a tensor, got list"),
        ({"image": torch.zeros(0, 8).double()}, ValueError, "image: expected at least one row"),
        ({"text": torch.zeros(4, 8).double()}, ValueError, r"text: expected size \(5, 8\), got \(4, 8\)"),
        ({"text": torch.zeros(5, 8)}, TypeError, "text: expected dtype float64 as image, got float32"),
        ({"image_keys": None}, ValueError, "image_keys: expected a tensor along with text_keys"),
        ({"text_keys": None}, ValueError, "text_keys: expected a tensor along with image_keys"),
        ({"text_keys": torch.zeros(12, 8).double()}, ValueError, r"text_keys: expected size \(13, 8\), got \(12, 8\)"),
        ({"image_keys": torch.zeros(0, 8).double()}, ValueError, "image_keys: expected at least one key"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature: expected a number above 0, got -1"),
        ({"temperature": torch.ones(1)}, ValueError, r"temperature: expected size \(\), got \(1,\)"),
        ({"temperature": "warm"}, TypeError, "temperature: expected a number, got str"),
        ({"gamma": -0.5}, ValueError, "gamma: expected a number of at least 0, got -0.5"),
        ({"gamma": float("inf")}, ValueError, "gamma: expected a finite number"),
        ({"gamma": float("nan")}, ValueError, "gamma: expected a finite number of size at most 1e\\+12, got nan"),
        ({"alpha": 1.5}, ValueError, "alpha: expected a number from 0 to 1, got 1.5"),
        ({"alpha": torch.zeros(1)}, ValueError, r"alpha: expected size \(\), got \(1,\)"),
        ({"alpha": torch.tensor(1)}, TypeError, "alpha: expected dtype float16 or .*, got int64"),
        ({"alpha": torch.tensor(0.0), "teacher_image": None}, ValueError, "teacher_image: .* as alpha is a tensor"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed: expected dtype int64, got float32"),
        ({"teacher_image": None}, ValueError, "teacher_image: expected a tensor .* as alpha is 0.4"),
        ({"teacher_text": torch.zeros(5, 9).double()}, ValueError, r"teacher_text: expected size \(5, 8\)"),
        ({"key_ids": torch.zeros(13, dtype=torch.int64)}, ValueError, "ids: expected the ids of the rows"),
        ({"ids": torch.zeros(5, dtype=torch.int64)}, ValueError, "key_ids: expected the ids of the keys"),
        ({"ids": torch.zeros(5)}, TypeError, "ids: expected dtype int64, got float32"),
        (
            {"ids": torch.arange(5), "key_ids": torch.tensor([0, 1, 2, 4] + [9] * 9)},
            ValueError,
            r"key_ids: .* got none for ids\[3\] = 3",
        ),
        ({"positives": "all"}, ValueError, "positives: expected 'mean' or 'any', got 'all'"),
        ({"reduction": "max"}, ValueError, "reduction: expected 'mean' or 'sum' or 'none', got 'max'"),
        ({"row_offset": 9}, ValueError, "row_offset: expected an integer from 0 to 8 .*, got 9"),
        ({"row_offset": -1}, ValueError, "row_offset: expected an integer from 0"),
        ({"row_offset": 1.0}, TypeError, "row_offset: expected an integer, got float"),
        ({"negative_range": (3, 14)}, ValueError, "negative_range: expected an integer from 3 to 13, got 14"),
        ({"negative_range": 4}, TypeError, "negative_range: expected a pair of key columns, got 4"),
        ({"seed": 2**63}, ValueError, "seed: expected an integer from"),
        ({"impl": "magic"}, ValueError, "impl: .*reference.* got 'magic'"),
    ],
)
def test_error_messages(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)

"""The pretraining step against the objectives written out one by one, each in a pass of its own, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gloo_ranks import results_of_ranks
from plain_attention import plain_attention

from softmask_fast.config import ObjectiveConfig
from softmask_fast.data.types import Batch
from softmask_fast.model.fusion import CrossAttention
from softmask_fast.model.momentum import MomentumTeacher, StepSettings
from softmask_fast.model.pretraining import PretrainingStep, draw_any_other
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.ops import FeatureQueue
from softmask_fast.ops.collectives import index_rows
from softmask_fast.training.options import make_config

PAIRS, TOKENS, VOCABULARY = 4, 8, 40
SETTINGS = StepSettings(alpha=0.4, seed=11)

ABLATION = {  # the five configurations of the paper; the distortions of the images are the data's part
    "baseline": dict(soft_mask=False, focal_gamma=0.0, masked_captions=False),
    "augmentation": dict(soft_mask=False, focal_gamma=0.0, masked_captions=True),
    "soft masks": dict(soft_mask=True, focal_gamma=0.0, masked_captions=False),
    "focal": dict(soft_mask=False, focal_gamma=2.0, masked_captions=False),
    "all": dict(soft_mask=True, focal_gamma=2.0, masked_captions=True),
}


GATHERS = ("momentum", "with_grad", "ring")


@pytest.fixture
def batch():
    return make_batch()


def make_batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (PAIRS, TOKENS), generator=generator)
    mask = torch.ones(PAIRS, TOKENS, dtype=torch.bool)
    mask[2, 6:] = False
    ids[~mask] = 0
    positions = torch.tensor([1, 4, TOKENS + 3, 2 * TOKENS + 2, 3 * TOKENS + 5])
    masked = ids.clone()
    masked.view(-1)[positions] = 4
    return Batch(
        pixels=torch.randn(PAIRS, 3, 32, 32, generator=generator, dtype=torch.float64),
        input_ids=ids,
        masked_ids=masked,
        attention_mask=mask,
        mlm_positions=positions,
        mlm_labels=ids.view(-1)[positions],
        word_index=torch.tensor([2, 1, 3, 4]),
        ids=torch.tensor([7, 3, 9, 5]),
        keys=["a", "b", "c", "d"],
    )


def make_step(**objectives):
    torch.manual_seed(4)
    config = make_config("tiny", vocab_size=VOCABULARY, image_size=32, hidden_dropout=0.0, queue_size=6).model
    model = VisionLanguageModel(config).double()
    objectives = ObjectiveConfig(queue_size=6, momentum=0.9, **objectives)
    step = PretrainingStep(model, objectives)
    torch.manual_seed(5)
    teacher = MomentumTeacher(VisionLanguageModel(config).double(), objectives).double()
    teacher.queue.queue_ids[2] = 9  # an older picture of the batch's third image: one more positive
    return step, teacher


def remember_negatives(step):
    """The list of (image negatives, text negatives) of the contrast in each step to come."""
    drawn = []
    step.itc.register_forward_hook(
        lambda module, inputs, output: drawn.append((output[1].image_hard_negative, output[1].text_hard_negative))
    )
    return drawn


def focal_cross_entropy(logits, teacher_logits, hard_target, gamma):
    p = logits.softmax(-1)
    target = SETTINGS.alpha * teacher_logits.softmax(-1) + (1 - SETTINGS.alpha) * hard_target
    return -(target * (1 - p) ** gamma * p.log()).sum(-1).mean()


def plain_losses(step, teacher, batch, other_images, other_texts, monkeypatch):
    """Every objective by its formula: own fusion passes, full maps and hooks-like autograd for the Grad-CAM."""
    model, objectives, alpha = step.model, step.objectives, SETTINGS.alpha
    mask = batch.attention_mask
    text_ids = batch.masked_ids if objectives.masked_captions else batch.input_ids
    images, image_features = model.encode_image(batch.pixels)
    texts, text_features = model.encode_text(text_ids, mask)
    with torch.no_grad():
        _, teacher_image_features = teacher.model.encode_image(batch.pixels)
        _, teacher_text_features = teacher.model.encode_text(text_ids, mask)
    image_keys = torch.cat([teacher_image_features, teacher.queue.image_queue])
    text_keys = torch.cat([teacher_text_features, teacher.queue.text_queue])
    key_ids = torch.cat([batch.ids, teacher.queue.queue_ids])
    positive = (batch.ids[:, None] == key_ids).double()
    hard_target = positive / positive.sum(-1, keepdim=True)
    scale = 1 / model.log_temperature.exp()
    itc = sum(
        focal_cross_entropy(
            rows @ keys.T * scale, teacher_rows @ keys.T * scale.detach(), hard_target, objectives.focal_gamma
        )
        for rows, keys, teacher_rows in (
            (image_features, text_keys, teacher_image_features),
            (text_features, image_keys, teacher_text_features),
        )
    )
    itm_logits = [
        model.match_tokens(images, texts, mask),
        model.match_tokens(images[other_images], texts, mask),
        model.match_tokens(images, texts[other_texts], mask[other_texts]),
    ]
    labels = [1] * PAIRS + [0] * 2 * PAIRS
    if objectives.soft_mask:
        maps = {}
        with monkeypatch.context() as patch:
            patch.setattr(CrossAttention, "forward", plain_attention(maps))
            score = model.match_tokens(images, texts, mask)[:, 1].sum()
        attention = maps[model.fusion.layers[model.config.soft_mask_layer].cross_attention]
        (gradient,) = torch.autograd.grad(score, attention)
        cam = (attention.detach() * gradient.clamp(min=0)).mean(1)[torch.arange(PAIRS), batch.word_index, 1:]
        low, high = cam.amin(-1, keepdim=True), cam.amax(-1, keepdim=True)
        masked_images = torch.cat([images[:, :1], images[:, 1:] * (1 - (cam - low) / (high - low))[..., None]], 1)
        itm_logits.append(model.match_tokens(masked_images, texts, mask))
        labels += [1] * PAIRS
    itm = F.cross_entropy(torch.cat(itm_logits), torch.tensor(labels))
    logits = model.mlm_logits(batch.pixels, batch.masked_ids, mask).flatten(0, 1)[batch.mlm_positions]
    with torch.no_grad():
        soft = teacher.model.mlm_logits(batch.pixels, batch.masked_ids, mask).flatten(0, 1)[batch.mlm_positions]
    hard = F.one_hot(batch.mlm_labels, VOCABULARY)
    mlm = -((alpha * soft.softmax(-1) + (1 - alpha) * hard) * logits.log_softmax(-1)).sum(-1).mean()
    return {"itc": itc / 2, "itm": itm, "mlm": mlm}


@pytest.mark.parametrize("name", ABLATION)
def test_losses_and_gradients_are_those_of_the_method(name, batch, monkeypatch):
    step, teacher = make_step(**ABLATION[name])
    drawn = remember_negatives(step)
    before = {buffer: value.clone() for buffer, value in teacher.named_buffers()}
    loss, metrics = step(batch, teacher, SETTINGS)
    got = torch.autograd.grad(loss, list(step.parameters()), allow_unused=True)

    for buffer, value in teacher.named_buffers():
        value.copy_(before[buffer])
    [(other_texts, other_images)] = drawn
    assert (other_images != torch.arange(PAIRS)).all() and (other_texts != torch.arange(PAIRS)).all()
    expected = plain_losses(step, teacher, batch, other_images, other_texts, monkeypatch)
    for term, value in expected.items():
        torch.testing.assert_close(metrics[term].double(), value, rtol=1e-6, atol=1e-7, check_dtype=False)
    want = torch.autograd.grad(sum(expected.values()), list(step.parameters()), allow_unused=True)
    for (parameter, _), ours, theirs in zip(step.named_parameters(), got, want, strict=True):
        assert (ours is None) == (theirs is None), parameter
        if ours is not None:
            scale = theirs.abs().max().item()
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=lambda m, p=parameter: f"{p}: {m}"
            )


def test_each_objective_can_be_switched_off(batch):
    for absent in ("itc", "itm", "mlm"):
        step, teacher = make_step(**{f"{absent}_weight": 0.0})
        loss, metrics = step(batch, teacher, SETTINGS)
        present = {"itc", "itm", "mlm"} - {absent}
        assert present == {"itc", "itm", "mlm"} & metrics.keys()
        torch.testing.assert_close(loss.double(), sum(metrics[name] for name in present).double())


@pytest.mark.parametrize("only", ["itc", "itm", "mlm"])
def test_each_objective_can_stand_alone(batch, only):
    step, teacher = make_step(**{f"{name}_weight": float(name == only) for name in ("itc", "itm", "mlm")})
    loss, metrics = step(batch, teacher, SETTINGS)
    assert {"itc", "itm", "mlm"} & metrics.keys() == {only}
    loss.backward()
    assert loss.isfinite() and any(p.grad is not None and p.grad.any() for p in step.model.parameters())


def test_momentum_features_enter_the_queue(batch):
    step, teacher = make_step()
    step(batch, teacher, SETTINGS)
    with torch.no_grad():
        _, features = teacher.model.encode_image(batch.pixels)
    queue = teacher.queue
    torch.testing.assert_close(queue.image_queue[:PAIRS], features)
    assert queue.queue_ids[:PAIRS].tolist() == batch.ids.tolist() and int(queue.queue_position) == PAIRS
    step.eval()
    step(batch, teacher, SETTINGS)
    assert int(queue.queue_position) == PAIRS


def test_before_its_warm_up_the_queue_gives_no_keys(batch):
    losses = {}
    for use_queue in (True, False):
        step, teacher = make_step()
        losses[use_queue] = step(batch, teacher, replace(SETTINGS, use_queue=use_queue))[1]["itc"]
    step, teacher = make_step()
    teacher.queue = FeatureQueue(teacher.queue.width, 0)
    assert torch.equal(losses[False], step(batch, teacher, SETTINGS)[1]["itc"])
    assert losses[True] != losses[False]


def test_same_seed_same_bits(batch):
    runs = []
    for _ in range(2):
        step, teacher = make_step()
        loss, _ = step(batch, teacher, SETTINGS)
        loss.backward()
        runs.append([loss.detach()] + [p.grad for p in step.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_one_pair_has_no_negatives():
    with pytest.raises(ValueError, match="batch_size: expected at least 2"):
        make_config("tiny", batch_size=1)


@pytest.mark.parametrize("hard_negatives", [True, False])
def test_pairs_without_a_negative_are_not_scored_as_unmatched(batch, hard_negatives):
    """One image four times: only its true pairs are scored."""
    step, teacher = make_step(soft_mask=False, hard_negatives=hard_negatives)
    batch.ids = torch.tensor([7, 7, 7, 7])
    _, metrics = step(batch, teacher, SETTINGS)
    text_tokens, _ = step.model.encode_text(batch.masked_ids, batch.attention_mask)
    logits = step.model.match_tokens(step.model.vision(batch.pixels), text_tokens, batch.attention_mask)
    expected = F.cross_entropy(logits, torch.ones(PAIRS, dtype=torch.int64))
    torch.testing.assert_close(metrics["itm"].double(), expected, rtol=1e-6, atol=1e-7)
    assert metrics["itm_accuracy"] == metrics["itm_true_pair_accuracy"] == (logits.argmax(-1) == 1).float().mean()
    assert metrics["itm_other_image"].isnan() and metrics["itm_other_text_accuracy"].isnan()


def test_matching_is_measured_for_each_kind_of_pair(batch, monkeypatch):
    """Against the logits, row by row; one row has no negative."""
    step, teacher = make_step(hard_negatives=False)
    monkeypatch.setattr("softmask_fast.model.pretraining.draw_any_other", lambda *_: torch.tensor([1, 2, -1, 0]))
    seen = []
    step.model.match_head.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    _, metrics = step(batch, teacher, SETTINGS)
    kinds = {"true_pair": 1, "other_image": 0, "other_text": 0, "soft_masked": 1}
    for logits, (kind, label) in zip(seen[-1].float().split(PAIRS), kinds.items(), strict=True):
        logits = logits if label else logits[[0, 1, 3]]
        torch.testing.assert_close(metrics[f"itm_{kind}"], -logits.log_softmax(-1)[:, label].mean())
        torch.testing.assert_close(metrics[f"itm_{kind}_accuracy"], (logits.argmax(-1) == label).float().mean())
    assert not make_step(soft_mask=False)[0](batch, teacher, SETTINGS)[1].keys() & {"itm_soft_masked"}


def test_any_other_pair_is_a_negative_without_its_similarity(batch):
    """Rows 0 and 1 show one image: each takes one of the others; every possible one is drawn at some seed."""
    step, teacher = make_step(hard_negatives=False)
    batch.ids = torch.tensor([7, 7, 9, 5])
    drawn = [draw_any_other(batch.ids, torch.Generator().manual_seed(seed)).tolist() for seed in range(60)]
    assert [set(column) for column in zip(*drawn, strict=True)] == [{2, 3}, {2, 3}, {0, 1, 3}, {0, 1, 2}]
    with torch.no_grad():
        losses = [step(batch, teacher, StepSettings(0.4, seed))[1]["itm"].item() for seed in (*range(8), 0)]
    assert losses[0] == losses[-1] and len(set(losses)) > 1


def test_weights_that_are_not_finite_give_a_loss_that_is_not_finite(batch):
    step, teacher = make_step()
    with torch.no_grad():
        step.model.image_projection.weight.fill_(torch.nan)
    loss, _ = step(batch, teacher, SETTINGS)
    assert not loss.isfinite()


def test_key_biases_do_not_move(batch):
    step, teacher = make_step()
    step(batch, teacher, SETTINGS)[0].backward()
    named = dict(step.model.named_parameters())
    held = [p.grad for name, p in named.items() if name.endswith("self.key.bias")]
    held += [p.grad.chunk(3)[1] for name, p in named.items() if name.endswith("qkv.bias")]
    assert len(held) == 8 and all((gradient == 0).all() for gradient in held)
    assert (named["vision.vit.blocks.0.attn.qkv.bias"].grad.chunk(3)[0] != 0).any()


def two_batches():
    """A batch, and its halves as two ranks have them: as many masked words each, captions of other lengths."""
    joined = make_batch()
    joined.attention_mask[2:, 6:] = False
    joined.mlm_positions = torch.tensor([1, TOKENS + 3, 2 * TOKENS + 2, 3 * TOKENS + 5])
    joined.mlm_labels = joined.input_ids.view(-1)[joined.mlm_positions]
    halves = []
    for rows, length in ((slice(0, 2), TOKENS), (slice(2, 4), 6)):
        texts = {n: getattr(joined, n)[rows, :length] for n in ("input_ids", "masked_ids", "attention_mask")}
        row, column = (joined.mlm_positions[rows] // TOKENS - rows.start, joined.mlm_positions[rows] % TOKENS)
        others = {n: getattr(joined, n)[rows] for n in ("pixels", "mlm_labels", "word_index", "ids", "keys")}
        halves.append(replace(joined, mlm_positions=row * length + column, **texts, **others))
    return joined, halves


def run_step(batch, gather):
    """The metrics, the gradients, the hard negatives and the queue after one step."""
    step, teacher = make_step(itc_gather=gather, gathered_negatives=True)
    drawn = remember_negatives(step)
    loss, metrics = step(batch, teacher, SETTINGS)
    loss.backward()
    gradients = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    return {
        "metrics": metrics,
        "gradients": gradients,
        "negatives": list(drawn[0]),
        "queue": dict(teacher.queue.state_dict()),
    }


def run_rank(rank):
    return {gather: run_step(two_batches()[1][rank], gather) for gather in GATHERS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_of_ranks(run_rank, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("gather", GATHERS)
def test_two_ranks_with_gathered_negatives_are_one_process_with_the_joined_batch(ranks, gather):
    expected = run_step(two_batches()[0], gather)
    halves = [results[gather] for results in ranks]
    for index, negatives in enumerate(expected["negatives"]):
        assert torch.equal(torch.cat([half["negatives"][index] for half in halves]), negatives)
        assert (negatives[:2] >= 2).any() or (negatives[2:] < 2).any()  # some live on the other rank
    for name, value in expected["metrics"].items():
        mean = (halves[0]["metrics"][name] + halves[1]["metrics"][name]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in expected["gradients"].items():
        mean = (halves[0]["gradients"][name] + halves[1]["gradients"][name]) / 2
        scale = value.abs().max().item()
        torch.testing.assert_close(mean, value, rtol=0, atol=1e-6 * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for half in halves:
        for name, value in expected["queue"].items():
            torch.testing.assert_close(half["queue"][name], value)


def test_rows_that_occur_often_have_the_same_gradient_in_every_run():
    """As hard negatives do; with several threads the gradient of plain indexing adds in any order."""
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 128, generator=generator, requires_grad=True)
    index = torch.randint(8, (256,), generator=generator)
    weight = torch.randn(256, 64, 128, generator=generator)
    assert torch.equal(index_rows(x, index), x[index])
    torch.set_num_threads(2)
    try:
        first, *others = [torch.autograd.grad(index_rows(x, index), x, weight)[0] for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, torch.zeros_like(x).index_add_(0, index, weight))

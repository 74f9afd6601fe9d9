"""FocalClipLoss against ClipLoss of the released open_clip: alone, on two ranks, and in open_clip's training loop."""

import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate
from gloo_ranks import results_of_ranks
from largest_tensor import LargestTensor
from torch.nn.parallel import DistributedDataParallel

from softmask_fast.adapters.open_clip import FocalClipLoss
from softmask_fast.ops import focal_itc_loss

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
ClipLoss = open_clip.loss.ClipLoss

RANKS, ROWS, WIDTH = 2, 5, 24
SETTINGS = list(itertools.product([False, True], [False, True]))  # local_loss, gather_with_grad
TRAINED = [(False, False), (True, True)]


def features(rows, dtype=torch.float32):
    """Unit vectors (rows, WIDTH), image and text of a pair alike."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    text = image + 3 * torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    return [F.normalize(x, dim=-1).to(dtype) for x in (image, text)]


def results(loss_module, image, text, scale=20.0, bias=-3.0, dtype=torch.float32):
    """Loss and gradients with respect to image, text and logit_scale, and to logit_bias."""
    numbers = torch.tensor(scale), torch.tensor(bias)
    inputs = [x.detach().to(dtype).requires_grad_() for x in (image, text, *numbers)]
    loss = loss_module(*inputs)
    loss.backward()
    return [loss.detach(), *(x.grad for x in inputs)]


def assert_same(ours, baseline, truth):
    for index, name in enumerate(("loss", "image", "text", "logit_scale")):
        assert_as_accurate(ours[index], baseline[index], truth[index], torch.float32, name)
    assert ours[4] == 0  # softmax ignores a constant; ClipLoss gives rounding noise


# ---- one process


@pytest.mark.parametrize("rows, scale", [(1, 14.3), (7, 14.3), (33, 100.0)])
def test_gamma_0_is_clip_loss(rows, scale):
    image, text = features(rows)
    ours = results(FocalClipLoss(gamma=0), image, text, scale)
    baseline, truth = (results(ClipLoss(), image, text, scale, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert_same(ours, baseline, truth)


def test_gamma_weighs_the_terms():
    image, text = features(9, torch.float64)
    log_p = [(20 * image @ text.T).log_softmax(dim) for dim in (1, 0)]
    expected = sum(-((1 - x.diag().exp()) ** 3 * x.diag()).mean() for x in log_p) / 2
    torch.testing.assert_close(FocalClipLoss(gamma=3)(image, text, 20.0), expected)


def test_call_and_constructor_are_those_of_clip_loss():
    image, text = features(4)
    ours, theirs = FocalClipLoss(True, True, True, 0, 1, False, gamma=0.0), ClipLoss(True, True, True, 0, 1, False)
    for arguments in (dict(logit_bias=torch.tensor([-10.0])), dict(logit_bias=-10.0), dict(output_dict=True)):
        losses = [module(image, text, logit_scale=torch.tensor([10.0]), **arguments) for module in (ours, theirs)]
        if "output_dict" in arguments:
            assert losses[0].keys() == losses[1].keys() == {"contrastive_loss"}
            losses = [loss["contrastive_loss"] for loss in losses]
        torch.testing.assert_close(losses[0], losses[1].squeeze())
    assert FocalClipLoss().gamma == 2.0


def test_half_precision_keeps_a_float32_loss():
    image, text = features(6, torch.bfloat16)
    scale = torch.tensor(math.log(20), dtype=torch.bfloat16).exp()
    loss = FocalClipLoss(gamma=0)(image, text, scale)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ClipLoss()(image.float(), text.float(), scale.float()))


def test_the_fused_operator_takes_the_place_of_the_matrix():
    rows = 500
    inputs = [x.requires_grad_() for x in features(rows)]
    ours, theirs = LargestTensor(), LargestTensor()
    for found, loss_module in ((ours, FocalClipLoss(gamma=0)), (theirs, ClipLoss())):
        with found:
            loss_module(*inputs, torch.tensor(20.0)).backward()
    assert theirs.elements >= rows * rows and ours.elements <= rows * WIDTH
    names = ("focal_itc", "focal_itc_backward")
    assert {f"softmask_fast.{name}.default" for name in names} <= ours.operations


@pytest.mark.parametrize("arguments", [dict(world_size=0), dict(rank=3), dict(use_horovod=True)])
def test_what_has_no_effect_on_one_process_is_accepted(arguments):
    image, text = features(4)
    theirs = ClipLoss(**arguments)(image, text, torch.tensor(5.0))
    torch.testing.assert_close(FocalClipLoss(gamma=0, **arguments)(image, text, torch.tensor(5.0)), theirs)


def test_bad_arguments_are_named():
    image, text = features(4)
    for arguments, message in (
        (dict(use_horovod=True, world_size=2), "use_horovod: expected False"),
        (dict(rank=2, world_size=2), "rank: expected a number from 0 to world_size - 1 = 1, got 2"),
        (dict(gamma=-1), "gamma: expected a number of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FocalClipLoss(**arguments)
    for arguments, message in (
        (dict(logit_scale=0.0), "logit_scale: expected a number above 0"),
        (dict(logit_scale=torch.ones(4)), r"logit_scale: expected .* one element, got torch.float32 of size \(4,\)"),
        (dict(logit_scale=1.0, logit_bias=torch.ones(4)), "logit_bias: expected .* one element"),
    ):
        with pytest.raises(ValueError, match=message):
            FocalClipLoss()(image, text, **arguments)
    with pytest.raises(ValueError, match="world_size: expected the process group's, got rank 1 of 2 in a single"):
        FocalClipLoss(rank=1, world_size=2)(image, text, 1.0)


def test_it_imports_no_open_clip():
    code = "import sys, softmask_fast.adapters.open_clip; assert 'open_clip' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- open_clip's training loop


class Batches:
    """What open_clip wraps a loader in: the same two batches of images and texts in every epoch."""

    def __init__(self, rank=0, world=1, rows=6):
        generator = torch.Generator().manual_seed(2)
        images = torch.randn(2, rows * world, 3, 16, 16, generator=generator)
        texts = torch.randint(1, 50, (2, rows * world, 8), generator=generator)
        mine = slice(rank * rows, (rank + 1) * rows)
        self.batches = [(image[mine], text[mine]) for image, text in zip(images, texts, strict=True)]
        self.num_batches, self.num_samples = len(self.batches), len(self.batches) * rows * world
        self.dataloader = self

    def set_epoch(self, epoch):
        pass

    def __iter__(self):
        return iter(self.batches)


def train(loss, rank=0, world=1, **arguments):
    """Weights of a tiny CLIP with a logit bias after an epoch of open_clip's own loop."""
    from open_clip_train.train import train_one_epoch

    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg=dict(layers=1, width=32, head_width=16, patch_size=8, image_size=16),
        text_cfg=dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1),
        init_logit_bias=-1.0,
        output_dict=True,
    )
    trained = model if world == 1 else DistributedDataParallel(model)
    defaults = dict(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=None,
        horovod=False, rank=rank, local_rank=rank, world_size=world, batch_size=6, log_every_n_steps=1, wandb=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    args = SimpleNamespace(**defaults | arguments)
    train_one_epoch(trained, {"train": Batches(rank, world)}, loss, 0, optimizer, None, None, None, args)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_trained_alike(ours, theirs):
    start = train_start()
    assert ours.keys() == theirs.keys() == start.keys()
    moved = [name for name in start if not torch.equal(start[name], theirs[name])]
    assert len(moved) > 0.8 * len(start)
    for name in start:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def train_start():
    """The weights before a step: three batches make one, and there are two."""
    return train(ClipLoss(), accum_freq=3)


@pytest.mark.parametrize("arguments", [{}, {"accum_freq": 2}], ids=["plain", "accumulated"])
def test_open_clips_loop_trains_the_same_model(arguments):
    assert_trained_alike(train(FocalClipLoss(gamma=0), **arguments), train(ClipLoss(), **arguments))


def test_open_clips_loop_in_bf16_with_gamma():
    ours = train(FocalClipLoss(gamma=2), precision="amp_bf16")
    assert all(value.isfinite().all() for value in ours.values() if value.is_floating_point())
    assert not torch.equal(ours["logit_scale"], train_start()["logit_scale"])


# ---- two ranks


def run_rank(rank):
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    image, text = (x[mine] for x in features(RANKS * ROWS))
    found = {}
    for setting in SETTINGS:
        common = dict(zip(("local_loss", "gather_with_grad"), setting, strict=True), rank=rank, world_size=RANKS)
        ours, theirs = FocalClipLoss(**common, gamma=0), ClipLoss(**common)
        found[f"{setting}"] = {
            "ours": results(ours, image, text),
            "theirs": results(theirs, image, text),
            "truth": results(theirs, image, text, dtype=torch.float64),
            "focal": results(FocalClipLoss(**common), image, text, dtype=torch.float64),
            "trained": [train(loss, rank, RANKS) for loss in (ours, theirs)] if setting in TRAINED else None,
        }
    try:
        FocalClipLoss(rank=1 - rank, world_size=RANKS)(image, text, 1.0)
    except ValueError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_of_ranks(run_rank, RANKS, tmp_path_factory.mktemp("ranks"), minutes=3)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_two_ranks_have_the_loss_and_gradients_of_clip_loss(ranks, setting):
    for rank in ranks:
        found = rank[f"{setting}"]
        assert_same(found["ours"], found["theirs"], found["truth"])


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_two_ranks_with_gamma_are_the_joined_batch(ranks, setting):
    """Mean loss, and gradients as each setting defines them, from the loss of all pairs in one process."""
    local_loss, gather_with_grad = setting
    inputs = [x.requires_grad_() for x in features(RANKS * ROWS, torch.float64)]
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    per_row = focal_itc_loss(*inputs, temperature=1 / scale, gamma=2, reduction="none")
    per_row.mean().backward()
    losses = [rank[f"{setting}"]["focal"][0] for rank in ranks]
    torch.testing.assert_close(sum(losses) / RANKS, per_row.mean().detach())
    assert local_loss or losses[0] == losses[1]
    torch.testing.assert_close(sum(rank[f"{setting}"]["focal"][3] for rank in ranks) / RANKS, scale.grad)
    if local_loss and not gather_with_grad:
        return  # features count as rows alone: compared with ClipLoss above
    factor = RANKS if gather_with_grad else 1
    for index, joined in enumerate(inputs, start=1):
        gradient = torch.cat([rank[f"{setting}"]["focal"][index] for rank in ranks])
        torch.testing.assert_close(gradient, factor * joined.grad)


@pytest.mark.parametrize("setting", TRAINED, ids=str)
def test_open_clips_loop_on_two_ranks(ranks, setting):
    for rank in ranks:
        assert_trained_alike(*rank[f"{setting}"]["trained"])


def test_a_rank_that_is_another_ones_is_refused(ranks):
    assert ranks[0]["refused"] == "world_size: expected the process group's, got rank 1 of 2 in rank 0 of 2"

"""docs/dual_encoders.md: each block against the formula that it replaces, written here, on the same inputs."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from code_blocks import ROOT, assert_sections_are_named, run_section
from compare import assert_as_accurate
from torch import nn

PAGE = ROOT / "docs" / "dual_encoders.md"
PAIRS, CHUNK, WIDTH = 7, 3, 16
IDS = torch.tensor([4, 1, 4, 0, 2, 1, 3])


def run(heading, **namespace):
    return run_section(PAGE, heading, torch=torch, **namespace)


def test_every_block_of_the_page_has_a_test():
    assert_sections_are_named(PAGE, __file__)


def focal_contrast(image, text, temperature, same, gamma=2):
    """Mean over rows, positives and directions of -(1 - p)^gamma log p; `same` (B, B) bool says which pairs match."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    share = same.to(image.dtype) / same.sum(1)
    log_p = [(image @ text.T / temperature).log_softmax(1), (text @ image.T / temperature).log_softmax(1)]
    return sum(-(share * (1 - x.exp()) ** gamma * x).sum(1).mean() for x in log_p) / 2


def assert_block(found):
    """`found(dtype, block)` gives the loss and gradients of the block, or of the formula."""
    results = found(torch.float32, True), found(torch.float32, False), found(torch.float64, False)
    for number, values in enumerate(zip(*results, strict=True)):
        assert_as_accurate(*values, torch.float32, str(number))


def encoders(dtype):
    """An encoder of images and one of texts, a temperature's logarithm, and inputs for them."""
    torch.manual_seed(6)
    pair = [nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, WIDTH)).double() for _ in range(2)]
    inputs = [torch.randn(PAIRS, 10, dtype=torch.float64).to(dtype) for _ in range(2)]
    log_temperature = torch.tensor(0.07, dtype=torch.float64).log().to(dtype).requires_grad_()
    return [encoder.to(dtype) for encoder in pair], inputs, log_temperature


# ---- open_clip


ARGS = SimpleNamespace(local_loss=True, gather_with_grad=True, rank=0, world_size=1)


def test_open_clip():
    loss = run("open_clip", args=ARGS).loss
    image, text = torch.randn(2, PAIRS, WIDTH, dtype=torch.float64)
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    torch.testing.assert_close(
        loss(image, text, 20.0), focal_contrast(image, text, 0.05, torch.eye(PAIRS, dtype=torch.bool))
    )


class CLIPTask(nn.Module):
    """What the main branch's task does in a training step: the model's outputs go to the loss by their names, and what
    is called a loss is added up."""

    def __init__(self, model, *, loss):
        super().__init__()
        self.trainable_module, self.loss = model, loss

    def forward(self, batch):
        outputs = self.trainable_module(**batch)
        losses = self.loss(**outputs, output_dict=True)
        return sum(value for name, value in losses.items() if name.endswith("_loss"))


class Clip(nn.Module):
    """Outputs as those of open_clip's models."""

    def __init__(self, pair, log_temperature):
        super().__init__()
        self.image, self.text = pair
        self.logit_scale = nn.Parameter(-log_temperature.detach())

    def forward(self, image, text):
        image, text = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return {"image_features": image, "text_features": text, "logit_scale": self.logit_scale.exp()}


def test_open_clip_main_branch(monkeypatch):
    module = ModuleType("open_clip.task")
    module.CLIPTask = CLIPTask
    monkeypatch.setitem(sys.modules, "open_clip", ModuleType("open_clip"))
    monkeypatch.setitem(sys.modules, "open_clip.task", module)

    def found(dtype, block):
        pair, (image, text), log_temperature = encoders(dtype)
        model = Clip(pair, log_temperature)
        if block:
            loss = run("open_clip", args=ARGS).loss
            loss = run("open_clip, main branch", model=model, loss=loss).task({"image": image, "text": text})
        else:
            outputs = model(image, text)
            features = outputs["image_features"], outputs["text_features"]
            loss = focal_contrast(*features, 1 / outputs["logit_scale"], torch.eye(PAIRS, dtype=torch.bool))
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    assert_block(found)


# ---- soft prompts


def test_soft_prompts():
    """Captions behind prompts, of images that some of them share; only the prompts learn."""

    def found(dtype, block):
        pair, (image, words), log_temperature = encoders(dtype)
        prompts = torch.full((10,), 0.1, dtype=dtype, requires_grad=True)
        image_features, text_features = pair[0](image).detach(), pair[1](words + prompts)
        logit_scale = -log_temperature.detach()
        names = dict(image_features=image_features, text_features=text_features, logit_scale=logit_scale)
        if block:
            loss = run("Soft prompts", image_ids=IDS, **names).loss
        else:
            loss = focal_contrast(image_features, text_features, 1 / logit_scale.exp(), IDS[:, None] == IDS)
        return [loss.detach(), *torch.autograd.grad(loss, prompts)]

    assert_block(found)


# ---- chunks


class GradCache:
    """GradCache's step (Gao et al., 2021), without its options: features without a graph, the loss on all of them, then
    each chunk once more with the gradient of its features."""

    def __init__(self, models, chunk_sizes, loss_fn):
        self.models, self.chunk, self.loss_fn = models, chunk_sizes, loss_fn

    def __call__(self, *inputs, **options):
        with torch.no_grad():
            features = [model(x) for model, x in zip(self.models, inputs, strict=True)]
        features = [x.requires_grad_() for x in features]
        loss = self.loss_fn(*features, **options)
        loss.backward()
        for model, x, whole in zip(self.models, inputs, features, strict=True):
            for part, gradient in zip(x.split(self.chunk), whole.grad.split(self.chunk), strict=True):
                (model(part) * gradient).sum().backward()
        return loss.detach()


@pytest.mark.parametrize("ids", [None, IDS], ids=["one positive", "ids"])
def test_gradcache(ids, monkeypatch):
    module = ModuleType("grad_cache")
    module.GradCache = lambda models, chunk_sizes, loss_fn: GradCache(models, CHUNK, loss_fn)
    monkeypatch.setitem(sys.modules, "grad_cache", module)
    same = torch.eye(PAIRS, dtype=torch.bool) if ids is None else ids[:, None] == ids

    def found(dtype, block):
        (image_encoder, text_encoder), (images, texts), log_temperature = encoders(dtype)
        learned = [*image_encoder.parameters(), *text_encoder.parameters(), log_temperature]
        if block:
            names = dict(image_encoder=image_encoder, text_encoder=text_encoder, images=images, texts=texts, ids=ids)
            loss = run("GradCache", log_temperature=log_temperature, **names).loss
        else:
            loss = focal_contrast(image_encoder(images), text_encoder(texts), log_temperature.exp(), same)
            loss.backward()
        return [loss.detach(), *(x.grad for x in learned)]

    assert_block(found)


class CachedLoss(nn.Module):
    """The cached losses of sentence-transformers 6: features of each mini-batch without a graph, the loss on all of
    them, then each mini-batch once more in the loss's backward pass."""

    def __init__(self, model, scale, mini_batch_size):
        super().__init__()
        self.model, self.scale, self.size = model, scale, CHUNK
        assert mini_batch_size == 32

    def forward(self, columns, labels):
        parts = [column.split(self.size) for column in columns]
        with torch.no_grad():
            features = [[self.model(part) for part in column] for column in parts]
        features = [[x.requires_grad_() for x in column] for column in features]
        loss = self.calculate_loss(features, labels, with_backward=True).detach().requires_grad_()

        def replay(gradient):
            with torch.enable_grad():
                for column, known in zip(parts, features, strict=True):
                    for part, x in zip(column, known, strict=True):
                        (self.model(part) * x.grad * gradient).sum().backward()

        loss.register_hook(replay)
        return loss


@pytest.mark.parametrize("labels", [None, IDS], ids=["one positive", "ids"])
def test_sentence_transformers(labels, monkeypatch):
    name = "sentence_transformers.sentence_transformer.losses"
    module = ModuleType(name)
    module.CachedMultipleNegativesRankingLoss = CachedLoss
    for part in (name.split(".")[0], ".".join(name.split(".")[:2])):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    same = torch.eye(PAIRS, dtype=torch.bool) if labels is None else labels[:, None] == labels

    def found(dtype, block):
        (model, _), columns, _ = encoders(dtype)
        if block:
            loss = run("sentence-transformers, cached losses", model=model).loss
            with torch.no_grad():
                evaluated = loss.calculate_loss([[model(x)] for x in columns], labels)
            loss = loss(columns, labels)
            assert not evaluated.requires_grad
            torch.testing.assert_close(evaluated, loss.detach())
        else:
            loss = focal_contrast(*(model(x) for x in columns), 1 / 20, same)
        loss.backward()
        return [loss.detach(), *(x.grad for x in model.parameters())]

    assert_block(found)

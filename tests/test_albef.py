"""ALBEF's checkpoints against a plain ALBEF, written here from the architecture's formulas with ALBEF's names."""

import copy
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softmask_fast.config import ObjectiveConfig
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.evaluation.heatmaps import explain
from softmask_fast.model.convert_albef import albef_state, load_albef, load_albef_state, save_albef
from softmask_fast.model.export import read_model
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.training.options import make_config

HEAD = 64
PATCH, GRID, VOCABULARY, POSITIONS, FUSION_LAYER, LAYERS, EMBED = 8, 4, 60, 40, 2, 5, 48
IMAGE_WIDTH, TEXT_WIDTH = 128, 192


def attention(query, key, value, mask=None):
    """Multi-head attention on (B, T, C) -> output (B, L, C) and probabilities (B, H, L, N)."""
    query, key, value = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (query, key, value))
    logits = query @ key.mT / math.sqrt(HEAD)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -math.inf)
    probabilities = logits.softmax(-1)
    return (probabilities @ value).transpose(1, 2).flatten(2), probabilities


def tree(**children):
    """A module that only holds others, for the sake of their names."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = tree(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        self.mlp = tree(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width))

    def forward(self, x):
        x = x + self.attn.proj(attention(*self.attn.qkv(self.norm1(x)).chunk(3, -1))[0])
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class ImageEncoder(nn.Module):
    def __init__(self, grid=GRID):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, IMAGE_WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, IMAGE_WIDTH))
        self.patch_embed = tree(proj=nn.Conv2d(3, IMAGE_WIDTH, PATCH, PATCH))
        self.blocks = nn.Sequential(Block(IMAGE_WIDTH, 4 * IMAGE_WIDTH), Block(IMAGE_WIDTH, 4 * IMAGE_WIDTH))
        self.norm = nn.LayerNorm(IMAGE_WIDTH, eps=1e-6)

    def forward(self, pixels):
        patches = self.patch_embed.proj(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1) + self.pos_embed
        return self.norm(self.blocks(x))


class Attend(nn.Module):
    """norm(x + dense(attention)); keys and values from x, or from other tokens of another width."""

    def __init__(self, width, source_width):
        super().__init__()
        self.add_module("self", tree(query=nn.Linear(width, width), key=nn.Linear(source_width, width),
                                     value=nn.Linear(source_width, width)))  # fmt: skip
        self.output = tree(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))
        self.maps = None

    def forward(self, x, source, mask=None):
        parts = self.self
        attended, self.maps = attention(parts.query(x), parts.key(source), parts.value(source), mask)
        return self.output.LayerNorm(x + self.output.dense(attended))


class Layer(nn.Module):
    def __init__(self, crosses):
        super().__init__()
        self.attention = Attend(TEXT_WIDTH, TEXT_WIDTH)
        if crosses:
            self.crossattention = Attend(TEXT_WIDTH, IMAGE_WIDTH)
        self.intermediate = tree(dense=nn.Linear(TEXT_WIDTH, 2 * TEXT_WIDTH))
        self.output = tree(dense=nn.Linear(2 * TEXT_WIDTH, TEXT_WIDTH), LayerNorm=nn.LayerNorm(TEXT_WIDTH, eps=1e-12))

    def forward(self, x, mask, image):
        x = self.attention(x, x, mask)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, image)
        return self.output.LayerNorm(x + self.output.dense(F.gelu(self.intermediate.dense(x))))


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = tree(
            word_embeddings=nn.Embedding(VOCABULARY, TEXT_WIDTH),
            position_embeddings=nn.Embedding(POSITIONS, TEXT_WIDTH),
            token_type_embeddings=nn.Embedding(2, TEXT_WIDTH),
            LayerNorm=nn.LayerNorm(TEXT_WIDTH, eps=1e-12),
        )
        self.embeddings.register_buffer("position_ids", torch.arange(POSITIONS)[None])
        self.encoder = tree(layer=nn.ModuleList(Layer(i >= FUSION_LAYER) for i in range(LAYERS)))

    def text(self, ids, mask):
        e = self.embeddings
        x = e.word_embeddings(ids) + e.position_embeddings.weight[: ids.shape[1]] + e.token_type_embeddings.weight[0]
        x = e.LayerNorm(x)
        for layer in self.encoder.layer[:FUSION_LAYER]:
            x = layer(x, mask, None)
        return x

    def fuse(self, x, mask, image):
        for layer in self.encoder.layer[FUSION_LAYER:]:
            x = layer(x, mask, image)
        return x


class Albef(nn.Module):
    """The pretraining model: its state dict is that of a released checkpoint, but for the sizes."""

    def __init__(self, grid=GRID, queue=6):
        super().__init__()
        self.visual_encoder = ImageEncoder(grid)
        head = tree(
            transform=tree(dense=nn.Linear(TEXT_WIDTH, TEXT_WIDTH), LayerNorm=nn.LayerNorm(TEXT_WIDTH, eps=1e-12)),
            decoder=nn.Linear(TEXT_WIDTH, VOCABULARY),
        )
        head.bias = head.decoder.bias
        self.text_encoder = tree(bert=Bert(), cls=tree(predictions=head))
        head.decoder.weight = self.text_encoder.bert.embeddings.word_embeddings.weight
        self.vision_proj, self.text_proj = nn.Linear(IMAGE_WIDTH, EMBED), nn.Linear(TEXT_WIDTH, EMBED)
        self.itm_head = nn.Linear(TEXT_WIDTH, 2)
        self.temp = nn.Parameter(torch.tensor(0.05))
        for name, parameter in self.named_parameters():
            if name != "temp":
                scale = re.search(r"(\bnorm\d?|LayerNorm)\.weight", name)
                nn.init.normal_(parameter, mean=1 if scale else 0, std=0.05)
        for part in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            self.add_module(f"{part}_m", copy.deepcopy(getattr(self, part)))
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(EMBED, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def answers(self, pixels, ids, mask):
        """Features, logits and the Grad-CAM of every fusion layer, by full attention maps and their gradients."""
        image, text = self.visual_encoder(pixels), self.text_encoder.bert.text(ids, mask)
        fused = self.text_encoder.bert.fuse(text, mask, image)
        head = self.text_encoder.cls.predictions
        hidden = head.transform.LayerNorm(F.gelu(head.transform.dense(fused)))
        match = self.itm_head(fused[:, 0])
        maps = [layer.crossattention.maps for layer in self.text_encoder.bert.encoder.layer[FUSION_LAYER:]]
        gradients = torch.autograd.grad(match[:, 1].sum(), maps)
        return {
            "image tokens": image,
            "image features": F.normalize(self.vision_proj(image[:, 0]), dim=-1),
            "text tokens": text,
            "text features": F.normalize(self.text_proj(text[:, 0]), dim=-1),
            "ITM logits": match,
            "MLM logits": head.decoder(hidden),
        } | {
            f"Grad-CAM {i}": (a * g.clamp(min=0)).mean(1) for i, (a, g) in enumerate(zip(maps, gradients, strict=True))
        }


def our_answers(model, pixels, ids, mask):
    image, image_features = model.encode_image(pixels)
    text, text_features = model.encode_text(ids, mask)
    return {
        "image tokens": image,
        "image features": image_features,
        "text tokens": text,
        "text features": text_features,
        "ITM logits": model.match_logits(pixels, ids, mask),
        "MLM logits": model.mlm_logits(pixels, ids, mask),
    } | {f"Grad-CAM {i}": model.word_relevance(pixels, ids, mask, i) for i in range(LAYERS - FUSION_LAYER)}


def bicubic_weights(old, new, a=-0.75):
    """The (new, old) matrix of cubic convolution (Keys, 1981) between the pixel centres, borders repeated."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - tap)
            near, far = ((a + 2) * x - (a + 3)) * x * x + 1, a * (((x - 5) * x + 8) * x - 4)
            weights[row, min(max(tap, 0), old - 1)] += near if x <= 1 else far
    return weights


def resized(albef, grid):
    """The same weights for another size of the image."""
    state = albef.state_dict()
    resize = bicubic_weights(GRID, grid)
    for name in ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed"):
        first, patches = state[name][:, :1], state[name][:, 1:].double().unflatten(1, (GRID, GRID))
        patches = torch.einsum("ri,cj,bijw->brcw", resize, resize, patches).flatten(1, 2)
        state[name] = torch.cat([first, patches.to(first.dtype)], 1)
    other = Albef(grid).eval()
    other.load_state_dict(state)
    return other


@pytest.fixture(scope="module")
def albef():
    torch.manual_seed(2)
    return Albef().eval()


@pytest.fixture
def checkpoint(albef, tmp_path):
    torch.save({"model": albef.state_dict(), "optimizer": {"state": {}}, "epoch": 29}, tmp_path / "ALBEF.pth")
    return tmp_path / "ALBEF.pth"


def pairs(grid=GRID):
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 5:] = False
    return torch.randn(3, 3, grid * PATCH, grid * PATCH), torch.randint(5, VOCABULARY, (3, 9)), mask


def fine_tuned(albef):
    """The state dict as retrieval fine-tuning writes it: no MLM head, no `.bert`."""
    state = {name: tensor for name, tensor in albef.state_dict().items() if ".cls." not in name}
    return {re.sub(r"^text_encoder(_m)?\.bert\.", r"text_encoder\1.", name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("grid", [GRID, 6, 3])
def test_every_answer_is_albefs(albef, checkpoint, grid):
    model = load_albef(checkpoint, image_size=None if grid == GRID else grid * PATCH)
    pixels, ids, mask = pairs(grid)
    ours, theirs = our_answers(model, pixels, ids, mask), resized(albef, grid).answers(pixels, ids, mask)
    assert ours.keys() == theirs.keys() and not model.training
    for what, expected in theirs.items():
        actual = ours[what]
        if expected.shape[:2] == mask.shape:  # of text tokens: padding has no meaning
            actual, expected = actual[mask], expected[mask]
        # a Grad-CAM is small: 1e-5 of its own largest value
        allowed = 1e-5 * (expected.abs().max() if "Grad-CAM" in what else 1)
        assert actual.shape == expected.shape and (actual - expected).abs().max() <= allowed > 0, what
    assert model.temperature.item() == pytest.approx(albef.temp.item(), rel=1e-6)


def test_sizes_come_from_the_tensors(albef):
    config = load_albef_state(albef.state_dict())[0].config
    expected = dict(
        image_size=GRID * PATCH, vision_patch_size=PATCH, vision_width=IMAGE_WIDTH, vision_depth=2, vision_heads=2,
        vision_mlp_ratio=4, text_width=TEXT_WIDTH, text_heads=3, text_mlp_ratio=2, text_positions=POSITIONS,
        text_layers=FUSION_LAYER, fusion_layers=LAYERS - FUSION_LAYER, vocab_size=VOCABULARY, embed_dim=EMBED,
        max_tokens=30, soft_mask_layer=1,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_unused_tensors_are_logged(albef, tmp_path, caplog):
    state = albef.state_dict() | {"cls_head.0.weight": torch.zeros(2, 2)}
    _, report = load_albef_state(state)
    momentum = [name for name in state if name.split(".")[0].endswith("_m")]
    queues = ["image_queue", "text_queue", "queue_ptr"]
    keys = [f"text_encoder.bert.encoder.layer.{i}.crossattention.self.key.bias" for i in range(FUSION_LAYER, LAYERS)]
    assert report.unplaced == sorted([*momentum, *queues, *keys, "cls_head.0.weight"]) and not report.absent
    torch.save({"model": state}, tmp_path / "odd.pth")
    with caplog.at_level(logging.WARNING):
        load_albef(tmp_path / "odd.pth")
    assert f"queues (3), momentum copy ({len(momentum)}), key biases" in caplog.text and "cls_head (1)" in caplog.text


def test_a_fine_tuned_checkpoint_lacks_only_the_language_head(albef, tmp_path, caplog):
    torch.save(fine_tuned(albef), tmp_path / "refcoco.pth")  # the state dict itself, as this one was released
    model = load_albef(tmp_path / "refcoco.pth")
    assert "initialized at random: text_encoder.cls.predictions." in caplog.text and "itm_head" not in caplog.text
    inputs = pairs()
    ours, theirs = our_answers(model, *inputs), albef.answers(*inputs)
    for what in theirs.keys() - {"MLM logits", "text tokens", "Grad-CAM 0", "Grad-CAM 1", "Grad-CAM 2"}:
        torch.testing.assert_close(ours[what], theirs[what], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours["MLM logits"], theirs["MLM logits"], atol=1e-2)
    state = {name: tensor for name, tensor in fine_tuned(albef).items() if not name.startswith("itm_head.")}
    assert {"itm_head.weight", "itm_head.bias"} <= set(load_albef_state(state)[1].absent)


def test_the_way_back_is_exact(albef, checkpoint, tmp_path):
    model, teacher = load_albef(checkpoint), None
    for teacher in (None, MomentumTeacher(model, ObjectiveConfig(queue_size=6, momentum=0.9))):
        if teacher is not None:
            for parameter in teacher.model.parameters():
                parameter.data.mul_(0.5)
            teacher.queue.enqueue(*torch.randn(2, 4, EMBED), torch.arange(4))
        save_albef(model, tmp_path / "ours.pth", teacher)
        state = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
        for name, expected in albef.state_dict().items():
            if "queue" in name:
                assert (name in state) == (teacher is not None)
            elif name.endswith("crossattention.self.key.bias"):
                assert state[name].count_nonzero() == 0 and state[name].shape == expected.shape
            elif name == "temp":
                torch.testing.assert_close(state[name], expected)
            elif not name.split(".")[0].endswith("_m"):
                assert torch.equal(state[name], expected), name
    other = Albef().eval()
    other.load_state_dict(state)  # strict
    inputs = pairs()
    for what, expected in albef.answers(*inputs).items():
        torch.testing.assert_close(other.answers(*inputs)[what], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.vision_proj_m.weight, 0.5 * albef.vision_proj.weight)
    assert torch.equal(other.image_queue[:, :4].T, teacher.queue.image_queue[:4]) and other.queue_ptr.tolist() == [4]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_another_image_encoder_is_not_albefs():
    config = make_config("tiny", vocab_size=50, image_size=32, vision_model="vit_small_patch14_reg4_dinov2").model
    with pytest.raises(ValueError, match="model: expected ALBEF's image encoder.*5 prefix tokens.*reg_token"):
        albef_state(VisionLanguageModel(config))


def changed(albef, drop=None, **tensors):
    state = albef.state_dict()
    for name in [name for name in state if drop and re.search(drop, name)]:
        del state[name]
    return state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def test_what_does_not_fit_is_named(albef, tmp_path):
    with pytest.raises(ValueError, match="not a file"):
        load_albef(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match="text.pth.*cannot be read"):
        load_albef(tmp_path / "text.pth")
    torch.save({"model": Path("a stranger's class")}, tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match="pickle.pth.*cannot be read"):
        load_albef(tmp_path / "pickle.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a state dict"):
        load_albef(tmp_path / "list.pth")
    for state, options, message in [
        ({}, {}, "expected visual_encoder.pos_embed of 3 dimensions, got no such tensor"),
        (changed(albef, r"blocks\.1\.norm2\.bias"), {}, r"missing \['visual_encoder.blocks.1.norm2.bias'\]"),
        (changed(albef, r"itm_head\.bias"), {}, r"missing \['itm_head.bias'\]"),
        (changed(albef, r"layer\.3\.crossattention"), {}, r"upper layers.*found it in \[2, 4\] of 5"),
        (changed(albef, itm_head__bias=torch.zeros(3)), {}, r"itm_head.bias has size \(3,\), expected \(2,\)"),
        (changed(albef, temp=torch.tensor(0.0)), {}, "temp above 0, got 0.0"),
        (changed(albef, visual_encoder__pos_embed=torch.zeros(1, 13, IMAGE_WIDTH)), {}, "got 13 of them"),
        (albef.state_dict(), {"image_size": 30}, "image_size: expected a multiple of .* 8, got 30"),
        (albef.state_dict(), {"head_width": 60}, "head_width: expected a divisor of 128"),
        (changed(albef, text_encoder__cls__predictions__decoder__weight=torch.zeros(VOCABULARY, TEXT_WIDTH)), {},
         "decoder.weight equal to .*word_embeddings.weight, to which it is tied"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_albef_state(state, **options)


def test_the_lines_of_the_documentation(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert = train_tokenizer(["a red circle left of a small blue square", "two dogs run"], VOCABULARY)
    bert.save_pretrained("google-bert/bert-base-uncased")
    page = (Path(__file__).parents[1] / "docs" / "albef.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and Path("ours.pth").exists()
    model, tokenizer = read_model("albef")
    words = tokenizer("two dogs")["input_ids"]
    assert words == bert("two dogs")["input_ids"][:-1] and words[0] == tokenizer.cls_token_id
    shown = explain(model, tokenizer, np.zeros((40, 60, 3), np.uint8), "two dogs", "words.png")
    assert [word["word"] for word in shown["words"]] == ["two", "dogs"] and Path("words.png").exists()

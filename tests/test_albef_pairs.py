"""ALBEF's checkpoints of two images, NLVR2's and those of text assignment, against a plain ALBEF."""

import pytest
import torch
from plain_albef import EMBED, FUSION_LAYER, GRID, PATCH, TEXT_WIDTH, VOCABULARY, Albef

from softmask_fast.config import DataConfig, MomentumConfig, TrainConfig
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.errors import UsageError
from softmask_fast.model.convert_albef import load_albef, save_albef
from softmask_fast.model.export import save_model
from softmask_fast.tasks.options import FinetuneConfig, TaskConfig
from softmask_fast.tasks.recipes import TASKS

IDS, MASK = torch.tensor([[2, 9, 8, 7], [2, 5, 6, 0]]), torch.tensor([[True] * 4, [True] * 3 + [False]])


@pytest.fixture
def assigned(tmp_path):
    """An ALBEF with two pairs of layers, and its checkpoint."""
    torch.manual_seed(2)
    albef = Albef(layers=FUSION_LAYER + 4)
    layers = albef.text_encoder.bert.encoder.layer[FUSION_LAYER:]
    for left, right in zip(layers[::2], layers[1::2], strict=True):
        for name in ("key", "value"):
            setattr(right.crossattention.self, name, getattr(left.crossattention.self, name))
    parts = {name: getattr(albef, name) for name in ("visual_encoder", "vision_proj", "text_proj")}
    parts |= {"text_encoder": albef.text_encoder.bert, "ta_head": torch.nn.Linear(TEXT_WIDTH, 3)}
    state = {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
    torch.save({"model": state | {"temp": albef.temp.data}}, tmp_path / "assigned.pth")
    train_tokenizer(["ab cd ef"], VOCABULARY).save_pretrained(tmp_path / "tokenizer")
    return albef, tmp_path / "assigned.pth"


def fused_by(albef, pixels):
    """[CLS] of two captions, each of a left and a right image: the layers in turn."""
    tokens, fused = albef.visual_encoder(pixels), albef.text_encoder.bert.text(IDS, MASK)
    for number, layer in enumerate(albef.text_encoder.bert.encoder.layer[FUSION_LAYER:]):
        fused = layer(fused, MASK, tokens[number % 2 :: 2])
    return fused[:, 0]


@torch.no_grad()
def test_text_assignment_of_albef_prepares_nlvr2(assigned):
    albef, path = assigned
    model = load_albef(path)
    assert model.config.fusion_layers == 2 and len(model.fusion.layers) == 4 and model.config.embed_dim == EMBED
    start = TaskConfig(str(path))
    data = DataConfig(tokenizer=str(path.parent / "tokenizer"))
    with pytest.raises(UsageError, match=f"tokenizer: expected the model's {VOCABULARY} entries, got"):
        TASKS["nlvr2"].model(FinetuneConfig("nlvr2", start, MomentumConfig(), data, TrainConfig()))
    words = [chr(97 + a) + chr(97 + b) for a in range(26) for b in range(a)]
    train_tokenizer(words * 2, VOCABULARY).save_pretrained(path.parent / "tokenizer")
    nlvr2, _ = TASKS["nlvr2"].model(FinetuneConfig("nlvr2", start, MomentumConfig(), data, TrainConfig()))
    pixels = torch.randn(4, 3, GRID * PATCH, GRID * PATCH)
    torch.testing.assert_close(nlvr2.eval().fused(pixels, IDS, MASK), fused_by(albef, pixels), rtol=1e-4, atol=1e-5)
    double = nlvr2.double()
    exact = double.fused(pixels.double(), IDS, MASK)
    assert exact.dtype == torch.float64 and {p.dtype for p in double.parameters()} == {torch.float64}
    torch.testing.assert_close(exact, fused_by(albef.double(), pixels.double()), rtol=1e-9, atol=1e-9)


def test_other_tasks_refuse_it(assigned, tmp_path):
    _, path = assigned
    config = FinetuneConfig("entailment", TaskConfig(str(path)), MomentumConfig(), DataConfig(), TrainConfig())
    with pytest.raises(
        UsageError, match="does not fit the model's options: .*fusion.layers.2.attention.* is unexpected"
    ):
        TASKS["entailment"].model(config)
    with pytest.raises(
        UsageError, match="model: expected one that reads one image per caption, got one that reads two"
    ):
        save_albef(load_albef(path), tmp_path / "back.pth")
    with pytest.raises(
        UsageError, match="model: expected one that reads one image per caption, got one that reads two"
    ):
        save_model(load_albef(path), train_tokenizer(["ab cd ef"], VOCABULARY), tmp_path / "model")
    assert not (tmp_path / "model").exists()

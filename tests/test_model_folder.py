"""Models on disk, and weights to start from."""

import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.errors import UsageError
from softmask_fast.model.convert_albef import save_albef
from softmask_fast.model.export import read_model, save_model
from softmask_fast.model.initialize import load_pretrained, load_weights, weights_tokenizer
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.training.options import make_config

SIZES = dict(image_size=32, vision_width=32, vision_depth=1, vision_heads=2, text_width=32, text_heads=2,
             text_layers=1, text_contrast_layers=0, vision_contrast_blocks=0, fusion_layers=2,
             embed_dim=16)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red circle left of a small blue square", "two dogs run"], 60)


def make_model(tokenizer, **options) -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(make_config("tiny", vocab_size=len(tokenizer), **SIZES | options).model).eval()


def test_a_saved_model_gives_the_same_answers(tokenizer, tmp_path):
    model = make_model(tokenizer)
    save_model(model, tokenizer, tmp_path / "model")
    save_model(model, tokenizer, tmp_path / "model")  # a second time replaces the first
    again, its_tokenizer = read_model(tmp_path / "model")
    text = its_tokenizer(["a red circle"], return_tensors="pt")
    inputs = torch.randn(1, 3, 32, 32), text["input_ids"], text["attention_mask"].bool()
    for method in ("match_logits", "mlm_logits", "word_relevance"):
        assert torch.equal(getattr(again, method)(*inputs), getattr(model, method)(*inputs))
    assert not again.training and sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_damaged_folder_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="lacks .*model.safetensors"):
        read_model(tmp_path)
    folder = tmp_path / "model"
    save_model(make_model(tokenizer), tokenizer, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"embed_dim": 8}))
    with pytest.raises(ValueError, match=r"image_projection.weight has size \(16, 32\), expected \(8, 32\)"):
        read_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"depth": 8}))
    with pytest.raises(ValueError, match="unknown options .*depth"):
        read_model(folder)


def bert_folder(folder, layers=3, width=32, vocabulary=60):
    torch.manual_seed(1)
    sizes = dict(hidden_size=width, num_attention_heads=2, intermediate_size=4 * width)
    bert = BertForMaskedLM(BertConfig(vocab_size=vocabulary, num_hidden_layers=layers, **sizes))
    bert.save_pretrained(folder)
    return bert.eval()


def test_bert_weights_are_split_into_text_and_fusion_layers(tokenizer, tmp_path):
    bert = bert_folder(tmp_path, vocabulary=len(tokenizer))
    model = make_model(tokenizer, text_weights=str(tmp_path), hidden_dropout=0.0)
    load_pretrained(model)
    ids = torch.randint(5, len(tokenizer), (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    tokens, _ = model.encode_text(ids, mask)
    torch.testing.assert_close(tokens, bert.bert(ids, output_hidden_states=True).hidden_states[1])
    # Without cross-attention our fusion layers are BERT's, so text, fusion and head together are BERT.
    expected = bert(ids).logits
    for layer in model.fusion.layers:
        tokens, _ = layer.attention(tokens, mask[:, None, None, :])
        tokens = layer.output(layer.intermediate(tokens), tokens)
    torch.testing.assert_close(model.language_head(tokens), expected)


def test_a_bert_without_a_head_says_so_and_without_a_layer_is_refused(tokenizer, tmp_path, caplog, capfd):
    bert = bert_folder(tmp_path, vocabulary=len(tokenizer))
    bert.bert.save_pretrained(tmp_path)
    model = make_model(tokenizer, text_weights=str(tmp_path))
    head = model.language_head.transform.dense.weight.clone()
    capfd.readouterr()
    load_pretrained(model)
    printed = "".join(capfd.readouterr())
    assert torch.equal(model.text.bert.embeddings.word_embeddings.weight, bert.bert.embeddings.word_embeddings.weight)
    assert torch.equal(model.language_head.transform.dense.weight, head)
    expected = f"text_weights: {tmp_path} has no head for masked language modeling; it starts random"
    assert caplog.messages == [expected] and not printed.strip().removeprefix(expected)
    state = {name: tensor for name, tensor in bert.bert.state_dict().items() if "layer.1.output.dense" not in name}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    message = (
        f"^text_weights: '{tmp_path}' lacks 2 tensors of a BERT, the first is bert.encoder.layer.1.output.dense.bias$"
    )
    with pytest.raises(ValueError, match=message):
        load_pretrained(model)


def test_bert_of_another_size_is_refused(tokenizer, tmp_path):
    bert_folder(tmp_path, layers=2, vocabulary=70)
    model = make_model(tokenizer, text_weights=str(tmp_path))
    with pytest.raises(ValueError, match="vocab_size is 70, expected .*num_hidden_layers is 2, expected 3"):
        load_pretrained(model)


def test_vision_weights_from_a_file_are_resampled_to_the_grid(tokenizer, tmp_path):
    model = make_model(tokenizer)
    save_file(model.vision.vit.state_dict(), tmp_path / "vit.safetensors")
    same = make_model(tokenizer, vision_weights=str(tmp_path / "vit.safetensors"))
    with torch.no_grad():
        same.vision.vit.norm.weight.fill_(7)
    load_pretrained(same)
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(same.vision(pixels), model.vision(pixels))
    larger = make_model(tokenizer, vision_weights=str(tmp_path / "vit.safetensors"), image_size=64)
    load_pretrained(larger)
    assert larger.vision(torch.randn(1, 3, 64, 64)).shape == (1, 65, 32)
    assert torch.equal(larger.vision.vit.blocks[0].attn.qkv.weight, model.vision.vit.blocks[0].attn.qkv.weight)


def test_missing_weights_say_what_to_do(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="an existing file, got"):
        load_pretrained(make_model(tokenizer, vision_weights=str(tmp_path / "none.pth")))
    with pytest.raises(ValueError, match="--text_weights DIR"):
        load_pretrained(make_model(tokenizer, text_weights=str(tmp_path / "none")))
    state = make_model(tokenizer).vision.vit.state_dict()
    del state["norm.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="missing .*norm.weight"):
        load_pretrained(make_model(tokenizer, vision_weights=str(tmp_path / "part.safetensors")))
    assert "norm.weight" not in load_file(tmp_path / "part.safetensors")


@pytest.mark.parametrize(
    "option, name",
    [("text_weights", "me/bert"), ("vision_weights", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")],
)
def test_without_the_hub_one_request_and_the_ways_out(tokenizer, monkeypatch, tmp_path, option, name):
    asked = []

    def refuse(self, name, **options):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    weights = {"text_weights": name} if option == "text_weights" else {"vision_weights": "timm"}
    with pytest.raises(UsageError) as caught:
        load_pretrained(make_model(tokenizer, **weights))
    expected = (
        f"{option}: {name} is neither a folder nor in the cache, and the hub cannot be reached (ConnectionError); "
    )
    assert str(caught.value).startswith(expected) and asked == [name]
    assert f"--{option} " in str(caught.value) and f"--{option} random" in str(caught.value)
    assert f"hf download {name}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_whole_model_is_a_start_for_pretraining(tokenizer, tmp_path):
    model = make_model(tokenizer)
    save_model(model, tokenizer, tmp_path / "model")
    config = make_config("base", model_weights=str(tmp_path / "model"), hidden_dropout=0.2).model
    assert (config.image_size, config.text_width, config.hidden_dropout) == (32, 32, 0.2)  # sizes are the folder's
    again = VisionLanguageModel(config)
    load_pretrained(again)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert len(weights_tokenizer(tmp_path / "model", None)) == len(tokenizer)
    larger = VisionLanguageModel(make_config("tiny", model_weights=str(tmp_path / "model"), image_size=64).model)
    load_pretrained(larger)
    assert torch.equal(larger.vision.vit.pos_embed[:, 0], model.vision.vit.pos_embed[:, 0])
    assert larger.vision.vit.pos_embed.shape[1] == 65
    wider = VisionLanguageModel(make_config("tiny", model_weights=str(tmp_path / "model"), embed_dim=8).model)
    with pytest.raises(ValueError, match=r"does not fit .* image_projection.weight has size \(16, 32\), expected \(8,"):
        load_pretrained(wider)
    with pytest.raises(ValueError, match="expected a model folder or an ALBEF checkpoint, got .*none"):
        make_config("tiny", model_weights=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="vision_weights: expected 'random' with model_weights"):
        make_config("tiny", model_weights=str(tmp_path / "model"), vision_weights="timm")


@pytest.mark.parametrize(
    "name, message", [("model.safetensors", "cannot be read: .*header"), ("config.json", "is not valid JSON")]
)
def test_a_file_that_cannot_be_read_is_named(tokenizer, tmp_path, name, message):
    save_model(make_model(tokenizer), tokenizer, tmp_path / "model")
    (tmp_path / "model" / name).write_text("{")
    with pytest.raises(ValueError, match=f"model: .*/{name} {message}"):
        read_model(tmp_path / "model")


def test_an_albef_checkpoint_is_a_start_for_pretraining(tokenizer, tmp_path):
    model = make_model(tokenizer, vision_width=64, vision_heads=1, text_width=64, text_heads=1)
    save_albef(model, tmp_path / "albef.pth")
    again = VisionLanguageModel(make_config("base", model_weights=str(tmp_path / "albef.pth")).model)
    load_pretrained(again)
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    state = torch.load(tmp_path / "albef.pth", weights_only=True)["model"]
    torch.save({k: v for k, v in state.items() if not k.startswith("itm_head")}, tmp_path / "headless.pth")
    with pytest.raises(ValueError, match="expected a checkpoint with all heads, .* lacks itm_head"):
        load_weights(again, tmp_path / "headless.pth")

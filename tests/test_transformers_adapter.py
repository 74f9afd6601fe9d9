"""Word maps of transformers' models against full attention maps, which eager attention returns, and their gradients."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    CLIPConfig,
    CLIPModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from softmask_fast.adapters.transformers import word_relevance

SIZES = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96)
TEXT = dict(SIZES, vocab_size=60, max_position_embeddings=20)
IMAGE = dict(SIZES, image_size=32, patch_size=8)


def blip(backend):
    config = BlipConfig(
        text_config=TEXT | dict(encoder_hidden_size=64, is_decoder=True, bos_token_id=1, sep_token_id=2),
        vision_config=IMAGE,
        image_text_hidden_size=32,
    )
    return BlipForImageTextRetrieval._from_config(config, attn_implementation=backend)


def captioner(backend):
    decoder = BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**IMAGE), decoder)
    return VisionEncoderDecoderModel._from_config(config, attn_implementation=backend)


def bridgetower(backend):
    config = BridgeTowerConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=3,
        text_config=dict(TEXT, pad_token_id=1),
        vision_config=dict(hidden_size=64, num_hidden_layers=4, image_size=32, patch_size=8),
    )
    return BridgeTowerForImageAndTextRetrieval._from_config(config, attn_implementation=backend)


def randomised(model):
    """Weights of a size that makes attention uneven, and biases that are not zero."""
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def inputs():
    ids, mask = torch.randint(5, 60, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return dict(pixel_values=torch.randn(2, 3, 32, 32), input_ids=ids, attention_mask=mask)


def matched(model, batch):
    return (model(**batch).itm_score if hasattr(model, "itm_head") else model(**batch).logits)[:, 1]


def caption_score(model, batch):
    """Log-probability of each caption."""
    ids = batch["input_ids"]
    logits = model(batch["pixel_values"], decoder_input_ids=ids, decoder_attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum((1, 2))


def expected_maps(model, attention, score, batch):
    """mean over heads of A * relu(dS/dA), from the map that the layer returns."""
    kept = {}
    handle = attention.register_forward_hook(lambda module, args, outputs: kept.update(map=outputs[1]))
    total = score(model, batch).sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(total, kept["map"])
    return (kept["map"] * gradient.clamp(min=0)).mean(1).detach()


def blip_captioner(backend):
    text = TEXT | dict(encoder_hidden_size=64, is_decoder=True, bos_token_id=1, sep_token_id=2)
    config = BlipConfig(text_config=text, vision_config=IMAGE)
    return BlipForConditionalGeneration._from_config(config, attn_implementation=backend)


def blip_caption_score(model, batch):
    """Log-probability of each caption."""
    ids, logits = batch["input_ids"], model(**batch).logits
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum((1, 2))


MODELS = {
    "blip captioner": (blip_captioner, blip_caption_score, lambda model: model.text_decoder.bert.encoder.layer),
    "blip": (blip, matched, lambda model: model.text_encoder.encoder.layer),
    "captioner": (captioner, caption_score, lambda model: model.decoder.bert.encoder.layer),
    "bridgetower": (bridgetower, matched, lambda model: model.bridgetower.cross_modal_text_layers),
}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_maps_are_those_of_full_attention(name, layer):
    make, score, layers = MODELS[name]
    eager = randomised(make("eager"))
    model = eager
    if name == "captioner":  # BLIP's text encoder and BridgeTower have no other attention than eager
        model = make("sdpa").eval()
        model.load_state_dict(eager.state_dict())
        assert model.decoder.config._attn_implementation == "sdpa"
    batch = inputs()
    expected = expected_maps(eager, layers(eager)[layer].crossattention.self, score, batch)
    attention, returned = layers(model)[layer].crossattention.self, []
    hook = attention.register_forward_hook(lambda module, args, outputs: returned.append(outputs[1]))
    with torch.no_grad(), word_relevance(model, layer) as cam:
        maps = cam.maps(total := score(model, batch))
        word = torch.tensor([2, 3])
        one, keep = cam.maps(total, word), cam.soft_mask(total, word)
        masked, _ = cam.soft_mask(total, word, features := torch.randn(2, 17, 5))
    hook.remove()
    assert (returned[0] is None) == (name == "captioner")  # no fall-back to eager
    assert maps.shape == expected.shape == (2, 7, 17) and expected.amax((0, 1, 2)) > 0
    scale = expected.abs().max().item()
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5 * scale)
    rows = expected[torch.arange(2), word]
    torch.testing.assert_close(one, rows, rtol=1e-4, atol=1e-5 * scale)
    patches = rows[:, 1:]
    low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
    torch.testing.assert_close(keep[:, 1:], 1 - (patches - low) / (high - low), rtol=1e-4, atol=1e-4)
    assert (keep[:, 0] == 1).all()
    torch.testing.assert_close(masked, features * keep[..., None])


def hook_count(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_nothing_stays_on_the_model():
    model, batch = randomised(blip("eager")), inputs()
    before, state, hooks = matched(model, batch), copy.deepcopy(model.state_dict()), hook_count(model)
    with pytest.raises(RuntimeError, match="inside"), word_relevance(model, 0):
        assert hook_count(model) > hooks
        matched(model, batch)
        raise RuntimeError("inside")
    assert torch.is_grad_enabled()
    assert hook_count(model) == hooks
    after = matched(model, batch)
    assert torch.equal(before, after) and after.requires_grad
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        with word_relevance(model, 0):
            pass
        assert not torch.is_grad_enabled()


def test_image_tokens_that_are_hidden_have_no_relevance():
    model = randomised(captioner("sdpa")).decoder
    ids, image, shown = torch.randint(5, 60, (2, 6)), torch.randn(2, 9, 64), torch.ones(2, 9, dtype=torch.long)
    shown[1, 4:] = 0
    with word_relevance(model, 1) as cam:
        logits = model(ids, encoder_hidden_states=image, encoder_attention_mask=shown).logits
        maps = cam.maps(logits.log_softmax(-1)[:, :, 7].sum(1))
    assert maps[1, :, 4:].abs().max() == 0 < maps[1, :, :4].max()
    with word_relevance(model, 1) as cam:
        logits = model(ids[1:], encoder_hidden_states=image[1:, :4]).logits
        alone = cam.maps(logits.log_softmax(-1)[:, :, 7].sum(1))
    torch.testing.assert_close(maps[1:, :, :4], alone, rtol=1e-4, atol=1e-5 * alone.max().item())


def test_mistakes_are_named():
    model, batch = randomised(blip("eager")), inputs()
    with pytest.raises(ValueError, match="layer: expected a number from 0 to 2 of BlipForImageTextRetrieval, got 3"):
        word_relevance(model, 3).__enter__()
    with pytest.raises(ValueError, match="layer: expected an attention module .*'query'"):
        word_relevance(model, model.itm_head).__enter__()
    with pytest.raises(ValueError, match="eval mode"):
        word_relevance(model.train(), 0).__enter__()
    model.eval()
    with torch.inference_mode(), pytest.raises(ValueError, match="expected torch.no_grad, got torch.inference_mode"):
        word_relevance(model, 0).__enter__()
    with word_relevance(model, 0) as cam:
        with pytest.raises(ValueError, match="has not run yet"):
            cam.maps(torch.ones(2))
        matched(model, batch)
        with pytest.raises(ValueError, match="does not depend on it"):
            cam.maps(torch.ones(2))


def weights_in_graph(tensor):
    """The parameters that a tensor's graph, and so its memory, leads to."""
    found, waiting, seen = set(), [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            found |= {node.variable} if hasattr(node, "variable") else set()
    return found


@pytest.mark.parametrize("kind", ["fusion", "dual encoder"])
def test_a_model_that_runs_by_its_parts_has_no_lower_graph(kind):
    """Twice in a block, without no_grad: the second pass begins where gradients are on."""
    torch.manual_seed(0)
    batch = inputs()
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    if kind == "fusion":
        model = randomised(blip("eager"))
        lower = [*model.vision_model.parameters(), *model.text_encoder.encoder.layer[0].parameters()]
        upper = [*model.text_encoder.encoder.layer[2].parameters()]

        def score():
            image = model.vision_model(pixels).last_hidden_state
            text = model.text_encoder(ids, attention_mask=mask, encoder_hidden_states=image)
            return model.itm_head(text.last_hidden_state[:, 0])[:, 1]
    else:
        text, image = (dict(sizes, projection_dim=16) for sizes in (TEXT, IMAGE))
        model = randomised(CLIPModel(CLIPConfig(text_config=text | {"eos_token_id": 2}, vision_config=image)))
        lower = [*model.vision_model.embeddings.parameters(), *model.vision_model.encoder.layers[0].parameters()]
        lower += model.text_model.encoder.parameters()
        upper = [*model.vision_model.encoder.layers[2].parameters()]

        def score():
            image = model.get_image_features(pixels).pooler_output
            return (image * model.get_text_features(ids, mask).pooler_output).sum(-1)

    maps = []
    with word_relevance(model, layer=1) as cam:
        for _ in range(2):
            found = score()
            reached = weights_in_graph(found)
            assert not reached.intersection(lower) and reached.intersection(upper)
            maps.append(cam.maps(found))
    assert torch.equal(*maps) and maps[0].abs().max() > 0
    assert weights_in_graph(score()).issuperset(lower[-2:])  # afterwards the model is as before

"""Word maps of dual encoders, encoder-decoders, Q-Formers and our own models, and who is refused."""

import re
from unittest import mock

import open_clip
import pytest
import torch
import transformers as tf
from code_blocks import ROOT
from small_decoders import FAMILIES, small_decoder
from small_models import small_model, small_tokenizer
from torch.nn import functional as F

from softmask_fast.adapters.transformers import word_relevance

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
TEXT = SIZES | dict(vocab_size=60, max_position_embeddings=20, bos_token_id=1, eos_token_id=2, pad_token_id=0)
VISION = SIZES | dict(image_size=16, patch_size=4)


def uneven(model):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower() and "logit" not in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def close(maps, expected):
    assert expected.max() > 0
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def cam_of(attention_map, score):
    """mean over heads of A * relu(dS/dA) of a map that a graph leads to."""
    (gradient,) = torch.autograd.grad(score.sum(), attention_map, retain_graph=True)
    return (attention_map * gradient.clamp(min=0)).mean(1).detach()


def returned_map(attention):
    """What the attention module returns beside its output, with eager attention: (hook's handle, dict)."""
    kept = {}
    return attention.register_forward_hook(lambda module, args, outputs: kept.update(map=outputs[1])), kept


def clip(backend):
    text, vision = dict(TEXT), dict(VISION)
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return tf.CLIPModel._from_config(config, attn_implementation=backend)


def siglip(backend):
    return tf.SiglipModel._from_config(
        tf.SiglipConfig(text_config=dict(TEXT), vision_config=dict(VISION)), attn_implementation=backend
    )


def siglip2(backend):
    vision = SIZES | dict(num_patches=16, patch_size=4)
    config = tf.Siglip2Config(text_config=dict(TEXT), vision_config=vision)
    return tf.Siglip2Model._from_config(config, attn_implementation=backend)


def pairs(**pixels):
    ids = torch.randint(5, 59, (3, 7))
    ids[:, -1] = 2
    return dict(input_ids=ids, **(pixels or dict(pixel_values=torch.randn(2, 3, 16, 16))))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_clip(backend, layer):
    eager, model, batch = uneven(clip("eager")), uneven(clip(backend)), pairs()
    handle, kept = returned_map(eager.vision_model.encoder.layers[layer].self_attn)
    logits = eager(**batch).logits_per_image
    with torch.no_grad(), word_relevance(model, layer) as cam:
        model(**batch)
    maps = cam.maps()
    assert maps.shape == (2, 3, 16)
    for text in range(3):
        close(maps[:, text], cam_of(kept["map"], logits[:, text])[:, 0, 1:])
    added = cam.maps(cam.outputs.logits_per_image[:, :1] - cam.outputs.logits_per_image[:, 1:])
    close(added[:, 1], cam_of(kept["map"], logits[:, 0] - logits[:, 2])[:, 0, 1:])
    close(cam.maps(cam.outputs.logits_per_image[:, 1]), maps[:, 1])
    assert [picture.shape for picture in cam.pictures(maps)] == [(3, 4, 4)] * 2


def head_map(attention, query, key, mask=None):
    """The map (B, H, 1, N) of an `nn.MultiheadAttention`, by its own weights."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k = (
        F.linear(x, w, b).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key), weights, biases, strict=False)
    )
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return (logits if mask is None else logits.masked_fill(~mask, float("-inf"))).softmax(-1)


def plain_multihead(attention, mask=None):
    """Replaces the module's forward by one that keeps its map for autograd."""
    kept = {}

    def forward(query, key, value, **kwargs):
        kept["map"] = head_map(attention, query, key, mask)
        v = F.linear(value, attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2])
        out = kept["map"] @ v.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        return attention.out_proj(out.transpose(1, 2).flatten(2)), None

    attention.forward = forward
    return kept


@pytest.mark.parametrize("make", [siglip, siglip2])
def test_siglip(make):
    plain, model = uneven(make("eager")), uneven(make("sdpa"))
    batch, mask = pairs(), None
    if make is siglip2:
        shapes = torch.tensor([[4, 4], [3, 5]])
        mask = torch.arange(16) < shapes.prod(1)[:, None]
        batch = pairs(pixel_values=torch.randn(2, 16, 48), pixel_attention_mask=mask.int(), spatial_shapes=shapes)
        mask = mask[:, None, None]
    kept = plain_multihead(plain.vision_model.head.attention, mask)
    logits = plain(**batch).logits_per_image
    with torch.no_grad(), word_relevance(model) as cam:
        torch.testing.assert_close(model(**batch).logits_per_image, logits)
        maps = cam.maps()
    for text in range(3):
        close(maps[:, text], cam_of(kept["map"], logits[:, text])[:, 0])
    shapes = [(3, 4, 4), (3, 4, 4) if make is siglip else (3, 3, 5)]
    assert [picture.shape for picture in cam.pictures(maps)] == shapes
    with pytest.raises(
        ValueError, match="layer: expected None, as Siglip.* reads the patches by its pooling head alone; got 0"
    ):
        word_relevance(model, 0).__enter__()


def open_clip_model(**vision):
    text = dict(context_length=7, vocab_size=60, width=32, heads=2, layers=1)
    vision = vision or dict(image_size=16, patch_size=4, width=32, head_width=16, layers=2)
    timm = "timm_model_name" in vision
    kind = open_clip.model.CustomTextCLIP if timm else open_clip.model.CLIP
    return uneven(kind(embed_dim=192 if timm else 32, vision_cfg=vision, text_cfg=text))


def test_open_clip():
    images, texts = torch.randn(2, 3, 16, 16), torch.randint(1, 59, (3, 7))
    plain, model = open_clip_model(), open_clip_model()
    for layer in (0, 1):
        kept = plain_multihead(plain.visual.transformer.resblocks[layer].attn)
        image, text, scale = plain(images, texts)
        logits = scale * image @ text.mT
        with torch.no_grad(), word_relevance(model, layer) as cam:
            model(images, texts)
        maps = cam.maps()
        for number in range(3):
            close(maps[:, number], cam_of(kept["map"], logits[:, number])[:, 0, 1:])
    assert cam.pictures(maps)[0].shape == (3, 4, 4)


def test_open_clip_with_timm_and_a_pooling_head():
    timm = dict(timm_model_name="vit_tiny_patch16_224", timm_proj="none", image_size=224)
    model = open_clip_model(**timm, timm_pool="map")
    kept = {}
    batch = torch.randn(2, 3, 224, 224), torch.randint(1, 59, (3, 7))
    with torch.no_grad(), word_relevance(model) as cam:
        image, text, _ = model(*batch)
        maps = cam.maps(image @ text.mT)

    def plain(q, k, v, **_):
        kept["map"] = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return kept["map"] @ v

    trunk = model.visual.trunk
    tokens = trunk.forward_features(batch[0]).detach()
    with mock.patch("timm.layers.attention_pool.F.scaled_dot_product_attention", plain):
        image = F.normalize(trunk.forward_head(tokens), dim=-1)
    for number in range(3):
        close(maps[:, number], cam_of(kept["map"], image @ text[number])[:, 0])
    assert cam.pictures(maps)[0].shape == (3, 14, 14)
    with pytest.raises(ValueError, match="a .CLS. token or a pooling head, got CustomTextCLIP with VisionTransformer"):
        word_relevance(open_clip_model(**timm, timm_pool="avg")).__enter__()


def test_mistakes_of_dual_encoders_are_named():
    model = uneven(clip("sdpa"))
    with pytest.raises(ValueError, match="layer: expected a number from 0 to 1 of CLIPModel, got 2"):
        word_relevance(model, 2).__enter__()
    with word_relevance(model, 0) as cam, pytest.raises(ValueError, match="the layer has not run yet"):
        cam.maps()
    resnet = open_clip_model(layers=[1, 1, 1, 1], width=8, head_width=16, image_size=32)
    with pytest.raises(ValueError, match="a .CLS. token or a pooling head, got CLIP with ModifiedResNet"):
        word_relevance(resnet).__enter__()


def gpt2_captioner(backend):
    decoder = tf.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=20, add_cross_attention=True, is_decoder=True
    )
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VISION), decoder)
    return tf.VisionEncoderDecoderModel._from_config(config, attn_implementation=backend)


def bart_captioner(backend):
    decoder = tf.MBartConfig(
        d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=48, vocab_size=60,
        max_position_embeddings=20, add_cross_attention=True, is_decoder=True, decoder_start_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return tf.VisionEncoderDecoderModel._from_config(config, attn_implementation=backend)


@pytest.mark.parametrize("make, path", [(gpt2_captioner, "transformer.h"), (bart_captioner, "model.decoder.layers")])
def test_captioners(make, path):
    """Words by the decoder's ids, with padding, and by labels."""
    eager, model = uneven(make("eager")), uneven(make("sdpa"))
    layer = eager.decoder.get_submodule(path)[0]
    handle, kept = returned_map(layer.crossattention if hasattr(layer, "crossattention") else layer.encoder_attn)
    ids, mask = torch.randint(5, 60, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    batch = dict(pixel_values=torch.randn(2, 3, 16, 16), decoder_input_ids=ids, decoder_attention_mask=mask)
    logits = eager(**batch).logits.log_softmax(-1)
    score = (logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)
    expected = cam_of(kept["map"], score)
    with torch.no_grad(), word_relevance(model, 0) as cam:
        model(**batch)
    maps = cam.maps()
    close(maps[:, 1:], expected[:, :-1])
    close(cam.maps(word_index=torch.tensor([[2, 3], [1, 3]]))[1], expected[1, [0, 2]])
    with torch.no_grad(), word_relevance(model, 1) as cam:
        model(**batch)
    cam.maps()
    assert cam.notes == ["sample 1: zero at 4: not read by the score"] or cam.notes == []

    if make is bart_captioner:
        labels = ids.where(mask == 1, -100)
        logits = eager(batch["pixel_values"], labels=labels).logits.log_softmax(-1)
        score = (logits.gather(2, ids[..., None])[..., 0] * mask).sum(1)
        expected = cam_of(kept["map"], score)
        with torch.no_grad(), word_relevance(model, 0) as cam:
            model(batch["pixel_values"], labels=labels)
        close(cam.maps()[:, :4], expected[:, :4])


def mllama(backend):
    text = SIZES | dict(
        num_hidden_layers=4, num_key_value_heads=1, cross_attention_layers=[1, 3], vocab_size=60, pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=1e4), bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, num_hidden_layers=1, num_global_layers=1, attention_heads=2, intermediate_size=48,
        vision_output_dim=64, image_size=16, patch_size=8, max_num_tiles=2, intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2]],
    )  # fmt: skip
    config = tf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=59)
    return tf.MllamaForConditionalGeneration._from_config(config, attn_implementation=backend)


def test_mllama():
    """A decoder with cross-attention whose mask differs from row to row, and from sample to sample."""
    eager, model = uneven(mllama("eager")), uneven(mllama("sdpa"))
    for one in (eager, model):
        for name, parameter in one.named_parameters():
            if "gate" in name:
                torch.nn.init.constant_(parameter, 0.7)
    ids, seen = torch.randint(5, 58, (2, 7)), torch.ones(2, 7, 1, 2, dtype=torch.long)
    ids[:, 1] = 59
    seen[:, 0], seen[0, :, :, 1] = 0, 0  # the model lets a word that sees no image see all; a sample has one tile
    batch = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(2, 1, 2, 3, 16, 16),
        aspect_ratio_ids=torch.tensor([[1], [2]]),
        aspect_ratio_mask=torch.tensor([[[1, 0]], [[1, 1]]]),
        cross_attention_mask=seen,
    )
    _, kept = returned_map(eager.model.language_model.layers[1].cross_attn)
    logits = eager(**batch).logits.log_softmax(-1)
    expected = cam_of(kept["map"], sum(logits[:, p - 1].gather(1, ids[:, p, None])[:, 0] for p in (4, 5, 6)))
    with torch.no_grad(), word_relevance(model, 0, answer=4) as cam:
        model(**batch)
    maps = cam.maps()
    close(maps[:, :4], expected[:, :4])
    close(maps[:, 4:], expected[:, 3:-1])


def blip2(backend, kind=tf.Blip2ForConditionalGeneration, **text):
    opt = dict(
        model_type="opt", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48, vocab_size=60,
        word_embed_proj_dim=32, max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    former = SIZES | dict(vocab_size=400, encoder_hidden_size=32, cross_attention_frequency=1)
    configuration = tf.InstructBlipConfig if kind is tf.InstructBlipForConditionalGeneration else tf.Blip2Config
    config = configuration(
        text_config=text or opt, vision_config=dict(VISION), qformer_config=former, num_query_tokens=4,
        image_token_index=59, image_token_id=59,
    )  # fmt: skip
    return kind._from_config(config, attn_implementation=backend)


@pytest.mark.parametrize("kind", [tf.Blip2ForConditionalGeneration, tf.InstructBlipForConditionalGeneration])
def test_query_formers(kind):
    """map(word) = sum over query tokens of rel(word, query) * rel(query, image), of a padded batch."""
    eager, model = uneven(blip2("eager", kind)), uneven(blip2("sdpa", kind))
    ids = torch.cat([torch.full((2, 4), 59), torch.randint(5, 58, (2, 6))], 1)
    mask = torch.ones_like(ids)
    ids[1], mask[1, :2] = torch.tensor([0, 0, 59, 59, 59, 59, 7, 8, 9, 10]), 0
    batch = dict(pixel_values=torch.randn(2, 3, 16, 16), input_ids=ids, attention_mask=mask)
    if kind is tf.InstructBlipForConditionalGeneration:
        batch |= dict(qformer_input_ids=torch.randint(5, 58, (2, 3)), qformer_attention_mask=torch.ones(2, 3).long())
    language = eager.language_model.model.decoder.layers[0].self_attn
    former = [module for name, module in eager.named_modules() if name.endswith("crossattention.attention")][-1]
    (_, words), (_, image) = returned_map(language), returned_map(former)
    logits = eager(**batch).logits.log_softmax(-1)
    score = torch.stack([logits[:, p - 1].gather(1, ids[:, p, None])[:, 0] for p in (8, 9)]).sum(0)
    to_queries, to_image = cam_of(words["map"], score), cam_of(image["map"], score)
    with torch.no_grad(), word_relevance(model, 0, answer=8) as cam:
        model(**batch)
    maps = cam.maps()
    assert maps.shape == (2, 10, 17)
    for sample, first in ((0, 0), (1, 2)):
        for word in range(4 + first, 10):
            row = to_queries[sample, word - int(word >= 8), first : first + 4]
            close(maps[sample, word], row @ to_image[sample])
    close(cam.maps(word_index=torch.tensor([7, 7])), maps[:, 7])


def test_our_own_model():
    tokenizer = small_tokenizer()
    model = small_model(tokenizer).eval()
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(5, 60, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    with torch.no_grad(), word_relevance(model, 1) as cam:
        with pytest.raises(ValueError, match="maps: expected a call of `model.match_logits`"):
            cam.maps()
        model.match_logits(pixels, ids, mask)
    expected = model.word_relevance(pixels, ids, mask, 1)[:, :, 1:]
    torch.testing.assert_close(cam.maps(), expected)
    torch.testing.assert_close(cam.maps(torch.tensor([2, 3])), expected[[0, 1], [2, 3]])
    assert cam.pictures(cam.maps())[0].shape == (7, 4, 4)
    assert "match_logits" not in vars(model)


def test_who_is_refused():
    git = tf.GitForCausalLM(tf.GitConfig(vision_config=dict(VISION), **TEXT))
    with pytest.raises(ValueError, match="got GitForCausalLM, which does not say which tokens are the image's"):
        word_relevance(git.eval(), 0).__enter__()
    image_tokens = torch.zeros(1, 4, dtype=torch.bool)
    with torch.no_grad(), word_relevance(git, 0, image_tokens=image_tokens):
        with pytest.raises(
            ValueError, match="attention interface, got GitForCausalLM, whose Git.*Attention does not run by it"
        ):
            git(torch.randint(5, 59, (1, 4)))
    t5 = dict(model_type="t5", d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=48, vocab_size=60)
    model = uneven(blip2("sdpa", **t5))
    ids = torch.cat([torch.full((1, 4), 59), torch.randint(5, 58, (1, 3))], 1)
    with torch.no_grad(), word_relevance(model, 0):
        with pytest.raises(ValueError, match="without a position bias, got T5Attention with it"):
            model(pixel_values=torch.randn(1, 3, 16, 16), input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="expected one of transformers, open_clip or softmask_fast, got Linear"):
        word_relevance(torch.nn.Linear(2, 2).eval(), 0).__enter__()


# What the tests of this file, of test_decoder_maps.py and of test_transformers_adapter.py compare or see refused.
TESTED = {
    "BlipForImageTextRetrieval", "BridgeTowerForImageAndTextRetrieval", "VisionEncoderDecoderModel", "CLIP",
    "CLIPModel", "SiglipModel", "Siglip2Model", "CustomTextCLIP", "VisionLanguageModel",
    "Blip2ForConditionalGeneration",
    "InstructBlipForConditionalGeneration", "MllamaForConditionalGeneration",
    "BlipForConditionalGeneration",
}  # fmt: skip
REFUSED = {"T5Attention", "GitForCausalLM", "ModifiedResNet"}


def test_the_support_table_is_what_is_tested():
    decoders = {type(small_decoder(family)).__name__ for family in FAMILIES}
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| (yes|no) \|", (ROOT / "docs/word_maps.md").read_text(), re.MULTILINE)
    named = {"yes": set(), "no": set()}
    for models, answer in rows:
        named[answer] |= set(re.findall(r"`(\w+)`", models))
    assert named == {"yes": TESTED | decoders, "no": REFUSED}

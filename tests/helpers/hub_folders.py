"""Folders as the hub has them: small random models with their processors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as tf
from open_clip.model import CLIP
from safetensors.torch import save_file
from small_decoders import CONFIGS, TEXT, VISION
from small_models import small_blip, small_model, small_tokenizer

from softmask_fast.model.export import save_model

SIZE = {"height": 16, "width": 16}


def _save(folder: Path, *parts) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


def _even(model):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower() and "logit" not in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def llava(folder: Path) -> Path:
    """A decoder; its processor cuts the center out of the picture."""
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    settings = CONFIGS["llava"]()
    settings |= dict(image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    settings["text_config"] = settings["text_config"] | dict(vocab_size=len(tokenizer))
    model = _even(tf.LlavaForConditionalGeneration(tf.LlavaConfig(**settings)))
    images = tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE)
    processor = tf.LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return _save(folder, model, processor)


def clip(folder: Path) -> Path:
    tokenizer = small_tokenizer()
    text = TEXT | dict(vocab_size=len(tokenizer), max_position_embeddings=32, eos_token_id=tokenizer.sep_token_id)
    model = _even(tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=dict(VISION), projection_dim=16)))
    images = tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE)
    return _save(folder, model, tf.CLIPProcessor(images, tokenizer))


def blip(folder: Path) -> Path:
    tokenizer = small_tokenizer()
    processor = tf.BlipProcessor(tf.BlipImageProcessor(size=SIZE), tokenizer)
    return _save(folder, _even(small_blip(16, 4, 3, len(tokenizer))), processor)


def captioner(folder: Path) -> Path:
    tokenizer = small_tokenizer()
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    decoder = tf.BertConfig(**sizes, vocab_size=len(tokenizer), is_decoder=True, add_cross_attention=True)
    vision = tf.ViTConfig(**sizes, image_size=16, patch_size=4)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, decoder)
    config.decoder_start_token_id, config.pad_token_id = tokenizer.cls_token_id, tokenizer.pad_token_id
    model = _even(tf.VisionEncoderDecoderModel(config))
    model.generation_config.decoder_start_token_id = tokenizer.cls_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return _save(folder, model, tf.ViTImageProcessor(size=SIZE), tokenizer)


def open_clip(folder: Path) -> Path:
    """As open_clip writes them; the tokenizer is its own."""
    text = dict(context_length=12, vocab_size=49408, width=32, heads=2, layers=1)
    vision = dict(image_size=16, patch_size=4, width=32, head_width=16, layers=2)
    sizes = dict(embed_dim=32, vision_cfg=vision, text_cfg=text)
    model = _even(CLIP(**sizes))
    folder.mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": {}}))
    return folder


def blip_captioner(folder: Path) -> Path:
    tokenizer = small_tokenizer()
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    ids = dict(bos_token_id=tokenizer.cls_token_id, pad_token_id=tokenizer.pad_token_id)
    ids |= dict(sep_token_id=tokenizer.sep_token_id, eos_token_id=tokenizer.sep_token_id)
    text = dict(sizes, vocab_size=len(tokenizer), encoder_hidden_size=32, is_decoder=True, **ids)
    config = tf.BlipConfig(text_config=text, vision_config=dict(sizes, image_size=16, patch_size=4))
    processor = tf.BlipProcessor(tf.BlipImageProcessor(size=SIZE), tokenizer)
    return _save(folder, _even(tf.BlipForConditionalGeneration(config)), processor)


def own(folder: Path) -> Path:
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    save_model(small_model(tokenizer, fusion_layers=2), tokenizer, folder)
    return folder


FOLDERS = {
    "own": own,
    "open_clip": open_clip,
    "llava": llava,
    "clip": clip,
    "blip": blip,
    "captioner": captioner,
    "blip_captioner": blip_captioner,
}

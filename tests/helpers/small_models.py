"""Small random models, and the files that a page of the documentation expects."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor

from softmask_fast.config import ModelConfig
from softmask_fast.data.sources import open_source
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.model.export import save_model
from softmask_fast.model.vision_language import VisionLanguageModel

TWO_HEADS = dict(vision_width=32, vision_heads=2, text_width=32, text_heads=2)


def small_tokenizer(source=None):
    """A tokenizer of the captions of a source; by default of eight scenes."""
    source = open_source("shapes:num=8", split="val", image_size=32) if source is None else source
    return train_tokenizer([caption for i in range(len(source)) for caption in source.read(i).captions], 200)


def small_model(tokenizer, **options):
    """A random model of the smallest size, by default with ALBEF's heads of 64, in training mode."""
    sizes = dict(
        image_size=32, vision_model="vit_tiny_patch16_224", vision_patch_size=8, vision_width=64, vision_depth=1,
        vision_heads=1, vision_weights="random", text_weights="random", text_width=64, text_heads=1, text_layers=1,
        fusion_layers=3, embed_dim=16, vocab_size=len(tokenizer), soft_mask_layer=0, max_tokens=32, hidden_dropout=0.0,
    )  # fmt: skip
    return VisionLanguageModel(ModelConfig(**sizes | options))


def small_pair(source, **options):
    """A random model with two heads, in evaluation mode, and the tokenizer of the source's captions."""
    tokenizer = small_tokenizer(source)
    torch.manual_seed(0)
    return small_model(tokenizer, **TWO_HEADS, **options).eval(), tokenizer


def small_blip(image_size, patch_size, layers, vocabulary):
    sizes = dict(hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48)
    text = dict(sizes, vocab_size=vocabulary, encoder_hidden_size=32, is_decoder=True, bos_token_id=1, sep_token_id=2)
    vision = dict(sizes, image_size=image_size, patch_size=patch_size)
    return BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision)).eval()


def tutorial_folder(folder: Path) -> None:
    """Writes images, tables, a random BLIP with the released model's image size, and a trained model's folder."""
    (folder / "photos").mkdir()
    shapes = open_source("shapes:num=24", split="train", image_size=32)
    names = ["dog.jpg", *(f"{number}.jpg" for number in range(1, 24))]
    rows = []
    for number, name in enumerate(names):
        sample = shapes.read(number)
        Image.fromarray(sample.image).save(folder / "photos" / name)
        rows.append(f'{name},"{sample.captions[0]}"')
    for table, part in (("pairs.csv", rows[:12]), ("held_out.csv", rows[12:])):
        (folder / table).write_text("\n".join(["image,caption", *part]) + "\n")
    tokenizer = small_tokenizer()
    save_model(small_model(tokenizer), tokenizer, folder / "runs/photos/model")
    name = folder / "Salesforce/blip-itm-base-coco"
    small_blip(384, 16, 9, len(tokenizer)).save_pretrained(name)
    BlipProcessor(BlipImageProcessor(size={"height": 384, "width": 384}), tokenizer).save_pretrained(name)

"""Small random models, and folders that hold what a page of the documentation finds."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor

from softmask_fast.data.sources import open_source
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.model.export import save_model
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.training.options import make_config


def small_tokenizer():
    captions = open_source("shapes:num=8", split="val", image_size=32)
    return train_tokenizer([caption for i in range(8) for caption in captions.read(i).captions], 200)


def small_model(tokenizer):
    """A random model of the smallest size, with ALBEF's heads of 64."""
    config = make_config(
        "tiny", image_size=32, vision_width=64, vision_depth=1, vision_heads=1, text_width=64, text_heads=1,
        text_layers=1, fusion_layers=3, embed_dim=16, vocab_size=len(tokenizer), soft_mask_layer=0,
    )  # fmt: skip
    return VisionLanguageModel(config.model)


def small_blip(image_size, patch_size, layers, vocabulary):
    sizes = dict(hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48)
    text = dict(sizes, vocab_size=vocabulary, encoder_hidden_size=32, is_decoder=True, bos_token_id=1, sep_token_id=2)
    vision = dict(sizes, image_size=image_size, patch_size=patch_size)
    return BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision)).eval()


def tutorial_folder(folder: Path) -> None:
    """Images, tables, a random BLIP of the released one's picture size, and what training would have left."""
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

"""Small random decoders of transformers that read images as tokens, and batches for them."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE, PAD, FAKE, GLOBAL, NEWLINE = 90, 0, 91, 92, 93
TEXT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    vocab_size=100, head_dim=8, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MROPE = dict(rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=1e4))
VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4
)
QWEN_VISION = dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=48, patch_size=4)
TOKENS = dict(image_token_id=IMAGE)
LLAVA_TOKENS = dict(image_token_index=IMAGE)
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _llava():
    vision = VISION | dict(model_type="clip_vision_model")
    return dict(text_config=TEXT | dict(model_type="llama"), vision_config=vision)


CONFIGS = {
    "llava": lambda: _llava() | LLAVA_TOKENS | dict(vision_feature_layer=-1),
    "llava_next": lambda: _llava() | LLAVA_TOKENS | dict(vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS),
    "llava_onevision": lambda: dict(
        text_config=TEXT | dict(model_type="qwen2"), vision_config=VISION | dict(model_type="siglip_vision_model"),
        vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_9", video_token_id=94,
        **TOKENS,
    ),
    "qwen2_vl": lambda: dict(
        text_config=TEXT | MROPE, vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4),
        video_token_id=94, vision_start_token_id=95, vision_end_token_id=96, **TOKENS,
    ),
    "qwen2_5_vl": lambda: dict(
        text_config=TEXT | MROPE, video_token_id=94, vision_start_token_id=95, vision_end_token_id=96,
        vision_config=QWEN_VISION | dict(out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]), **TOKENS,
    ),
    "qwen3_vl": lambda: dict(
        text_config=TEXT | MROPE, video_token_id=94, vision_start_token_id=95, vision_end_token_id=96,
        vision_config=QWEN_VISION | dict(out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[0]),
        **TOKENS,
    ),
    "internvl": lambda: dict(
        text_config=TEXT | dict(model_type="qwen2"), image_seq_length=4, vision_feature_layer=-1,
        vision_config=VISION | dict(image_size=[16, 16], patch_size=[4, 4]), **TOKENS,
    ),
    "paligemma": lambda: dict(
        text_config=TEXT | dict(model_type="gemma"), vision_config=VISION | dict(model_type="siglip_vision_model"),
        projection_dim=32, **LLAVA_TOKENS,
    ),
    "idefics3": lambda: dict(
        text_config=TEXT | dict(model_type="llama"), vision_config=VISION, scale_factor=2, **TOKENS
    ),
    "smolvlm": lambda: dict(
        text_config=TEXT | dict(model_type="llama"), vision_config=VISION, scale_factor=2, **TOKENS
    ),
    "gemma3": lambda: dict(
        text_config=TEXT | dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        vision_config=VISION, mm_tokens_per_image=4, boi_token_index=95, eoi_token_index=96, **LLAVA_TOKENS,
    ),
}  # fmt: skip
FAMILIES = list(CONFIGS)


def small_decoder(family, backend="sdpa", **text):
    """A random model of a family, with weights that make attention uneven."""
    settings = CONFIGS[family]()
    settings["text_config"] = settings["text_config"] | text
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=backend)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def pixels(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))


def image_pieces(family):
    """For two images (the second a wide one): the ids of each, and the arguments of both together."""
    run = [IMAGE]
    if family == "llava":
        return [run * 16] * 2, dict(pixel_values=pixels(2, 3, 16, 16))
    if family in ("llava_next", "llava_onevision"):  # 2 x 2 tiles; 1 x 2, of which the padding rows are cut off
        arguments = dict(pixel_values=pixels(2, 5, 3, 16, 16), image_sizes=torch.tensor([[32, 32], [8, 32]]))
        return [run * (16 + 8 * 9), run * (16 + 2 * 9)], arguments
    if family.startswith("qwen"):
        grids = torch.tensor([[1, 4, 4], [1, 4, 8]])
        return [[95, *run * n, 96] for n in (4, 8)], dict(pixel_values=pixels(48, 96), image_grid_thw=grids)
    if family == "internvl":  # one tile; two tiles side by side and their overview
        return [[95, *run * n, 96] for n in (4, 12)], dict(pixel_values=pixels(4, 3, 16, 16))
    if family == "paligemma":
        return [run * 16] * 2, dict(pixel_values=pixels(2, 3, 16, 16))
    if family == "gemma3":
        return [[95, *run * 4, 96]] * 2, dict(pixel_values=pixels(2, 3, 16, 16))
    if family in ("idefics3", "smolvlm"):  # an image that was not cut; 1 x 2 tiles and their overview
        whole = [FAKE, GLOBAL, *run * 4, FAKE]
        tiles = [FAKE, 97, *run * 4, FAKE, 98, *run * 4, NEWLINE, NEWLINE]
        return [whole, tiles + whole], dict(pixel_values=pixels(2, 3, 3, 16, 16))
    raise ValueError(family)


def small_batch(family, padding_side="left", answer=3):
    """Two samples with an image each, of different lengths, padded: (inputs, position of each answer)."""
    images, arguments = image_pieces(family)
    generator = torch.Generator().manual_seed(2)
    rows = []
    for image, words in zip(images, (7, 5), strict=True):
        text = torch.randint(5, 80, (2 + words,), generator=generator).tolist()
        rows.append([1, *text[:2], *image, *text[2:]])
    length = max(map(len, rows))
    ids, mask, first = [], [], []
    for row in rows:
        padding, ones = [PAD] * (length - len(row)), [1] * len(row)
        left = padding_side == "left"
        ids.append(padding + row if left else row + padding)
        mask.append([0] * len(padding) + ones if left else ones + [0] * len(padding))
        first.append((length if left else len(row)) - answer)
    inputs = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **arguments)
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if family == "paligemma":  # the answer is the suffix, which is causal
        inputs["token_type_ids"] = (torch.arange(length) >= torch.tensor(first)[:, None]).int()
    if family == "gemma3":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if family in ("idefics3", "smolvlm"):
        pixel_mask = torch.ones(2, 3, 16, 16, dtype=torch.bool)
        inputs["pixel_values"][0, 1:], inputs["pixel_attention_mask"] = 0, pixel_mask
    return inputs, torch.tensor(first)

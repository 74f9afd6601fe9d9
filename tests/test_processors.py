"""Real processors of transformers with small random models: from a picture and a question to the maps of words."""

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from small_decoders import CONFIGS, PINPOINTS
from tokenizers import ByteLevelBPETokenizer

from softmask_fast.adapters.hub import _in_picture, explain_image
from softmask_fast.adapters.image_layouts import find_layouts

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
SIDE = {"height": 16, "width": 16}


def tokenizer(**named):
    """Bytes and a few words; special tokens by the names that processors ask for, as in image_token="<image>"."""
    bytes_of_text = ByteLevelBPETokenizer()
    text = ["what is it? a small red circle\n\n on the left\n user: assistant:"] * 4
    bytes_of_text.train_from_iterator(text, vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"])
    common = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    names = list(named.values()) + [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=bytes_of_text._tokenizer, additional_special_tokens=names, **common
    )
    for name, token in named.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def model(family, words, **ids):
    settings = CONFIGS[family]()
    settings["text_config"] = settings["text_config"] | dict(vocab_size=len(words))
    made = tf.AutoModelForImageTextToText.from_config(tf.AutoConfig.for_model(family, **settings | ids))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return made.eval()


def template(image):
    return dict(chat_template=TEMPLATE.replace("IMAGE", image))


def qwen(family):
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {f"vision_{end}": f"<|vision_{end}|>" for end in ("start", "end")}
    words = tokenizer(**{f"{name}_token": token for name, token in names.items()})
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in names.items()}
    images = tf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    kind = {"qwen2_vl": tf.Qwen2VLProcessor, "qwen2_5_vl": tf.Qwen2_5_VLProcessor, "qwen3_vl": tf.Qwen3VLProcessor}
    videos = tf.Qwen3VLVideoProcessor() if family == "qwen3_vl" else tf.Qwen2VLVideoProcessor()
    chat = template("<|vision_start|><|image_pad|><|vision_end|>")
    return model(family, words, **ids), kind[family](images, words, videos, **chat)


def internvl(family):
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    images = tf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=6)
    chat = template("<IMG_CONTEXT>")
    processor = tf.InternVLProcessor(images, words, tf.InternVLVideoProcessor(), image_seq_length=4, **chat)
    return model(family, words, image_token_id=words.context_image_token_id), processor


def paligemma(family):
    images = tf.SiglipImageProcessor(size=SIDE)
    images.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(images, tokenizer(image_token="<image>"))
    return model(family, processor.tokenizer, image_token_index=processor.image_token_id), processor


def idefics(family):
    names = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    words = tokenizer(**{f"special_{number}": name for number, name in enumerate(names)})
    sizes = dict(size={"longest_edge": 48}, max_image_size={"longest_edge": 16})
    common = dict(tokenizer=words, image_seq_len=4, **template("<image>"))
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="num2words is not installed, which SmolVLM's processor needs")
        videos = tf.SmolVLMVideoProcessor()
        processor = tf.SmolVLMProcessor(tf.SmolVLMImageProcessor(**sizes), video_processor=videos, **common)
    else:
        processor = tf.Idefics3Processor(tf.Idefics3ImageProcessor(**sizes), **common)
    return model(family, words, image_token_id=words.convert_tokens_to_ids("<image>")), processor


def gemma3(family):
    words = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    images = tf.Gemma3ImageProcessor(size=SIDE)
    processor = tf.Gemma3Processor(images, words, image_seq_length=4, **template("<start_of_image>"))
    ids = dict(image_token_index=words.image_token_id, boi_token_index=words.boi_token_id)
    return model(family, words, **ids, eoi_token_index=words.eoi_token_id), processor


def llava_next(family):
    words = tokenizer(image_token="<image>")
    images = tf.LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size=SIDE, image_grid_pinpoints=PINPOINTS)
    processor = tf.LlavaNextProcessor(
        images, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        **template("<image>"),
    )  # fmt: skip
    return model(family, words, image_token_index=words.image_token_id), processor


def llava_onevision(family):
    words = tokenizer(image_token="<image>", video_token="<video>")
    images = tf.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=PINPOINTS)
    processor = tf.LlavaOnevisionProcessor(
        images, words, tf.LlavaOnevisionVideoProcessor(), num_image_tokens=16, vision_feature_select_strategy="full",
        **template("<image>"),
    )  # fmt: skip
    return model(family, words, image_token_id=words.image_token_id, video_token_id=words.video_token_id), processor


FAMILIES = {  # and the grid of a picture of 90 x 40 pixels
    "llava_next": (llava_next, (4, 8)), "llava_onevision": (llava_onevision, (4, 8)), "qwen2_vl": (qwen, (2, 6)),
    "qwen2_5_vl": (qwen, (2, 6)), "qwen3_vl": (qwen, (2, 6)), "internvl": (internvl, (2, 4)),
    "paligemma": (paligemma, (4, 4)), "idefics3": (idefics, (4, 6)), "smolvlm": (idefics, (4, 6)),
    "gemma3": (gemma3, (2, 2)),
}  # fmt: skip


def picture(width, height):
    """Brighter downwards in red, to the right in green."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([y * 255 / height, x * 255 / width, 0 * x], -1).astype(np.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_to_the_maps_of_its_words(family):
    make, grid = FAMILIES[family]
    small, processor = make(family)
    found = explain_image(small, processor, picture(90, 40), "what is it?", layer=0, max_new_tokens=3)
    prompt = [word for word in found.words if word.part == "prompt"]
    assert [word.text for word in prompt][-4 if family != "paligemma" else -3 :][:3] == ["what", "is", "it?"]
    assert {word.heat.shape for word in found.words} == {grid}
    assert max(word.heat.max() for word in prompt) > 0 and np.isfinite(found.value)
    assert all(0 <= word.heat.min() for word in found.words)
    before = [] if family == "paligemma" else ["zero, before the image, which it cannot see: user:"]
    assert [note for note in found.notes if "before" in note] == before
    given = explain_image(small, processor, picture(90, 40), "what is it?", layer=0, answer=" a red circle")
    assert [word.text for word in given.words if word.part == "answer"] == ["a", "red", "circle"]


@pytest.mark.parametrize(
    "processor, seen",
    [
        (tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIDE), (0, 0.25, 1, 0.75)),
        (tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIDE), (0.25, 0.375, 0.75, 0.625)),
        (tf.LlavaImageProcessor(size={"shortest_edge": 16}, crop_size=SIDE, do_pad=True), (-0.5, 0, 1.5, 1)),
        (tf.SiglipImageProcessor(size=SIDE), (0, 0, 1, 1)),
    ],
)
def test_what_a_processor_cuts_out_or_pads(processor, seen):
    """Of a picture of 80 x 40 pixels: a map of ones lies where the model saw the picture."""
    image = picture(80, 40)
    maps = _in_picture(torch.ones(1, 4, 4), processor, image)[0]
    top, left, bottom, right = seen
    inside = max(0, top) * maps.shape[0], min(1, bottom) * maps.shape[0], left * maps.shape[1], right * maps.shape[1]
    low, high, first, last = map(round, inside)
    assert maps[low:high, first:last].min() > 0
    assert maps.sum() == pytest.approx(maps[low:high, first:last].sum().item())
    share = (min(1, bottom) - max(0, top)) / (bottom - top)  # of the grid, on the picture
    assert maps.sum().item() == pytest.approx(16 * share)


@pytest.mark.parametrize("kind", ["Blip2", "InstructBlip"])
def test_a_question_to_query_formers(kind):
    images, words = tf.BlipImageProcessor(size=SIDE), tokenizer()
    parts = (images, words) if kind == "Blip2" else (images, words, tokenizer())
    processor = getattr(tf, f"{kind}Processor")(*parts, num_query_tokens=4)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = sizes | dict(model_type="opt", ffn_dim=48, vocab_size=len(words), word_embed_proj_dim=32, pad_token_id=0)
    former = sizes | dict(intermediate_size=48, vocab_size=len(words), encoder_hidden_size=32)
    config = getattr(tf, f"{kind}Config")(
        text_config=text,
        vision_config=sizes | dict(intermediate_size=48, image_size=16, patch_size=4),
        qformer_config=former,
        num_query_tokens=4,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    small = getattr(tf, f"{kind}ForConditionalGeneration")(config).eval()
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    found = explain_image(small, processor, picture(40, 20), "what is it?", layer=0, answer=" a red circle")
    assert [word.text for word in found.words] == ["what", "is", "it?", "a", "red", "circle"]
    assert {word.heat.shape for word in found.words} == {(4, 4)} and max(word.heat.max() for word in found.words) > 0


@pytest.mark.parametrize("family", ["internvl", "idefics3"])
def test_tiles_lie_where_their_pixels_come_from(family):
    small, processor = FAMILIES[family][0](family)
    image = picture(130, 90)
    content = [{"type": "image"}, {"type": "text", "text": "a"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    inputs = processor(images=image, text=text, return_tensors="pt")
    tokens = inputs["input_ids"] == small.config.image_token_id
    [[layout]] = find_layouts(small, inputs, tokens, [(90, 130)])
    pixels = inputs["pixel_values"].flatten(0, -4)
    assert len(layout.parts) == len(pixels) > 4
    means = {part.box: pixels[part.first // 4].mean((1, 2)) for part in layout.parts if part.box != (0, 0, 1, 1)}
    centers = torch.tensor([[(box[0] + box[2]) / 2, (box[1] + box[3]) / 2] for box in means])
    for color in range(2):  # brightness grows in one direction alone, and evenly
        values = torch.stack([mean[color] for mean in means.values()])
        other = torch.corrcoef(torch.stack([values, centers[:, 1 - color]]))[0, 1]
        assert torch.corrcoef(torch.stack([values, centers[:, color]]))[0, 1] > 0.999 and abs(other) < 0.01

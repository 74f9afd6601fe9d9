"""Word maps of one image and one text, by any supported model: from a folder or a name on the hub to words and maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from softmask_fast.adapters.cross_attention import WordRelevance, matching_logits
from softmask_fast.adapters.decoders import image_token_id
from softmask_fast.adapters.dual_encoders import is_dual_encoder, similarities
from softmask_fast.adapters.image_layouts import WHOLE, Box, Layout, Part, on_picture, square_grid
from softmask_fast.adapters.scores import answer_log_probability
from softmask_fast.adapters.transformers import word_relevance
from softmask_fast.adapters.words import Word, with_answer, words_of
from softmask_fast.errors import UsageError, one_line
from softmask_fast.hub import model_folder, without_hub
from softmask_fast.utils import read_json

PROMPT = "Describe the image."
SAFELY = {"trust_remote_code": False, "local_files_only": True}  # a folder is data: it runs no code, and asks no hub


@dataclass(frozen=True)
class WordMap:
    """The map of one word over the whole image."""

    text: str
    part: str  # "text", "prompt" or "answer"
    heat: np.ndarray  # (rows, columns) float32
    features: np.ndarray  # (C,) float32: the mean of the image's features, weighted by the map; NaN for a map of zeros


@dataclass(frozen=True)
class Explanation:
    """The maps of the words of a text over one image."""

    text: str
    answer: str | None  # what a decoder or captioner wrote, or was given
    score: str  # name of the score that the maps explain
    value: float  # of the score
    words: list[WordMap]
    notes: list[str]  # why some words have no map


def open_model(name: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """Opens a model of transformers or open_clip, from a folder or by its name on the hub.

    None of its code runs, and weights are read as tensors only.

    Args:
        name: a folder, or "owner/name" on the hub.
        device: device of the model.

    Returns:
        The model in eval mode, and its processor.

    Raises:
        UsageError: if the model cannot be opened; or, within 10 seconds, if it is not on this machine and the hub
            cannot be reached.
    """
    folder = model_folder(name)
    family = _open_clip if (folder / "open_clip_config.json").is_file() else _transformers
    try:
        with without_hub():
            model, processor = family(folder, device)
    except UsageError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors for damaged files
        raise UsageError(f"--model: {name} cannot be opened: {one_line(error)}") from error
    return model.to(device).eval(), processor


def _open_clip(folder: Path, device: torch.device | str) -> tuple[nn.Module, Any]:
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise UsageError(f"--model: {folder} needs open_clip; install it with: pip install open_clip_torch") from error
    source, given = f"local-dir:{folder}", {}
    if read_json(folder / "open_clip_config.json", "--model")["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        given = SAFELY  # the file could ask to run code
    model, transform = open_clip.create_model_from_pretrained(source)
    return model, (transform, open_clip.get_tokenizer(source, **given))


def _transformers(folder: Path, device: torch.device | str) -> tuple[nn.Module, Any]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder, **SAFELY)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UsageError(f"--model: expected a model of transformers, got {folder} with {config.architectures}")
    dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
    model = kind.from_pretrained(folder, dtype=dtype, weights_only=True, **SAFELY)
    processor = transformers.AutoProcessor.from_pretrained(folder, **SAFELY)
    if isinstance(processor, transformers.PreTrainedTokenizerBase):  # a captioner's folder may have no processor
        processor = (transformers.AutoImageProcessor.from_pretrained(folder, **SAFELY), processor)
    return model, processor


def explain_image(
    model: nn.Module, processor: Any, image: Image.Image, text: str | None = None, *, layer: int | None = None,
    answer: str | None = None, max_new_tokens: int = 32,
) -> Explanation:  # fmt: skip
    """The word maps of one image and one text.

    Args:
        model, processor: as returned by `open_model`.
        image: an RGB image.
        text: for models that compare or match, a caption; for decoders, a question (default: "Describe the image.");
            for captioners, the caption to explain (default: the one they write).
        layer: as for `word_relevance`.
        answer: for decoders, the answer to explain; None: the one they write, by greedy decoding.
        max_new_tokens: most tokens of an answer or caption that the model writes.

    Returns:
        The text, the answer, the score and one `WordMap` per word.

    Raises:
        UsageError: for a model without maps, or a text that is missing or has no word.
    """
    if is_dual_encoder(model):
        return _dual(model, processor, image, _required(text), layer)
    if hasattr(model, "generate") and image_token_id(model) is not None and model.can_generate():
        return _decoder(model, processor, image, text or PROMPT, layer, answer, max_new_tokens)
    if hasattr(model, "generate") and model.can_generate():
        return _captioner(model, processor, image, text, layer, max_new_tokens)
    return _matching(model, processor, image, _required(text), layer)


def _required(text: str | None) -> str:
    if not (text or "").split():
        raise UsageError("--text: expected at least one word, got none")
    return text


def _decoder(
    model: nn.Module, processor: Any, image: Image.Image, text: str, layer: int | None, answer: str | None,
    max_new_tokens: int,
) -> Explanation:  # fmt: skip
    tokenizer = processor.tokenizer
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        image_token = "" if hasattr(model, "qformer") else getattr(processor, "image_token", "<image>")
        inputs = processor(images=image, text=f"{image_token}{text}", return_tensors="pt")
    inputs = {name: _as_model(value, model) for name, value in inputs.to(model.device).items()}
    if answer is not None:
        ids = tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
    else:
        with torch.no_grad():
            options = {"max_new_tokens": max_new_tokens, "do_sample": False}
            ids = model.generate(**inputs, **options, suppress_tokens=[image_token_id(model)])
    inputs, start = with_answer(model, inputs, ids)
    with torch.no_grad(), word_relevance(model, layer, answer=start) as cam:
        outputs = model(**inputs)
        maps = cam.maps()
    ids = inputs["input_ids"]
    attended = inputs["attention_mask"].bool() & ~cam.image_tokens
    words = words_of(tokenizer, ids[0].tolist(), (~attended[0]).nonzero()[:, 0].tolist(), [start])
    parts = ["answer" if word.tokens[0] >= start else "prompt" for word in words]
    pictures = cam.pictures(maps, [(image.height, image.width)])[0][0]
    value = answer_log_probability(outputs.logits.detach(), ids, torch.tensor([start]), inputs["attention_mask"].bool())
    made = _words(cam, processor, image, maps[0], pictures, words, parts)
    said = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    return Explanation(text, said, "log-probability of the answer", value.item(), made, _zero(cam, words))


def _dual(model: nn.Module, processor: Any, image: Image.Image, text: str, layer: int | None) -> Explanation:
    """The text's map, and of each word that of what it adds: the similarity less that to the text without it."""
    words = text.split()
    texts = [text] + [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)) if len(words) > 1]
    if isinstance(processor, tuple):
        transform, tokenizer = processor
        device = next(model.parameters()).device
        arguments, given = (transform(image)[None].to(device), tokenizer(texts).to(device)), {}
    else:
        padding = "max_length" if "siglip" in model.config.model_type else True  # as SigLIP was trained
        given = processor(text=texts, images=image, return_tensors="pt", padding=padding, truncation=True)
        arguments, given = (), {name: _as_model(value, model) for name, value in given.to(model.device).items()}
    with torch.no_grad(), word_relevance(model, layer) as cam:
        scores = similarities(model(*arguments, **given))
        every = torch.cat([scores[:, :1], scores[:, :1] - scores[:, 1:]], 1)
        maps = cam.maps(every)
    pictures = cam.pictures(maps)[0]
    spans = [Word(text, (0,)), *(Word(word, (i + 1,)) for i, word in enumerate(words) if len(words) > 1)]
    made = _words(cam, processor, image, maps[0], pictures, spans, ["text"] * len(spans))
    return Explanation(text, None, "similarity; of a word, what it adds", scores[0, 0].item(), made, [])


def _matching(model: nn.Module, processor: Any, image: Image.Image, text: str, layer: int | None) -> Explanation:
    inputs = processor(images=image, text=text, return_tensors="pt").to(model.device)
    with torch.no_grad(), word_relevance(model, layer) as cam:
        outputs = model(**inputs)
        maps = cam.maps()
    matched = matching_logits(outputs).softmax(-1)[0, 1].item()
    words = words_of(processor.tokenizer, inputs["input_ids"][0].tolist())
    made = _words(cam, processor, image, maps[0], cam.pictures(maps)[0], words, ["text"] * len(words))
    return Explanation(text, None, "probability of a match", matched, made, _zero(cam, words))


def _captioner(
    model: nn.Module, processor: Any, image: Image.Image, text: str | None, layer: int | None, max_new_tokens: int
) -> Explanation:
    images, tokenizer = processor if isinstance(processor, tuple) else (processor.image_processor, processor.tokenizer)
    pixels = images(image, return_tensors="pt").pixel_values.to(model.device)
    if text is None:
        with torch.no_grad():
            ids = model.generate(pixels, max_new_tokens=max_new_tokens, do_sample=False)
    else:
        start = [token for token in (_start(model, tokenizer),) if token is not None]
        ids = torch.tensor([start + tokenizer(text, add_special_tokens=False).input_ids], device=model.device)
    if ids.shape[1] < 2:
        raise UsageError("--text: expected a caption with a word, got none, and the model writes an empty one")
    first, attended = torch.ones(1, dtype=torch.int64), torch.ones_like(ids, dtype=torch.bool)

    def log_probability(outputs: Any) -> Tensor:
        return answer_log_probability(outputs.logits, ids, first, attended)

    name = "input_ids" if model.config.model_type == "blip" else "decoder_input_ids"
    with torch.no_grad():
        with word_relevance(model, layer, score=log_probability) as cam:
            model(pixel_values=pixels, **{name: ids})
            maps, value = cam.maps(), cam.score(cam.outputs)
    if isinstance(cam, WordRelevance):  # BERT's cross-attention maps rows: a word is predicted by the row before
        maps = torch.cat([maps[:, :1], maps[:, :-1]], 1)
    words = words_of(tokenizer, ids[0].tolist(), [0])
    [pictures] = square_grid(maps)
    made = _words(cam, processor, image, maps[0], pictures, words, ["answer"] * len(words))
    said = tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    return Explanation(text or "", said, "log-probability of the caption", value.item(), made, [])


def _start(model: nn.Module, tokenizer: Any) -> int | None:
    first = getattr(model.config, "decoder_start_token_id", None)
    for token in (first, tokenizer.bos_token_id, tokenizer.cls_token_id):
        if token is not None:
            return token
    return None


def _as_model(value: Any, model: nn.Module) -> Any:
    return value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _words(
    cam: Any, processor: Any, image: Image.Image, maps: Tensor, pictures: Tensor, words: Sequence[Word], parts: list
) -> list[WordMap]:
    """maps (L, N) and pictures (L, rows, columns) of tokens -> those of words, over the whole picture."""
    pictures = _in_picture(pictures, processor, image)
    features = cam.image_features()[0].float()
    made = []
    for word, part in zip(words, parts, strict=True):
        places = list(word.tokens)
        weights = maps[places].mean(0)
        pooled = (weights / weights.sum()) @ features[: len(weights)]
        heat = pictures[places].mean(0)
        made.append(WordMap(word.text, part, heat.float().cpu().numpy(), pooled.cpu().numpy()))
    if not made:
        raise UsageError("--text: expected at least one word that the tokenizer knows, got none")
    return made


def _zero(cam: Any, words: Sequence[Word]) -> list[str]:
    """The words whose maps are zero by construction, a line for each reason."""
    silent = [
        (reason, [word.text for word in words if all(found[0, place] for place in word.tokens)])
        for found, reason in cam.zero
    ]
    return [f"zero, {reason}: {' '.join(texts)}" for reason, texts in silent if texts]


def _in_picture(pictures: Tensor, processor: Any, image: Image.Image) -> Tensor:
    """Maps of the part that a processor cuts out of the picture, or of the square it pads it to, placed in the
    picture."""
    images = processor[0] if isinstance(processor, tuple) else getattr(processor, "image_processor", processor)
    top, left, bottom, right = _seen(images, image.height, image.width)
    if (top, left, bottom, right) == WHOLE:
        return pictures
    rows, columns = pictures.shape[1:]
    layout = Layout(rows * columns, (Part(0, rows, columns, (top, left, bottom, right)),))
    return on_picture(pictures.flatten(1), layout)


def _seen(images: Any, height: int, width: int) -> Box:
    """What a processor's grid covers: the center that it cuts out, or the square that it pads the picture to."""
    if hasattr(images, "image_grid_pinpoints"):  # tiles, whose layout says what they cover
        return WHOLE
    high = wide = 1.0
    crop, size = getattr(images, "crop_size", None), getattr(images, "size", None) or {}
    steps = {type(step).__name__: step for step in getattr(images, "transforms", ())}  # open_clip's, of torchvision
    cuts = getattr(images, "do_center_crop", False)
    if "CenterCrop" in steps and isinstance(steps["Resize"].size, int):
        cuts, crop = True, dict(zip(("height", "width"), steps["CenterCrop"].size, strict=True))
        size = {"shortest_edge": steps["Resize"].size}
    if getattr(images, "do_pad", False) and "Llava" in type(images).__name__:
        high, wide = max(height, width) / height, max(height, width) / width
    elif cuts and crop and size.get("shortest_edge"):
        scale = min(height, width) / size["shortest_edge"]
        high, wide = min(1.0, crop["height"] * scale / height), min(1.0, crop["width"] * scale / width)
    return ((1 - high) / 2, (1 - wide) / 2, (1 + high) / 2, (1 + wide) / 2)

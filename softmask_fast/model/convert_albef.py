"""Converts ALBEF's checkpoints (Li et al., NeurIPS 2021) to our model, and our model to a checkpoint for their code.

Both models compute the same function. They store four things differently:

- The upper layers of ALBEF's text encoder, those with cross-attention, are our fusion encoder.
- Their cross-attention has a key bias. It adds one number to all logits of a query, which softmax ignores: we drop it,
  and export zeros.
- Our value bias is a parameter of its own, of size (heads, head width).
- Their `temp` is the temperature, our parameter its logarithm.

Fine-tuned checkpoints name the text encoder without `.bert` and lack the heads that their task does not use. Those of
NLVR2, and of its pretraining by text assignment, have two layers for each fusion layer, which share keys and values.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from softmask_fast.config import ModelConfig
from softmask_fast.errors import UsageError
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.pair_fusion import PairFusion, refuse_pairs
from softmask_fast.model.state import read_checkpoint
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.utils import replacing

logger = logging.getLogger(__name__)

BERT, FINE_TUNED_BERT = "text_encoder.bert.", "text_encoder."
WORDS, POSITION_IDS = "embeddings.word_embeddings.weight", "embeddings.position_ids"
DECODER = "text_encoder.cls.predictions."
QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr")
MOMENTUM = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")  # parts with a momentum copy, "..._m"
CROSS_LAYERS = r"encoder\.layer\.(\d+)\.crossattention\."
PAIR_SHARES = [f"crossattention.self.{name}.{kind}" for name in ("key", "value") for kind in ("weight", "bias")]
HEADS = ("vision_proj.", "text_proj.", "itm_head.", DECODER, "temp")  # a fine-tuned checkpoint may lack them

_PREFIXES = {
    "vision.vit.": "visual_encoder.",
    "image_projection.": "vision_proj.",
    "text_projection.": "text_proj.",
    "match_head.": "itm_head.",
    "language_head.transform.": DECODER + "transform.",
    "language_head.decoder.bias": DECODER + "bias",
    "log_temperature": "temp",
}
_FUSION_PREFIXES = {
    "cross_attention.value_bias": "crossattention.self.value.bias",
    "cross_attention.": "crossattention.self.",
    "cross_output.": "crossattention.output.",
}
_VIT = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)


@dataclass(frozen=True)
class AlbefReport:
    """What was not converted, by the checkpoint's names."""

    unplaced: list[str]  # tensors that the model does not have
    absent: list[str]  # parameters of heads that the checkpoint lacks; they stay randomly initialized

    def __str__(self) -> str:
        kinds = {
            "queues": [name for name in self.unplaced if name in QUEUES],
            "momentum copy": [name for name in self.unplaced if name.split(".")[0] in {f"{m}_m" for m in MOMENTUM}],
            "key biases of the cross-attention, which have no effect": [
                name for name in self.unplaced if re.match(r"text_encoder\..*crossattention\.self\.key\.bias", name)
            ],
        }
        others = Counter(name.split(".")[0] for name in sorted(set(self.unplaced).difference(*kinds.values())))
        groups = [f"{kind} ({len(names)})" for kind, names in kinds.items() if names]
        groups += [f"{part} ({count})" for part, count in others.items()]
        messages = []
        if groups:
            messages.append(f"unused tensors: {', '.join(groups)}")
        if self.absent:
            messages.append(f"missing, initialized at random: {', '.join(self.absent)}")
        return "; ".join(messages) or "all tensors were converted"


def load_albef(
    path: str | Path,
    *,
    image_size: int | None = None,
    head_width: int = 64,
    complete: bool = False,
    option: str = "path",
) -> VisionLanguageModel:
    """Reads an ALBEF checkpoint, pretrained or fine-tuned. Only tensors and plain containers are unpickled.

    Args:
        path: of the .pth file. A warning names what cannot be converted; `load_albef_state` returns it.
        image_size: side of the input in pixels; default: the checkpoint's. Position embeddings are interpolated as in
            ALBEF.
        head_width: width of an attention head, the only size that the tensors do not reveal.
        complete: refuse a checkpoint that lacks heads.
        option: what messages call the path.

    Returns:
        The model in eval mode, float32, on the CPU. For NLVR2 and text assignment its fusion encoder is a `PairFusion`.

    Raises:
        UsageError: if the file is not a checkpoint, tensors are missing, or sizes do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{option}: expected an ALBEF checkpoint, got {str(path)!r}, which is not a file")
    state = read_checkpoint(path, option)  # memory-mapped: the optimizer state, twice the weights, is never read
    try:
        model, report = load_albef_state(state, image_size=image_size, head_width=head_width)
    except UsageError as error:
        raise UsageError(f"{option}: {path}: {error}") from error
    if complete and report.absent:
        raise UsageError(
            f"{option}: expected a checkpoint with all heads, got {str(path)!r}, which lacks {', '.join(report.absent)}"
        )
    if report.unplaced or report.absent:
        logger.warning("%s: %s", path, report)
    return model


def load_albef_state(
    state: Mapping[str, Tensor], *, image_size: int | None = None, head_width: int = 64
) -> tuple[VisionLanguageModel, AlbefReport]:
    """`load_albef` for a state dict in memory, which is not changed. Also returns what was not converted."""
    bert = BERT if BERT + WORDS in state else FINE_TUNED_BERT
    config = _infer_config(state, bert, image_size, head_width)
    left = dict(state)
    _take_copies(left, bert)
    model = VisionLanguageModel(config)
    if _in_pairs(state, bert, fused := sorted(_layers(state, bert + CROSS_LAYERS))):
        model.fusion = PairFusion(model.fusion, config, model.vision.width)
        for number in fused[1::2]:
            for name in PAIR_SHARES:
                del left[f"{bert}encoder.layer.{number}.{name}"]
    model.eval()
    absent = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs = albef_name(name, config.text_layers, bert)
            if theirs not in left:
                absent.append(theirs)
                continue
            value = left.pop(theirs)
            if name == "vision.vit.pos_embed":
                value = resample_positions(value, model.grid_size)
            elif name == "log_temperature":
                value = _positive(value, theirs).log()
            if name.endswith("value_bias") or name == "log_temperature":
                parameter = parameter.view(-1)
                value = value.reshape(-1)
            if value.shape != parameter.shape:
                raise UsageError(f"state: {theirs} has size {tuple(value.shape)}, expected {tuple(parameter.shape)}")
            parameter.copy_(value)
    _check_absent(absent, left, state)
    return model, AlbefReport(unplaced=sorted(left), absent=absent)


def albef_state(model: VisionLanguageModel, teacher: MomentumTeacher | None = None) -> dict[str, Tensor]:
    """The state dict of ALBEF's pretraining model with our weights. Its tensors share memory with the model's.

    A teacher adds its momentum copy and queue, which ALBEF's strict loading needs. Without one the momentum copy is the
    model itself, as ALBEF initializes it, and there are no queues. Key biases of the cross-attention are zero.

    Raises:
        UsageError: for an image encoder that ALBEF's code does not have, and for a model that reads pairs of images.
    """
    refuse_pairs(model)
    state = _own_part(model)
    momentum = state if teacher is None else _own_part(teacher.model)
    for name, tensor in list(momentum.items()):
        part, _, rest = name.partition(".")
        if part in MOMENTUM:
            state[f"{part}_m.{rest}"] = tensor
    if teacher is not None:
        queue = teacher.queue
        state["image_queue"], state["text_queue"] = queue.image_queue.T, queue.text_queue.T  # (d, M)
        state["queue_ptr"] = queue.queue_position.reshape(1)
    return state


def save_albef(model: VisionLanguageModel, path: str | Path, teacher: MomentumTeacher | None = None) -> None:
    """Writes `albef_state` atomically, under the key 'model', where ALBEF's scripts look for it."""
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:  # given a path, torch hides a full disk
        torch.save({"model": albef_state(model, teacher)}, file)


def albef_tokenizer(bert_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy of BERT's tokenizer as ALBEF uses it: without [SEP] after the words."""
    backend = copy.deepcopy(bert_tokenizer.backend_tokenizer)
    first = [("[CLS]", bert_tokenizer.cls_token_id)]
    backend.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=first)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **bert_tokenizer.special_tokens_map)


def albef_name(name: str, text_layers: int, bert: str = BERT) -> str:
    """ALBEF's name for one of our parameters. Our fusion layer 0 is their layer `text_layers`."""
    if fused := re.fullmatch(r"fusion\.layers\.(\d+)\.(.+)", name):
        return f"{bert}encoder.layer.{text_layers + int(fused[1])}.{_renamed(fused[2], _FUSION_PREFIXES)}"
    return _renamed(name, {"text.bert.": bert} | _PREFIXES)


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    """The name with the first matching prefix replaced."""
    for ours, theirs in prefixes.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def _infer_config(state: Mapping[str, Tensor], bert: str, image_size: int | None, head_width: int) -> ModelConfig:
    """The model's configuration, inferred from the sizes of the tensors."""

    def size(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state or state[name].dim() != dimensions:
            got = f"size {tuple(state[name].shape)}" if name in state else "no such tensor"
            raise UsageError(f"state: expected {name} of {dimensions} dimensions, got {got}")
        return tuple(state[name].shape)

    def heads(width: int, name: str) -> int:
        if head_width < 1 or width % head_width:
            raise UsageError(f"head_width: expected a divisor of {width}, the width of {name}, got {head_width}")
        return width // head_width

    _, tokens, vision_width = size("visual_encoder.pos_embed", 3)
    patch = size("visual_encoder.patch_embed.proj.weight", 4)[-1]
    grid = math.isqrt(tokens - 1)
    if grid * grid != tokens - 1:
        raise UsageError(f"state: expected positions of [CLS] and a square of patches, got {tokens} of them")
    image_size = grid * patch if image_size is None else image_size
    if image_size < patch or image_size % patch:
        raise UsageError(f"image_size: expected a multiple of the patches' side, {patch}, got {image_size}")

    vocab_size, text_width = size(bert + WORDS, 2)
    layers = _layers(state, bert + r"encoder\.layer\.(\d+)\.")
    fused = _layers(state, bert + CROSS_LAYERS)
    if not fused or not 0 < min(fused) or fused != set(range(min(fused), max(layers) + 1)):
        raise UsageError(
            f"state: expected cross-attention in the upper layers of {bert}encoder only, got it in "
            f"{sorted(fused)} of {len(layers)}"
        )
    positions = size(bert + "embeddings.position_embeddings.weight", 2)[0]
    fusion_layers = len(fused) // 2 if _in_pairs(state, bert, sorted(fused)) else len(fused)
    defaults = ModelConfig()
    return ModelConfig(
        image_size=image_size,
        vision_patch_size=patch,
        vision_width=vision_width,
        vision_depth=len(_layers(state, r"visual_encoder\.blocks\.(\d+)\.")),
        vision_heads=heads(vision_width, "visual_encoder"),
        vision_mlp_ratio=size("visual_encoder.blocks.0.mlp.fc1.weight", 2)[0] / vision_width,
        vision_weights="random",
        text_width=text_width,
        text_heads=heads(text_width, "text_encoder"),
        text_mlp_ratio=size(bert + "encoder.layer.0.intermediate.dense.weight", 2)[0] / text_width,
        text_positions=positions,
        text_layers=min(fused),
        fusion_layers=fusion_layers,
        text_weights="random",
        vocab_size=vocab_size,
        max_tokens=min(defaults.max_tokens, positions),
        embed_dim=size("vision_proj.weight", 2)[0] if "vision_proj.weight" in state else defaults.embed_dim,
        soft_mask_layer=max(0, min(defaults.soft_mask_layer, fusion_layers - 2)),
    )


def _layers(state: Mapping[str, Tensor], pattern: str) -> set[int]:
    """The layer numbers in names that start with the pattern."""
    return {int(found[1]) for name in state if (found := re.match(pattern, name))}


def _in_pairs(state: Mapping[str, Tensor], bert: str, fused: list[int]) -> bool:
    """Whether the layers with cross-attention are pairs that share keys and values."""

    def same(left: int, right: int) -> bool:
        names = [[f"{bert}encoder.layer.{number}.{name}" for number in (left, right)] for name in PAIR_SHARES]
        return all(a in state and b in state and torch.equal(state[a], state[b]) for a, b in names)

    return len(fused) % 2 == 0 and all(map(same, fused[::2], fused[1::2]))


def _take_copies(state: dict[str, Tensor], bert: str) -> None:
    """Removes copies: the MLM decoder's matrix and bias, and the position ids.

    Raises:
        UsageError: if tied tensors differ. In ALBEF's code and in this model they are one tensor.
    """
    for twin, original in ((DECODER + "decoder.weight", bert + WORDS), (DECODER + "decoder.bias", DECODER + "bias")):
        if twin in state and original in state:
            if not torch.equal(state[twin], state[original]):
                raise UsageError(f"state: expected {twin} equal to {original}, to which it is tied")
            del state[twin]
    ids = state.get(bert + POSITION_IDS)
    if ids is not None and torch.equal(ids.flatten(), torch.arange(ids.numel())):
        del state[bert + POSITION_IDS]


def _check_absent(absent: list[str], left: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises UsageError if tensors are missing, except for complete heads."""
    absent_heads = tuple(head for head in HEADS if not any(name.startswith(head) for name in state))
    missing = [name for name in absent if not name.startswith(absent_heads)]
    if missing:
        raise UsageError(f"state: missing {missing}; unexpected {sorted(left)}")


def _positive(temperature: Tensor, name: str) -> Tensor:
    if not (temperature > 0).all():
        raise UsageError(f"state: expected {name} above 0, got {temperature.tolist()}")
    return temperature


def resample_positions(positions: Tensor, grid_size: tuple[int, int], prefix: int = 1) -> Tensor:
    """Position embeddings (1, prefix + n * n, Cv), resampled to another grid (bicubic, as in ALBEF), prefix
    unchanged."""
    side = math.isqrt(positions.shape[1] - prefix)
    if (side, side) == tuple(grid_size):
        return positions
    first, patches = positions[:, :prefix], positions[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches.float(), size=grid_size, mode="bicubic", align_corners=False)
    return torch.cat([first, patches.flatten(2).mT], dim=1)


def _own_part(model: VisionLanguageModel) -> dict[str, Tensor]:
    """ALBEF's state dict without momentum copy and queues."""
    vit = model.vision.vit.state_dict()
    other = sorted(name for name in vit if not _VIT.fullmatch(name))
    rows, columns = model.grid_size
    if other or model.prefix_tokens != 1 or rows != columns or vit["pos_embed"].shape[1] != 1 + rows * columns:
        raise UsageError(
            "model: expected ALBEF's image encoder, with [CLS], a square of patches and a position for each, got "
            f"{model.config.vision_model!r} with {model.prefix_tokens} prefix tokens, a grid of {model.grid_size}, and "
            f"parameters {other} beyond ALBEF's"
        )
    state = {albef_name(name, model.config.text_layers): p.detach() for name, p in model.named_parameters()}
    for name in [name for name in state if name.endswith("crossattention.self.value.bias")]:
        state[name] = state[name].flatten()
        state[name.replace("value", "key")] = torch.zeros_like(state[name])
    state["temp"] = model.temperature.detach()
    state[DECODER + "decoder.weight"] = state[BERT + WORDS]
    state[DECODER + "decoder.bias"] = state[DECODER + "bias"]
    positions = state[BERT + "embeddings.position_embeddings.weight"]
    state[BERT + POSITION_IDS] = torch.arange(len(positions), device=positions.device)[None]
    return state

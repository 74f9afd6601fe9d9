"""Maps of a whole text over an image by dual encoders: CLIP, SigLIP and SigLIP 2 of transformers, open_clip's models.

In these models no text token attends to an image token. A map therefore explains the similarity of a pair, at the one
row of the image encoder that enters it: the [CLS] token in CLIP, the probe of the pooling head in SigLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_fast.adapters.attention_record import AttentionRecord, cut, observed_model
from softmask_fast.adapters.image_layouts import on_grid
from softmask_fast.errors import UsageError

Score = Callable[[Any], Tensor]


class DualEncoderRelevance:
    """Text maps of one layer of the image encoder, from what it computed in the model's last forward pass."""

    def __init__(self, score: Score | None, prefix: int, grid: tuple[int, int] | None) -> None:
        self.score, self.prefix, self.grid = score, prefix, grid
        self.record: AttentionRecord | None = None
        self.inputs: dict[str, Any] = {}
        self.passes = 0
        self.outputs: Any = None

    def keep(self, _: nn.Module, record: AttentionRecord) -> None:
        self.record = record

    def maps(self, score: Tensor | None = None) -> Tensor:
        """Grad-CAM of the similarity of each of I images to each of T texts, over the N patches.

        To map a word, pass what it adds as the score: the similarity to the text, minus that to the text without it.

        Args:
            score: (I, T), (I,) or a scalar, computed inside the `with` block; an image's scores may depend only on that
                image. None: the `score` passed to `word_relevance`, or else the similarities of all images and texts.

        Returns:
            float32, at least 0: (I, T, N), or (I, N) for a score of (I,) or a scalar; 0 at padding.

        Raises:
            UsageError: if there was no forward pass, or the score does not depend on the layer.
        """
        if self.record is None:
            raise UsageError("score: expected a forward pass inside the `with` block first, the layer has not run yet")
        if score is None:
            with torch.enable_grad():
                score = (self.score or similarities)(self.outputs)
        images, _, tokens, _ = self.record.key.shape
        row = torch.zeros(images, 1, dtype=torch.int64, device=self.record.key.device)
        columns = torch.arange(self.prefix, tokens, device=row.device).expand(images, -1)
        exists = torch.ones_like(columns, dtype=torch.bool)
        texts = score.unbind(1) if score.ndim == 2 else [score]
        maps = [self.record.maps(self.record.gradient(text), row, columns, exists)[0] for text in texts]
        return torch.cat(maps, 1) if score.ndim == 2 else maps[0][:, 0]

    def image_features(self) -> Tensor:
        """What the row can read from each patch in this layer: its values (I, N, C), in the order of `maps`."""
        return self.record.value[:, :, self.prefix :].transpose(1, 2).flatten(2)

    def pictures(self, maps: Tensor) -> list[Tensor]:
        """Lays maps (I, ..., N) on the grids of patches: one (..., rows, columns) per image."""
        shapes = self.inputs.get("spatial_shapes")
        if shapes is not None:
            return [one[..., : h * w].unflatten(-1, (h, w)) for one, (h, w) in zip(maps, shapes.tolist(), strict=True)]
        return on_grid(maps, self.grid)


def similarities(outputs: Any) -> Tensor:
    """The model's own logits (I, T), from the outputs of transformers or open_clip."""
    if getattr(outputs, "logits_per_image", None) is not None:
        return outputs.logits_per_image
    if isinstance(outputs, dict):
        outputs = tuple(outputs[name] for name in ("image_features", "text_features", "logit_scale"))
    image, text, scale = outputs[:3]
    return scale * image @ text.mT


def is_dual_encoder(model: nn.Module) -> bool:
    """Whether this is a CLIP-like model of open_clip or transformers."""
    return _is_open_clip(model) or all(hasattr(model, name) for name in ("vision_model", "text_model", "logit_scale"))


def _is_open_clip(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("visual", "encode_image", "encode_text", "logit_scale"))


@contextmanager
def dual_encoder_relevance(model: nn.Module, layer: int | None, score: Score | None) -> Iterator[DualEncoderRelevance]:
    """`word_relevance` of a dual encoder. `layer` is a block of the image encoder; None: the last one that counts."""
    name = type(model).__name__
    visual = model.visual if _is_open_clip(model) else model.vision_model
    text = next(getattr(model, part) for part in ("text_model", "text", "transformer") if hasattr(model, part))
    blocks, pool = _blocks(visual), _pool(visual)
    if pool is None and blocks is None:
        raise UsageError(
            f"model: expected an image encoder with a [CLS] token or a pooling head, got {name} with "
            f"{type(getattr(visual, 'trunk', visual)).__name__}"
        )
    if pool is not None and layer is not None:
        raise UsageError(f"layer: expected None, as {name} reads the patches by its pooling head alone; got {layer}")
    if pool is None:
        layer = len(blocks) - 1 if layer is None else layer
        if not 0 <= layer < len(blocks):
            raise UsageError(f"layer: expected a number from 0 to {len(blocks) - 1} of {name}, got {layer}")
    attention = blocks[layer] if pool is None else pool
    trunk = getattr(visual, "trunk", None)  # timm's model in open_clip
    grid = getattr(visual, "grid_size", None) if trunk is None else trunk.patch_embed.grid_size
    prefix = 1 if pool is None else trunk.num_prefix_tokens * getattr(trunk, "pool_include_prefix", 0) if trunk else 0
    cam = DualEncoderRelevance(score, int(prefix), grid)
    by_interface = not isinstance(attention, nn.MultiheadAttention) and not hasattr(attention, "latent")
    with ExitStack() as stack:
        stack.enter_context(observed_model(model, cam, [attention] if by_interface else [], attention, text))
        if isinstance(attention, nn.MultiheadAttention):
            handles = [attention.register_forward_hook(_multihead(cam), with_kwargs=True)]
        elif not by_interface:
            handles = _latent_pool(cam, attention)
        else:
            handles = []
        for handle in handles:
            stack.callback(handle.remove)
        yield cam


def _blocks(visual: nn.Module) -> list[nn.Module] | None:
    """The self-attention of the blocks of an image encoder with [CLS], in order; None if it has none."""
    if hasattr(visual, "encoder") and getattr(getattr(visual, "embeddings", None), "class_embedding", None) is not None:
        return [layer.self_attn for layer in visual.encoder.layers]
    if getattr(visual, "class_embedding", None) is not None and getattr(visual, "pool_type", "tok") == "tok":
        blocks = [getattr(block, "attn", None) for block in visual.transformer.resblocks]
        plain = all(isinstance(block, nn.MultiheadAttention) and block.batch_first for block in blocks)
        return blocks if plain and getattr(visual, "attn_pool", None) is None else None
    return None


def _pool(visual: nn.Module) -> nn.Module | None:
    """The attention of a pooling head: of SigLIP in transformers, of timm's in open_clip."""
    head = getattr(visual, "head", None)
    if isinstance(getattr(head, "attention", None), nn.MultiheadAttention):
        return head.attention
    pool = getattr(getattr(visual, "trunk", None), "attn_pool", None)
    return pool if hasattr(pool, "latent") and hasattr(pool, "k_norm") else None


def _multihead(cam: DualEncoderRelevance) -> Callable:
    """A hook of `nn.MultiheadAttention` that records its first row: what is read of it."""

    def hook(attention: nn.MultiheadAttention, args: tuple, kwargs: dict, outputs: tuple) -> tuple:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = (given[name] for name in names[:3])
        with torch.no_grad():
            weights = attention.in_proj_weight.chunk(3)
            biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
            parts = [
                F.linear(tensor, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                for tensor, weight, bias in zip((query[:, :1], key, value), weights, biases, strict=True)
            ]
        mask = given.get("attn_mask")
        if mask is not None:
            mask = mask.reshape(len(key), -1, *mask.shape[-2:])[:, :, :1] if mask.ndim == 3 else mask[None, None, :1]
            mask = ~mask if mask.dtype == torch.bool else mask
        output, weight = cut(outputs[0]), attention.out_proj.weight.detach()
        cam.record = AttentionRecord(*parts, output, parts[0].shape[-1] ** -0.5, mask, projection=weight)
        return output, *outputs[1:]

    return hook


def _latent_pool(cam: DualEncoderRelevance, pool: nn.Module) -> list[Any]:
    """Hooks of timm's `AttentionPoolLatent`: its norms see queries and keys, its projection the attention's output."""
    seen: dict[str, Tensor] = {}

    def project(_: nn.Module, args: tuple) -> tuple:
        output = cut(args[0])
        value = seen["kv"].unflatten(-1, (2, pool.num_heads, -1))[:, :, 1].transpose(1, 2)
        parts = (seen["query"], seen["key"], value)
        cam.record = AttentionRecord(*(part.detach() for part in parts), output, parts[0].shape[-1] ** -0.5)
        return (output, *args[1:])

    def record(name: str) -> Callable:
        return lambda module, args, output: seen.update({name: output})

    names = {"query": pool.q_norm, "key": pool.k_norm, "kv": pool.kv}
    hooks = [module.register_forward_hook(record(name)) for name, module in names.items()]
    return [*hooks, pool.proj.register_forward_pre_hook(project)]

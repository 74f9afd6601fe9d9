"""The fusion encoder for a text and two images (ALBEF, section 5)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from softmask_fast.config import ModelConfig
from softmask_fast.errors import UsageError
from softmask_fast.model.fusion import FusionEncoder, FusionLayer, KeyValue


class PairFusion(FusionEncoder):
    """A fusion encoder with twice as many layers, in pairs that share the projections of keys and values."""

    def __init__(self, fusion: FusionEncoder, config: ModelConfig, image_width: int) -> None:
        """Copies each layer of the pretrained `fusion` into both layers of a pair."""
        super().__init__(replace(config, fusion_layers=2 * config.fusion_layers), image_width)
        self.attention, self.checkpointing = fusion.attention, fusion.checkpointing
        for number, layer in enumerate(self.layers):
            layer.load_state_dict(fusion.layers[number // 2].state_dict())
        for left, right in zip(self.layers[::2], self.layers[1::2], strict=True):
            for name in ("key", "value", "value_bias"):
                setattr(right.cross_attention, name, getattr(left.cross_attention, name))

    def keys_values(self, image_tokens: tuple[Tensor, Tensor]) -> list[KeyValue]:
        """The keys and values of each layer, from the tokens of the left and the right images, each (B, N, Cv)."""
        sides = (image_tokens[number % 2] for number in range(len(self.layers)))
        return [layer(FusionLayer.keys_values, side) for layer, side in zip(self.layers, sides, strict=True)]


def refuse_pairs(model: nn.Module) -> None:
    """Raises UsageError for a pretrained model whose fusion encoder reads two images. Only its tasks can be stored."""
    if isinstance(getattr(model, "fusion", None), PairFusion):
        raise UsageError("model: expected one that reads one image per caption, got one that reads two")

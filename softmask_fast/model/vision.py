"""Image encoder: any timm vision transformer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import Attention, build_sincos2d_pos_embed
from timm.models.resnet import BasicBlock, downsample_avg
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from softmask_fast.config import ModelConfig
from softmask_fast.errors import UsageError, one_line
from softmask_fast.hub import from_hub
from softmask_fast.model.layers import image_block, run_region, scale_gradient
from softmask_fast.model.state import read_checkpoint
from softmask_fast.model.weights import Joined, WeightedLayer, run_layer


class ImageBlock(WeightedLayer):
    """A block of a timm vision transformer without layer scale, without stochastic depth and without norms inside its
    attention."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.heads, self.eps = block.attn.num_heads, block.norm1.eps

    @staticmethod
    def covers(block: nn.Module) -> bool:
        """Whether a block computes what `image_block` does."""
        if type(block) is not Block or type(block.attn) is not Attention:
            return False
        attention, mlp, norms = block.attn, block.mlp, (block.norm1, block.norm2)
        absent = (block.ls1, block.ls2, block.drop_path1, block.drop_path2, attention.q_norm, attention.k_norm)
        absent += (attention.norm, mlp.norm)
        linear = (attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
        return (
            all(isinstance(module, nn.Identity) for module in absent)
            and all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)
            and block.norm1.eps == block.norm2.eps
            and all(isinstance(module, nn.Linear) and module.bias is not None for module in linear)
            and isinstance(mlp.act, nn.GELU)
            and mlp.act.approximate == "none"
            and attention.gate is None
            and not any(drop.p for drop in (attention.attn_drop, attention.proj_drop, mlp.drop1, mlp.drop2))
        )

    def joined(self) -> list[Joined]:
        """The weights of `image_block`."""
        modules = (self.norm1, self.attn.qkv, self.attn.proj, self.norm2, self.mlp.fc1, self.mlp.fc2)
        parts = [Joined((parameter,)) for module in modules for parameter in (module.weight, module.bias)]
        parts[3] = Joined((self.attn.qkv.bias,), holds_key_bias=True)
        return parts

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, Cv) -> (B, N, Cv) in the dtype of the weights."""
        weights = self.weights()
        return run_region(self.compiled, image_block, weights, tokens.to(weights[0].dtype), self.heads, self.eps)


class ConvolutionalStem(nn.Sequential):
    """Residual stages of convolutions in place of ViT's projection of patches (Xiao et al., NeurIPS 2021).

    Each stage halves the image and doubles the channels. It uses group norms because the momentum teacher only averages
    weights, and would have no batch statistics.

    Args:
        width: of a token, Cv.
        patch_size: pixels from one token to the next, a power of 2 above 1 that divides `width`.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        channels = 2 * width // patch_size
        stages = [nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False), self.norm(channels), nn.ReLU()]
        while channels < width:
            shortcut = downsample_avg(channels, 2 * channels, 1, stride=2, norm_layer=self.norm)
            stages.append(BasicBlock(channels, 2 * channels, stride=2, downsample=shortcut, norm_layer=self.norm))
            channels *= 2
        super().__init__(*stages)

    @staticmethod
    def norm(channels: int, **placed: Any) -> nn.GroupNorm:
        """A norm of groups of 16 channels, or of the largest power of 2 below that divides them."""
        return nn.GroupNorm(channels // math.gcd(channels, 16), channels, **placed)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) -> (B, Cv, H / patch_size, W / patch_size)."""
        return super().forward(pixels.contiguous(memory_format=torch.channels_last))  # on a CPU 1.3 x as fast


class VisionEncoder(nn.Module):
    """A timm vision transformer without its head.

    Attributes:
        width: of its tokens, Cv.
        grid_size: rows and columns of patches.
        prefix_tokens: number of tokens before the patches; the first one is [CLS].
        checkpointing: whether the backward pass recomputes the intermediates of each block.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = {
            "patch_size": config.vision_patch_size,
            "embed_dim": config.vision_width,
            "depth": config.vision_depth,
            "num_heads": config.vision_heads,
            "mlp_ratio": config.vision_mlp_ratio,
        }
        if not timm.is_model(config.vision_model):  # create_model would ask a hub for "hf-hub:..."
            raise UsageError(f"vision_model: expected the name of a model in timm, got {config.vision_model!r:.100}")
        try:
            self.vit = timm.create_model(
                config.vision_model,
                pretrained=False,
                img_size=config.image_size,
                num_classes=0,
                global_pool="",
                weight_init="jax",  # scaled by fan-in; the default of 0.02 nearly silences the layers of a narrow model
                **{name: size for name, size in sizes.items() if size is not None},
            )
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"vision_model: {config.vision_model!r} cannot have these sizes: {one_line(error)}"
            ) from error
        if not isinstance(self.vit, VisionTransformer) or self.vit.num_prefix_tokens < 1 or self.vit.pos_embed is None:
            raise UsageError(f"vision_model: expected a transformer with a [CLS] token, got {config.vision_model!r}")
        size, patch = config.image_size, self.vit.patch_embed.patch_size[0]
        if size % patch:  # timm would cut the rest off
            below, above = size - size % patch, size - size % patch + patch
            nearest = f"{below} or {above}" if below else f"{above}"
            raise UsageError(
                f"image_size: expected a multiple of the patch side, {patch} pixels ({nearest}), got {size}"
            )
        if config.vision_stem == "convolutions":
            if patch == 1 or patch & (patch - 1) or self.vit.embed_dim % patch:
                expected = f"a power of 2 that divides vision_width={self.vit.embed_dim}, for a stem of convolutions"
                raise UsageError(f"vision_patch_size: expected {expected}, got {patch}")
            self.vit.patch_embed.proj = ConvolutionalStem(self.vit.embed_dim, patch)
        if self.vit.embed_dim % 4:
            raise UsageError(f"vision_width: expected a multiple of 4, got {self.vit.embed_dim}")
        depth, self.contrast_blocks = len(self.vit.blocks), config.vision_contrast_blocks
        if self.contrast_blocks >= depth:
            expected = f"fewer than the {depth} blocks of {config.vision_model!r}"
            raise UsageError(f"vision_contrast_blocks: expected {expected}, got {self.contrast_blocks}")
        self.vit.blocks = nn.Sequential(*(ImageBlock(b) if ImageBlock.covers(b) else b for b in self.vit.blocks))
        self.checkpointing = False
        self.contrast_gradient, self.contrast_pooling = config.contrast_gradient, config.contrast_pooling
        self.width: int = self.vit.embed_dim
        self.grid_size: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        self.prefix_tokens: int = self.vit.num_prefix_tokens
        self._place_patches()

    @torch.no_grad()
    def _place_patches(self) -> None:
        """Initializes the learned position embeddings with 2-d sines and cosines. At timm's 0.02 the pixels drown them
        out, and a model from scratch is slow to learn where things are."""
        positions = build_sincos2d_pos_embed(list(self.grid_size), dim=self.width)
        self.vit.pos_embed[:, -len(positions) :] = positions

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, image_size, image_size) -> tokens (B, N, Cv), N = prefix_tokens + rows * columns.

        Raises:
            UsageError: for images of another size.
        """
        vit = self.vit
        height, width = vit.patch_embed.img_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, height, width):
            raise UsageError(f"pixels: expected size (B, 3, {height}, {width}), got {tuple(pixels.shape)}")
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))
        tokens = self._run(vit.blocks[: len(vit.blocks) - self.contrast_blocks], tokens)
        if self.contrast_blocks:  # the norm's weights belong to the contrast; keys and values have their own
            return F.layer_norm(tokens, tokens.shape[-1:], eps=vit.norm.eps).to(tokens.dtype)
        return vit.norm(tokens).to(tokens.dtype)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Like `forward`; also returns one vector per image for the contrast, (B, Cv)."""
        tokens = own = self.forward(pixels)
        if self.contrast_blocks:
            blocks = self.vit.blocks[-self.contrast_blocks :]
            own = self.vit.norm(self._run(blocks, scale_gradient(tokens, self.contrast_gradient))).to(tokens.dtype)
        return tokens, own.mean(1) if self.contrast_pooling == "mean" else own[:, 0]

    def _run(self, blocks: nn.Sequential, tokens: Tensor) -> Tensor:
        for block in blocks:
            tokens = run_layer(block, tokens, checkpointing=self.checkpointing)
        return tokens


def load_vision_weights(encoder: VisionEncoder, config: ModelConfig) -> None:
    """Loads timm's pretrained weights, or those of a file. Position embeddings are resampled to the encoder's grid.

    Raises:
        UsageError: if they cannot be loaded or do not fit.
    """
    if config.vision_weights == "random":
        return
    if config.vision_weights == "timm":
        state = _timm_model(config.vision_model).state_dict()
    else:
        state = _read_state(config.vision_weights)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "fc_norm."))}
    try:
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, encoder.vit)
        missing, unexpected = encoder.vit.load_state_dict(state, strict=False)
    except Exception as error:  # timm's filter may misread the tensors of other models
        raise UsageError(f"vision_weights: {config.vision_weights!r} does not fit: {one_line(error)}") from error
    if missing or unexpected:
        raise UsageError(
            f"vision_weights: {config.vision_weights!r} does not fit {config.vision_model!r}: missing {missing[:5]}, "
            f"unexpected {unexpected[:5]}"
        )


def _timm_model(name: str) -> nn.Module:
    """A model with timm's pretrained weights. Raises UsageError if they are not available."""
    found = timm.get_pretrained_cfg(name)
    hub_name = found and found.hf_hub_id
    instead = (
        "give a file (--vision_weights FILE.safetensors), copy the hub's cache from a machine with a network "
        f"(`hf download {hub_name}`), or start from --vision_weights random"
    )

    def load() -> nn.Module:
        return timm.create_model(name, pretrained=True, num_classes=0)

    try:
        return from_hub(hub_name, "vision_weights", instead, load) if hub_name else load()
    except UsageError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors for damaged files
        raise UsageError(
            f"vision_weights: timm's weights of {name!r} cannot be loaded ({one_line(error)}); {instead}"
        ) from error


def _read_state(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file."""
    if not Path(path).is_file():
        raise UsageError(f"vision_weights: expected 'timm', 'random' or an existing file, got {path!r}")
    if not path.endswith(".safetensors"):
        return read_checkpoint(path, "vision_weights")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"vision_weights: {path} cannot be read: {error}") from error

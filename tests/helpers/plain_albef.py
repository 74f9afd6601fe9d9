"""A plain ALBEF, written from the architecture's formulas with ALBEF's names."""

import copy
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

HEAD = 64
PATCH, GRID, VOCABULARY, POSITIONS, FUSION_LAYER, LAYERS, EMBED = 8, 4, 60, 40, 2, 5, 48
IMAGE_WIDTH, TEXT_WIDTH = 128, 192


def attention(query, key, value, mask=None):
    """Multi-head attention on (B, T, C) -> output (B, L, C) and probabilities (B, H, L, N)."""
    query, key, value = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (query, key, value))
    logits = query @ key.mT / math.sqrt(HEAD)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -math.inf)
    probabilities = logits.softmax(-1)
    return (probabilities @ value).transpose(1, 2).flatten(2), probabilities


def tree(**children):
    """A module that only holds others, for the sake of their names."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = tree(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        self.mlp = tree(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width))

    def forward(self, x):
        x = x + self.attn.proj(attention(*self.attn.qkv(self.norm1(x)).chunk(3, -1))[0])
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class ImageEncoder(nn.Module):
    def __init__(self, grid=GRID):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, IMAGE_WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, IMAGE_WIDTH))
        self.patch_embed = tree(proj=nn.Conv2d(3, IMAGE_WIDTH, PATCH, PATCH))
        self.blocks = nn.Sequential(Block(IMAGE_WIDTH, 4 * IMAGE_WIDTH), Block(IMAGE_WIDTH, 4 * IMAGE_WIDTH))
        self.norm = nn.LayerNorm(IMAGE_WIDTH, eps=1e-6)

    def forward(self, pixels):
        patches = self.patch_embed.proj(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1) + self.pos_embed
        return self.norm(self.blocks(x))


class Attend(nn.Module):
    """norm(x + dense(attention)); keys and values from x, or from other tokens of another width."""

    def __init__(self, width, source_width):
        super().__init__()
        self.add_module("self", tree(query=nn.Linear(width, width), key=nn.Linear(source_width, width),
                                     value=nn.Linear(source_width, width)))  # fmt: skip
        self.output = tree(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))
        self.maps = None

    def forward(self, x, source, mask=None):
        parts = self.self
        attended, self.maps = attention(parts.query(x), parts.key(source), parts.value(source), mask)
        return self.output.LayerNorm(x + self.output.dense(attended))


class Layer(nn.Module):
    def __init__(self, crosses):
        super().__init__()
        self.attention = Attend(TEXT_WIDTH, TEXT_WIDTH)
        if crosses:
            self.crossattention = Attend(TEXT_WIDTH, IMAGE_WIDTH)
        self.intermediate = tree(dense=nn.Linear(TEXT_WIDTH, 2 * TEXT_WIDTH))
        self.output = tree(dense=nn.Linear(2 * TEXT_WIDTH, TEXT_WIDTH), LayerNorm=nn.LayerNorm(TEXT_WIDTH, eps=1e-12))

    def forward(self, x, mask, image):
        x = self.attention(x, x, mask)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, image)
        return self.output.LayerNorm(x + self.output.dense(F.gelu(self.intermediate.dense(x))))


class Bert(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.embeddings = tree(
            word_embeddings=nn.Embedding(VOCABULARY, TEXT_WIDTH),
            position_embeddings=nn.Embedding(POSITIONS, TEXT_WIDTH),
            token_type_embeddings=nn.Embedding(2, TEXT_WIDTH),
            LayerNorm=nn.LayerNorm(TEXT_WIDTH, eps=1e-12),
        )
        self.embeddings.register_buffer("position_ids", torch.arange(POSITIONS)[None])
        self.encoder = tree(layer=nn.ModuleList(Layer(i >= FUSION_LAYER) for i in range(layers)))

    def text(self, ids, mask):
        e = self.embeddings
        x = e.word_embeddings(ids) + e.position_embeddings.weight[: ids.shape[1]] + e.token_type_embeddings.weight[0]
        x = e.LayerNorm(x)
        for layer in self.encoder.layer[:FUSION_LAYER]:
            x = layer(x, mask, None)
        return x

    def fuse(self, x, mask, image):
        for layer in self.encoder.layer[FUSION_LAYER:]:
            x = layer(x, mask, image)
        return x


class Albef(nn.Module):
    """The pretraining model: its state dict is that of a released checkpoint, but for the sizes."""

    def __init__(self, grid=GRID, queue=6, layers=LAYERS):
        super().__init__()
        self.visual_encoder = ImageEncoder(grid)
        head = tree(
            transform=tree(dense=nn.Linear(TEXT_WIDTH, TEXT_WIDTH), LayerNorm=nn.LayerNorm(TEXT_WIDTH, eps=1e-12)),
            decoder=nn.Linear(TEXT_WIDTH, VOCABULARY),
        )
        head.bias = head.decoder.bias
        self.text_encoder = tree(bert=Bert(layers), cls=tree(predictions=head))
        head.decoder.weight = self.text_encoder.bert.embeddings.word_embeddings.weight
        self.vision_proj, self.text_proj = nn.Linear(IMAGE_WIDTH, EMBED), nn.Linear(TEXT_WIDTH, EMBED)
        self.itm_head = nn.Linear(TEXT_WIDTH, 2)
        self.temp = nn.Parameter(torch.tensor(0.05))
        for name, parameter in self.named_parameters():
            if name != "temp":
                scale = re.search(r"(\bnorm\d?|LayerNorm)\.weight", name)
                nn.init.normal_(parameter, mean=1 if scale else 0, std=0.05)
        for part in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            self.add_module(f"{part}_m", copy.deepcopy(getattr(self, part)))
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(EMBED, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def answers(self, pixels, ids, mask):
        """Features, logits and the Grad-CAM of every fusion layer, by full attention maps and their gradients."""
        image, text = self.visual_encoder(pixels), self.text_encoder.bert.text(ids, mask)
        fused = self.text_encoder.bert.fuse(text, mask, image)
        head = self.text_encoder.cls.predictions
        hidden = head.transform.LayerNorm(F.gelu(head.transform.dense(fused)))
        match = self.itm_head(fused[:, 0])
        maps = [layer.crossattention.maps for layer in self.text_encoder.bert.encoder.layer[FUSION_LAYER:]]
        gradients = torch.autograd.grad(match[:, 1].sum(), maps)
        return {
            "image tokens": image,
            "image features": F.normalize(self.vision_proj(image[:, 0]), dim=-1),
            "text tokens": text,
            "text features": F.normalize(self.text_proj(text[:, 0]), dim=-1),
            "ITM logits": match,
            "MLM logits": head.decoder(hidden),
        } | {
            f"Grad-CAM {i}": (a * g.clamp(min=0)).mean(1) for i, (a, g) in enumerate(zip(maps, gradients, strict=True))
        }

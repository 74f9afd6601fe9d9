"""Where the image tokens of a decoder lie on the images: grids, tiles and overviews, and how to lay maps on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softmask_fast.errors import UsageError

WHOLE = (0.0, 0.0, 1.0, 1.0)
Box = tuple[float, float, float, float]  # top, left, bottom, right as fractions of the picture


@dataclass(frozen=True)
class Part:
    """A grid of tokens over a box of the picture. Each row may be followed by tokens that only mark its end."""

    first: int  # among the image's tokens
    rows: int
    columns: int
    box: Box = WHOLE
    row_ends: int = 0


@dataclass(frozen=True)
class Layout:
    """The tokens of one image."""

    tokens: int
    parts: tuple[Part, ...]


def on_picture(maps: Tensor, layout: Layout, size: tuple[int, int] | None = None) -> Tensor:
    """Lays maps (W, tokens) of one image on it: (W, rows, columns).

    Each token's relevance is spread evenly over the part that it covers, so sums are kept; where parts overlap, it adds
    up. `size` is (rows, columns); default: the grid of the finest part, extended over the whole picture.
    """
    rows, columns = size or (
        max((round(part.rows / (part.box[2] - part.box[0])) for part in layout.parts), default=1),
        max((round(part.columns / (part.box[3] - part.box[1])) for part in layout.parts), default=1),
    )
    picture = maps.new_zeros(len(maps), rows, columns)
    for part in layout.parts:
        stride = part.columns + part.row_ends
        grid = maps[:, part.first : part.first + part.rows * stride]
        grid = grid.unflatten(1, (part.rows, stride))[..., : part.columns]
        top, left, bottom, right = part.box
        down = _overlap(part.rows, top, bottom, rows).to(maps)
        across = _overlap(part.columns, left, right, columns).to(maps)
        picture += down @ grid @ across.T
    return picture


def _overlap(cells: int, low: float, high: float, pixels: int) -> Tensor:
    """(pixels, cells): the fraction of each cell between low and high that lies in each pixel."""
    edges = torch.linspace(low * pixels, high * pixels, cells + 1, dtype=torch.float64)
    pixel = torch.arange(pixels, dtype=torch.float64)[:, None]
    common = torch.minimum(edges[1:], pixel + 1) - torch.maximum(edges[:-1], pixel)
    return common.clamp(min=0) / (edges[1:] - edges[:-1])


def on_grid(maps: Tensor, grid: tuple[int, int] | None = None) -> list[Tensor]:
    """Lays maps (I, ..., N) on a grid of patches, by default a square one: one (..., rows, columns) per image."""
    rows, columns = grid or (math.isqrt(maps.shape[-1]),) * 2
    if rows * columns != maps.shape[-1]:
        raise UsageError(f"maps: expected {rows} x {columns} patches, got {maps.shape[-1]}")
    return list(maps.unflatten(-1, (rows, columns)))


def square_grid(maps: Tensor) -> list[Tensor]:
    """`on_grid` for a square grid. If one token, [CLS], comes before it, that token is left out."""
    tokens = maps.shape[-1]
    return on_grid(maps[..., int(math.isqrt(tokens) ** 2 != tokens) :])


def square(tokens: int, prefix: int = 0) -> Layout:
    """A layout of one square grid, after `prefix` tokens that are not patches."""
    side = math.isqrt(tokens - prefix)
    if side * side != tokens - prefix:
        raise UsageError(f"image_tokens: expected a square number for a grid of patches, got {tokens - prefix}")
    return Layout(tokens, (Part(prefix, side, side),))


def find_layouts(
    model: nn.Module, inputs: dict[str, Any], image_tokens: Tensor, picture_sizes: Sequence[tuple[int, int]] | None
) -> list[list[Layout]]:
    """The layouts of all images of a batch, for each sample; see `DecoderRelevance.layouts`.

    Raises:
        UsageError: for a model whose image grid is unknown here, or image tokens that do not fit the images.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UsageError(f"model: expected one whose image grid is known ({known}), got {kind}: use `maps` alone")
    runs = [_runs(row) for row in image_tokens.cpu().tolist()]
    found = FAMILIES[kind](model, inputs, runs, picture_sizes)
    for sample, layouts in enumerate(found):
        tokens, expected = sum(length for _, length in runs[sample]), sum(layout.tokens for layout in layouts)
        if tokens != expected:
            raise UsageError(f"image_tokens: expected {expected} for the images of sample {sample}, got {tokens}")
    return found


def _runs(row: list[bool]) -> list[tuple[int, int]]:
    """Start and length of each run of True."""
    runs: list[tuple[int, int]] = []
    for place, inside in enumerate(row):
        if inside and runs and sum(runs[-1]) == place:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        elif inside:
            runs.append((place, 1))
    return runs


def _in_turn(runs: list[list[tuple[int, int]]], images: Sequence[Layout]) -> list[list[Layout]]:
    """The images of a batch, in order, assigned to the samples by their numbers of tokens."""
    dealt, waiting = [], list(images)
    for sample in runs:
        left = sum(length for _, length in sample)
        dealt.append([])
        while left > 0 and waiting and waiting[0].tokens <= left:
            left -= waiting[0].tokens
            dealt[-1].append(waiting.pop(0))
    return dealt


def _equal(runs: list[list[tuple[int, int]]], layout: Layout) -> list[list[Layout]]:
    """The same layout for every image."""
    return [[layout] * (sum(length for _, length in sample) // layout.tokens) for sample in runs]


def _llava(model: nn.Module, inputs: dict[str, Any], runs: list, sizes: Any) -> list[list[Layout]]:
    config, vision = model.config, model.config.vision_config
    if vision.model_type == "pixtral":  # each row ends with a token that is not an image token
        step = vision.patch_size * getattr(config, "spatial_merge_size", 1)
        grids = [(height // step, width // step) for height, width in inputs["image_sizes"].tolist()]
        return _in_turn(runs, [Layout(rows * columns, (Part(0, rows, columns),)) for rows, columns in grids])
    side = vision.image_size // vision.patch_size
    prefix = int(getattr(config, "vision_feature_select_strategy", "default") == "full" and "clip" in vision.model_type)
    return _equal(runs, square(side * side + prefix, prefix))


def _llava_next(model: nn.Module, inputs: dict[str, Any], runs: list, sizes: Any) -> list[list[Layout]]:
    """An overview, and the patches of all tiles as one grid without padding, whose rows end with a token. The model
    itself packs zeros with ends that are NaN, and the result shows the grid."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, vision = model.config, model.config.vision_config
    side = vision.image_size // vision.patch_size
    if config.model_type == "llava_next":
        options = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    else:
        options = {"vision_aspect_ratio": config.vision_aspect_ratio}
    together = inputs.get("batch_num_images")  # if a sample has several images, they are not cut into tiles
    alone = [True] * len(inputs["image_sizes"]) if together is None else [n == 1 for n in together for _ in range(n)]
    images = []
    for size, cut in zip(inputs["image_sizes"].cpu(), alone, strict=True):
        tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size) if cut else 1
        zeros, end = torch.zeros(tiles, side * side, 1), torch.full((1,), float("nan"))
        packed = model.base_model.pack_image_features([zeros], size[None], image_newline=end, **options)[0][0]
        rows = int(packed.isnan().sum())
        parts = [Part(0, side, side)]
        if tiles > 1:
            parts.append(Part(side * side, rows, (len(packed) - side * side) // rows - 1, row_ends=1))
        images.append(Layout(len(packed), tuple(parts)))
    return _in_turn(runs, images)


def _qwen(model: nn.Module, inputs: dict[str, Any], runs: list, sizes: Any) -> list[list[Layout]]:
    merge = model.config.vision_config.spatial_merge_size
    images = []
    for frames, height, width in inputs["image_grid_thw"].tolist():
        rows, columns = height // merge, width // merge
        parts = tuple(Part(frame * rows * columns, rows, columns) for frame in range(frames))
        images.append(Layout(frames * rows * columns, parts))
    return _in_turn(runs, images)


def _internvl(model: nn.Module, inputs: dict[str, Any], runs: list, sizes: Any) -> list[list[Layout]]:
    """Tiles row by row, then the overview; one run of tokens is one image."""
    tokens = model.config.image_seq_length
    side = math.isqrt(tokens)
    images, number = [], 0
    for sample in runs:
        images.append([])
        for _, length in sample:
            count = length // tokens
            parts = [Part((count - 1) * tokens, side, side)]
            if count > 1 and sizes is not None:
                rows, columns = _canvas(count - 1, *sizes[number])
                parts += _tiles(rows, columns, side, tokens)
            images[-1].append(Layout(count * tokens, tuple(parts)))
            number += 1
    return images


def _canvas(tiles: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a number of tiles with the aspect ratio nearest to the picture's."""
    pairs = [(rows, tiles // rows) for rows in range(1, tiles + 1) if tiles % rows == 0]
    return min(pairs, key=lambda pair: abs(width / height - pair[1] / pair[0]))


def _tiles(rows: int, columns: int, side: int, tokens: int) -> list[Part]:
    return [
        Part(
            (row * columns + column) * tokens,
            side,
            side,
            (row / rows, column / columns, (row + 1) / rows, (column + 1) / columns),
        )
        for row in range(rows)
        for column in range(columns)
    ]


def _idefics(model: nn.Module, inputs: dict[str, Any], runs: list, sizes: Any) -> list[list[Layout]]:
    """Tiles row by row, one run of tokens each, then the overview, which the same token always precedes. There are
    two tokens between two tiles of a row, and more at its end."""
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 // model.config.scale_factor**2
    side = math.isqrt(tokens)
    images = []
    for sample, ids in zip(runs, inputs["input_ids"].tolist(), strict=True):
        images.append([])
        pieces = [start + piece for start, length in sample for piece in range(0, length, tokens)]
        tiles: list[int] = []  # starts of the tiles of the image so far
        for start in pieces:
            if ids[start - 1] != ids[pieces[-1] - 1]:
                tiles.append(start)
                continue
            parts = [Part(len(tiles) * tokens, side, side)]
            if tiles:
                gaps = [after - before - tokens for before, after in zip(tiles, [*tiles[1:], start], strict=True)]
                columns = next((number + 1 for number, gap in enumerate(gaps) if gap != 2), len(tiles))
                parts += _tiles(len(tiles) // columns, columns, side, tokens)
            images[-1].append(Layout((len(tiles) + 1) * tokens, tuple(parts)))
            tiles = []
    return images


FAMILIES = {
    "llava": _llava,
    "mistral3": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_next,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _internvl,
    "paligemma": lambda model, inputs, runs, sizes: _equal(
        runs, square((model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2)
    ),
    "gemma3": lambda model, inputs, runs, sizes: _equal(runs, square(model.config.mm_tokens_per_image)),
    "idefics3": _idefics,
    "smolvlm": _idefics,
}

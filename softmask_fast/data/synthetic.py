"""`shapes`, the built-in data: scenes of colored shapes, with captions about their relations and exact boxes.

Scenes are drawn on the fly; nothing is downloaded. Captions say left and right, so train without the horizontal flip.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from softmask_fast.data.seeding import image_ids, keyed_generator
from softmask_fast.data.types import Phrase, Sample
from softmask_fast.errors import UsageError

COLORS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 215, 50),
    "orange": (245, 140, 30), "purple": (140, 60, 180), "pink": (245, 150, 190), "cyan": (60, 205, 215),
    "black": (20, 20, 20), "white": (250, 250, 250),
}  # fmt: skip
SIZES = {"small": 0.11, "large": 0.16}  # half the width of an object, as a fraction of the image's width
NAMES = ("full", "color")  # what captions call objects: "small red circle", or "red object", which is learned sooner
DEFAULT_SCENES = {"train": 65_536, "val": 4096}
HELD_OUT: dict[str, Any] = {"split": "val", "seed": 0}  # evaluation sees the same scenes for every training seed
VALIDATION_PARTS = (1, 4)  # one in four contents (objects and relations) is held out
_MARGIN = 0.01  # between objects, as a fraction of the width
_SUPERSAMPLING = 2  # drawn larger and averaged, for smooth edges


def _regular(points: int, radii: Sequence[float], turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [2 * math.pi * (i / points) - math.pi / 2 + turn for i in range(points)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    steps = [2 * math.pi * i / 32 for i in range(32)]
    x = [16 * math.sin(t) ** 3 for t in steps]
    y = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in steps]
    return [(a / 17, -(b + 2.5) / 15) for a, b in zip(x, y, strict=True)]


_T = 1 / 3
# outlines within [-1, 1] squared, y downwards
OUTLINES = {
    "circle": _regular(48, (1.0,)),
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "star": _regular(10, (1.0, 0.42)),
    "cross": [(-_T, -1), (_T, -1), (_T, -_T), (1, -_T), (1, _T), (_T, _T), (_T, 1), (-_T, 1), (-_T, _T), (-1, _T),
              (-1, -_T), (-_T, -_T)],
    "heart": _heart(),
    "ring": _regular(48, (1.0,)),
}  # fmt: skip
_RING_HOLE = 0.55
# x1 y1 x2 y2 of each outline
_EXTENTS = {
    shape: (min(x for x, _ in points), min(y for _, y in points), max(x for x, _ in points), max(y for _, y in points))
    for shape, points in OUTLINES.items()
}


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene."""

    size: str
    color: str
    shape: str
    x: float  # of the center, as fractions of the image's width and height
    y: float

    @property
    def name(self) -> str:
        """The full name."""
        return f"{self.size} {self.color} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 of the outline, as fractions of the image's width and height."""
        half = SIZES[self.size]
        x1, y1, x2, y2 = _EXTENTS[self.shape]
        return (self.x + half * x1, self.y + half * y1, self.x + half * x2, self.y + half * y2)


def relation(first: SceneObject, second: SceneObject) -> str:
    """Where `first` is relative to `second`, along the axis on which they are farther apart."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


class ShapesSource:
    """Numbered scenes. The seed, the split, the number and the options determine each.

    No content (which objects, in which relation) occurs both in "train" and in another split.
    """

    encoded = False

    def __init__(
        self, *, num: int | None = None, objects: tuple[int, int] = (2, 2), colors: int = len(COLORS),
        names: str = "full", split: str = "train", seed: int = 0, image_size: int = 64,
    ) -> None:  # fmt: skip
        """
        Args:
            num: Number of scenes; default: `DEFAULT_SCENES`.
            objects: Smallest and largest number of objects in a scene, 2 or 3.
            colors: How many colors there are; fewer are learned sooner.
            names: What captions call the objects, one of `NAMES`. Names within a scene differ.
            split: "train", or any other name for held-out scenes.
            seed: Of the scenes.
            image_size: Width and height in pixels.

        Raises:
            UsageError: If a value is out of range.
        """
        num = DEFAULT_SCENES.get(split, DEFAULT_SCENES["val"]) if num is None else num
        if num < 1:
            raise UsageError(f"shapes: num: expected at least 1, got {num}")
        if not 2 <= objects[0] <= objects[1] <= 3:
            raise UsageError(f"shapes: objects: expected 2, 3 or 2-3, got {objects[0]}-{objects[1]}")
        if names not in NAMES:
            raise UsageError(f"shapes: names: expected {' or '.join(NAMES)}, got {names!r}")
        fewest = 2 if names == "full" else objects[1] + 1  # so that a scene can lack a color
        if not fewest <= colors <= len(COLORS):
            raise UsageError(f"shapes: colors: expected {fewest} to {len(COLORS)}, got {colors}")
        if image_size < 16:
            raise UsageError(f"shapes: image_size: expected at least 16, got {image_size}")
        self.num, self.objects, self.colors, self.names = num, objects, colors, names
        self.split, self.seed, self.image_size = split, seed, image_size
        self.keys = [f"shapes-{split}-{seed}-{index:06d}" for index in range(num)]
        self.image_ids = image_ids(self.keys)

    @classmethod
    def from_options(cls, options: str, *, split: str, seed: int, image_size: int) -> ShapesSource:
        """From "num=4096,objects=2-3,colors=10,names=full"; all are optional, and "colour" is accepted for "color"."""
        values: dict[str, Any] = {}
        for option in filter(None, options.split(",")):
            name, _, value = option.replace("colour", "color").partition("=")
            low, _, high = value.partition("-")
            try:
                if name in ("num", "colors"):
                    values[name] = int(value)
                elif name == "names":
                    values[name] = value
                elif name == "objects":
                    values["objects"] = (int(low), int(high or low))
                else:
                    raise ValueError(name)
            except ValueError:
                raise UsageError(
                    f"shapes: cannot read option {option!r}; expected num=65536, objects=2-3, colors=10 or names=full"
                ) from None
        return cls(**values, split=split, seed=seed, image_size=image_size)

    def __len__(self) -> int:
        return self.num

    def scene(self, index: int) -> list[SceneObject]:
        """The objects of one scene, in the order in which the first caption names them."""
        generator = keyed_generator(self.seed, self.split, self.objects, index, "scene")
        while True:
            count = int(generator.integers(self.objects[0], self.objects[1] + 1))
            scene = _draw_scene(generator, count, self.colors)
            if scene is None or len({self.name(thing) for thing in scene}) < count:
                continue
            if _is_validation(scene) == (self.split != "train"):
                return scene

    def name(self, thing: SceneObject) -> str:
        """What the captions call an object."""
        return thing.name if self.names == "full" else f"{thing.color} object"

    def draw(self, index: int, scene: Sequence[SceneObject]) -> np.ndarray:
        """Draws a scene on the background of that number: (image_size, image_size, 3) uint8."""
        return _paint(scene, self.image_size, keyed_generator(self.seed, self.split, index, "background"))

    def read(self, index: int) -> Sample:
        if not 0 <= index < self.num:
            raise IndexError(f"shapes: index {index} is outside [0, {self.num})")
        scene = self.scene(index)
        described = _describe(scene, self.name)
        captions = [caption for caption, _ in described]
        phrases = [phrase for _, own in described for phrase in own]
        return Sample(self.keys[index], self.draw(index, scene), captions, phrases)


def _describe(scene: Sequence[SceneObject], name: Callable[[SceneObject], str]) -> list[tuple[str, list[Phrase]]]:
    """Captions that name every object, with their phrases. The proposals of a phrase are the boxes of all objects."""
    texts: list[list[str | SceneObject]] = [
        _chain(scene, "{}"),
        _chain(scene[::-1], "{}"),
        ["there is", *_chain(scene, "that is {}")],
        ["the picture shows", *_chain(scene[::-1], "placed {}")],
    ]
    return [_caption(parts, name) for parts in texts]


def _chain(scene: Sequence[SceneObject], link: str) -> list[str | SceneObject]:
    """[A, "left of", B], and with three objects [A, "left of", B, "which is above", C]."""
    parts: list[str | SceneObject] = [scene[0]]
    for i, (first, second) in enumerate(zip(scene, scene[1:], strict=False)):
        parts += [("which is " if i else "") + link.format(relation(first, second)), second]
    return parts


def _caption(parts: Sequence[str | SceneObject], name: Callable[[SceneObject], str]) -> tuple[str, list[Phrase]]:
    words: list[str] = []
    spans: list[tuple[SceneObject, int, int]] = []  # object, its first word, number of words
    for part in parts:
        text = f"a {name(part)}" if isinstance(part, SceneObject) else part
        if isinstance(part, SceneObject):
            spans.append((part, len(words), len(text.split())))
        words += text.split()
    caption, boxes = " ".join(words), [thing.box for thing, _, _ in spans]
    return caption, [
        Phrase(caption, " ".join(words[first : first + n]), first, n, [thing.box], boxes) for thing, first, n in spans
    ]


def _draw_scene(generator: np.random.Generator, count: int, palette: int) -> list[SceneObject] | None:
    """One random scene, or None if objects overlap, look alike or have no clear relation."""
    sizes, colors, shapes = list(SIZES), list(COLORS)[:palette], list(OUTLINES)
    kinds = generator.integers((len(sizes), len(colors), len(shapes)), size=(count, 3)).tolist()
    positions = generator.random((count, 2)).tolist()
    scene = []
    for (size, color, shape), (x, y) in zip(kinds, positions, strict=True):
        half = SIZES[sizes[size]]
        room = 1 - 2 * half
        scene.append(SceneObject(sizes[size], colors[color], shapes[shape], half + x * room, half + y * room))
    if len({(thing.color, thing.shape) for thing in scene}) < count:
        return None
    for i, first in enumerate(scene):
        for second in scene[:i]:
            apart = max(abs(first.x - second.x), abs(first.y - second.y))
            if apart < SIZES[first.size] + SIZES[second.size] + _MARGIN:
                return None
    for first, second in zip(scene, scene[1:], strict=False):
        dx, dy = abs(first.x - second.x), abs(first.y - second.y)
        if max(dx, dy) < 1.5 * min(dx, dy):  # diagonal: neither clearly "left of" nor "above"
            return None
    return scene


def _is_validation(scene: Sequence[SceneObject]) -> bool:
    """Whether the content, however worded, belongs to validation."""
    wording = min(
        " ".join(part.name if isinstance(part, SceneObject) else part for part in _chain(order, "{}"))
        for order in (scene, scene[::-1])
    )
    digest = hashlib.blake2b(wording.encode(), digest_size=8).digest()
    chosen, of = VALIDATION_PARTS
    return int.from_bytes(digest, "little") % of < chosen


def _paint(scene: Sequence[SceneObject], image_size: int, generator: np.random.Generator) -> np.ndarray:
    """(image_size, image_size, 3) uint8."""
    size = image_size * _SUPERSAMPLING
    gray = int(generator.integers(90, 180))
    background = tuple(int(c) for c in np.clip(gray + generator.integers(-15, 16, size=3), 0, 255))
    canvas = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(canvas)
    for thing in scene:
        half, x, y = SIZES[thing.size] * size, thing.x * size, thing.y * size
        draw.polygon([(x + half * a, y + half * b) for a, b in OUTLINES[thing.shape]], fill=COLORS[thing.color])
        if thing.shape == "ring":
            hole = half * _RING_HOLE
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
    pixels = np.asarray(canvas.reduce(_SUPERSAMPLING))
    strongest = np.uint8(2 ** int(generator.integers(0, 5)) - 1)  # 0, 1, 3, ... 15
    noise = np.frombuffer(generator.bytes(pixels.size), np.uint8).reshape(pixels.shape) & strongest
    return pixels + np.minimum(noise, 255 - pixels)  # at most 255

"""Questions, statements, pairs and expressions about `shapes` scenes: data for the tasks without a download.

Each entry depends only on seed, split and index, and has the format of the task's JSON file. As in `shapes`, objects
and relations never occur in the same combination in training and in validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from softmask_fast.data.seeding import keyed_generator
from softmask_fast.data.synthetic import COLORS, OUTLINES, SIZES, SceneObject, ShapesSource, relation

UNSEEN_PROPERTIES = ("heavy", "old", "cold", "expensive")  # no picture of a shape can show these
ANSWERS = [*COLORS, *OUTLINES, "yes", "no"]

Entry = tuple[dict[str, Any], list[np.ndarray]]  # an entry and its images, each (H, W, 3) uint8


class ShapesTask:
    """`num` entries of one task."""

    def __init__(self, task: str, scenes: ShapesSource) -> None:
        self._scenes = scenes
        self._make = _MAKERS[task]
        self.task, self.name = task, scenes.name
        self.keys = [f"{task}-{key}" for key in scenes.keys]

    def __len__(self) -> int:
        return len(self._scenes)

    def entry(self, index: int) -> Entry:
        """One entry and its images."""
        source = self._scenes
        return self._make(self, index, keyed_generator(source.seed, source.split, index, self.task))

    def scene(self, index: int, which: int = 0) -> tuple[list[SceneObject], np.ndarray]:
        """The `which`-th scene of an entry, and its image."""
        number = index + len(self) * which
        scene = self._scenes.scene(number)
        return scene, self._scenes.draw(number, scene)

    def absent(self, scene: Sequence[SceneObject], generator: np.random.Generator) -> str:
        """The name of a random object that is not in the scene."""
        colors = list(COLORS)[: self._scenes.colors]
        while True:
            size, color, shape = (str(generator.choice(list(values))) for values in (SIZES, colors, OUTLINES))
            name = self.name(SceneObject(size, color, shape, 0.5, 0.5))
            if name not in map(self.name, scene):
                return name


def _question(task: ShapesTask, index: int, generator: np.random.Generator) -> Entry:
    """A question with ten equal answers, as from ten annotators who agree."""
    scene, image = task.scene(index)
    first, second = _neighbors(scene, generator)
    kinds = ["relation", "existence"]
    if task.name(first) == first.name:
        kinds += ["color", "shape"]
    kind = generator.choice(kinds)
    alike = {
        "color": [thing for thing in scene if (thing.size, thing.shape) == (first.size, first.shape)],
        "shape": [thing for thing in scene if (thing.size, thing.color) == (first.size, first.color)],
    }
    # The British spelling of the questions is part of the data.
    if kind == "color" and len(alike[kind]) == 1:
        question, answer = f"what colour is the {first.size} {first.shape}", first.color
    elif kind == "shape" and len(alike[kind]) == 1:
        question, answer = f"what shape is the {first.size} {first.color} object", first.shape
    elif kind == "existence":
        present = bool(generator.integers(2))
        name = task.name(first) if present else task.absent(scene, generator)
        question, answer = f"is there a {name}", "yes" if present else "no"
    else:
        question, answer = f"what colour is {relation(first, second)} the {task.name(second)}", first.color
    entry = {"question_id": index, "question": question, "answer": [answer] * 10, "dataset": "vqa"}
    return entry | {"image": task.keys[index]}, [image]


def _pair(task: ShapesTask, index: int, generator: np.random.Generator) -> Entry:
    """A statement about one of two images. A false one is often true of the other image."""
    scenes, images = zip(*(task.scene(index, which) for which in range(2)), strict=True)
    side, true = (int(number) for number in generator.integers(2, size=2))
    named, other = scenes[side], scenes[1 - side]
    name = task.name(named[generator.integers(len(named))])
    if not true:
        elsewhere = [task.name(thing) for thing in other if task.name(thing) not in map(task.name, named)]
        use_other = bool(elsewhere) and bool(generator.integers(2))
        name = str(generator.choice(elsewhere)) if use_other else task.absent(named, generator)
    sentence = f"the {('left', 'right')[side]} image shows a {name}"
    names = [f"{task.keys[index]}-{which}" for which in range(2)]
    return {"sentence": sentence, "label": str(bool(true)), "images": names}, list(images)


def _statement(task: ShapesTask, index: int, generator: np.random.Generator) -> Entry:
    """A statement that the image proves, disproves or leaves open."""
    scene, image = task.scene(index)
    label = str(generator.choice(["entailment", "neutral", "contradiction"]))
    name = task.name(scene[generator.integers(len(scene))])
    if label == "contradiction":
        name = task.absent(scene, generator)
    sentence = f"there is a {name}"
    if label == "neutral":
        sentence += f" that is {generator.choice(UNSEEN_PROPERTIES)}"
    return {"sentence": sentence, "label": label, "image": task.keys[index]}, [image]


def _expression(task: ShapesTask, index: int, generator: np.random.Generator) -> Entry:
    """An expression for one object. Boxes are [x, y, width, height] in pixels; every object is a proposal."""
    scene, image = task.scene(index)
    size = image.shape[0]

    def box(thing: SceneObject) -> list[float]:
        x1, y1, x2, y2 = (size * edge for edge in thing.box)
        return [x1, y1, x2 - x1, y2 - y1]

    chosen = scene[generator.integers(len(scene))]
    entry = {"ref_id": index, "text": f"the {task.name(chosen)}", "box": box(chosen), "proposals": [*map(box, scene)]}
    return entry | {"image": task.keys[index]}, [image]


def _neighbors(scene: Sequence[SceneObject], generator: np.random.Generator) -> tuple[SceneObject, SceneObject]:
    """Two objects in random order that are neighbors in the caption, and so have a clear relation."""
    index = generator.integers(len(scene) - 1)
    first, second = scene[index], scene[index + 1]
    return (first, second) if generator.integers(2) else (second, first)


_MAKERS: dict[str, Callable[[ShapesTask, int, np.random.Generator], Entry]] = {
    "vqa": _question,
    "nlvr2": _pair,
    "entailment": _statement,
    "grounding": _expression,
}

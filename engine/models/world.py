"""The procedural world of the built-in model: scenes of coloured shapes, their prompts, and a renderer.

A scene is a light 64 x 64 canvas with one to nine objects that do not touch. A prompt asks for one to three
groups, "two red circles and three blue squares", in one of several wordings. The renderer is the ground truth that
the autoencoder and the flow learn from, the parser reads back (`rollflow.rewards.count`) and the held-out
classifier is trained on (`rollflow.rewards.classifier`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import RequestError, shown

SIZE = 64
CANVAS = (0.96, 0.95, 0.93)
PALETTE = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.60, 0.25),
    "blue": (0.16, 0.32, 0.84),
    "yellow": (0.95, 0.76, 0.06),
}
COLORS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle")
CLASSES = tuple((color, shape) for color in COLORS for shape in SHAPES)
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_OBJECTS = len(NUMBERS)

WORDINGS = (
    "{groups}",
    "a picture of {groups}",
    "an image with {groups}",
    "draw {groups}",
    "show {groups}",
    "{groups} on a light canvas",
)

Group = tuple[int, str, str]


@dataclass(frozen=True)
class Scene:
    """Objects of one image: class index into `CLASSES`, centre and radius in pixels, all of shape [object]."""

    kind: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray

    def counts(self) -> np.ndarray:
        """How many objects of each class: [12]."""
        return np.bincount(self.kind, minlength=len(CLASSES))


def words() -> tuple[str, ...]:
    """Every word that a prompt of this world may use, sorted."""
    text = " ".join(WORDINGS).replace("{groups}", "")
    vocabulary = {*re.findall(r"[a-z]+", text), *NUMBERS, *COLORS, *SHAPES, *(s + "s" for s in SHAPES), "a", "and", ","}
    return tuple(sorted(vocabulary))


def phrase(group: Group) -> str:
    """(2, "red", "circle") -> "two red circles"."""
    count, color, shape = group
    return f"{NUMBERS[count - 1]} {color} {shape}{'s' if count > 1 else ''}"


def prompt(groups: Sequence[Group], wording: int = 0) -> str:
    """The sentence that asks for `groups` in the given wording (index into `WORDINGS`)."""
    phrases = [phrase(group) for group in groups]
    joined = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return WORDINGS[wording].format(groups=joined)


_GROUP = re.compile(rf"\b({'|'.join((*NUMBERS, 'a'))})\s+({'|'.join(COLORS)})\s+({'|'.join(SHAPES)})s?\b")


def parse_prompt(text: str) -> list[Group]:
    """The groups that a prompt asks for.

    Raises:
        RequestError: it asks for no group, mentions a colour or a shape outside of one, or asks for too many objects.
    """
    groups = [
        (1 if number == "a" else NUMBERS.index(number) + 1, color, shape)
        for number, color, shape in _GROUP.findall(text.lower())
    ]
    mentioned = [len(re.findall(rf"\b(?:{'|'.join(names)})s?\b", text.lower())) for names in (COLORS, SHAPES)]
    if not groups or max(mentioned) > len(groups):
        raise RequestError(
            f"the prompt {shown(text)} cannot be read as groups of shapes: write each as number, colour, shape, as in "
            f"'two red circles and one blue square' (numbers one to nine; colours {', '.join(COLORS)}; shapes "
            f"{', '.join(SHAPES)})"
        )
    total = sum(count for count, _, _ in groups)
    if total > MAX_OBJECTS:
        raise RequestError(f"the prompt {shown(text)} asks for {total} objects: a scene has at most {MAX_OBJECTS}")
    return groups


def target_counts(text: str) -> np.ndarray:
    """What a prompt asks for, as objects of each class: [12]."""
    wanted: Counter[int] = Counter()
    for count, color, shape in parse_prompt(text):
        wanted[CLASSES.index((color, shape))] += count
    return np.array([wanted[i] for i in range(len(CLASSES))])


def random_groups(rng: np.random.Generator, total: int, groups: int) -> list[Group]:
    """`total` objects in `groups` distinct classes, each with at least one."""
    kinds = rng.choice(len(CLASSES), size=groups, replace=False)
    cuts = np.sort(rng.choice(np.arange(1, total), size=groups - 1, replace=False)) if groups > 1 else np.array([], int)
    counts = np.diff(np.concatenate(([0], cuts, [total])))
    return [(int(n), *CLASSES[k]) for n, k in zip(counts, kinds, strict=True)]


EXTENT = {"circle": 1.0, "square": 0.886 * 2**0.5, "triangle": 1.35}  # radius of the circumscribed circle
_EXTENT = np.array([EXTENT[shape] for _, shape in CLASSES])


def random_scene(rng: np.random.Generator, groups: Sequence[Group], gap: float = 2.5) -> Scene:
    """Places the objects of `groups` at random, at least `gap` pixels apart and one pixel from the border."""
    kind = np.repeat([CLASSES.index((color, shape)) for _, color, shape in groups], [count for count, _, _ in groups])
    largest = 9.5 - 0.45 * (len(kind) - 1)
    while True:
        radius = rng.uniform(5.0, largest, size=len(kind))
        reach = radius * _EXTENT[kind]
        x, y = np.zeros(len(kind)), np.zeros(len(kind))
        for i in rng.permutation(np.argsort(-reach)) if len(kind) < 4 else np.argsort(-reach):
            done = np.flatnonzero(x)
            tries = rng.uniform(reach[i] + 1, SIZE - reach[i] - 1, size=(96, 2))
            distance = np.hypot(tries[:, :1] - x[done], tries[:, 1:] - y[done])
            free = np.flatnonzero((distance > reach[i] + reach[done] + gap).all(axis=1))
            if not len(free):
                break
            x[i], y[i] = tries[free[0]]
        if x.all():
            return Scene(kind, x, y, radius)


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Anti-aliased coverage in [0, 1] of a shape at offsets (dx, dy) from its centre (y points down)."""
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - 0.886 * radius
    else:  # an equilateral triangle, point up
        distance = np.maximum(dy, 0.8660254 * abs(dx) - 0.5 * dy) - 0.675 * radius
    return np.clip(0.5 - distance, 0.0, 1.0)


_GRID = np.arange(SIZE, dtype=np.float32) + 0.5


def render(scene: Scene) -> np.ndarray:
    """The image of a scene: float32 [64, 64, 3] in [0, 1]."""
    image = np.broadcast_to(np.array(CANVAS, np.float32), (SIZE, SIZE, 3)).copy()
    for kind, x, y, radius in zip(scene.kind, scene.x, scene.y, scene.radius, strict=True):
        color, shape = CLASSES[kind]
        reach = radius * EXTENT[shape] + 1
        rows = slice(max(0, int(y - reach)), int(y + reach) + 2)
        columns = slice(max(0, int(x - reach)), int(x + reach) + 2)
        ink = coverage(shape, _GRID[None, columns] - x, _GRID[rows, None] - y, radius)[..., None]
        image[rows, columns] = (1 - ink) * image[rows, columns] + ink * np.array(PALETTE[color], np.float32)
    return image


def render_batch(scenes: Sequence[Scene]) -> Float[Tensor, "scene 3 64 64"]:
    """The images of many scenes, in the layout of models: [scene, 3, 64, 64] in [0, 1]."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).contiguous()

"""The procedural world of the built-in video model: clips of coloured circles that move, their prompts, a renderer.

A clip is 9 frames of a light 32 x 32 canvas, on which one to three circles move along straight lines and never touch.
A prompt asks for one or two groups, "two red circles move left and one blue circle moves up". The renderer is the
ground truth that the autoencoder and the flow learn from, and the reward reads it back (`rollflow.rewards.motion`).
Colours and outlines are those of `rollflow.models.world`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rollflow.errors import RequestError, shown
from rollflow.models import world
from rollflow.models.world import CANVAS, COLORS, PALETTE

SIZE = 32
FRAMES = 9
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # unit steps (x, y); y points down
WAYS = tuple(DIRECTIONS)
NUMBERS = world.NUMBERS[:3]
MAX_CIRCLES = len(NUMBERS)
RADII = (3.3, 4.7)  # pixels
TRAVEL = (7.0, 11.0)  # pixels from the first frame to the last

Group = tuple[int, str, str]  # number, colour, direction


@dataclass(frozen=True)
class Clip:
    """Circles of one clip: colour, an index into `COLORS`, and way, one into `WAYS`; all of shape [circle].

    `x`, `y` are the centre in the first frame, `travel` is the way to its place in the last, all in pixels.
    """

    color: np.ndarray
    way: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    travel: np.ndarray

    def paths(self) -> tuple[np.ndarray, np.ndarray]:
        """Centres (x, y) in all frames, each [circle, frame]."""
        steps = np.array([DIRECTIONS[way] for way in WAYS])[self.way] * self.travel[:, None]
        share = np.linspace(0, 1, FRAMES)
        return self.x[:, None] + steps[:, :1] * share, self.y[:, None] + steps[:, 1:] * share


def words() -> tuple[str, ...]:
    """Every word that a prompt of this world may use, sorted."""
    return tuple(sorted({*NUMBERS, *COLORS, *WAYS, "a", "and", "circle", "circles", "move", "moves"}))


def phrase(group: Group) -> str:
    """(2, "red", "left") -> "two red circles move left"."""
    count, color, way = group
    many = count > 1
    return f"{NUMBERS[count - 1]} {color} circle{'s' * many} move{'s' * (not many)} {way}"


def prompt(groups: Sequence[Group]) -> str:
    """The sentence that asks for `groups`."""
    return " and ".join(phrase(group) for group in groups)


_GROUP = re.compile(
    rf"\b({'|'.join((*NUMBERS, 'a'))})\s+({'|'.join(COLORS)})\s+circles?\s+moves?\s+({'|'.join(WAYS)})\b"
)


def parse_prompt(text: str) -> list[Group]:
    """The groups that a prompt asks for.

    Raises:
        RequestError: it asks for no group, mentions a colour, a shape or a direction outside of one, or asks for too
            many circles.
    """
    lower = text.lower()
    groups = [
        (1 if number == "a" else NUMBERS.index(number) + 1, color, way) for number, color, way in _GROUP.findall(lower)
    ]
    named = (COLORS, world.SHAPES, WAYS)
    mentioned = [len(re.findall(rf"\b(?:{'|'.join(names)})s?\b", lower)) for names in named]
    if not groups or max(mentioned) > len(groups):
        raise RequestError(
            f"the prompt {shown(text)} cannot be read as groups of moving circles: write each as number, colour "
            "and direction, as in 'two red circles move left and one blue circle moves up' (numbers "
            f"{', '.join(NUMBERS)}; colours {', '.join(COLORS)}; directions {', '.join(WAYS)})"
        )
    total = sum(group[0] for group in groups)
    if total > MAX_CIRCLES:
        raise RequestError(f"the prompt {shown(text)} asks for {total} circles: a clip has at most {MAX_CIRCLES}")
    return groups


def target_moves(text: str) -> np.ndarray:
    """What a prompt asks for, as circles of each colour and direction: [4, 4]."""
    wanted = np.zeros((len(COLORS), len(WAYS)), int)
    for count, color, way in parse_prompt(text):
        wanted[COLORS.index(color), WAYS.index(way)] += count
    return wanted


def random_groups(rng: np.random.Generator, total: int, groups: int) -> list[Group]:
    """`total` circles in `groups` groups of distinct colours, each with at least one circle and a direction."""
    colors = rng.choice(len(COLORS), size=groups, replace=False)
    cuts = np.sort(rng.choice(np.arange(1, total), size=groups - 1, replace=False)) if groups > 1 else np.array([], int)
    counts = np.diff(np.concatenate(([0], cuts, [total])))
    return [(int(n), COLORS[c], WAYS[rng.integers(len(WAYS))]) for n, c in zip(counts, colors, strict=True)]


def random_prompt(rng: np.random.Generator) -> str:
    """A prompt for one to three circles, every number equally often, in one or two groups."""
    total = int(rng.integers(1, MAX_CIRCLES + 1))
    return prompt(random_groups(rng, total, int(rng.integers(1, min(2, total) + 1))))


def random_clip(rng: np.random.Generator, groups: Sequence[Group], gap: float = 2.0) -> Clip:
    """Places the circles of `groups` at random: at least `gap` pixels apart in every frame, never over the border.

    The circles of a group travel equally far.
    """
    sizes = [group[0] for group in groups]
    color = np.repeat([COLORS.index(color) for _, color, _ in groups], sizes)
    way = np.repeat([WAYS.index(way) for *_, way in groups], sizes)
    steps = np.array([DIRECTIONS[name] for name in WAYS])[way]
    share = np.linspace(0, 1, FRAMES)
    while True:
        radius = rng.uniform(*RADII, size=len(color))
        travel = np.repeat(rng.uniform(*TRAVEL, size=len(groups)), sizes)
        moved = steps * travel[:, None]  # [circle, 2]
        low = np.maximum(0, -moved) + radius[:, None] + 0.5
        high = SIZE - np.maximum(0, moved) - radius[:, None] - 0.5
        place = rng.uniform(low, high, size=(64, len(color), 2))  # 64 tries at once
        path = place[:, :, None] + moved[:, None] * share[:, None]  # [try, circle, frame, 2]
        apart = np.linalg.norm(path[:, :, None] - path[:, None], axis=-1).min(-1)  # [try, circle, circle]
        apart += 1e3 * np.eye(len(color))
        free = np.flatnonzero((apart > radius[:, None] + radius + gap).all((1, 2)))
        if len(free):
            x, y = place[free[0]].T
            return Clip(color, way, x, y, radius, travel)


_GRID = np.arange(SIZE, dtype=np.float32) + 0.5


def render(clip: Clip) -> Float[np.ndarray, "frame 3 32 32"]:
    """The frames of a clip: float32 [9, 3, 32, 32] in [0, 1]."""
    canvas = np.array(CANVAS, np.float32).reshape(3, 1, 1)
    image = np.broadcast_to(canvas, (FRAMES, 3, SIZE, SIZE)).copy()
    for color, radius, x, y in zip(clip.color, clip.radius, *(c.astype(np.float32) for c in clip.paths()), strict=True):
        paint = np.array(PALETTE[COLORS[color]], np.float32).reshape(3, 1, 1)
        dx, dy = _GRID - x[:, None, None], _GRID[:, None] - y[:, None, None]
        ink = world.coverage("circle", dx, dy, float(radius))[:, None]
        image += ink * (paint - image)
    return image

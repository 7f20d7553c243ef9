"""The `motion` reward: reads the circles of a clip back, frame by frame, and how they move.

Like `rollflow.rewards.count`, whose counting it extends to clips, it is a measuring instrument and not a network: it
knows the palette, the canvas and the outline of `rollflow.models.moving` and nothing else. What it cannot account for
(a blob of two colours, a scrap, a ghost, circles grown together) is counted as *unrecognised*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rollflow.errors import RequestError, shown
from rollflow.models import moving, world

SIZE = moving.SIZE
COLORS = len(world.COLORS)
STRAY = len(moving.WAYS)  # column of circles that stand still, or move neither along x nor along y

FAINT, SOLID = 0.25, 0.5  # ink from which a pixel is not canvas; ink from which it is a circle
OFF_PALETTE = 0.28  # RGB distance of a pixel from the line canvas-colour beyond which it has no colour
PURITY = 0.9  # share of a circle's solid pixels that must have its colour
PALE = 0.72  # mean ink of solid pixels below which a circle is a ghost
RADII = (2.7, 5.4)  # pixels; the renderer draws 3.3 to 4.7
OVERLAP = 0.84  # soft intersection over union with a disc of the same area
SPECK, GHOST = 3, 8.0  # solid pixels of a blob that is no scrap yet; faint ink outside of circles that counts as one
SHIFT = moving.TRAVEL[0] / 2  # pixels that a circle must move from the first frame to the last
ASIDE = 0.5  # part of its way that it may move across

_CANVAS = np.array(world.CANVAS, np.float32)
_RAYS = np.array([world.PALETTE[color] for color in world.COLORS], np.float32) - _CANVAS
_LENGTHS = np.linalg.norm(_RAYS, axis=1)
_PLANE = np.zeros((3, 3, 3), int)  # 4-connected within an image, not connected between images
_PLANE[1] = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True)
class Circles:
    """What images show: of each circle its image, its colour (`COLORS` for unrecognised) and its centre in pixels."""

    image: np.ndarray
    color: np.ndarray
    x: np.ndarray
    y: np.ndarray
    images: int

    def counts(self) -> np.ndarray:
        """Circles of each colour, then what is unrecognised: [image, 5]."""
        flat = np.bincount(self.image * (COLORS + 1) + self.color, minlength=self.images * (COLORS + 1))
        return flat.reshape(self.images, COLORS + 1)


def _inked(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ink in [0, 1] and colour (index into `COLORS`, their number for none) of [image, 3, y, x], each [image, y, x].

    A pixel's colour is the one whose segment from the canvas is nearest: rims are mixtures of a colour and the canvas.
    """
    offset = images.transpose(0, 2, 3, 1) - _CANVAS
    square = np.square(offset).sum(-1, keepdims=True)
    along = offset @ (_RAYS / _LENGTHS[:, None] ** 2).T
    a = np.clip(along, 0, 1)
    distance = square + _LENGTHS**2 * a * (a - 2 * along)
    color = distance.argmin(-1)
    ink = np.minimum(np.sqrt(square[..., 0]) / _LENGTHS[color], 1)
    color[distance.min(-1) > OFF_PALETTE**2] = len(_RAYS)
    return ink, color


def read(images: Float[np.ndarray, "image 3 32 32"]) -> Circles:
    """Finds the circles of images in [0, 1], and what else is there."""
    ink, color = _inked(images)
    labels, blobs = ndimage.label(ink > SOLID, structure=_PLANE)
    grown = np.where(labels > 0, labels, ndimage.maximum_filter(labels, size=(1, 3, 3)))  # with the anti-aliased rim
    image, y, x = np.nonzero((grown > 0) & ((ink > FAINT) | (labels > 0)))
    blob, ink_, color_ = grown[image, y, x] - 1, ink[image, y, x], color[image, y, x]
    solid = (labels[image, y, x] > 0).astype(float)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(blob, weights=values, minlength=blobs)

    core, mass = np.maximum(total(solid), 1), np.maximum(total(ink_), 1e-6)
    shares = np.stack([total(solid * (color_ == c)) for c in range(len(_RAYS))])
    cx, cy = total((x + 0.5) * ink_) / mass, total((y + 0.5) * ink_) / mass
    radius = np.sqrt(mass / np.pi)
    disc = world.coverage("circle", x + 0.5 - cx[blob], y + 0.5 - cy[blob], radius[blob])
    common = total(np.minimum(disc, ink_))
    overlap = common / np.maximum(mass + np.maximum(total(disc), mass) - common, 1e-6)
    clear = (shares.max(0) > PURITY * core) & (total(solid * ink_) > PALE * core) & (overlap > OVERLAP)
    clear &= (radius > RADII[0]) & (radius < RADII[1])
    named = np.where(clear, shares.argmax(0), COLORS)
    where = np.zeros(blobs, int)
    where[blob] = image
    kept = clear | (core >= SPECK)
    faint = np.where((grown == 0) & (ink > FAINT), ink, 0).sum((1, 2))
    ghosts = np.flatnonzero(faint > GHOST)
    none = np.full(len(ghosts), np.nan)
    return Circles(
        np.concatenate([where[kept], ghosts]),
        np.concatenate([named[kept], np.full(len(ghosts), COLORS)]),
        np.concatenate([cx[kept], none]),
        np.concatenate([cy[kept], none]),
        len(images),
    )


def way(dx: float, dy: float) -> int:
    """Index into `WAYS` of a shift by (dx, dy) pixels, `STRAY` for one that is too short or goes astray."""
    along, across = (dx, dy) if abs(dx) >= abs(dy) else (dy, dx)
    if abs(along) < SHIFT or abs(across) > ASIDE * abs(along):
        return STRAY
    return moving.WAYS.index(("left", "right")[dx > 0] if along is dx else ("up", "down")[dy > 0])


def moves(circles: Circles, first: int, last: int) -> np.ndarray:
    """Circles that image `first` and image `last` both show, by colour and direction: [4, 5], the last column `STRAY`.

    Circles of a colour are paired so that the sum of their squared shifts is least, which is right for circles that
    move alike.
    """
    found = np.zeros((COLORS, STRAY + 1), int)
    here, there = circles.image == first, circles.image == last
    for color in range(COLORS):
        a, b = (np.flatnonzero(at & (circles.color == color)) for at in (here, there))
        dx, dy = circles.x[b] - circles.x[a][:, None], circles.y[b] - circles.y[a][:, None]
        for i, j in zip(*linear_sum_assignment(dx**2 + dy**2), strict=True):
            found[color, way(float(dx[i, j]), float(dy[i, j]))] += 1
    return found


@lru_cache(maxsize=4096)
def _wanted(prompt: str) -> np.ndarray:
    """[4, 5]: what a prompt asks for, with a column of zeros for `STRAY`."""
    return np.pad(moving.target_moves(prompt), ((0, 0), (0, 1)))


class MotionReward:
    """Minus the squared errors of a clip's numbers and of its movements; 0 is best.

    With n[f, c] circles of colour c in frame f, m[c, d] circles of colour c that move in direction d from the first
    frame to the last, and n*, m* those that the prompt asks for:

        score = - mean over f of sum over c of (n[f, c] - n*[c])^2 - sum over c, d of (m[c, d] - m*[c, d])^2

    c runs over one more colour in the first sum, what is unrecognised, and d over one more direction in the second:
    circles that stand still or go astray. A circle that is missing costs 2, and so does one that moves the wrong way.
    """

    name = "motion"
    size = (SIZE, SIZE)
    clips = concurrent = True

    def check(self, prompt: str) -> None:
        """Raises `RequestError` if the prompt asks for no group of moving circles."""
        _wanted(prompt)

    def __call__(
        self, images: Float[Tensor, "row *frame 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " row"]:
        """Scores of clips [row, frame, 3, 32, 32] in [0, 1], at most 0.

        Raises:
            RequestError: these are no clips of at least two frames of this size, or a prompt cannot be read.
        """
        if images.ndim != 5 or images.shape[1] < 2 or tuple(images.shape[-2:]) != self.size:
            raise RequestError(
                f"the reward 'motion' reads clips [row, frame, 3, {SIZE}, {SIZE}] of at least 2 frames, not "
                f"{shown(tuple(images.shape))}: use it with the built-in model 'shapes-video', and choose another "
                "reward for other models"
            )
        wanted = [_wanted(prompt) for prompt in prompts]
        rows, frames = images.shape[:2]
        circles = read(images.detach().to("cpu", torch.float32).flatten(0, 1).numpy())
        counts = circles.counts().reshape(rows, frames, -1)
        scores = []
        for row, target in enumerate(wanted):
            numbers = np.square(counts[row] - np.append(target.sum(1), 0)).sum(1).mean()
            found = moves(circles, row * frames, (row + 1) * frames - 1)
            scores.append(0.0 - numbers - np.square(found - target).sum())  # not -0.0
        return torch.tensor(np.array(scores, np.float32))

    def exact(self, images: Float[Tensor, "row *frame 3 height width"], prompts: Sequence[str]) -> Bool[Tensor, " row"]:
        """Whether every frame of a clip shows exactly what its prompt asks for, and all of it moves that way."""
        return self(images, prompts) == 0

"""The `count` reward: a parser that reads the objects of an image back, and minus the squared error of their numbers.

The parser is a measuring instrument, not a network: it knows the palette, the canvas and the outlines of
`rollflow.models.world` and nothing else. Whatever it cannot account for (a blob of two colours, a scrap, a melted
outline, two objects grown together, a ghost) is counted as *unrecognised*, so that a search gains nothing by painting
mess.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from rollflow.errors import RequestError
from rollflow.models import world
from rollflow.rewards import catalog, protocol

COLUMNS = len(world.CLASSES) + 1  # the classes, then what is unrecognised
SIZE = world.SIZE
CHUNK = 64  # images that a thread parses at once: their pixels fit a cache
LEAST = 8  # of them: with fewer, what is done once a chunk counts

FAINT, SOLID = 0.2, 0.5  # ink from which a pixel is not canvas; ink from which it is an object
OFF_PALETTE = 0.25  # RGB distance of a pixel from the line canvas-colour beyond which it has no colour
PURITY = 0.93  # share of an object's pixels that must have its colour
PALE = 0.72  # mean ink below which an object is a ghost
RADII = (4.2, 10.5)  # pixels; the renderer draws 5 to 9.5
OUTLINE = 0.3  # pixels by which an object's outline may deviate from its shape's, on average
MARGIN = 0.015  # lead of the best shape's overlap over the second best's
SPECK, LITTER = 3.0, 16.0  # pixels of ink that are no scrap yet; pixels of ink in specks that make one
LARGEST = 280.0  # pixels of the largest object: mess counts once for each object that it could hide

_CANVAS = np.array(world.CANVAS, np.float32)
_RAYS = np.array([world.PALETTE[color] for color in world.COLORS], np.float32) - _CANVAS
_LENGTHS = np.linalg.norm(_RAYS, axis=1)
_AREA = {"circle": np.pi, "square": (2 * 0.886) ** 2, "triangle": 3**1.5 * 0.675**2}  # of a shape of radius 1
_PERIMETER = {"circle": 2 * np.pi, "square": 8 * 0.886, "triangle": 6 * 3**0.5 * 0.675}
_PLANE = np.zeros((3, 3, 3), int)  # 4-connected within an image, not connected between images
_PLANE[1] = ndimage.generate_binary_structure(2, 1)
_ROW = SIZE + 2  # of the label image, which has a border of one pixel
_NEIGHBOURS = (1, -1, _ROW, -_ROW, _ROW + 1, _ROW - 1, 1 - _ROW, -1 - _ROW)


@dataclass
class _Pixels:
    """The pixels that are not canvas, as arrays over them: where they lie, ink in [0, 1], colour, blob."""

    image: np.ndarray
    y: np.ndarray
    x: np.ndarray
    ink: np.ndarray
    color: np.ndarray  # index into COLORS, or len(COLORS) for none
    blob: np.ndarray = field(init=False)
    core: np.ndarray = field(init=False)  # member of a connected component, not of its anti-aliased rim
    euler: np.ndarray = field(init=False)  # contribution to the blob's Euler number: components minus holes

    def sum(self, values: np.ndarray, blobs: int) -> np.ndarray:
        """Sums `values` over the pixels of each blob."""
        return np.bincount(self.blob, weights=values, minlength=blobs)


def _inked(offset: np.ndarray, square: np.ndarray) -> _Pixels:
    """Pixels whose distance from the canvas (`offset` [3, image, pixel], its square [image, pixel]) is ink.

    A pixel of an anti-aliased rim is canvas + a (colour - canvas): it lies on the ray of its colour, although another
    colour of the palette may be nearer. So a pixel's colour is the one whose segment from the canvas is nearest.
    """
    square = square.reshape(-1)
    place = np.flatnonzero(square > (FAINT * _LENGTHS.min()) ** 2)
    square = square[place]
    seen = np.stack([channel.reshape(-1)[place] for channel in offset], 1)
    along = np.ascontiguousarray((seen @ (_RAYS / _LENGTHS[:, None] ** 2).T).T)  # [colour, pixel]
    a = np.clip(along, 0, 1)
    distance = square + (_LENGTHS**2)[:, None] * a * (a - 2 * along)
    color, least = np.zeros(len(place), int), distance[0]
    for i, other in enumerate(distance[1:], 1):  # argmin along the first axis is slow
        color[other < least] = i
        least = np.minimum(least, other)
    ink = np.minimum(np.sqrt(square) / _LENGTHS[color], 1)
    color[least > OFF_PALETTE**2] = len(_RAYS)
    image, pixel = np.divmod(place, SIZE * SIZE)
    y, x = np.divmod(pixel, SIZE)
    return _Pixels(image, y, x, ink, color)


def _connect(pixels: _Pixels, images: int) -> int:
    """Finds the blobs: solid ink, and faint ink that is no object's rim. Fills in their pixels; returns how many."""
    place = (pixels.image * _ROW + pixels.y + 1) * _ROW + pixels.x + 1
    mask = np.zeros((images, _ROW, _ROW), bool)
    solid = pixels.ink > SOLID
    mask.reshape(-1)[place[solid]] = True
    near = mask.copy()
    near[:, 1:] |= mask[:, :-1]
    near[:, :-1] |= mask[:, 1:]
    rows = near.copy()
    near[:, :, 1:] |= rows[:, :, :-1]
    near[:, :, :-1] |= rows[:, :, 1:]
    pixels.core = solid | ~near.reshape(-1)[place]
    mask.reshape(-1)[place[pixels.core]] = True
    labels, blobs = ndimage.label(mask, structure=_PLANE)
    labels = labels.reshape(-1)
    pixels.blob = labels[place]
    rim = np.flatnonzero(~pixels.core)  # adopts the blob of a neighbour
    for step in _NEIGHBOURS:
        pixels.blob[rim] = np.where(pixels.blob[rim] == 0, labels[place[rim] + step], pixels.blob[rim])
    pixels.blob -= 1
    right, below, diagonal = (labels[place + step] > 0 for step in (1, _ROW, _ROW + 1))
    pixels.euler = np.where(pixels.core, 1.0 - right - below + (right & below & diagonal), 0.0)
    return blobs


def _fit(pixels: _Pixels, blobs: int, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best shape of each blob, and whether its outline and size are those of that shape.

    A shape of the same area at the same centroid is compared with the ink by soft intersection over union. Its edge is
    given the width that the ink's own edge has: sum a (1 - a) over a linear ramp of width w along a perimeter P is
    w P / 6. A blurred image then still matches, while a melted outline does not.
    """
    x, y, ink = pixels.x + 0.5, pixels.y + 0.5, pixels.ink
    dx = x - (pixels.sum(x * ink, blobs) / mass)[pixels.blob]
    dy = y - (pixels.sum(y * ink, blobs) / mass)[pixels.blob]
    ramp = 6 * pixels.sum(ink * (1 - ink), blobs)
    overlap, radii = np.empty((2, len(world.SHAPES), blobs))
    for i, shape in enumerate(world.SHAPES):
        radii[i] = np.sqrt(mass / _AREA[shape])
        sharpness = 1 / np.clip(ramp / (_PERIMETER[shape] * radii[i]), 0.8, 3.5)
        scale = sharpness[pixels.blob]
        template = world.coverage(shape, scale * dx, scale * dy, (sharpness * radii[i])[pixels.blob])
        common = pixels.sum(np.minimum(template, ink), blobs)
        whole = np.maximum(pixels.sum(template, blobs), 0.97 * mass)  # some of it may lie outside of the blob
        overlap[i] = common / (mass + whole - common)
    best = overlap.argmax(0)
    radius = radii[best, np.arange(blobs)]
    second, first = np.sort(overlap, axis=0)[-2:]
    deviation = (1 - first) * radius / 2  # of a disc: two discs of overlap 1 - e differ by a strip of width e r / 2
    fits = (deviation < OUTLINE) & (first - second > MARGIN) & (radius > RADII[0]) & (radius < RADII[1])
    return best, fits


def _parse(images: np.ndarray) -> np.ndarray:
    """Counts of a chunk: [image, 3, pixel] to [image, 13]."""
    offset = np.clip(images.transpose(1, 0, 2), 0, 1)
    offset -= _CANVAS[:, None, None]
    red, green, blue = offset
    square = red * red
    square += green * green
    square += blue * blue
    broken = np.isnan(square.sum(1))  # of what is at most 3 each
    square[broken] = 0
    pixels = _inked(offset, square)
    blobs = _connect(pixels, len(images))
    counts = np.zeros((len(images), COLUMNS), int)
    counts[broken, -1] = round(SIZE * SIZE / LARGEST)
    if not blobs:
        return counts
    image = np.zeros(blobs, int)
    image[pixels.blob] = pixels.image
    core, kinds = pixels.core.astype(float), len(world.COLORS) + 1
    mass = pixels.sum(pixels.ink, blobs)
    cores = (pixels.color * blobs + pixels.blob)[pixels.core]
    colors = np.bincount(cores, minlength=kinds * blobs).reshape(kinds, blobs)
    area, colors = colors.sum(0), colors[:-1]
    shape, fits = _fit(pixels, blobs, mass)
    known = fits & (colors.max(0) >= PURITY * area) & (pixels.sum(core * pixels.ink, blobs) >= PALE * area)
    known &= pixels.sum(pixels.euler, blobs) == 1
    speck = mass < SPECK
    mess = np.flatnonzero(~known & ~speck)
    np.add.at(counts, (image[known], colors.argmax(0)[known] * len(world.SHAPES) + shape[known]), 1)
    np.add.at(counts[:, -1], image[mess], np.maximum(1, np.rint(area[mess] / LARGEST)).astype(int))
    counts[:, -1] += (np.bincount(image[speck], weights=mass[speck], minlength=len(images)) / LITTER).astype(int)
    return counts


def parse(images: Float[Tensor, "image 3 height width"]) -> Int[Tensor, "image 13"]:
    """Reads the objects of images back, on as many cores as torch would use in the thread that calls.

    Args:
        images: [image, 3, 64, 64], nominally in [0, 1] (clamped); any floating dtype and device.

    Returns:
        On the CPU, objects of each class in the order of `world.CLASSES`; the 13th column counts what is unrecognised.
        Mess larger than an object counts once for each that it could hide; an image with a NaN is nothing but mess.

    Raises:
        RequestError: the images are not 64 x 64.
    """
    if tuple(images.shape[-2:]) != (SIZE, SIZE):
        raise RequestError(
            f"the count reward reads images of {SIZE} x {SIZE} pixels, but these are {images.shape[-1]} x "
            f"{images.shape[-2]}: it judges the built-in model 'shapes' only; choose another reward for other models"
        )
    array = images.detach().to("cpu", torch.float32).reshape(-1, 3, SIZE * SIZE).numpy()
    chunk = min(CHUNK, max(LEAST, -(-len(array) // torch.get_num_threads())))
    parts = [array[i : i + chunk] for i in range(0, len(array), chunk)]
    counts = [*(_threads(os.getpid()).map if len(parts) > 1 else map)(_parse, parts)]
    return torch.from_numpy(np.concatenate(counts) if counts else np.zeros((0, COLUMNS), int))


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """Threads that parse, of this process: those of one that it was forked from are not there."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="rollflow-count")


@lru_cache(maxsize=4096)
def _target(prompt: str) -> tuple[int, ...]:
    return (*world.target_counts(prompt).tolist(), 0)


def _targets(prompts: Sequence[str]) -> Int[Tensor, "row 13"]:
    return torch.tensor([_target(prompt) for prompt in prompts], dtype=torch.int64).reshape(-1, COLUMNS)


class CountReward:
    """Minus the squared errors of the numbers of objects, summed over their kinds: 0 is exactly what was asked for.

    The counting reward of Kim et al. 2025 (arXiv 2503.19385, section 6), with the parser in the place of a detector.
    At 0 every object is there and nothing else; what is unrecognised is a kind of its own. Its held-out judge is the
    classifier.
    """

    name = "count"
    size = (SIZE, SIZE)
    concurrent = True

    @cached_property
    def held_out(self) -> protocol.Reward:
        """The independent judge, `rollflow.rewards.classifier.CountClassifier`."""
        return catalog.make("classifier")

    def check(self, prompt: str) -> None:
        """Raises `RequestError` if the prompt asks for no group of the world's shapes."""
        _target(prompt)

    def __call__(self, images: Float[Tensor, "row 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " row"]:
        """Scores of 64 x 64 images in [0, 1], at most 0; raises `RequestError` for other sizes or prompts."""
        return 0.0 - (parse(images) - _targets(prompts)).square().sum(1).float()  # not -0.0

    def exact(self, images: Float[Tensor, "row 3 height width"], prompts: Sequence[str]) -> Bool[Tensor, " row"]:
        """Whether an image shows exactly what its prompt asks for, and nothing else."""
        return (parse(images) == _targets(prompts)).all(1)

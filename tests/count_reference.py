"""The parser of the count reward as it was first written, one idea a line: what faster ones are held against."""

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from rollflow.models import world
from rollflow.rewards.count import (
    _AREA,
    _CANVAS,
    _LENGTHS,
    _NEIGHBOURS,
    _PERIMETER,
    _PLANE,
    _RAYS,
    _ROW,
    COLUMNS,
    FAINT,
    LARGEST,
    LITTER,
    MARGIN,
    OFF_PALETTE,
    OUTLINE,
    PALE,
    PURITY,
    RADII,
    SIZE,
    SOLID,
    SPECK,
)


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
    """Pixels whose distance from the canvas (`offset` [image, 3, pixel], its square [image, pixel]) is ink.

    A pixel of an anti-aliased rim is canvas + a (colour - canvas): it lies on the ray of its colour, although another
    colour of the palette may be nearer. So a pixel's colour is the one whose segment from the canvas is nearest.
    """
    image, pixel = np.nonzero(square > (FAINT * _LENGTHS.min()) ** 2)
    square = square[image, pixel]
    along = offset[image, :, pixel] @ (_RAYS / _LENGTHS[:, None] ** 2).T
    a = np.clip(along, 0, 1)
    distance = square[:, None] + _LENGTHS**2 * a * (a - 2 * along)
    color = distance.argmin(1)
    ink = np.minimum(np.sqrt(square) / _LENGTHS[color], 1)
    color[distance.min(1) > OFF_PALETTE**2] = len(_RAYS)
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


def parsed(images: np.ndarray) -> np.ndarray:
    """Counts of a chunk: [image, 3, pixel] to [image, 13]."""
    offset = np.clip(images, 0, 1) - _CANVAS[:, None]
    square = np.einsum("icp,icp->ip", offset, offset)
    broken = np.isnan(square).any(axis=1)
    square[broken] = 0
    pixels = _inked(offset, square)
    blobs = _connect(pixels, len(images))
    counts = np.zeros((len(images), COLUMNS), int)
    counts[broken, -1] = round(SIZE * SIZE / LARGEST)
    if not blobs:
        return counts
    image = np.zeros(blobs, int)
    image[pixels.blob] = pixels.image
    core = pixels.core.astype(float)
    mass, area = pixels.sum(pixels.ink, blobs), pixels.sum(core, blobs)
    colors = np.stack([pixels.sum(core * (pixels.color == i), blobs) for i in range(len(world.COLORS))])
    shape, fits = _fit(pixels, blobs, mass)
    known = fits & (colors.max(0) >= PURITY * area) & (pixels.sum(core * pixels.ink, blobs) >= PALE * area)
    known &= pixels.sum(pixels.euler, blobs) == 1
    speck = mass < SPECK
    mess = np.flatnonzero(~known & ~speck)
    np.add.at(counts, (image[known], colors.argmax(0)[known] * len(world.SHAPES) + shape[known]), 1)
    np.add.at(counts[:, -1], image[mess], np.maximum(1, np.rint(area[mess] / LARGEST)).astype(int))
    counts[:, -1] += (np.bincount(image[speck], weights=mass[speck], minlength=len(images)) / LITTER).astype(int)
    return counts

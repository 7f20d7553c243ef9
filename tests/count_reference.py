"""What became faster of the count reward's parser, as it was first written: what the faster form is held against."""

import numpy as np

from rollflow.models import world
from rollflow.rewards.count import (
    _CANVAS,
    _LENGTHS,
    _RAYS,
    COLUMNS,
    FAINT,
    LARGEST,
    LITTER,
    OFF_PALETTE,
    PALE,
    PURITY,
    SIZE,
    SPECK,
    _connect,
    _fit,
    _Pixels,
)


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

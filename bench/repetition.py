"""Whether an image repeats itself from tile to tile: its content, or whole tiles of it. Needs no model."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def likeness(images: NDArray[np.floating], tile: int, bins: int = 16) -> float:
    """How far distant tiles show the same things: mean intersection of their colour histograms, 0 to 1.

    A tile of one large picture shows a part of it, another tile another part: sea here, land there. Tiles that do not
    know of each other draw a whole picture each, with some of everything, and share their colours however differently
    these are arranged. So this finds a subject that is drawn over and over, where :func:`repetition` finds a copy.
    Histogram intersection after Swain and Ballard (1991), over ``bins`` by ``bins`` by ``bins`` colours, smoothed
    by 1 2 1 along each channel so that no colour's share hangs on which side of a bin's edge it falls.

    Args:
        images: ``[H, W, 3]``, 0 to 1.
        tile: side of a tile in pixels.
        bins: of a channel.

    Returns:
        Mean over the pairs of tiles that do not touch; NaN where there are none.
    """
    rows, cols = (n // tile for n in images.shape[:2])
    tiles = images[: rows * tile, : cols * tile].reshape(rows, tile, cols, tile, 3).swapaxes(1, 2)
    level = np.clip(tiles.reshape(rows * cols, tile * tile, 3) * bins, 0, bins - 1).astype(np.int64)
    colour = (level[..., 0] * bins + level[..., 1]) * bins + level[..., 2]
    count = np.stack([np.bincount(c, minlength=bins**3) for c in colour]).reshape(-1, bins, bins, bins)
    for axis in (1, 2, 3):
        padded = np.moveaxis(np.pad(count, [(0, 0)] + [(1, 1) if a == axis else (0, 0) for a in (1, 2, 3)]), axis, 0)
        count = np.moveaxis(padded[:-2] + 2 * padded[1:-1] + padded[2:], 0, axis)
    share = count.reshape(rows * cols, -1) / count.sum((1, 2, 3))[:, None]
    found = [np.minimum(share[i], share[j]).sum() for i, j in zip(*np.nonzero(_distant(rows, cols)), strict=True)]
    return float(np.mean(found)) if found else float("nan")


def repetition(images: NDArray[np.floating], tile: int, size: int = 16) -> float:
    """Largest normalised cross-correlation between distant tiles of an image: 1 where one repeats another.

    Tiles that do not know of each other repeat the subject. Each tile is shrunk to ``size`` pixels a side; tiles that
    touch, also across a corner, are not compared, because they are meant to be alike. A pair is compared at all shifts
    of up to a quarter of a tile, each time only what both hold.

    Before they are correlated, the tiles' spectrum is made flat: each cosine coefficient is divided by the root of the
    mean power of all tiles at its radial frequency. Without this the figure tells how smooth a picture is, and not
    whether it repeats: few coefficients then hold nearly all of a tile's power, and any two tiles are alike at one of
    the shifts. Pictures that a network drew whole had 0.49 to 0.88, a patchwork of unrelated tiles less, and a copy of
    a tile at half strength was often not found at all. Flat spectra have the same chance level whatever the picture,
    which :func:`repetition_by_chance` gives. A tile with less than a tenth of the mean power counts as if it had that:
    a flat sea is no subject.

    Args:
        images: ``[H, W]`` or ``[H, W, C]``.
        tile: side of a tile in pixels.
        size: pixels per tile that are compared.

    Returns:
        -1 to 1. NaN where no two tiles are distant, that is, below three tiles along both axes.

    Raises:
        ValueError: ``tile`` is no multiple of ``size``.
    """
    tiles, distant = _shrunk(images, tile, size)
    return _closest(tiles, tiles, distant)


def repetition_by_chance(images: NDArray[np.floating], tile: int, size: int = 16) -> float:
    """What :func:`repetition` is where nothing repeats: with one tile of each pair turned by half, or mirrored.

    That leaves a tile's brightness, contrast and spectrum what they are (a mirror all but their slant), and takes the
    likeness of its content; the mean of the three. A picture repeats itself as far as it is above this. Both figures
    are a maximum over many pairs, so of one picture both are noisy: compare means over pictures.
    """
    tiles, distant = _shrunk(images, tile, size)
    others = (tiles[:, ::-1, ::-1], tiles[:, ::-1], tiles[:, :, ::-1])
    return float(np.mean([_closest(tiles, other, distant) for other in others]))


def _shrunk(images: NDArray[np.floating], tile: int, size: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Tiles ``[N, size, size]``, and which pairs of them do not touch."""
    grey = images.astype(np.float64) if images.ndim == 2 else images.mean(-1, dtype=np.float64)
    if tile < size or tile % size:
        raise ValueError(f"tile={tile} must be a multiple of size={size}")
    rows, cols = (n // tile for n in grey.shape)
    block = tile // size
    small = grey[: rows * tile, : cols * tile].reshape(rows * size, block, cols * size, block).mean((1, 3))
    tiles = small.reshape(rows, size, cols, size).swapaxes(1, 2).reshape(rows * cols, size, size)
    return tiles, _distant(rows, cols)


def _distant(rows: int, cols: int) -> NDArray[np.bool_]:
    """``[N, N]``: pairs of tiles of a grid that do not touch, not across a corner either."""
    y, x = np.divmod(np.arange(rows * cols), max(cols, 1))
    return np.maximum(np.abs(y[:, None] - y), np.abs(x[:, None] - x)) > 1


def _closest(tiles: Floats, others: Floats, pairs: NDArray[np.bool_]) -> float:
    """Largest correlation of ``tiles[i]`` and ``others[j]``, both ``[N, size, size]``, over pairs and shifts."""
    if not pairs.any():
        return float("nan")
    size = tiles.shape[1]
    best, reach = -1.0, size // 4
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            here = tiles[:, max(dy, 0) : size + min(dy, 0), max(dx, 0) : size + min(dx, 0)]
            there = others[:, max(-dy, 0) : size + min(-dy, 0), max(-dx, 0) : size + min(-dx, 0)]
            a, b = _flat_spectra(here, there)
            best = max(best, float((a @ b.T)[pairs].max()))
    return best


def _flat_spectra(*sets: Floats) -> list[Floats]:
    """Sets of tiles ``[N, h, w]`` as ``[N, h * w]`` coefficients without mean, of equal power at all frequencies and of
    length 1; shorter where a tile is flat."""
    h, w = sets[0].shape[1:]
    coefficients = [_cosines(h) @ tiles @ _cosines(w).T for tiles in sets]
    radius = np.rint(np.hypot(np.arange(h)[:, None] * max(1, w / h), np.arange(w) * max(1, h / w))).astype(int)
    power = np.mean([(c**2).mean(0) for c in coefficients], axis=0)
    power[0, 0] = 0
    radial = np.bincount(radius.ravel(), power.ravel()) / np.maximum(np.bincount(radius.ravel()), 1)
    # What a picture has next to nothing of, above the resolution that it was enlarged from, stays so.
    scale = np.sqrt(radial + 1e-6 * radial.max())[radius]
    scale[0, 0] = np.inf
    found = []
    for c in coefficients:
        flat = np.divide(c, scale, out=np.zeros_like(c), where=scale > 0).reshape(len(c), -1)
        length = (flat**2).sum(1, keepdims=True)
        length = np.sqrt(np.maximum(length, 0.1 * length.mean()))
        found.append(np.divide(flat, length, out=np.zeros_like(flat), where=length > 0))
    return found


@cache
def _cosines(n: int) -> Floats:
    """``[n, n]``, orthonormal: the cosine transform of a vector that is mirrored at its ends (DCT-II)."""
    rows = np.cos(np.pi * np.arange(n)[:, None] * (np.arange(n) + 0.5) / n) * np.sqrt(2 / n)
    rows[0] /= np.sqrt(2)
    return rows

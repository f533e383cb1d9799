"""Metrics: how coherent a tiled image is, in numbers. No model and no second image is needed.

The seam ratio compares a line with the lines around it, so texture and brightness cancel out. A *line* y is between the
pixels y - 1 and y. Line 0 joins the last row to the first one, and only exists on an axis that wraps.

Networks draw a grid of their own: lines between latent pixels, or between the patches of a transformer, differ more
than other lines, with tiles or without. Tile lines are on that grid, so they must be compared with lines on it.
``period`` is its spacing in image pixels.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 16
PERCENTILE = 99.9

Floats = NDArray[np.float64]
Pixels = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SeamCheck:
    """What :func:`seam_check` found."""

    limit: float
    """The 99.9th percentile of the ordinary lines' ratios, both axes together."""
    y: dict[int, float]
    """Tile line in pixels -> its ratio, for the lines along which y is constant: horizontal seams."""
    x: dict[int, float]

    @property
    def worst(self) -> float:
        """Largest ratio of any tile line, 0 if there are none."""
        return max((*self.y.values(), *self.x.values()), default=0.0)

    @property
    def mean(self) -> float:
        """Mean ratio of all tile lines, 1 being that of an ordinary line; NaN if there are none."""
        return fmean((*self.y.values(), *self.x.values())) if self.y or self.x else math.nan

    @property
    def passes(self) -> bool:
        """No tile line stands out more than the worst 0.1 % of the ordinary lines."""
        return self.worst <= self.limit


def seam_profile(image: Pixels, wrap: tuple[bool, bool] = (False, False), period: int = 1) -> tuple[Floats, Floats]:
    """The seam ratio of every line of both axes, of lengths H and W; NaN at line 0 of an axis that does not wrap.

    It is the mean |difference| across the line, over the same mean for the 16 nearest parallel lines, 8 on each side
    where there are as many. Ordinary lines have a ratio near 1. Where nothing changes at all, it is 1.

    Args:
        image: ``[H, W]`` or ``[H, W, channels]``, any scale.
        wrap: (y, x), whether the last pixel row (column) is next to the first.
        period: image pixels of a latent pixel, or of a token of a patched transformer. Each ratio is divided by the
            median for the same place in the period. At most half of the lines at one place may be tile lines.
    """
    if period < 1:
        raise ValueError(f"period={period} must be at least 1")
    if image.ndim not in (2, 3) or min(image.shape[:2]) < 3:
        raise ValueError(f"image of shape {image.shape} must be [H, W] or [H, W, C] with H, W of at least 3")
    if not np.issubdtype(image.dtype, np.floating):
        image = image.astype(np.float32)  # differences of unsigned integers would wrap
    return _profile(image, wrap[0], period), _profile(np.swapaxes(image, 0, 1), wrap[1], period)


def seam_check(
    image: Pixels,
    lines_y: Iterable[int],
    lines_x: Iterable[int],
    wrap: tuple[bool, bool] = (False, False),
    period: int = 1,
) -> SeamCheck:
    """Whether the lines on which tiles meet stand out from all the others.

    Every line that is no tile line is an ordinary one, except for the outermost 8 at an open border: decoders draw the
    border more strongly than any seam, and it would set the limit. Both axes count together, because a 99.9th
    percentile needs thousands of lines. By definition one ordinary line in a thousand would fail, too.

    ``lines_y`` and ``lines_x`` are the lines in pixels where a tile starts or ends or two cores meet; line 0 only
    counts on an axis that wraps. The rest is as for :func:`seam_profile`.
    """
    axes: list[dict[int, float]] = []
    ordinary, near = [], NEIGHBOURS // 2
    profiles = zip("yx", seam_profile(image, wrap, period), (lines_y, lines_x), wrap, strict=True)
    for axis, ratios, given, wraps in profiles:
        lines, others = set(given), np.ones(len(ratios), bool)
        if outside := [line for line in lines if not 0 <= line < len(ratios)]:
            raise ValueError(f"lines_{axis} has {min(outside)}, but lines go from 0 to {len(ratios) - 1}")
        if not wraps:
            lines -= {0}
            others[: near + 1] = others[-near:] = False
        others[list(lines)] = False
        ordinary.append(ratios[others])
        axes.append({line: float(ratios[line]) for line in sorted(lines)})
    if not (compared := np.concatenate(ordinary)).size:
        raise ValueError("every line is a tile line: there is nothing to compare them with")
    return SeamCheck(float(np.percentile(compared, PERCENTILE)), *axes)


def cut_windows(image: Pixels, size: int, count: int, seed: int = 0) -> Floats:
    """``[count, size, size, C]``: windows of an image ``[H, W, C]`` at random places."""
    rng = np.random.default_rng(seed)
    places = zip(*(rng.integers(0, side - size + 1, count) for side in image.shape[:2]), strict=True)
    return np.stack([image[y : y + size, x : x + size] for y, x in places]).astype(np.float64)


def low_frequency_power(images: Pixels) -> float:
    """Power of the luminance at one to two cycles per image side. Compare it with that of the model's native samples.

    Tiles that do not know of each other cancel where they are averaged, and low frequencies are lost first.

    ``images`` are ``[N, size, size, C]``, any scale; they are Hann-windowed, and the power is the mean over N.
    """
    size = images.shape[1]
    window = np.hanning(size + 1)[:size]
    grey = images.mean(-1, dtype=np.float64)
    power = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window[:, None] * window)) ** 2
    frequency = np.fft.fftfreq(size) * size
    radius = np.hypot(frequency[:, None], frequency)
    return float(power[:, (radius >= 1) & (radius < 2.5)].mean())


def likeness(image: Pixels, tile: int, bins: int = 16) -> float:
    """How far distant tiles show the same things: mean intersection of their colour histograms, 0 to 1.

    Tiles of one large picture show parts of it, such as sea here and land there. Tiles that do not know of each other
    each draw a whole picture, so their colours are the same. Intersection as in Swain and Ballard (1991), over ``bins``
    levels of each channel, smoothed by 1 2 1, so that both sides of a bin's edge count the same. The mean is over all
    pairs of tiles that do not touch, not even at a corner; NaN if there are none.

    ``image`` is ``[H, W, 3]``, 0 to 1, and ``tile`` the side of a tile in pixels.
    """
    rows, cols = (n // tile for n in image.shape[:2])
    tiles = image[: rows * tile, : cols * tile].reshape(rows, tile, cols, tile, 3).swapaxes(1, 2)
    level = np.clip(tiles.reshape(rows * cols, tile * tile, 3) * bins, 0, bins - 1).astype(np.int64)
    colour = (level[..., 0] * bins + level[..., 1]) * bins + level[..., 2]
    smooth = 2 * np.eye(bins) + np.eye(bins, k=1) + np.eye(bins, k=-1)
    count = np.stack([np.bincount(c, minlength=bins**3) for c in colour]).reshape(-1, bins, bins, bins)
    count = np.einsum("nrgb,ri,gj,bk->nijk", count, smooth, smooth, smooth, optimize=True)
    share = count.reshape(rows * cols, -1) / count.sum((1, 2, 3))[:, None]
    y, x = np.divmod(np.arange(rows * cols), max(cols, 1))
    distant = np.maximum(np.abs(y[:, None] - y), np.abs(x[:, None] - x)) > 1
    found = [np.minimum(share[i], share[j]).sum() for i, j in zip(*np.nonzero(distant), strict=True)]
    return float(np.mean(found)) if found else float("nan")


def _profile(image: Pixels, wrap: bool, period: int) -> Floats:
    """The seam ratio of each line of the first axis, see :func:`seam_profile`."""
    # Row by row: 8192² px in one go would need gigabytes.
    differences = np.array([np.abs(row - image[i - 1]).mean(dtype=np.float64) for i, row in enumerate(image)])
    size = len(differences)
    count = min(NEIGHBOURS, size - 1 if wrap else size - 2)
    first = np.arange(size) - count // 2
    if not wrap:
        first = first.clip(1, size - count - 1)
    windows = differences[(first[:, None] + np.arange(count + 1)) % size]  # the line itself is among them
    around = (windows.sum(axis=1) - differences) / count
    # Taking a line from its window's sum leaves rounding where all of its neighbours are 0.
    around[around < 1e-12 * np.max(differences, initial=0)] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: Floats = np.where(differences == around, 1.0, differences / around)
    if not wrap:
        ratios[0] = np.nan
    for phase in range(min(period, size)) if period > 1 else ():
        usual = np.nanmedian(ratios[phase::period])
        if 0 < usual < math.inf:  # of a picture of flat blocks it may be neither
            ratios[phase::period] /= usual
    return ratios

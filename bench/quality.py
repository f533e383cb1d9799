"""How coherent a tiled image is, in numbers. Needs no model and no second image.

The seam ratio compares a line with its own surroundings, so texture and brightness, which raise the
differences on all lines of a region alike, cancel out. A *line* y lies between pixels y - 1 and y;
line 0 joins the last row to the first one and only exists on a wrapped axis.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 16
PERCENTILE = 99.9

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AxisSeams:
    """The tile lines of one axis."""

    lines: int
    mean: float
    """Mean ratio of the tile lines; 1 is what an ordinary line has. NaN without tile lines."""
    worst: float
    """Largest ratio of a tile line. NaN without tile lines."""
    worst_line: int | None
    """Where, in pixels."""


@dataclass(frozen=True)
class SeamCheck:
    """What :func:`seam_check` found."""

    limit: float
    """The 99.9th percentile of the ordinary lines' ratios, both axes pooled."""
    y: AxisSeams
    """Lines along which y is constant: horizontal seams."""
    x: AxisSeams

    @property
    def worst(self) -> float:
        """Largest ratio of any tile line, 0 if there are none."""
        return max((axis.worst for axis in (self.y, self.x) if axis.lines), default=0.0)

    @property
    def mean(self) -> float:
        """Mean ratio of all tile lines, NaN if there are none."""
        found = [axis for axis in (self.y, self.x) if axis.lines]
        count = sum(axis.lines for axis in found)
        return sum(axis.mean * axis.lines for axis in found) / count if count else float("nan")

    @property
    def passes(self) -> bool:
        """No tile line stands out more than the most conspicuous 0.1 % of ordinary lines."""
        return self.worst <= self.limit


def seam_profile(image: NDArray[np.floating], wrap: tuple[bool, bool] = (False, False)) -> tuple[Floats, Floats]:
    """The seam ratio of every line of both axes.

    The ratio is the mean absolute difference across a line, over the mean of the same across the
    16 nearest parallel lines: 8 on each side, or whichever are nearest at the image's end (fewer
    than 16 only if there are no more). Ordinary lines have a ratio near 1. Where nothing at all
    changes, it is 1.

    Args:
        image: ``[H, W]`` or ``[H, W, channels]``, any scale.
        wrap: whether the last pixel row (column) is adjacent to the first.

    Returns:
        Ratios of lengths H and W, indexed by line; NaN at line 0 of an axis that does not wrap.
    """
    if image.ndim not in (2, 3) or min(image.shape[:2]) < 3:
        raise ValueError(f"image of shape {image.shape} must be [H, W] or [H, W, C] with H, W of at least 3")
    if not np.issubdtype(image.dtype, np.floating):
        image = image.astype(np.float32)  # unsigned differences would wrap round
    turned = np.swapaxes(image, 0, 1)
    return _ratios(_differences(image), wrap[0]), _ratios(_differences(turned), wrap[1])


def seam_check(
    image: NDArray[np.floating],
    lines_y: Iterable[int],
    lines_x: Iterable[int],
    wrap: tuple[bool, bool] = (False, False),
) -> SeamCheck:
    """Whether the lines on which tiles meet stand out from all the others.

    Every line that is no tile line is an ordinary one. The two axes' ordinary lines are pooled: a
    99.9th percentile needs thousands of lines, and the ratio is already relative to its
    surroundings. By definition one ordinary line in a thousand would fail, too.

    Args:
        image: as for :func:`seam_profile`.
        lines_y: y in pixels of every line where a tile starts or ends or two cores meet.
        lines_x: the same along x.
        wrap: as for :func:`seam_profile`; line 0 only counts on an axis that wraps.
    """
    profile = seam_profile(image, wrap)
    tile_lines = [
        sorted(_valid(lines, len(ratios), axis, wraps))
        for lines, ratios, axis, wraps in zip((lines_y, lines_x), profile, "yx", wrap, strict=True)
    ]
    ordinary = np.concatenate(
        [np.delete(ratios, [0, *lines]) for ratios, lines in zip(profile, tile_lines, strict=True)]
    )
    if not ordinary.size:
        raise ValueError("every line is a tile line: there is nothing to compare them with")
    y, x = (_summary(r, lines) for r, lines in zip(profile, tile_lines, strict=True))
    return SeamCheck(float(np.percentile(ordinary, PERCENTILE)), y, x)


def cut_windows(image: NDArray[np.floating], size: int, count: int, seed: int = 0) -> Floats:
    """``[count, size, size, C]``: windows of an image ``[H, W, C]`` at random places, not aligned to any tile."""
    rng = np.random.default_rng(seed)
    places = zip(*(rng.integers(0, side - size + 1, count) for side in image.shape[:2]), strict=True)
    return np.stack([image[y : y + size, x : x + size] for y, x in places]).astype(np.float64)


def low_frequency_power(images: NDArray[np.floating]) -> float:
    """Power of the luminance at one to two cycles per image side, the scale at which tiles go astray.

    Tiles that do not know of each other cancel where they are averaged: the low frequencies of the canvas
    are what is lost first. To be compared with the same figure of the model's own native samples.

    Args:
        images: ``[N, size, size, C]``, any scale; Hann-windowed, mean over N.
    """
    size = images.shape[1]
    window = np.hanning(size + 1)[:size]
    grey = images.mean(-1, dtype=np.float64)
    power = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window[:, None] * window)) ** 2
    frequency = np.fft.fftfreq(size) * size
    radius = np.hypot(frequency[:, None], frequency)
    return float(power[:, (radius >= 1) & (radius < 2.5)].mean())


def _differences(image: NDArray[np.floating]) -> Floats:
    """Mean |difference| across each line of the first axis, line 0 being the wrapped one."""
    size = len(image)
    result = np.empty(size)
    for start in range(0, size, 256):  # in bands: 8192² px in one go would need gigabytes
        rows = np.arange(start, min(start + 256, size))
        band = np.abs(image[rows] - image[rows - 1])
        result[rows] = band.mean(axis=tuple(range(1, image.ndim)), dtype=np.float64)
    return result


def _ratios(differences: Floats, wrap: bool) -> Floats:
    size = len(differences)
    each_side = NEIGHBOURS // 2
    if wrap:
        count = min(NEIGHBOURS, size - 1)
        padded = np.pad(differences, (count // 2, count - count // 2), mode="wrap")
        start = np.arange(size)
    else:
        count = min(NEIGHBOURS, size - 2)
        padded = differences
        start = np.clip(np.arange(size) - each_side, 1, size - count - 1)
    # count + 1 lines, the line itself among them
    windows = np.lib.stride_tricks.sliding_window_view(padded, count + 1)[start]
    around = (windows.sum(axis=1) - differences) / count
    # Taking a line from its window's sum leaves rounding where all of its neighbours are 0.
    around[around < 1e-12 * np.max(differences, initial=0)] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(differences == around, 1.0, differences / around)
    if not wrap:
        ratios[0] = np.nan
    return ratios


def _valid(lines: Iterable[int], size: int, axis: str, wrap: bool) -> set[int]:
    found = set(lines)
    outside = [line for line in found if not 0 <= line < size]
    if outside:
        raise ValueError(f"lines_{axis} has {min(outside)}, but lines go from 0 to {size - 1}")
    return found if wrap else found - {0}


def _summary(ratios: Floats, lines: list[int]) -> AxisSeams:
    if not lines:
        return AxisSeams(0, float("nan"), float("nan"), None)
    found = ratios[lines]
    worst = int(np.argmax(found))
    return AxisSeams(len(lines), float(found.mean()), float(found[worst]), lines[worst])

"""How coherent a tiled image is, in numbers. Needs no model and no second image.

The seam ratio compares a line with its own surroundings, so texture and brightness, which raise the
differences on all lines of a region alike, cancel out. A *line* y lies between pixels y - 1 and y;
line 0 joins the last row to the first one and only exists on a wrapped axis.

Networks draw a grid of their own: lines between latent pixels, or between the patches of a transformer,
differ more than lines within one, tiles or no tiles. Tile lines lie on that grid, so they are compared with
lines on it: ``period`` is its spacing in image pixels, and a ratio is divided by what is usual for its line's
place in the period.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

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


@dataclass(frozen=True)
class ToneStep:
    """What :func:`tone_step` found."""

    on_lines: float
    """Mean |difference| of tone across tile lines."""
    elsewhere: float
    """The same across the lines moved by random offsets."""
    ratio: float


def seam_profile(
    image: NDArray[np.floating], wrap: tuple[bool, bool] = (False, False), period: int = 1
) -> tuple[Floats, Floats]:
    """The seam ratio of every line of both axes.

    The ratio is the mean absolute difference across a line, over the mean of the same across the
    16 nearest parallel lines: 8 on each side, or whichever are nearest at the image's end (fewer
    than 16 only if there are no more). Ordinary lines have a ratio near 1. Where nothing at all
    changes, it is 1.

    Args:
        image: ``[H, W]`` or ``[H, W, channels]``, any scale.
        wrap: whether the last pixel row (column) is adjacent to the first.
        period: image pixels of a latent pixel, or of a token of a patched transformer. Each ratio is divided by the
            median of its axis's lines at the same place in the period, which tile lines must not be half of.

    Returns:
        Ratios of lengths H and W, indexed by line; NaN at line 0 of an axis that does not wrap.
    """
    if period < 1:
        raise ValueError(f"period={period} must be at least 1")
    if image.ndim not in (2, 3) or min(image.shape[:2]) < 3:
        raise ValueError(f"image of shape {image.shape} must be [H, W] or [H, W, C] with H, W of at least 3")
    if not np.issubdtype(image.dtype, np.floating):
        image = image.astype(np.float32)  # unsigned differences would wrap round
    turned = np.swapaxes(image, 0, 1)
    y, x = _ratios(_differences(image), wrap[0]), _ratios(_differences(turned), wrap[1])
    return _by_phase(y, period), _by_phase(x, period)


def outermost(size: int, wrap: bool) -> list[int]:
    """Lines that have not half of their neighbours on each side; line 0 of an open axis is none at all."""
    each_side = NEIGHBOURS // 2
    return [] if wrap else [line for line in range(size) if line <= each_side or line > size - each_side - 1]


def seam_check(
    image: NDArray[np.floating],
    lines_y: Iterable[int],
    lines_x: Iterable[int],
    wrap: tuple[bool, bool] = (False, False),
    period: int = 1,
) -> SeamCheck:
    """Whether the lines on which tiles meet stand out from all the others.

    Every line that is no tile line is an ordinary one, but for the outermost 8 at an open border: decoders draw the
    border itself more strongly than any seam, and it would set the limit. The two axes' ordinary lines are pooled: a
    99.9th percentile needs thousands of lines, and the ratio is already relative to its
    surroundings. By definition one ordinary line in a thousand would fail, too.

    Args:
        image: as for :func:`seam_profile`.
        lines_y: y in pixels of every line where a tile starts or ends or two cores meet.
        lines_x: the same along x.
        wrap: as for :func:`seam_profile`; line 0 only counts on an axis that wraps.
        period: as for :func:`seam_profile`.
    """
    profile = seam_profile(image, wrap, period)
    tile_lines = [
        sorted(_valid(lines, len(ratios), axis, wraps))
        for lines, ratios, axis, wraps in zip((lines_y, lines_x), profile, "yx", wrap, strict=True)
    ]
    ordinary = np.concatenate(
        [
            np.delete(ratios, sorted({*outermost(len(ratios), wraps), *lines}))
            for ratios, lines, wraps in zip(profile, tile_lines, wrap, strict=True)
        ]
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


def tone_step(
    image: NDArray[np.floating],
    lines_y: Iterable[int],
    lines_x: Iterable[int],
    band: int = 32,
    offsets: int = 64,
    seed: int = 0,
) -> ToneStep:
    """Whether tiles differ in tone from their neighbours, which a ramp hides from the seam ratio.

    At each line the means of the two bands of ``band`` pixels beside it are compared, tile by tile: along the line in
    pieces between the crossing lines. The same is measured with all lines moved by random offsets, the same for all,
    that keep them at least ``band`` away from the tile lines where these are far enough apart; else half as far
    as the nearest two lines are.

    Args:
        image: ``[H, W]`` or ``[H, W, C]``.
        lines_y: y in pixels of the lines between tiles.
        lines_x: the same along x.
        band: pixels on each side whose tone counts.
        offsets: how many random offsets to compare with.
        seed: of these.

    Returns:
        The mean step on tile lines, and over that at random offsets; 1 is ideal, NaN without tile lines.

    Raises:
        ValueError: no line has ``band`` pixels on both sides, or there are no two lines' widths to move them in.
    """
    grey = image.astype(np.float64) if image.ndim == 2 else image.mean(-1, dtype=np.float64)
    axes = [sorted(_valid(lines, size, axis, False)) for lines, size, axis in
            zip((lines_y, lines_x), grey.shape, "yx", strict=True)]  # fmt: skip
    if not any(axes):
        return ToneStep(float("nan"), float("nan"), float("nan"))
    on = _steps(grey, axes, band, (0, 0))
    if not on.size:
        raise ValueError(f"band={band}: no tile line of an image of {grey.shape} has that many pixels on both sides")
    rng = np.random.default_rng(seed)
    ranges = [_free_offsets(lines, size, band) for lines, size in zip(axes, grey.shape, strict=True)]
    moved = [_steps(grey, axes, band, tuple(int(rng.choice(r)) for r in ranges)) for _ in range(offsets)]
    elsewhere = float(np.mean([steps.mean() for steps in moved if steps.size]))
    found = float(on.mean())
    return ToneStep(found, elsewhere, 1.0 if found == elsewhere else found / elsewhere if elsewhere else float("inf"))


def _free_offsets(lines: list[int], size: int, band: int) -> NDArray[np.int64]:
    """Offsets that move every line away from all others."""
    if not lines:
        return np.zeros(1, dtype=np.int64)
    gaps = np.diff([0, *lines, size])
    room = min(band, max(1, int(gaps.min()) // 4))
    away = np.arange(-int(gaps.max()) + 1, int(gaps.max()))
    at = np.array(lines)
    apart = np.abs(at[None, :, None] + away[:, None, None] - at[None, None, :]).min((1, 2))
    return away[apart >= room]


def _steps(grey: Floats, axes: list[list[int]], band: int, offset: tuple[int, ...]) -> Floats:
    """|difference of tone| across each piece of each line, both axes, lines moved by the offset."""
    found = []
    for axis, (turned, lines, crossing) in enumerate(
        zip((grey, grey.T), axes, (axes[1], axes[0]), strict=True)  # [along the normal, along the line]
    ):
        pieces = np.clip([0, *(line + offset[1 - axis] for line in crossing), turned.shape[1]], 0, turned.shape[1])
        for line in (line + offset[axis] for line in lines):
            if band <= line <= len(turned) - band:
                step = turned[line : line + band].mean(0) - turned[line - band : line].mean(0)
                found += [abs(float(step[a:b].mean())) for a, b in pairwise(pieces) if b - a >= band]
    return np.array(found)


def psnr(image: NDArray[np.floating], whole: NDArray[np.floating], peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of a tiled image against the same one made whole; infinite where they agree."""
    if image.shape != whole.shape:
        raise ValueError(f"image of shape {image.shape} and whole of shape {whole.shape} must have the same shape")
    error = float(np.mean((image.astype(np.float64) - whole) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def tiling_score(image: NDArray[np.floating], wrap: tuple[bool, bool] = (True, True)) -> float:
    """How well an image joins itself: mean |difference| of the pixels that meet across its wrapped borders.

    After the Tiling Score of Tiled Diffusion (Madar and Fried, CVPR 2025), which compares the pixels along the sides
    that are to be connected; 0 is ideal, and its authors report 0.03 to 0.04. The paper's formula was not at hand:
    the mean over both axes, pixels and channels of an image in 0..1 is this project's reading of that description. An
    untouched image has about what two neighbouring rows have.

    Args:
        image: ``[H, W]`` or ``[H, W, C]``, 0 to 1.
        wrap: which axes join.
    """
    if not any(wrap):
        raise ValueError(f"wrap={wrap}: at least one axis must be wrapped")
    sides = [np.abs(image[0] - image[-1])] if wrap[0] else []
    sides += [np.abs(image[:, 0] - image[:, -1])] if wrap[1] else []
    return float(np.mean([side.mean(dtype=np.float64) for side in sides]))


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


def _by_phase(ratios: Floats, period: int) -> Floats:
    if period == 1:
        return ratios
    result = ratios.copy()
    for phase in range(min(period, len(ratios))):
        usual = np.nanmedian(ratios[phase::period])
        if 0 < usual < math.inf:  # of a picture of flat blocks it may be neither
            result[phase::period] /= usual
    return result


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

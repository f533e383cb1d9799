"""Tiles that move, cross-faded in time: near a line, a prediction gives way to that of the step before.

A partition evaluates no pixel twice, so that at its lines two tiles meet that do not know of each other. But the lines
move, and where they are in this step the step before had the middle of a tile: its prediction is smooth there. It is of
another noise level; so what is carried over is the clean image that it stood for, as in ``pull``. With the
canvas ``z`` and the clean image ``x`` of the step before, the prediction ``m`` becomes

    m  +=  w · (m* − m),      m* = what a network would predict that knew x

and ``w`` falls from 1 beside a line, where nothing of it is left, to 0 at the fade's width. Nothing is evaluated for
it. It is done in the second half of the steps: before, a clean image changes more from step to step than over a line,
and later steps heal the line. Tiles that have not moved do not fade: the step before has its lines there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tiledcore.geometry import Partition, Tiling
from tiledcore.schedulers.noise_levels import clean_and_noisy

FIRST = 0.5
"""Share of the steps before the first one that fades."""


class Fading:
    """The fade during one call of a pipeline, in which every evaluation is shown to it, in order.

    Args:
        width: of the band on each side of a line, in canvas pixels.
        wrap: axes (y, x) of the canvas that are circles.
    """

    def __init__(self, width: float, wrap: tuple[bool, bool]) -> None:
        self.width, self.wrap = width, wrap
        self.clean: Tensor | None = None
        """``[B, C, H, W]``, float32 or float64: what the prediction before stood for."""
        self.tiles: Tiling | Partition | None = None
        """Where its tiles lay: where they still do, there is nothing to fade into."""
        self._coefficients: Sequence[tuple[float, float]] | None = None
        self._weights: tuple[Tiling | Partition, Tensor] | None = None

    @property
    def started(self) -> bool:
        return self._coefficients is not None

    def start(self, coefficients: Sequence[tuple[float, float]]) -> None:
        """Of each evaluation, as :func:`fade_coefficients` gives them."""
        self._coefficients = coefficients

    def watches(self, index: int) -> bool:
        """Whether an evaluation fades, or is the one before the first that does, whose clean image that needs."""
        assert self._coefficients is not None
        return index + 1 >= FIRST * len(self._coefficients)

    def __call__(self, index: int, prediction: Tensor, sample: Tensor, tiles: Tiling | Partition) -> Tensor:
        """The prediction, faded.

        Args:
            index: evaluation of this call.
            prediction: ``[B, C, H, W]``, guided; or ``[k * B, C, H, W]``, of k branches one after the other.
            sample: ``[B, C, H, W]``: the canvas that it was made from, as the scheduler has it.
            tiles: where they lay; of those that overlap, the lines are where their cores meet.

        Returns:
            As ``prediction``, of its dtype.
        """
        assert self._coefficients is not None
        if not self.watches(index):
            return prediction
        clean, noisy = self._coefficients[index]
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        faded = prediction.to(dtype)
        canvas = noisy * sample.to(dtype).repeat(len(prediction) // len(sample), 1, 1, 1)
        if self.clean is None:
            self.clean = torch.empty_like(faded)
        moved, self.tiles = self.tiles is not None and tiles != self.tiles, tiles
        if moved and index >= FIRST * len(self._coefficients):
            before = torch.add(canvas, self.clean, alpha=clean)
            faded = torch.lerp(faded, before, self._beside_lines(tiles, faded))
        torch.sub(faded, canvas, out=self.clean).div_(clean)
        return faded.to(prediction.dtype)

    def _beside_lines(self, tiles: Tiling | Partition, like: Tensor) -> Tensor:
        """The weights ``[H, W]`` of the step before."""
        if self._weights is None or self._weights[0] != tiles:
            cores = (tiles.core_rows, tiles.core_cols) if isinstance(tiles, Tiling) else (tiles.rows, tiles.cols)
            axes = zip((tiles.height, tiles.width), cores, self.wrap, strict=True)
            y, x = (fade_weights(size, [start for start, _ in parts], self.width, wrap) for size, parts, wrap in axes)
            self._weights = (tiles, (1 - (1 - y[:, None]) * (1 - x)).to(like.device, like.dtype))
        return self._weights[1]


def fade_coefficients(scheduler: Any, timesteps: Tensor) -> list[tuple[float, float]]:
    """What a prediction at each timestep stands for, see :func:`tiledcore.schedulers.noise_levels.clean_and_noisy`.

    Raises:
        ValueError: the scheduler's kind of prediction is not known.
    """
    try:
        return [clean_and_noisy(scheduler, timestep) for timestep in timesteps]
    except ValueError as error:
        raise ValueError(f"fade: {error}; give fade=0") from error


def fade_weights(size: int, starts: list[int], width: float, wrap: bool) -> Tensor:
    """``[size]``: 1 for both pixels on a line at which one tile ends and the next one starts, 0 from ``width`` on.

    Line 0 is one only on an axis that wraps.
    """
    middles = torch.arange(size, dtype=torch.float64) + 0.5
    nearest = torch.full((size,), float("inf"), dtype=torch.float64)
    for line in starts if wrap else [start for start in starts if start]:
        away = (middles - line).abs()
        nearest = torch.minimum(nearest, torch.minimum(away, size - away) if wrap else away)
    return ((width - nearest) / max(width - 0.5, 0.5)).clamp_(0, 1)

"""Fade: near the lines of moving tiles, a prediction blends into that of the step before.

In the step before the lines were elsewhere, so its prediction is smooth there. Its noise level differs, so its clean
image ``x`` is carried over. With the canvas ``z``, the prediction ``m`` becomes

    m  +=  w · (m* − m),      m* = what a network would predict that knew x

where ``w`` falls from 1 beside a line to 0 at the fade's width. Nothing more is evaluated. It runs in the second half
of the steps: before, the clean image changes more from step to step than across a line.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from tiledcore.feature import Feature
from tiledcore.geometry import Tiling
from tiledcore.schedulers.pull import clean_and_noisy

logger = logging.getLogger(__name__)

FIRST = 0.5  # Share of the steps before the first one that fades


class Fade(Feature):
    """The fade of one call.

    ``width``: on each side of a line, in canvas pixels. ``wrap``: axes (y, x) that are circles. ``asked``: the user
    asked for it: a scheduler that cannot fade is an error, otherwise a warning.
    """

    every_step = True

    def __init__(self, width: float, wrap: tuple[bool, bool], asked: bool = True) -> None:
        self.width, self.wrap, self.asked = width, wrap, asked
        self._clean: Tensor | None = None  # [B, C, H, W], what the prediction before stood for
        self._tiles: Tiling | None = None  # where its tiles lay
        self.coefficients: list[tuple[float, float]] = []  # of each evaluation, see clean_and_noisy

    def begin(self, scheduler: Any, timesteps: Tensor) -> None:
        try:
            self.coefficients = [clean_and_noisy(scheduler, timestep) for timestep in timesteps]
        except ValueError as error:
            if self.asked:
                raise ValueError(f"fade: {error}; give fade=0") from error
            logger.warning("tiles do not fade: %s", error)

    def active(self, index: int) -> bool:
        """Whether an evaluation fades, or is the one before, whose clean image is needed."""
        return bool(self.coefficients) and index + 1 >= FIRST * len(self.coefficients)

    def after_prediction(self, index: int, sample: Tensor, tiles: Tiling, prediction: Tensor) -> Tensor:
        clean, noisy = self.coefficients[index]
        canvas = noisy * sample.to(prediction.dtype)
        moved, self._tiles = self._tiles is not None and tiles != self._tiles, tiles
        # Tiles that have not moved do not fade: the step before has its lines in the same places.
        if moved and self._clean is not None and index >= FIRST * len(self.coefficients):
            before = torch.add(canvas, self._clean, alpha=clean)
            prediction = torch.lerp(prediction, before, self._beside_lines(tiles, prediction))
        self._clean = (prediction - canvas).div_(clean)
        return prediction

    def tensors(self) -> dict[str, Tensor]:
        return {} if self._clean is None else {"clean": self._clean}

    def resume(self, tensors: dict[str, Tensor], tiles: Tiling) -> None:
        """Go on after the evaluation that left these tensors and used these tiles."""
        self._clean, self._tiles = tensors.get("clean"), tiles

    def _beside_lines(self, tiles: Tiling, like: Tensor) -> Tensor:
        """The weights ``[H, W]`` of the step before."""
        axes = zip((tiles.height, tiles.width), tiles.cores, self.wrap, strict=True)
        y, x = (
            fade_weights(size, [start for start, _ in parts], self.width, wrap, like.device)
            for size, parts, wrap in axes
        )
        return (1 - (1 - y[:, None]) * (1 - x)).to(like.dtype)


def fade_weights(size: int, starts: list[int], width: float, wrap: bool, device: torch.device | str = "cpu") -> Tensor:
    """``[size]``: 1 for both pixels beside a line, 0 from ``width`` pixels on. Line 0 counts only on a wrapped axis."""
    middles = torch.arange(size, dtype=torch.float64, device=device) + 0.5
    nearest = torch.full_like(middles, float("inf"))
    for line in starts if wrap else [start for start in starts if start]:
        away = (middles - line).abs()
        nearest = torch.minimum(nearest, torch.minimum(away, size - away) if wrap else away)
    return ((width - nearest) / max(width - 0.5, 0.5)).clamp_(0, 1)

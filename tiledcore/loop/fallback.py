"""The fallback loop: the pipeline's own loop and the scheduler's own step, with the call's features around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiledcore._diffusers import places_of
from tiledcore.feature import Features, Start, Step
from tiledcore.geometry import Pair
from tiledcore.tiles.denoiser import TileDenoiser
from tiledcore.tiles.families import network_of, to_image, to_tokens


class Fallback:
    """The steps of one call."""

    canvas_size: Pair = (0, 0)  # In canvas pixels; known once the network has been called
    denoiser: TileDenoiser | None = None  # Known at the same time

    def __init__(self, pipe: Any, features: Features) -> None:
        self.pipe, self.features = pipe, features
        self._packed = network_of(pipe)[1].packed
        self._steps = 0

    def before(self, prediction: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """What the scheduler's ``step`` is given for its prediction."""
        if not self.features.begun:
            scheduler = self.pipe.scheduler
            # A timestep that is there twice has one noise level.
            timesteps = scheduler.timesteps[places_of(scheduler, timestep)[0] :]
            self.features.begin(Start(scheduler, timesteps, self.canvas_size))
        if not self.features.active(self._steps):
            return prediction
        assert self.denoiser is not None and self.denoiser.placed is not None
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        step = Step(self._steps, self._canvas(sample), self.denoiser.placed)
        changed = self.features.after_prediction(step, self._canvas(prediction).to(dtype))
        return (to_tokens(changed) if self._packed else changed).to(prediction.dtype)

    def after(self, latents: Tensor) -> None:
        """The step is done."""
        self._steps += 1
        self.features.after_step(self._steps, self._canvas(latents))

    def _canvas(self, latents: Tensor) -> Tensor:
        return to_image(latents, self.canvas_size) if self._packed else latents

"""What is done to a step that is the pipeline's own: its guided prediction is faded and pulled, its canvas shown."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tiledcore.geometry import Pair
from tiledcore.io.preview import Previewing
from tiledcore.schedulers.pull import Pulling
from tiledcore.tiles.denoiser import TileDenoiser
from tiledcore.tiles.fade import Fading, fade_coefficients
from tiledcore.tiles.families import network_of, to_image, to_tokens


class OwnLoop:
    """The steps of one call.

    Args:
        pipe: the pipeline.
        fading: a fade near the lines of moving tiles, or None.
        pulling: a low-frequency pull, or None.
        preview: shown after steps, or None.
    """

    canvas_size: Pair = (0, 0)
    """In canvas pixels; known once the network has been called."""
    denoiser: TileDenoiser | None = None
    """Which then is known too."""

    def __init__(self, pipe: Any, fading: Fading | None, pulling: Pulling | None, preview: Previewing | None) -> None:
        self.pipe, self.fading, self.pulling, self.preview = pipe, fading, pulling, preview
        self.watches = any(part is not None for part in (fading, pulling, preview))
        self._packed = network_of(pipe)[1].packed
        self._steps = 0
        self._timesteps: Tensor | None = None

    def before(self, prediction: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """What the scheduler's ``step`` is given for its prediction."""
        if self._timesteps is None and self.watches:
            self._timesteps = self._left(timestep)
        if self.fading is None and self.pulling is None:
            return prediction
        canvas, z = (to_image(t, self.canvas_size) if self._packed else t for t in (prediction, sample))
        changed = self._pulled(self._faded(canvas, z), z)
        return (to_tokens(changed) if self._packed else changed).to(prediction.dtype)

    def after(self, latents: Tensor) -> None:
        """The step is done."""
        self._steps += 1
        if self.preview is not None:
            assert self._timesteps is not None
            canvas = to_image(latents, self.canvas_size) if self._packed else latents
            self.preview.after(self._steps, self._timesteps, self.pipe.scheduler, canvas)

    def _left(self, timestep: Any) -> Tensor:
        """The timesteps from the first one on."""
        scheduler = self.pipe.scheduler
        begin = getattr(scheduler, "begin_index", None)
        if begin is None:  # not told; a timestep that is there twice has one noise level
            begin = int((scheduler.timesteps == timestep).nonzero()[0])
        timesteps: Tensor = scheduler.timesteps[begin:]
        return timesteps

    def _faded(self, prediction: Tensor, sample: Tensor) -> Tensor:
        if self.fading is None:
            return prediction
        assert self._timesteps is not None and self.denoiser is not None and self.denoiser.placed is not None
        if not self.fading.started:
            self.fading.start(fade_coefficients(self.pipe.scheduler, self._timesteps))
        return self.fading(self._steps, prediction, sample, self.denoiser.placed)

    def _pulled(self, prediction: Tensor, sample: Tensor) -> Tensor:
        if self.pulling is None:
            return prediction
        assert self._timesteps is not None
        if not self.pulling.started:
            self.pulling.start(self._timesteps)
        if not self.pulling.active(self._steps):
            return prediction
        return prediction + self.pulling.correction(self._steps, prediction, sample)

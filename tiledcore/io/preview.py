"""A small picture of the canvas every few steps, while it is denoised.

The canvas is averaged down to at most the model's native size and decoded by the pipeline's own autoencoder. It costs
one pass over the canvas and the decode of one native image, and changes no bit of the result.

What is decoded is an estimate of the clean image. At noise level ``(α, σ)`` the canvas is ``α x0 + σ ε``; averaged over
``k`` pixels its noise has the variance ``σ² / k``. The best linear estimate of clean latents of variance 1 is then
``α z / (α² + σ² / k)`` (Wiener 1949).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiledcore import validate
from tiledcore.feature import Feature
from tiledcore.geometry import Pair
from tiledcore.io.writers import check_target, write_rows

if TYPE_CHECKING:  # torch takes seconds to import, and a command's path is checked before that
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preview:
    """Where a call of a :class:`~tiledcore.TiledPipeline` shows how far it is, and how often.

    Of several images the first one is shown. The file is always complete, and stays. If it cannot be written, or memory
    does not suffice for it, a warning says so and the call goes on without previews.

    Args:
        path: of the file; its extension is one of :data:`tiledcore.io.writers.FORMATS`.
        every: evaluations of the network between two previews. The last one is always shown.

    Raises:
        ValueError: names the argument, its value and what is valid.
    """

    path: Path
    every: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        validate.integer("preview: every", self.every, 1)
        try:
            check_target(self.path, (1, 1))
        except ValueError as error:
            raise ValueError(f"preview: {error}") from None


class Previewing(Feature):
    """The previews of one call. It has to be made before anything replaces the autoencoder's ``decode``.

    ``native`` is the (height, width) that the network was trained at, ``unit`` a token's side, both in latent pixels.
    """

    every_step = True

    def __init__(self, preview: Preview, pipe: Any, native: Pair, unit: int) -> None:
        self.preview, self.pipe, self.native, self.unit = preview, pipe, native, unit
        self._decode, self._broken = pipe.vae.decode, False

    def begin(self, scheduler: Any, timesteps: Tensor) -> None:
        self._scheduler, self._timesteps = scheduler, timesteps

    def after_step(self, index: int, sample: Tensor) -> None:
        """Show the canvas, if it is time."""
        import torch

        from tiledcore.schedulers.pull import noise_level

        timesteps, scheduler = self._timesteps, self._scheduler
        last = index >= len(timesteps)
        if self._broken or (index % self.preview.every and not last):
            return
        noised = not last and (hasattr(scheduler, "scale_noise") or hasattr(scheduler, "add_noise"))
        level = noise_level(scheduler, timesteps[index]) if noised else (1.0, 0.0)
        try:
            picture = self._decoded(self.estimate(sample, level))
            write_rows(self.preview.path, picture.size, [np.asarray(picture)], {})
        except (OSError, torch.OutOfMemoryError) as error:
            self._broken = True
            logger.warning("no more previews: %s: %s", self.preview.path, str(error).split("\n")[0])

    def estimate(self, canvas: Tensor, level: tuple[float, float]) -> Tensor:
        """The clean latents of the first image, ``[1, C, h, w]`` float32, of at most the native size.

        ``canvas`` is ``[B, C, H, W]`` as the scheduler has it; ``level`` is α and σ of the noise in it.
        """
        import torch.nn.functional as F

        image = F.pixel_shuffle(canvas[:1].float(), self.unit)  # the order of channels in a packed token
        height, width = image.shape[2:]
        scale = max(1.0, height / self.native[0], width / self.native[1])
        size = (max(1, round(height / scale)), max(1, round(width / scale)))
        pooled = F.interpolate(image, size, mode="area")
        alpha, sigma = level
        gain = alpha / (alpha**2 + sigma**2 * size[0] * size[1] / (height * width))
        return pooled * gain

    def _decoded(self, latents: Tensor) -> Any:
        """``[1, C, h, w]`` as the scheduler has them -> PIL."""
        import torch

        from tiledcore._diffusers import device_of, is_offloaded

        vae, config = self.pipe.vae, self.pipe.vae.config
        # An offloaded autoencoder comes to where the pipeline runs when it is called.
        latents = latents.to(device_of(self.pipe) if is_offloaded(vae) else vae.device)
        latents = latents / (config.get("scaling_factor") or 1.0) + (config.get("shift_factor") or 0.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            latents = latents * latents.new_tensor(std).view(1, -1, 1, 1) + latents.new_tensor(mean).view(1, -1, 1, 1)
        if "temperal_downsample" in config:  # Qwen-Image's autoencoder is one of videos: here of one frame
            latents = latents.unsqueeze(2)
        # SDXL's first autoencoder overflows in float16; there and back again changes no weight.
        upcast = vae.dtype == torch.float16 and config.get("force_upcast")
        if upcast:
            vae.to(dtype=torch.float32)
        try:
            image = self._decode(latents.to(vae.dtype), return_dict=False)[0]
        finally:
            if upcast:
                vae.to(dtype=torch.float16)
        image = image[:, :, 0] if image.ndim == 5 else image
        return self.pipe.image_processor.postprocess(image, output_type="pil")[0]

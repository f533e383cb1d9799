"""The low-frequency pull: the first steps of a refinement keep the composition of the picture that it starts from.

At noise level ``(α, σ)`` a prediction stands for a clean image: ``z = α x0 + σ ε``, and the prediction is linear in
``z`` and ``x0`` whatever its type. The pull moves the low frequencies of the predicted clean image toward those of the
coarse picture's latents ``x``, with a weight ``w`` that decays over the steps. On the prediction ``m`` that is

    m  +=  w · LowPass(m* − m),      m* = what a network would predict that knew x

so it holds for every scheduler, with its own noise and history, and the noise' low frequencies stay those of noise.
Where ``w = 1`` and the step is deterministic, the canvas' low frequencies follow the noised picture exactly: the
skip residual of DemoFusion (Du et al. 2024), limited to the low frequencies as in ILVR (Choi et al. 2021), and held
on the predicted clean image as in DiffuseHigh (Kim et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiledcore.geometry import Pair
from tiledcore.schedulers.noise_levels import clean_and_noisy
from tiledcore.utils import replaced


@dataclass(frozen=True)
class Pull:
    """How strongly, how long and which frequencies.

    Args:
        weight: of the first step, 0 to 1; 1 is the coarse picture's low frequencies and nothing else.
        until: share of the steps, 0 to 1, over which the weight falls to 0: ``weight * (1 - x**4)``, so that it is
            nearly whole for the first half. A half cosine was measured to let the low frequencies go too early.
        sigma: of the Gaussian low-pass, in latent pixels. Default: a sixteenth of the tile's shorter side.

    Raises:
        ValueError: names the argument, its value and what is valid.
    """

    weight: float = 1.0
    until: float = 1.0
    sigma: float | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"pull {name}={getattr(self, name)!r}: must be from 0 to 1")
        if self.sigma is not None and not 0 < self.sigma < math.inf:
            raise ValueError(f"pull sigma={self.sigma!r}: must be above 0")

    def weights(self, steps: int) -> list[float]:
        """The weight of each step."""
        last = self.until * steps
        return [self.weight * (1 - (i / last) ** 4) if i < last else 0.0 for i in range(steps)]


def low_pass_matrix(size: int, sigma: float, wrap: bool) -> Tensor:
    """The Gaussian low-pass of one axis as a matrix ``[size, size]``, float64: a row holds a pixel's weights.

    An axis that wraps is a circle, however wide the Gaussian is; an open one is mirrored at its borders (each border
    pixel twice). Every row sums to 1, and both forms are exact: nothing is cut off that the float64 sum would hold.
    """
    reach = math.ceil(9 * sigma)
    kernel = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-reach, reach + 1)]
    offsets = torch.arange(-reach, reach + 1)
    where = torch.arange(size)[:, None] + offsets
    where = where % size if wrap else _mirror(where, size)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, where, torch.tensor(kernel, dtype=torch.float64).expand(size, -1))
    return matrix / sum(kernel)


def _mirror(where: Tensor, size: int) -> Tensor:
    folded = where % (2 * size)
    return torch.minimum(folded, 2 * size - 1 - folded)


def low_pass(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``[..., H, W]`` through the matrices ``[H, H]`` and ``[W, W]`` of :func:`low_pass_matrix`.

    Two matrix products: on a GPU the quickest form of so wide a filter, with no border case.
    """
    return rows @ image @ columns.mT


class Pulling:
    """A pull during one call of an image-to-image pipeline.

    Args:
        pull: how strongly, how long, which frequencies.
        scheduler: of the pipeline.
        unit: latent pixels per canvas pixel along each axis, where the pipeline packs them into tokens.
        wrap: axes (y, x) of the canvas that are circles.
        sigma: of the low-pass where ``pull`` names none, in latent pixels.
    """

    def __init__(self, pull: Pull, scheduler: Any, unit: int, wrap: tuple[bool, bool], sigma: float) -> None:
        self.pull, self.scheduler, self.unit, self.wrap = pull, scheduler, unit, wrap
        self.sigma = sigma if pull.sigma is None else pull.sigma
        self._clean: Tensor | None = None
        self._weights: list[float] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Where the pipeline adds noise to its latents, keep them: they are what the canvas is pulled to."""
        name = "scale_noise" if hasattr(self.scheduler, "scale_noise") else "add_noise"
        own = getattr(self.scheduler, name)

        @wraps(own)
        def noised(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._clean is None:
                self._clean = sample.detach()
            return own(sample, *args, **kwargs)

        with replaced(self.scheduler, **{name: noised}):
            yield

    def start(self, timesteps: Tensor) -> None:
        """Read the noise levels of the timesteps that are left, and low-pass the clean latents, once."""
        if self._clean is None:
            raise ValueError("pull: this pipeline did not start from an image's latents")
        try:
            self._coefficients = [clean_and_noisy(self.scheduler, t) for t in timesteps]
        except ValueError as error:
            raise ValueError(f"pull: {error}") from error
        self._weights = self.pull.weights(len(timesteps))
        clean = self._clean.to(torch.promote_types(self._clean.dtype, torch.float32))
        if clean.ndim == 5:  # video-like latents of one frame (Qwen-Image)
            clean = clean.squeeze(1 if clean.shape[1] == 1 else 2)
        if self.unit > 1:  # in the order of channels of a packed token
            clean = F.pixel_unshuffle(clean, self.unit)
        # The filter of the tokens' grid: each of a token's pixels is one of `unit**2` interleaved images.
        self._filters = tuple(
            low_pass_matrix(size, self.sigma / self.unit, wrap).to(clean.device, clean.dtype)
            for size, wrap in zip(clean.shape[2:], self.wrap, strict=True)
        )
        self._clean = clean

    @property
    def started(self) -> bool:
        return self._weights is not None

    @property
    def size(self) -> Pair:
        """Of the canvas, in its own pixels."""
        assert self._clean is not None
        return (self._clean.shape[2], self._clean.shape[3])

    def active(self, index: int) -> bool:
        """Whether the pull does anything at this evaluation."""
        assert self._weights is not None
        return index < len(self._weights) and self._weights[index] > 0

    def correction(self, index: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """What is added to the guided prediction.

        Args:
            index: evaluation of this call.
            prediction: ``[B, C, H, W]``, guided, of any dtype.
            sample: the canvas that it was made from, as the scheduler has it (not scaled for the network).

        Returns:
            ``[B, C, H, W]``, float32 or float64.
        """
        assert self._weights is not None and self._clean is not None
        clean, noisy = self._coefficients[index]
        wanted = noisy * sample.to(self._clean.dtype) + clean * self._clean
        return low_pass(wanted - prediction, *self._filters).mul_(self._weights[index])

"""A stationary Gaussian field on a torus, and its ideal denoiser: a network without weights or training error.

With the spectrum P and ``x = a x0 + s n``, n being noise, the best prediction of x0 is the conditional mean: for the
whole canvas the Wiener filter ``a P / (a² P + s²)``, a product in frequency, and for a tile
``a C (a² C + s²)⁻¹ x`` with C the covariance of the tile's pixels.
C is diagonalised once for each size of tile and serves every step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def spectrum(side: int, cutoff: float = 48.0) -> Floats:
    """``1 / (k² + (1/cutoff)²)^1.5`` with k in cycles per pixel, ``[side, side]``; the field's variance is 1."""
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij"))
    power = (k**2 + cutoff**-2) ** -1.5
    return power / power.mean()


class IdealDenoiser:
    """The conditional mean of the noise minus the field, what flow matching predicts, for tiles of any size.

    Args:
        power: ``[side, side]``, the spectrum; the canvas is a torus.
    """

    def __init__(self, power: Floats) -> None:
        self.power = torch.from_numpy(power)
        self._covariance = np.fft.ifft2(power).real
        self._bases: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, timestep: Any) -> Tensor:
        """``x`` is ``[N, 1, h, h]`` float64, square tiles or the canvas; the timestep is 1000 sigma."""
        sigma, h = float(torch.as_tensor(timestep).flatten()[0]) / 1000, x.shape[-1]
        if h == self.power.shape[-1]:
            signal = torch.fft.ifft2(_gain(self.power, sigma) * torch.fft.fft2(x)).real
        else:
            if h not in self._bases:
                apart = np.subtract.outer(np.arange(h), np.arange(h))
                covariance = self._covariance[apart[:, None, :, None], apart[None, :, None, :]]
                values, vectors = torch.linalg.eigh(torch.from_numpy(covariance.reshape(h * h, h * h)))
                self._bases[h] = values.clamp(min=0), vectors
            values, vectors = self._bases[h]
            signal = ((x.flatten(1) @ vectors * _gain(values, sigma)) @ vectors.T).view_as(x)
        return (x - signal) / sigma  # x = (1 - sigma) x0 + sigma n, so that n - x0 = (x - x0) / sigma


def _gain(power: Tensor, sigma: float) -> Tensor:
    a = 1 - sigma
    return a * power / (a * a * power + sigma * sigma)

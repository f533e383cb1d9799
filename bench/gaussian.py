"""A stationary Gaussian field on a torus, and its ideal denoiser: a network without weights or training error.

With the spectrum P and ``x = a x0 + s n``, n being noise, the best prediction of x0 is the conditional mean: for the
whole canvas the Wiener filter ``a P / (a² P + s²)``, a product in frequency, and for a tile
``a C (a² C + s²)⁻¹ x`` with C the covariance of the tile's pixels.

C commutes with the two reflections of the tile, so in the basis of even and odd vectors it is four blocks of a quarter
of its side (Cantoni and Butler 1976); each is diagonalised once and serves every step.
"""

from __future__ import annotations

import math
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
        self._bases: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, x: Tensor, timestep: Any, **_: Any) -> tuple[Tensor]:
        """``x`` is ``[N, 1, h, h]`` float64, a tile or the canvas; the timestep is 1000 sigma."""
        sigma = float(torch.as_tensor(timestep).flatten()[0]) / 1000
        if x.shape[-1] == self.power.shape[-1]:
            signal = torch.fft.ifft2(_gain(self.power, sigma) * torch.fft.fft2(x)).real
        else:
            signal = self._tile_mean(x, sigma)
        return ((x - signal) / sigma,)  # x = (1 - sigma) x0 + sigma n, so that n - x0 = (x - x0) / sigma

    def _tile_mean(self, x: Tensor, sigma: float) -> Tensor:
        h = x.shape[-1]
        if x.shape[-2] != h or h % 2:
            raise ValueError(f"tiles of {tuple(x.shape[-2:])}: must be square with an even side")
        if h not in self._bases:
            self._bases[h] = self._decompose(h)
        fold = _even_odd(h)
        parts = torch.einsum("pih,nhw,qjw->npiqj", fold, x[:, 0], fold)
        out = torch.empty_like(parts)
        for index, (values, vectors) in enumerate(self._bases[h]):
            p, q = divmod(index, 2)
            inside = parts[:, p, :, q].flatten(1) @ vectors
            out[:, p, :, q] = ((inside * _gain(values, sigma)) @ vectors.T).unflatten(1, (h // 2, h // 2))
        return torch.einsum("pih,npiqj,qjw->nhw", fold, out, fold)[:, None]

    def _decompose(self, h: int) -> list[tuple[Tensor, Tensor]]:
        """Eigenvalues and vectors of the tile's covariance in each of the four combinations of even and odd."""
        # Even and odd rows of Toeplitz matrices: what lies i before the middle is paired with i behind it.
        n = h // 2
        index = np.arange(n)
        near, far = np.subtract.outer(index, index), np.add.outer(index, index) - (h - 1)
        result = []
        for sign_y in (1, -1):
            for sign_x in (1, -1):
                block = np.zeros((n, n, n, n))
                for dy, wy in ((near, 1), (far, sign_y)):
                    for dx, wx in ((near, 1), (far, sign_x)):
                        block += wy * wx * self._covariance[dy[:, None, :, None], dx[None, :, None, :]]
                values, vectors = np.linalg.eigh(block.reshape(n * n, n * n))
                result.append((torch.from_numpy(values.clip(0)), torch.from_numpy(vectors)))
        return result


def _gain(power: Tensor, sigma: float) -> Tensor:
    a = 1 - sigma
    return a * power / (a * a * power + sigma * sigma)


def _even_odd(h: int) -> Tensor:
    """``[2, h / 2, h]``, orthogonal: the even and the odd part of a vector of length h."""
    half = torch.eye(h // 2, dtype=torch.float64)
    return torch.stack([torch.cat([half, s * half.flip(1)], 1) for s in (1, -1)]) / math.sqrt(2)

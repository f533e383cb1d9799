"""Distances between two sets of images: spectrum, colour and patches. Lower is better."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.floating[Any]]  # [N, H, W, 3] in 0..1


def spectrum_distance(a: Images, b: Images) -> float:
    """Mean |difference| of the log10 radially averaged power spectra of the luminance, Hann-windowed."""

    def spectrum(images: Images) -> NDArray[np.float64]:
        size = images.shape[1]
        window = np.hanning(size)[:, None] * np.hanning(size)[None]
        grey = images.mean(-1)
        power = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2
        ky, kx = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
        radius = np.rint(np.hypot(ky, kx) * size).astype(int)
        total = np.bincount(radius.ravel(), power.mean(0).ravel())
        return np.log10((total / np.bincount(radius.ravel()))[1 : size // 2] + 1e-12)

    return float(np.abs(spectrum(a) - spectrum(b)).mean())


def colour_distance(a: Images, b: Images) -> float:
    """Wasserstein-1 distance of the colour histograms, mean over the channels, in units of 0..1."""
    quantiles = np.linspace(0, 1, 513)
    return float(
        np.mean(
            [np.abs(np.quantile(a[..., c], quantiles) - np.quantile(b[..., c], quantiles)).mean() for c in range(3)]
        )
    )


def patch_distance(a: Images, b: Images, patch: int = 16, count: int = 8192, seed: int = 0) -> float:
    """Sliced Wasserstein-1 distance of random ``patch``-sized patches, 256 projections (Rabin et al. 2011)."""

    def patches(images: Images) -> NDArray[np.float64]:
        rng = np.random.default_rng(seed)  # the same places in both sets
        i = rng.integers(0, len(images), count)
        y, x = (rng.integers(0, n - patch + 1, count) for n in images.shape[1:3])
        rows, cols = y[:, None] + np.arange(patch), x[:, None] + np.arange(patch)
        return images[i[:, None, None], rows[:, :, None], cols[:, None, :]].reshape(count, -1).astype(np.float64)

    directions = np.random.default_rng(seed + 1).normal(size=(patch * patch * 3, 256))
    directions /= np.linalg.norm(directions, axis=0)
    pa, pb = (np.sort(patches(images) @ directions, axis=0) for images in (a, b))
    return float(np.abs(pa - pb).mean())


def distances(images: Images, real: Images) -> dict[str, float]:
    metrics = {"spectrum": spectrum_distance, "colour": colour_distance, "patches": patch_distance}
    return {name: round(metric(images, real), 4) for name, metric in metrics.items()}


def psnr(a: Images, b: Images) -> float:
    """Peak signal-to-noise ratio in dB, mean over the images."""
    return float(-10 * np.log10(((a - b) ** 2).mean((1, 2, 3))).mean())

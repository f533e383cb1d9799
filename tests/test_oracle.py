"""The Gaussian field's ideal denoiser against dense linear algebra, and the table beside an earlier one."""

import numpy as np
import pytest
import torch

from bench import oracle
from tiledcore import TilingConfig


def fields(power: oracle.Floats, count: int, seed: int) -> oracle.Floats:
    """``[count, side, side]``: exact samples of the field."""
    noise = np.random.default_rng(seed).standard_normal((count, *power.shape))
    return np.fft.ifft2(np.fft.fft2(noise) * np.sqrt(power)).real


def dense_covariance(power: oracle.Floats, tile: int) -> oracle.Floats:
    """``[tile², tile²]``, entry by entry."""
    by_distance = np.fft.ifft2(power).real
    at = [(y, x) for y in range(tile) for x in range(tile)]
    return np.array([[by_distance[a - c, b - d] for c, d in at] for a, b in at])


@pytest.mark.parametrize(("tile", "sigma"), [(2, 0.9), (8, 0.3), (8, 1.0), (12, 0.02)])
def test_tile_denoiser_is_the_conditional_mean(tile: int, sigma: float) -> None:
    power = oracle.spectrum(20)
    covariance = dense_covariance(power, tile)
    x = np.random.default_rng(0).standard_normal((3, 1, tile, tile))
    a = 1 - sigma
    inner = a * a * covariance + sigma**2 * np.eye(tile * tile)
    mean = a * covariance @ np.linalg.solve(inner, x.reshape(3, -1).T)
    expected = (x - mean.T.reshape(x.shape)) / sigma
    found = oracle.IdealDenoiser(power)(torch.from_numpy(x), torch.tensor(1000 * sigma, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-7)


def test_whole_canvas_is_the_conditional_mean_too() -> None:
    power, sigma = oracle.spectrum(10), 0.4
    covariance = dense_covariance(power, 10)
    x = np.random.default_rng(1).standard_normal((1, 1, 10, 10))
    inner = 0.6**2 * covariance + sigma**2 * np.eye(100)
    mean = 0.6 * covariance @ np.linalg.solve(inner, x.ravel())
    found = oracle.IdealDenoiser(power)(torch.from_numpy(x), 1000 * sigma)
    np.testing.assert_allclose(found.numpy().ravel(), (x.ravel() - mean) / sigma, rtol=1e-7, atol=1e-7)


def test_many_steps_over_the_whole_canvas_are_the_exact_flow() -> None:
    power = oracle.spectrum(16)
    noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = np.fft.ifft2(np.sqrt(power) * np.fft.fft2(noise[:, 0].numpy())).real
    errors = []
    for steps in (25, 100, 400):
        found = oracle.flow(oracle.IdealDenoiser(power), noise, TilingConfig(tile=16), steps)[:, 0].numpy()
        errors.append(np.abs(found - exact).max() / np.abs(exact).max())
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.02


def test_exact_samples_have_the_spectrum_and_no_seams() -> None:
    power = oracle.spectrum(64)
    images = fields(power, 64, seed=0)
    assert images.var() == pytest.approx(1, rel=0.25)
    measured = (np.abs(np.fft.fft2(images)) ** 2).mean(0) / 64**2
    assert np.median(measured / power) == pytest.approx(1, abs=0.05)
    assert oracle.seam_ratio(images, {0, 16, 32, 48}) == pytest.approx(1, abs=0.03)


def test_columns_find_what_is_planted() -> None:
    power = oracle.spectrum(64)
    noise = np.random.default_rng(0).standard_normal((4, 64, 64))
    exact = np.fft.ifft2(np.fft.fft2(noise) * np.sqrt(power)).real
    assert oracle.low_power(exact, noise, power) == pytest.approx(1)
    assert oracle.low_power(exact / 2, noise, power) == pytest.approx(0.25)
    seams = []
    for strength in (0.0, 0.5, 1.0, 2.0):
        image = exact.copy()
        image[:, 16:32] += strength
        seams.append(oracle.seam_ratio(image, {0, 16, 32, 48}))
    assert (np.diff(seams) > 0).all() and seams[-1] > 2


FIGURES = {
    "whole canvas, exact": (1.00, 0.86),
    "no overlap, fixed grid": (3.34, 0.65),
    "50 % overlap, equal weights (MultiDiffusion)": (1.68, 0.58),
    "25 % overlap, ramp": (1.01, 0.74),
    "window 32, core 20 kept": (1.00, 0.80),
    "canvas mode: core 32 sees 8": (1.00, 0.84),
}
"""Seam and low of an earlier measurement, by code that had nothing in common with this."""
SLOW = ("canvas mode: core 32 sees 8",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FIGURES]
)
def test_rows_are_those_of_an_earlier_measurement(name: str) -> None:
    seam, low = FIGURES[name]
    found = oracle.measured(name, oracle.ways()[name], count=1)
    assert found["seam"] == pytest.approx(seam, abs=0.06 if seam < 1.1 else 0.35)
    assert found["low"] == pytest.approx(low, abs=0.07)


def test_area_factors_of_the_table() -> None:
    ways = list(oracle.ways().items())
    factors = [oracle.measured(*way, count=1, steps=2)["area_factor"] for way in (*ways[:5], ways[9])]
    assert factors == pytest.approx([1, 1, 4, 16, 1.96, 1], abs=0.01)


def test_a_row_of_several_seeds_has_their_mean_and_spread() -> None:
    found = [{"name": "a", "area_factor": 1.0, "seam": 1.0, "low": low}
             for low in (0.4, 0.6)]  # fmt: skip
    row = oracle.summary(found)
    assert row["low"] == pytest.approx(0.5) and row["low_sd"] == pytest.approx(0.02**0.5) and row["seam_sd"] == 0
    assert "| a | 1.0 | 1.00 ± 0.00 | 0.50 ± 0.14 |" in oracle.table([row])
    assert "| a | 1.0 | 1.00 | 0.40 |" in oracle.table([oracle.summary(found[:1])])

"""How every way of tiling compares with exact sampling, on a Gaussian field whose ideal denoiser is known.

    python -m bench.oracle [--fields 8] [--seeds 4] [--json bench/results/oracle.json]

A stationary Gaussian field on a torus with the spectrum P takes the place of images. For ``x = a x0 + s n``, n being
noise, the best prediction of x0 is the conditional mean: for the whole canvas the Wiener filter ``a P / (a² P + s²)``,
a product in frequency, and for a tile ``a C (a² C + s²)⁻¹ x`` with C the covariance of the tile's pixels. It has no
error, so all errors are those of the tiling. Tiles are gathered, denoised and blended by :func:`tiledcore.sample`, with
diffusers' flow-matching scheduler.

- seam: mean |difference| across the lines on which tiles start or end (with a hard crop: on which cores meet), over
  that across all other lines. 1 is ideal. A grid that moves has no lines of its own, so those of the fixed grid count.
- low: power at up to 4 cycles per canvas side, which are waves of at least 40 pixels, over that of the exact flow from
  the same noise.

Each row is measured with the same seeds; ± is the standard deviation between them. The whole canvas has a low below 1,
because 40 Euler steps are no exact integral: compare with it, not with 1. Canvas mode is here a wide tile of which only
the core is kept: what it computes without evaluating a pixel twice.
"""

import argparse
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray
from torch import Tensor

from bench import measure
from tiledcore import Execution, Motion, TilingConfig, sample

Floats = NDArray[np.float64]
SIDE, TILE, STEPS = 160, 32, 40
SHIFT = 3.0
"""Of the flow-matching schedule, as SD3 ships it (Esser et al. 2024): sigma = 3 s / (1 + 2 s)."""


def spectrum(side: int, cutoff: float = 48.0) -> Floats:
    """``1 / (k² + (1/cutoff)²)^1.5`` with k in cycles per pixel, ``[side, side]``; the field's variance is 1."""
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij"))
    power = (k**2 + cutoff**-2) ** -1.5
    return power / power.mean()


class IdealDenoiser:
    """The conditional mean of the noise minus the field, what flow matching predicts, for tiles of any size.

    ``power`` is the spectrum, ``[side, side]``. C is diagonalised once for each size of tile and serves every step.
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


def ways() -> dict[str, TilingConfig]:
    """The rows of the table."""

    def wrapped(**tiling: Any) -> TilingConfig:
        return TilingConfig(**{"tile": TILE, "wrap": True} | tiling)

    canvas_mode = {
        f"canvas mode: core {core} sees {sees}": wrapped(tile=core + 2 * sees, overlap=2 * sees, window="core")
        for core, sees in ((32, 8), (32, 16), (16, 8), (16, 16))
    }
    return {
        "whole canvas, exact": TilingConfig(tile=SIDE),
        "no overlap, fixed grid": wrapped(overlap=0),
        "50 % overlap, equal weights (MultiDiffusion)": wrapped(overlap=16, window="mean"),
        "75 % overlap, equal weights": wrapped(overlap=24, window="mean"),
        "25 % overlap, ramp": wrapped(overlap=8),
        "50 % overlap, ramp": wrapped(overlap=16),
        "50 % overlap, ramp of 8": wrapped(overlap=16, ramp=8),
        "window 32, core 20 kept": wrapped(overlap=12, window="core"),
        "window 32, core 16 kept": wrapped(overlap=16, window="core"),
        "no overlap, shifted at random (SpotDiffusion)": wrapped(motion=Motion(0, 0, 0)),
        **canvas_mode,
    }


def flow(denoiser: IdealDenoiser, noise: Tensor, config: TilingConfig, steps: int = STEPS) -> Tensor:
    """Fields ``[B, 1, side, side]`` from noise, float64."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps)
    return sample(denoiser, noise, scheduler, config, execution=Execution(tile_batch=64))


def seam_ratio(images: Floats, lines: set[int]) -> float:
    """Mean |difference| across the lines, both axes, over that across all others; ``[N, side, side]``, wrapped."""
    across = np.stack([np.abs(images - np.roll(images, 1, axis)).mean((0, 3 - axis)) for axis in (1, 2)])
    chosen = np.isin(np.arange(across.shape[1]), list(lines))
    return float(across[:, chosen].mean() / across[:, ~chosen].mean())


def low_power(images: Floats, noise: Floats, power: Floats, cycles: float = 4.0) -> float:
    """Power at up to ``cycles`` per canvas side, the mean left out, over that of ``noise`` moved exactly.

    The exact flow takes each mode of the noise to ``sqrt(P)`` times itself. ``[N, side, side]`` both.
    """
    side = power.shape[0]
    k = side * np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij"))
    modes = (k > 0) & (k <= cycles)
    found, exact = ((np.abs(np.fft.fft2(part)) ** 2)[:, modes].sum(0) for part in (images, noise))
    return float(found.sum() / (exact * power[modes]).sum())


def tile_lines(config: TilingConfig) -> set[int]:
    """Where to look for seams: where the blend's weights have an edge."""
    grid = config.grid(SIDE, SIDE, SIDE)
    if config.moving or config.tile == SIDE:
        return set(range(0, SIDE, TILE))
    if config.window == "core":
        return {start for start, _ in grid.cores[0]}
    return {line % SIDE for start, size in grid.rows for line in (start, start + size)}


def measured(name: str, config: TilingConfig, count: int, steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
    """One row of the table, on ``count`` fields from the same noise as every other row."""
    power, generator = spectrum(SIDE), torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    fields = flow(IdealDenoiser(power), noise, config, steps)[:, 0].numpy()
    once = config.moving or name.startswith("canvas mode")  # every pixel is evaluated once in each step
    return {
        "name": name,
        "area_factor": 1.0 if once else config.grid(SIDE, SIDE, TILE).area_factor,
        "seam": seam_ratio(fields, tile_lines(config)),
        "low": low_power(fields, noise[:, 0].numpy(), power),
    }


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several seeds: the mean, and the standard deviation from one seed to another."""
    result = dict(found[0])
    for key in ("seam", "low"):
        values = [one[key] for one in found]
        result |= {key: fmean(values), f"{key}_sd": stdev(values) if len(values) > 1 else None}
    return result


def table(found: list[dict[str, Any]]) -> str:
    def cell(row: dict[str, Any], key: str) -> str:
        spread = row[f"{key}_sd"]
        return f"{row[key]:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")

    cells = ([row["name"], f"{row['area_factor']:.1f}", cell(row, "seam"), cell(row, "low")] for row in found)
    return measure.markdown(["tiling", "area factor", "seam", "low"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=8, help="fields of each row and seed")
    parser.add_argument("--seeds", type=int, default=4, help="how often each row is measured")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for name, config in ways().items():
        found.append(summary([measured(name, config, args.fields, seed=seed) for seed in range(args.seeds)]))
        print(f"{name} done", flush=True)
    about = {"fields": args.fields, "side": SIDE, "tile": TILE, "steps": STEPS, "shift": SHIFT, "seeds": args.seeds}
    print(f"{args.seeds} times {args.fields} fields of {SIDE}², tiles of {TILE}², {STEPS} steps\n{table(found)}")
    measure.save(args.json, torch.device("cpu"), about=about, rows=found)


if __name__ == "__main__":
    main()

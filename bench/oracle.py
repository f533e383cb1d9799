"""How every way of tiling compares with exact sampling, on a Gaussian field whose ideal denoiser is known.

    python -m bench.oracle [--fields 8] [--seeds 4] [--json bench/results/oracle.json]

The field and its denoiser are in bench/gaussian.py. The denoiser has no error, so all errors are those of the tiling.
Tiles are gathered, denoised and blended by the engine's own code: :class:`~tiledcore.tiles.denoiser.TileDenoiser`, and
:func:`~tiledcore.ops.fused_step` with the table of diffusers' flow-matching scheduler.

- seam: mean |difference| across the lines on which tiles start or end (with a hard crop: on which cores meet), over
  that across all other lines. 1 is ideal. A grid that moves has no lines of its own, so those of the fixed grid count.
- low: power at up to 4 cycles per canvas side, which are waves of at least 40 pixels, over that of the exact flow from
  the same noise.

Each row is measured with several seeds, the same for all rows; ± is the standard deviation between seeds.

The whole canvas has a low below 1, because 40 Euler steps are no exact integral: compare with it, not with 1. A core
that sees its neighbours is here a wide tile of which only the core is kept. This is what canvas mode computes without
evaluating a pixel twice. The columns *design* are an earlier measurement with a slightly different form of ramp.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import measure
from bench.gaussian import Floats, IdealDenoiser, spectrum
from tiledcore import Execution, Motion, TilingConfig, ops
from tiledcore.schedulers.solver import LinearSolver, linear_solver
from tiledcore.tiles.denoiser import TileDenoiser

SIDE, TILE, STEPS = 160, 32, 40
SHIFT = 3.0
"""Of the flow-matching schedule, as SD3 ships it (Esser et al. 2024): sigma = 3 s / (1 + 2 s)."""


@dataclass(frozen=True)
class Row:
    """A way of tiling, and what the design says of it."""

    name: str
    tiling: dict[str, Any] | None
    area_factor: float | None = None
    """Where it is not that of the tiles."""
    seam: float | None = None
    low: float | None = None


def rows(tile: int = TILE) -> list[Row]:
    """The design's table; None instead of a tiling is the whole canvas."""

    def context(core: int, sees: int) -> dict[str, Any]:
        return {"tile": core + 2 * sees, "overlap": 2 * sees, "window": "core"}

    half = tile // 2
    return [
        Row("whole canvas, exact", None, 1.0, 1.00, 0.86),
        Row("no overlap, fixed grid", {"overlap": 0}, None, 3.34, 0.65),
        Row("50 % overlap, equal weights (MultiDiffusion)", {"overlap": half, "window": "mean"}, None, 1.68, 0.58),
        Row("75 % overlap, equal weights", {"overlap": tile * 3 // 4, "window": "mean"}, None, 1.27, 0.58),
        Row("25 % overlap, ramp", {"overlap": tile // 4}, None, 1.01, 0.74),
        Row("50 % overlap, ramp", {"overlap": half}, None, 1.01, 0.77),
        Row("50 % overlap, ramp of 8", {"overlap": half, "ramp": tile // 4}),
        Row("window 32, core 20 kept", {"overlap": tile * 3 // 8, "window": "core"}, None, 1.00, 0.80),
        Row("window 32, core 16 kept", {"overlap": half, "window": "core"}, None, 1.00, 0.82),
        Row("no overlap, shifted at random (SpotDiffusion)", {"motion": Motion(0, 0, 0)}, None, 1.00, 0.58),
        Row("canvas mode: core 32 sees 8", context(tile, tile // 4), 1.0, 1.00, 0.84),
        Row("canvas mode: core 32 sees 16", context(tile, half), 1.0, 1.00, 0.86),
        Row("canvas mode: core 16 sees 8", context(half, tile // 4), 1.0, 1.00, 0.82),
        Row("canvas mode: core 16 sees 16", context(half, half), 1.0, 1.00, 0.86),
    ]


def scheduler(steps: int) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    result = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    result.set_timesteps(steps)
    return result


def sample(
    forward: Callable[..., tuple[Tensor]], noise: Tensor, tiling: dict[str, Any] | None, tile: int, steps: int = STEPS
) -> Tensor:
    """The engine's loop: gather and denoise tiles, then blend and step, on ``[B, 1, side, side]`` float64."""
    solver = linear_solver(scheduler(steps))
    assert isinstance(solver, LinearSolver), solver
    solver, side = solver.to(noise.device, torch.float64), noise.shape[-1]
    asked = {"tile": side} if tiling is None else {"tile": tile, "wrap": True} | tiling
    config = TilingConfig(**asked)
    denoiser = TileDenoiser(config, Execution(tile_batch=64), tile, pixels=1)
    state = torch.cat([noise[None], noise.new_zeros(solver.slots - 1, *noise.shape)])
    model_input, step = state[0] * solver.input_scale[0], torch.zeros(1, dtype=torch.int64)
    for timestep in solver.timesteps:
        denoiser.place((side, side), timestep, noise.device)
        tiles, offsets, _, ramp = denoiser.evaluate(forward, model_input, timestep)
        ops.fused_step(
            *(tiles.contiguous(), offsets, state, solver.table, solver.input_scale, step),
            model_input=model_input,
            window=config.window,
            ramp=ramp,
        )
        step += 1
    return state[0]


def seam_ratio(images: Floats, lines: set[int]) -> float:
    """Mean |difference| across the lines, both axes, over that across all others; ``[N, side, side]``, wrapped."""
    on, off = [], []
    for axis in (1, 2):
        across = np.abs(images - np.roll(images, 1, axis)).mean(tuple({0, 1, 2} - {axis}))
        chosen = np.isin(np.arange(len(across)), list(lines))
        on.append(across[chosen])
        off.append(across[~chosen])
    return float(np.concatenate(on).mean() / np.concatenate(off).mean())


def low_power(images: Floats, noise: Floats, power: Floats, cycles: float = 4.0) -> float:
    """Power at up to ``cycles`` per canvas side, the mean left out, over that of ``noise`` moved exactly.

    The exact flow takes each mode of the noise to ``sqrt(P)`` times itself. ``[N, side, side]`` both.
    """
    side = power.shape[0]
    k = side * np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij"))
    modes = (k > 0) & (k <= cycles)
    found, exact = ((np.abs(np.fft.fft2(part)) ** 2)[:, modes].sum(0) for part in (images, noise))
    return float(found.sum() / (exact * power[modes]).sum())


def tile_lines(tiling: dict[str, Any] | None, side: int, tile: int) -> set[int]:
    """Where to look for seams: where the blend's weights have an edge."""
    fixed = {} if tiling is None or "motion" in tiling else tiling
    grid = TilingConfig(**({"tile": tile, "wrap": True, "overlap": 0} | fixed)).grid(side, side, tile)
    if fixed.get("window") == "core":
        return {start for start, _ in grid.core_rows}
    return {line % side for start, size in grid.rows for line in (start, start + size)}


def measured(row: Row, side: int, tile: int, count: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """One row of the table, on ``count`` fields from the same noise as every other row."""
    power = spectrum(side)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, side, side, generator=generator, dtype=torch.float64)
    fields = sample(IdealDenoiser(power), noise, row.tiling, tile, steps)[:, 0].numpy()
    config = TilingConfig(**({"tile": tile, "wrap": True} | (row.tiling or {})))
    area = 1.0 if config.moving else config.grid(side, side, tile).area_factor
    return {
        "name": row.name,
        "area_factor": area if row.area_factor is None else row.area_factor,
        "seam": seam_ratio(fields, tile_lines(row.tiling, side, tile)),
        "low": low_power(fields, noise[:, 0].numpy(), power),
        "design_seam": row.seam,
        "design_low": row.low,
    }


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several seeds: the mean, and the standard deviation from one seed to another."""
    result = dict(found[0])
    for key in ("seam", "low"):
        values = [one[key] for one in found]
        result[key] = statistics.fmean(values)
        result[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return result


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| tiling | area factor | seam | design | low | design |", "|---" * 6 + "|"]
    for row in found:
        design = [f"{row[key]:.2f}" if row[key] is not None else "–" for key in ("design_seam", "design_low")]
        seam, low = (
            f"{row[key]:.2f}" + (f" ± {row[f'{key}_sd']:.2f}" if row[f"{key}_sd"] is not None else "")
            for key in ("seam", "low")
        )
        lines.append(f"| {row['name']} | {row['area_factor']:.1f} | {seam} | {design[0]} | {low} | {design[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=8, help="fields of each row and seed")
    parser.add_argument("--seeds", type=int, default=4, help="how often each row is measured")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for row in rows():
        found.append(summary([measured(row, SIDE, TILE, args.fields, STEPS, seed) for seed in range(args.seeds)]))
        print(f"{row.name} done", flush=True)
    about = {"fields": args.fields, "side": SIDE, "tile": TILE, "steps": STEPS, "shift": SHIFT, "seeds": args.seeds}
    print(f"{args.seeds} times {args.fields} fields of {SIDE}², tiles of {TILE}², {STEPS} steps\n{table(found)}")
    if args.json and args.json.exists():  # rows of ways that are no longer measured stay
        names = {row.name for row in rows()}
        found += [row for row in json.loads(args.json.read_text())["rows"] if row["name"] not in names]
    measure.save(args.json, torch.device("cpu"), about=about, rows=found)


if __name__ == "__main__":
    main()

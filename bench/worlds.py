"""Do worlds close? Wrapped maps and textures, and sets of images whose edges fit.

    python -m bench.worlds --model earth --size 1024x512 --json bench/results/worlds_earth.json

Rows: a planet map wrapped in x, a texture wrapped in x and y, the map without wrap as the control, and two sets in
which every right side fits every left side: of 2 and of 4 images. Columns:

- seam: ratio of the line across the wrap (or joint: mean over all pairs that fit) to its 16 neighbours
  (bench/quality.py); worst: of the axes or pairs; p99: the 99th percentile of that ratio over the ordinary lines of
  both axes.
- TS: Tiling Score of Tiled Diffusion (Madar and Fried, 2025, section 4.2): mean |difference| of pixels in 0..1
  across the joint, and at a fixed offset on both sides of it; the largest of the three, which bounds their average (the
  paper names both). TS inside: the same at the middle of an image, where nothing joins.

The wrapped decoder is checked on its own: largest difference of decoding latents turned half round and turned back,
which is 0 but for normalisation and attention, which see the continued canvas (tiledcore/wrapping.py).
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench import timing
from bench.modes import kept, period
from bench.quality import outermost, seam_profile
from tiledcore import TiledPipeline, TilingConfig
from tiledcore.compose.connected import Joint, connected
from tiledcore.models import call_defaults
from tiledcore.models.architecture import NATIVE
from tiledcore.vae.wrap import wrapped

MAP = "satellite view of continents and oceans"
TEXTURE = "relief map of mountains"
SET = (
    "relief map of mountains",
    "relief map of desert",
    "relief map of islands in the ocean",
    "relief map of a rugged coast",
)
OFFSET = 16  # px from the joint, for the Tiling Score
PX = 8

Image = NDArray[np.floating[Any]]


def tiling_score(before: Image, behind: Image, offset: int = OFFSET) -> float:
    """Of two images ``[H, W, C]`` in 0..1 side by side; for one above the other, turn them."""
    both = np.concatenate([before, behind], 1).astype(np.float64)
    middle = before.shape[1]
    return max(float(np.abs(both[:, x] - both[:, x - 1]).mean()) for x in (middle, middle - offset, middle + offset))


def across(before: Image, behind: Image, grid: int) -> dict[str, float]:
    """Seam and Tiling Score of the joint of two images side by side, and what ordinary lines have."""
    both = np.concatenate([before, behind], 1)
    middle = before.shape[1]
    y, x = seam_profile(both, period=grid)
    ordinary = np.concatenate([np.delete(r, [*outermost(len(r), False), *at]) for r, at in ((y, ()), (x, (middle,)))])
    half = before.shape[1] // 2
    return {
        "seam": float(x[middle]),
        "p99": float(np.percentile(ordinary, 99)),
        "ts": tiling_score(before, behind),
        "ts_inside": tiling_score(before[:, :half], before[:, half:]),
    }


def row(pairs: list[tuple[Image, Image]], grid: int) -> dict[str, float]:
    found = [across(before, behind, grid) for before, behind in pairs]
    mean = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
    return mean | {"worst": max(f["seam"] for f in found), "pairs": len(found)}


def turned(image: Image) -> Image:
    return np.swapaxes(image, 0, 1)


def decoder_error(pipe: Any, latents: torch.Tensor, wrap: bool) -> dict[str, float]:
    """Decoding latents turned half round in x, turned back: largest and mean difference, in units of 0..1."""
    vae, half = pipe.vae, latents.shape[-1] // 2
    with torch.no_grad(), wrapped(vae, (False, wrap), PX):
        straight = vae.decode(latents, return_dict=False)[0]
        back = vae.decode(latents.roll(half, -1), return_dict=False)[0].roll(-half * PX, -1)
    difference = (straight - back).abs() / 2
    return {"max": float(difference.max()), "mean": float(difference.mean())}


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| world | joints | seam | worst | 99th percentile of ordinary lines | TS | TS inside |", "|---" * 7 + "|"]
    for name, r in rows.items():
        cells = [name, f"{r['pairs']:.0f}", *(f"{r[key]:.3f}" for key in ("seam", "worst", "p99"))]
        lines.append(f"| {' | '.join([*cells, *(f'{r[key]:.4f}' for key in ('ts', 'ts_inside'))])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="earth", help="earth or earth-flux")
    parser.add_argument("--size", default="1024x512", help="of the map, px; others are squares of its height")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--work", type=Path, default=Path("runs/worlds"), help="images are kept there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    width, height = (int(n) for n in args.size.split("x"))
    pipe = TiledPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    call = call_defaults(args.model) | {"num_inference_steps": args.steps}
    overlap, work = NATIVE // 4, args.work / args.model

    def world(name: str, prompt: str, w: int, wrap: tuple[bool, bool]) -> Image:
        tiling = TilingConfig(tile=NATIVE, overlap=overlap, wrap=wrap)

        def make() -> list[Image]:
            generator = torch.Generator().manual_seed(args.seed)
            options = call | {"generator": generator, "tiling": tiling, "output_type": "np"}
            return [pipe(prompt, height=height, width=w, **options).images[0]]

        return kept(work / f"{name} {w}x{height} {args.steps} {args.seed}.png", make)

    def images(count: int) -> list[Image]:
        every = tuple(range(count))

        def make() -> list[Image]:
            tiling = TilingConfig(tile=NATIVE, overlap=overlap)
            options = call | {"tiling": tiling, "output_type": "np", "seed": args.seed}
            return connected(pipe, SET[:count], [Joint("x", every, every)], height=height, width=height, **options)

        together = kept(work / f"set of {count} {height} {args.steps} {args.seed}.png", make)
        return list(together.reshape(count, height, height, 3))

    rows: dict[str, dict[str, float]] = {}
    for name in args.only or ("map, wrap x", "map, no wrap", "texture, wrap xy", "set of 2", "set of 4"):
        if name.startswith("map"):
            picture = world(name, MAP, width, (False, name.endswith("wrap x")))
            rows[name] = row([(picture, picture)], period(pipe))
        elif name.startswith("texture"):
            picture = world(name, TEXTURE, height, (True, True))
            rows[name] = row([(picture, picture), (turned(picture), turned(picture))], period(pipe))
        else:
            found = images(int(name[-1]))
            rows[name] = row(list(product(found, found)), period(pipe))
        print(f"{name} done", flush=True)
    print(table(rows))
    latents = torch.randn(
        1, pipe.vae.config.latent_channels, NATIVE, NATIVE, generator=torch.Generator().manual_seed(0)
    )
    decoder = {"wrapped": decoder_error(pipe, latents, True), "as it is": decoder_error(pipe, latents, False)}
    for name, error in decoder.items():
        print(
            f"decoder {name}: turned half round differs by {error['max']:.4f} at most, {error['mean']:.4f} on average"
        )
    if args.json:
        about = {"model": args.model, "size": args.size, "seed": args.seed, "call": call}
        data = {"machine": timing.machine(torch.device("cpu")), "about": about, "rows": rows, "decoder": decoder}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Do regions obey their own prompts? One scene, measured against images of each prompt alone.

    python -m bench.regions --model earth --size 1024 --json bench/results/regions_earth.json

The scene has a global prompt and a box for each other prompt. Windows are cut from inside each region (a quarter of the
native size away from its border, feather apart) and compared with windows of an image that has that prompt everywhere:
spectrum and colour distance of `tiledcore.models.evaluate`. A region obeys where its own prompt is the
nearest of all. Beside it the seam ratio of the lines of region borders (bench/quality.py): the worst line within the
feather, and the limit, the 99.9th percentile of all other lines. Last, the moved region: correlation of its pixels
with themselves after its box was moved, with the region's own seed and without.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.modes import kept, period
from bench.quality import PERCENTILE, cut_windows, outermost, seam_profile
from tiledcore import Region, TiledPipeline, TilingConfig
from tiledcore.models import call_defaults
from tiledcore.models.architecture import NATIVE
from tiledcore.models.evaluate import colour_distance, spectrum_distance

PROMPTS = ("satellite view of ocean", "satellite view of desert", "relief map of mountains", "topographic map of ocean")
WINDOW = 128  # px
COUNT = 24

Images = NDArray[np.floating[Any]]


def boxes(size: int) -> list[tuple[int, int, int, int]]:
    """Three quarters of a square canvas; the global prompt has the first."""
    half = size // 2
    return [(half, 0, size, half), (0, half, half, size), (half, half, size, size)]


def render(pipe: Any, prompt: str, size: int, seed: int, call: dict[str, Any], regions: list[Region]) -> list[Images]:
    generator = torch.Generator().manual_seed(seed)
    output = pipe(prompt, height=size, width=size, generator=generator, regions=regions, output_type="np", **call)
    return [output.images[0]]


def obedience(scene: Images, alone: dict[str, Images], margin: int) -> list[dict[str, Any]]:
    """Distances of each part of the scene from every prompt's own image."""
    size = scene.shape[0]
    half = size // 2
    parts = [(0, 0, half, half), *boxes(size)]
    windows = {prompt: cut_windows(image, WINDOW, COUNT) for prompt, image in alone.items()}
    rows = []
    for (left, top, right, bottom), prompt in zip(parts, PROMPTS, strict=True):
        # Away from the other parts, but not from the canvas' border.
        inner = scene[
            top + margin * (top > 0) : bottom - margin * (bottom < size),
            left + margin * (left > 0) : right - margin * (right < size),
        ]
        found = cut_windows(inner, WINDOW, COUNT)
        spectrum = {other: spectrum_distance(found, w) for other, w in windows.items()}
        colour = {other: colour_distance(found.astype(np.float32), w) for other, w in windows.items()}
        obeys = all(min(d, key=lambda k: d[k]) == prompt for d in (spectrum, colour))
        rows.append({"prompt": prompt, "spectrum": spectrum, "colour": colour, "obeys": obeys})
    return rows


def borders(scene: Images, feather: int, grid: int) -> dict[str, float]:
    """Worst seam ratio of the lines within the feather of the borders, and the limit of all the others."""
    half, reach = scene.shape[0] // 2, max(feather // 2, 1)
    worst, ordinary = 0.0, []
    for ratios in seam_profile(scene, period=grid):
        near = np.zeros(len(ratios), dtype=bool)
        near[half - reach : half + reach + 1] = True
        worst = max(worst, float(ratios[near].max()))
        near[outermost(len(ratios), False)] = True
        ordinary.append(ratios[~near])
    return {"worst": worst, "limit": float(np.percentile(np.concatenate(ordinary), PERCENTILE))}


def moved(pipe: Any, size: int, call: dict[str, Any], work: Path, step: int) -> dict[str, float]:
    """Correlation of a region's pixels with themselves after the box has moved by ``step`` px."""
    side = size // 2
    result = {}
    for name, seed in (("own seed", 7), ("no seed", None)):
        pictures = []
        for shift in (0, step):
            box = (64 + shift, 64, 64 + shift + side, 64 + side)
            region = Region("relief map of islands in the ocean", box=box, seed=seed)
            path = work / f"{size} moved {name} {shift}.png"
            image = kept(path, lambda r=region: render(pipe, PROMPTS[0], size, 3, call, [r]))
            inner = image[box[1] + 48 : box[3] - 48, box[0] + 48 : box[2] - 48].mean(-1)
            pictures.append(inner.ravel())
        result[name] = float(np.corrcoef(*pictures)[0, 1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="earth", help="earth or earth-flux")
    parser.add_argument("--size", type=int, default=1024, help="px, a multiple of 16")
    parser.add_argument("--feather", type=int, default=64, help="px")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--mode", choices=("tiles", "canvas"), default="tiles")
    parser.add_argument("--work", type=Path, default=Path("runs/regions"), help="images are kept there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tiling = TilingConfig(tile=NATIVE, **({"overlap": NATIVE // 4} if args.mode == "tiles" else {"mode": "canvas"}))
    pipe = TiledPipeline.from_pretrained(args.model, tiling=tiling)
    pipe.set_progress_bar_config(disable=True)
    call = call_defaults(args.model) | {"num_inference_steps": args.steps}
    work, size = args.work / f"{args.model} {args.mode}", args.size
    alone = {
        prompt: kept(work / f"{size} {prompt}.png", lambda p=prompt: render(pipe, p, size, 1, call, []))
        for prompt in PROMPTS
    }
    regions = [Region(p, box=b, feather=args.feather) for p, b in zip(PROMPTS[1:], boxes(size), strict=True)]
    scene = kept(work / f"{size} scene {args.feather}.png", lambda: render(pipe, PROMPTS[0], size, 2, call, regions))
    rows, line = (
        obedience(scene, alone, args.feather // 2 + 8 * NATIVE // 4),
        borders(scene, args.feather, period(pipe)),
    )
    for row in rows:
        print(f"{row['prompt']}: {'obeys' if row['obeys'] else 'DOES NOT OBEY'}")
        for measure in ("spectrum", "colour"):
            print(f"  {measure:<9}" + "  ".join(f"{k}: {v:.3f}" for k, v in row[measure].items()))
    print(f"borders: worst line within the feather {line['worst']:.2f}, limit {line['limit']:.2f}")
    shift = moved(pipe, size, call, work, 8 * NATIVE)
    print("moved by 256 px: " + ", ".join(f"correlation {v:.2f} with {k}" for k, v in shift.items()))
    if args.json:
        about = {"model": args.model, "size": size, "feather": args.feather, "mode": args.mode, "call": call}
        args.json.write_text(
            json.dumps({"about": about, "parts": rows, "borders": line, "moved": shift}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

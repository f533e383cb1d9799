"""Do regions obey their own prompts? Scenes, measured against images of each prompt alone.

    python -m bench.regions --size 1024 --seeds 3 --json bench/results/regions_earth.json

A scene has a global prompt and a box for each other prompt. Windows are cut from inside each region (a quarter of the
native size away from its border, feather apart) and compared with windows of images that have that prompt everywhere:
spectrum and colour distance of `tiledcore.models.evaluate`. A region obeys where its own prompt is the nearest of all.
The latents of those images are put together as the scene is and decoded in one piece, for the decoder's norms are those
of the whole picture: a map's latents, decoded beside black sea, have half their power at the highest frequencies.

Beside it the seam ratio of the lines near region borders (bench/quality.py) over the limit, the 99.9th percentile of
all other lines, the worst of all scenes: *within* the feather, where one prompt turns into the other, and *beyond*
it, as far again on both sides, where nothing should be seen. *Cross-fade* is the first for the prompts' own images
mixed pixel by pixel over the same feather: what the softest transition has.

Last, the moved region: correlation of its pixels with themselves after its box was moved, with the region's own seed
and without.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench import timing
from bench.modes import kept, period
from bench.quality import PERCENTILE, cut_windows, outermost, seam_profile
from tiledcore import Region, TiledPipeline, TilingConfig
from tiledcore.models import call_defaults
from tiledcore.models.architecture import NATIVE
from tiledcore.models.evaluate import colour_distance, spectrum_distance

PROMPTS = ("satellite view of ocean", "satellite view of desert", "relief map of mountains", "topographic map of ocean")
MODEL = "earth"
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


def kept_latents(path: Path, pipe: Any, prompt: str, size: int, seed: int, call: dict[str, Any]) -> Images:
    """Latents ``[H, W, C]`` of an image with one prompt, stored at ``path``; made first if they are not there."""
    if not path.exists():
        generator = torch.Generator().manual_seed(seed)
        latents = pipe(prompt, height=size, width=size, generator=generator, output_type="latent", **call).images
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.with_suffix(".tmp.npy"), latents[0].movedim(0, -1).numpy())
        path.with_suffix(".tmp.npy").rename(path)
    return np.load(path)


def decoded(pipe: Any, latents: Images) -> Images:
    """``[H, W, 3]`` in 0..1, decoded in one piece."""
    with torch.no_grad():
        z = torch.from_numpy(latents).movedim(-1, 0)[None] / pipe.vae.config.scaling_factor
        image = pipe.vae.decode(z, return_dict=False)[0][0]
    return (image / 2 + 0.5).clamp(0, 1).movedim(0, -1).numpy()


def mosaic(images: Sequence[Images]) -> Images:
    """The quarter of each prompt's own image or latents ``[H, W, C]`` that it has in the scene."""
    size = len(images[0])
    result = images[0].copy()
    for image, (left, top, right, bottom) in zip(images[1:], boxes(size), strict=True):
        result[top:bottom, left:right] = image[top:bottom, left:right]
    return result


def obedience(scenes: list[Images], references: list[Images], margin: int) -> list[dict[str, Any]]:
    """Distances of each part of the scenes from the parts of images in which each prompt was alone."""
    size = len(scenes[0])
    half = size // 2
    windows, inside = {}, {}
    for (left, top, right, bottom), prompt in zip([(0, 0, half, half), *boxes(size)], PROMPTS, strict=True):
        # Away from the other parts, but not from the canvas' border.
        y = slice(top + margin * (top > 0), bottom - margin * (bottom < size))
        x = slice(left + margin * (left > 0), right - margin * (right < size))
        windows[prompt] = _windows([image[y, x] for image in references])
        inside[prompt] = _windows([scene[y, x] for scene in scenes])
    rows = []
    for prompt, found in inside.items():
        spectrum = {other: spectrum_distance(found, w) for other, w in windows.items()}
        colour = {other: colour_distance(found, w) for other, w in windows.items()}
        obeys = all(min(d, key=lambda k: d[k]) == prompt for d in (spectrum, colour))
        rows.append({"prompt": prompt, "spectrum": spectrum, "colour": colour, "obeys": obeys})
    return rows


def _windows(images: list[Images]) -> Images:
    return np.concatenate([cut_windows(image, WINDOW, COUNT) for image in images])


def borders(scene: Images, feather: int, grid: int) -> dict[str, float]:
    """Worst seam ratio of the lines within the feather of the borders and beyond it, over the limit of the others."""
    half, reach = len(scene) // 2, max(feather // 2, 1)
    within, beyond, ordinary = [], [], []
    for ratios in seam_profile(scene, period=grid):
        away = np.abs(np.arange(len(ratios)) - half)
        inner = np.ones(len(ratios), dtype=bool)
        inner[outermost(len(ratios), False)] = False
        within.append(ratios[inner & (away <= reach)])
        beyond.append(ratios[inner & (away > reach) & (away <= 2 * reach)])
        ordinary.append(ratios[inner & (away > 2 * reach)])
    limit = float(np.percentile(np.concatenate(ordinary), PERCENTILE))
    return {name: float(np.concatenate(r).max()) / limit for name, r in (("within", within), ("beyond", beyond))}


def cross_fade(alone: Sequence[Images], feather: int) -> Images:
    """The images of each prompt in their parts of the scene, mixed linearly over the feather."""
    size = len(alone[0])
    high = np.clip((np.arange(size) + 0.5 - size / 2) / feather + 0.5, 0, 1)
    low = 1 - high
    parts = ((low, low), (low, high), (high, low), (high, high))  # (y, x), as boxes()
    return np.sum([y[:, None, None] * x[:, None] * image for (y, x), image in zip(parts, alone, strict=True)], axis=0)


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
    parser.add_argument("--size", type=int, default=1024, help="px, a multiple of 16")
    parser.add_argument("--seeds", type=int, default=1, help="scenes, and images of each prompt")
    parser.add_argument("--feather", type=int, default=64, help="px")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--mode", choices=("tiles", "canvas"), default="tiles")
    parser.add_argument("--work", type=Path, default=Path("runs/regions"), help="images are kept there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tiling = TilingConfig(tile=NATIVE, **({"overlap": NATIVE // 4} if args.mode == "tiles" else {"mode": "canvas"}))
    pipe = TiledPipeline.from_pretrained(MODEL, tiling=tiling)
    pipe.set_progress_bar_config(disable=True)
    call = call_defaults(MODEL) | {"num_inference_steps": args.steps}
    work, size = args.work / f"{MODEL} {args.mode}", args.size
    regions = [Region(p, box=b, feather=args.feather) for p, b in zip(PROMPTS[1:], boxes(size), strict=True)]
    scenes, references, fades = [], [], []
    for seed in range(1, 2 * args.seeds, 2):  # a scene and the images that it is compared with share no noise
        paths = [work / f"{size} {prompt} {seed}.npy" for prompt in PROMPTS]
        alone = [kept_latents(path, pipe, p, size, seed, call) for path, p in zip(paths, PROMPTS, strict=True)]
        references.append(decoded(pipe, mosaic(alone)))
        fades.append(cross_fade([decoded(pipe, latents) for latents in alone], args.feather))
        path = work / f"{size} scene {args.feather} {seed + 1}.png"
        scenes.append(kept(path, lambda s=seed + 1: render(pipe, PROMPTS[0], size, s, call, regions)))
    rows = obedience(scenes, references, args.feather // 2 + 8 * NATIVE // 4)
    found = [borders(scene, args.feather, period(pipe)) for scene in scenes]
    lines = {name: max(f[name] for f in found) for name in found[0]}
    lines["cross_fade"] = max(borders(fade, args.feather, period(pipe))["within"] for fade in fades)
    shift = moved(pipe, size, call, work, 8 * NATIVE)
    data = {"parts": rows, "borders": lines, "moved": shift}
    print(table(data))
    if args.json:
        about = {"model": MODEL, "size": size, "seeds": args.seeds, "feather": args.feather, "mode": args.mode}
        machine = timing.machine(torch.device("cpu"))
        whole = {"machine": machine, "about": about | {"call": call}} | data
        args.json.write_text(json.dumps(whole, indent=1) + "\n")


def table(data: dict[str, Any]) -> str:
    lines = ["| region | spectrum: own | nearest other | colour: own | nearest other | |", "|---" * 6 + "|"]
    for row in data["parts"]:
        cells = [row["prompt"]]
        for measure in ("spectrum", "colour"):
            others = {k: v for k, v in row[measure].items() if k != row["prompt"]}
            nearest = min(others, key=lambda k: others[k])
            cells += [f"{row[measure][row['prompt']]:.3f}", f"{others[nearest]:.3f} ({nearest})"]
        lines.append(f"| {' | '.join(cells)} | {'obeys' if row['obeys'] else 'DOES NOT OBEY'} |")
    border, shift = data["borders"], data["moved"]
    return "\n".join(
        [
            *lines,
            "",
            f"Borders, worst line / limit: {border['beyond']:.2f} beyond the feather, {border['within']:.2f} within it "
            f"(cross-fade {border['cross_fade']:.2f}). Moved by a tile, a region correlates with itself by "
            + ", ".join(f"{v:.2f} with {k}" for k, v in shift.items())
            + ".",
        ]
    )


if __name__ == "__main__":
    main()

"""All ways to cover one canvas with tiles, side by side: cost, seams, low frequencies, patches.

    python -m bench.modes --model earth --size 2048 --seeds 2 --json bench/results/modes_earth.json

The figures are explained in bench/study.py. Each row is a mean over one image for each prompt and seed. Tiles that move
meet elsewhere in each step: the lines are those of the last step in which they move, and those of the steps with
overlap that come after it.

Ways with an area factor of at most 1.1 are compared with the 25 % ramp on the images that both have: mean difference
and its standard error, less is better (of low: of its distance from 1). The stored results also have the 95 % interval
of low over other native samples, made at commit eb6322d.

Times are for one denoising step of the whole canvas with guidance, without decoding.
"""

import argparse
import json
from functools import partial
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import measure, study
from bench.study import PX, Figures, Key
from tiledcore import Motion, TiledPipeline, TileGrid, TilingConfig
from tiledcore.models import NATIVE, call_defaults
from tiledcore.tiles.families import network_of

PROMPTS = ["topographic map of a rugged coast", "satellite view of desert", "relief map of mountains"]
RAMP = "25 % ramp"
"""What the cheap ways are compared with."""
COLUMNS = {
    "images": "images",
    "area_factor": "area factor",
    "seconds": "s a step",
    "seam_mean": "seam, mean",
    "seam_worst_over_limit": "worst / limit",
    "low_frequency_kept": "low",
    "patches": "patches",
}


def ways(tile: int) -> dict[str, TilingConfig]:
    """The rows of the table."""

    def moving(blend_first: int = 0, blend_last: int = 0, fade: int = 0) -> TilingConfig:
        return TilingConfig(tile=tile, motion=Motion(blend_first, blend_last, fade))

    fade = tile * 3 // 16
    return {
        "no overlap": TilingConfig(tile=tile, overlap=0, window="core"),
        "12 % ramp": TilingConfig(tile=tile, overlap=tile // 8),
        "25 % ramp": TilingConfig(tile=tile, overlap=tile // 4),
        "50 % ramp": TilingConfig(tile=tile, overlap=tile // 2),
        "50 % mean": TilingConfig(tile=tile, overlap=tile // 2, window="mean"),
        "shift": moving(),
        "shift, last 3 blended": moving(blend_last=3),
        "shift, fading": moving(fade=fade),
        "shift, fading, last step blended": moving(blend_last=1, fade=fade),
        "shift, fading, first 2 and last blended": moving(blend_first=2, blend_last=1, fade=fade),
        "canvas, halo 0": TilingConfig(tile=tile, mode="canvas", halo=0),
        "canvas, halo half": TilingConfig(tile=tile, mode="canvas", halo=tile // 2),
        "canvas, halo whole": TilingConfig(tile=tile, mode="canvas", halo=tile),
        # Each tile sees as much as the network was trained on, and no distance that it was not.
        "canvas, native windows": TilingConfig(tile=tile // 4, mode="canvas", halo=tile * 3 // 8),
    }


def period(pipe: Any) -> int:
    """Image pixels of what the network takes for one pixel: see bench/quality.py."""
    network, family = network_of(pipe.pipe)
    return PX * family.patch(network)


def meeting_lines(config: TilingConfig, size: int, steps: int) -> tuple[list[int], list[int]]:
    """The y and the x lines on which tiles meet, in image pixels."""
    grid, motion = config.grid(size // PX, size // PX, NATIVE), config.moving
    if motion:
        parts = TileGrid(grid.height, grid.width, grid.tile_size, wrap=grid.wrap)
        moved = parts.shifted(steps - 1 - motion.blend_last, motion.seed)
        found = [{start for start, _ in axis if start} for axis in (moved.rows, moved.cols)]
        if motion.blend_last:
            found = [starts | set(lines) for starts, lines in zip(found, grid.lines, strict=True)]
    elif config.mode == "canvas" or grid.overlap == (0, 0):
        sides = zip((grid.height, grid.width), grid.tile_size, strict=True)
        found = [set(range(tile, side, tile)) for side, tile in sides]
    else:
        found = [set(lines) for lines in grid.lines]
    y, x = ([PX * line for line in sorted(lines)] for lines in found)
    return y, x


def step_times(
    pipe: Any, chosen: dict[str, TilingConfig], size: int, rounds: int, call: dict[str, Any]
) -> dict[str, float]:
    """Mean seconds of the denoising steps of each way. The ways take turns, and the median round counts."""
    call = call | {"output_type": "latent"}
    runs = {name: partial(study.generate, pipe, PROMPTS[0], size, 0, way, **call) for name, way in chosen.items()}
    found = measure.interleaved(runs, torch.device("cpu"), seconds=1e-3, rounds=rounds)
    return {name: measured.median / call["num_inference_steps"] for name, measured in found.items()}


def against_ramp(way: dict[Key, Figures], ramp: dict[Key, Figures]) -> dict[str, list[float | None]]:
    """Mean difference of a way from the ramp on the images of both, and its standard error (None of one image)."""
    both = [image for image in way if image in ramp]
    result: dict[str, list[float | None]] = {}
    for key in ("seam_mean", "low_frequency_kept", "patches") if both else ():
        ideal = 1 if key == "low_frequency_kept" else 0
        apart = [abs(way[image][key] - ideal) - abs(ramp[image][key] - ideal) for image in both]
        result[key] = [fmean(apart), stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else None]
    return result


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each way that was compared with the ramp."""
    names = {"seam_mean": "seam", "low_frequency_kept": "low", "patches": "patches"}
    lines = []
    for row in (row for row in rows if row.get("against_ramp")):
        found = []
        for key, (mean, error, *interval) in row["against_ramp"].items():
            spread = "" if error is None else f" ± {error:.4f}"
            ends = f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else ""
            found.append(f"{names[key]} {mean:+.4f}{spread}{ends}")
        lines.append(f"- {row['name']}: {', '.join(found)}")
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    return study.table(rows, COLUMNS, {"patches": 4, "images": 0})


def judged(
    pipe: Any, chosen: dict[str, TilingConfig], args: argparse.Namespace, call: dict[str, Any]
) -> tuple[dict[str, dict[Key, Figures]], list[Figures]]:
    """Figures of each image of each way, and the noise floors."""
    found: dict[str, dict[Key, Figures]] = {name: {} for name in chosen}
    floors, work = [], args.work / args.model
    for prompt in args.prompts:
        natives = study.native_samples(pipe, work, prompt, call)
        floors.append(study.noise_floor(natives))
        native = np.concatenate(natives)
        for seed in range(args.seeds):
            for name, config in chosen.items():
                path = work / f"{args.size} {args.tile} {name} {prompt} {seed}.png"
                if args.cached and not path.exists():
                    continue
                make = partial(study.generate, pipe, prompt, args.size, seed, config, output_type="np", **call)
                image = study.kept(path, make)
                lines = meeting_lines(config, args.size, args.steps)
                found[name][prompt, seed] = study.judge(image, native, lines, period(pipe))
                print(name, prompt, seed, {k: round(v, 3) for k, v in found[name][prompt, seed].items()}, flush=True)
    return found, floors


def main() -> None:
    parser = study.parser(__doc__, 8, PROMPTS, "runs/modes")
    parser.add_argument("--model", default="earth", help="earth or earth-flux")
    parser.add_argument("--tile", type=int, default=NATIVE, help="latent pixels")
    parser.add_argument("--rounds", type=int, default=1, help="of timing; 0: keep the times of an earlier --json")
    parser.add_argument("--cached", action="store_true", help="make no image")
    args = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    pipe = TiledPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    call = call_defaults(args.model) | {"num_inference_steps": args.steps}
    chosen = {name: way for name, way in ways(args.tile).items() if name in (args.only or [name])}
    old = json.loads(args.json.read_text()) if not args.rounds and args.json and args.json.exists() else {}
    seconds = {row["name"]: row.get("seconds") for row in old.get("rows", ())}
    if args.rounds:
        seconds = dict(step_times(pipe, chosen, args.size, args.rounds, call))
    found, floors = judged(pipe, chosen, args, call)
    rows: list[dict[str, Any]] = []
    for name, config in chosen.items():
        if images := found[name]:
            area = config.area_factor(config.grid(args.size // PX, args.size // PX, NATIVE), args.steps)
            row = {"name": name, "area_factor": area, "seconds": seconds.get(name), "images": len(images)}
            cheap = against_ramp(images, found.get(RAMP, {})) if area <= 1.1 else None
            rows.append(row | study.mean(images.values()) | {"against_ramp": cheap})
    rows.append({"name": "native samples"} | study.mean(floors))
    print(table(rows), *verdict(rows), sep="\n")
    about = {key: getattr(args, key) for key in ("model", "size", "tile", "prompts", "seeds")} | {"call": call}
    timed_on = {"machine": old["machine"]} if old else {}
    measure.save(args.json, torch.device("cpu"), about=about, rows=rows, **timed_on)


if __name__ == "__main__":
    main()

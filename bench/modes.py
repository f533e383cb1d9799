"""All ways over one canvas, side by side: our own and the other methods. Same weights, prompts, seeds and steps.

    python -m bench.modes --model earth --size 1024 --seeds 2 --json bench/results/modes_earth_1024.json

docs/benchmarks.md says what the columns are. Images are kept in the folder ``--work``: with other weights, give another
one. Seams are looked for on the lines of the last step where tiles move, and for a method whose windows are not placed
on a grid, on those of the plain grid. Below the table each way is compared with the default on the images of both: only
what differs by more than two standard errors counts as better or worse.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import measure
from bench.peers import methods
from bench.peers.methods import Model, counted
from bench.peers.scalediff import scalediff
from bench.quality import Pixels, cut_windows, likeness, low_frequency_power, seam_check
from bench.windows import starts
from tiledcore import TiledPipeline, TileGrid, TilingConfig
from tiledcore.compose.stages import StagePlan, Staging
from tiledcore.models import NATIVE, call_defaults
from tiledcore.models.training.metrics import patch_distance
from tiledcore.tiles.families import network_of

WINDOWS = 128  # cut from each image; with fewer, chance moved the patch distance of an image by up to 0.02
SAMPLES = 32  # native ones, in each of two sets
PX = 8  # image pixels per latent pixel

Figures = dict[str, float]
Key = tuple[str, int]  # prompt and seed of an image

PROMPTS = ["topographic map of a rugged coast", "satellite view of desert", "relief map of mountains"]
DEFAULT = "moving tiles"  # of both embedded models; the others are compared with it
COLUMNS = {
    "images": "images",
    "seconds": "s",
    "work": "work",
    "seam_mean": "seam",
    "seam_worst_over_limit": "worst / limit",
    "low_frequency_kept": "low",
    "patches": "patches",
    "likeness": "alike",
}
DIGITS = {"patches": 4, "images": 0, "seconds": 1}
IDEAL = {"seam_mean": 1.0, "low_frequency_kept": 1.0, "patches": 0.0, "likeness": 0.0}
"""Figures by which ways are compared, and the value that would be best."""


@dataclass(frozen=True)
class Way:
    """A row of the table: one of our tilings, or another method, its windows and how far apart they start."""

    tiling: TilingConfig | None = None
    staged: bool = False
    method: Callable[..., Tensor] | None = None
    stride: int = NATIVE
    window: int = NATIVE


def ways(tile: int = NATIVE) -> dict[str, Way]:
    """The rows of the table. Sizes that a paper gives for another model are kept in proportion to the window."""
    canvas = TilingConfig(tile=tile // 2, mode="canvas", halo=tile // 4)  # a window of native size
    ramp, moving = TilingConfig(tile=tile, overlap=tile // 4), TilingConfig(tile=tile, motion="moving")
    return {
        "tiles, no overlap": Way(TilingConfig(tile=tile, overlap=0, window="core")),
        "25 % ramp": Way(ramp),
        DEFAULT: Way(moving),
        "canvas, native windows": Way(canvas),
        "25 % ramp, staged": Way(ramp, staged=True),
        "moving tiles, staged": Way(moving, staged=True),
        "canvas, native windows, staged": Way(canvas, staged=True),
        "MultiDiffusion, stride 1/2": Way(method=partial(methods.multidiffusion, stride=tile // 2), stride=tile // 2),
        "Mixture of Diffusers": Way(method=methods.mixture_of_diffusers, stride=tile - tile * 3 // 8),
        "SpotDiffusion": Way(method=methods.spotdiffusion),
        "DemoFusion": Way(method=methods.demofusion, stride=tile // 2),
        "ScaleDiff": Way(method=scalediff, stride=tile // 2, window=tile // 2),
    }


def meeting_lines(config: TilingConfig, size: int, steps: int) -> tuple[list[int], list[int]]:
    """The y and the x lines on which tiles meet, in image pixels."""
    grid, motion = config.grid(size // PX, size // PX, NATIVE), config.moving
    found: Sequence[Iterable[int]] = grid.lines
    if motion:
        parts = TileGrid(grid.height, grid.width, grid.tile_size, wrap=grid.wrap)
        moved = parts.shifted(steps - 1 - motion.blend_last, motion.seed).lines
        found = [{*one, *other} for one, other in zip(moved, grid.lines, strict=True)] if motion.blend_last else moved
    elif config.mode == "canvas" or grid.overlap == (0, 0):
        sides = zip((grid.height, grid.width), grid.tile_size, strict=True)
        found = [range(tile, side, tile) for side, tile in sides]
    y, x = ([PX * line for line in sorted(lines)] for lines in found)
    return y, x


def lines_of(way: Way, pipe: Any, size: int, steps: int) -> tuple[list[int], list[int]]:
    """Where the windows of a way meet, in image pixels."""
    if way.tiling is None:
        begins = starts(size // PX, way.window, way.stride)
        met = {PX * line for start in begins for line in (start, start + way.window)} - {0, size}
        return sorted(met), sorted(met)
    if not way.staged:
        return meeting_lines(way.tiling, size, steps)
    plan = StagePlan(pipe, (size, size), Staging(), way.tiling)
    return meeting_lines(plan.tilings()[-1], size, plan.costs(steps)[-1].steps)


def generate(way: Way, pipe: Any, prompt: str, size: int, seed: int, call: dict[str, Any]) -> Pixels:
    """One image ``[size, size, 3]``, 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    if way.method is None:
        own = {"tiling": way.tiling, "stages": "auto" if way.staged else None, "output_type": "np"}
        image: Pixels = pipe(prompt, height=size, width=size, generator=generator, **own, **call).images[0]
        return image
    plain = pipe.pipe
    model = Model(plain, prompt, call["num_inference_steps"], call["guidance_scale"])
    shape = (1, plain.unet.config.in_channels, size // PX, size // PX)
    with torch.inference_mode():
        latents = way.method(model, torch.randn(shape, generator=generator).to(plain.unet.dtype))
        decoded = plain.vae.decode(latents / plain.vae.config.scaling_factor).sample
    return (decoded[0].permute(1, 2, 0).float().numpy() / 2 + 0.5).clip(0, 1)


def made(path: Path, way: Way, pipe: Any, prompt: str, size: int, seed: int, call: dict[str, Any]) -> Pixels:
    """The image at ``path``, 0 to 1. It is made if it is not there, and its cost is stored beside it."""
    if not path.exists():
        network, family = network_of(pipe.pipe)
        begin = time.perf_counter()
        with counted(network, family.patch(network)) as spent:
            image = generate(way, pipe, prompt, size, seed, call)
        branches = 2 * call["num_inference_steps"] * (size // PX) ** 2
        cost = {"seconds": time.perf_counter() - begin, "work": sum(spent) / branches}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(cost))  # first: an image without its cost would stay so
        Image.fromarray((image * 255).round().astype(np.uint8)).save(path.with_suffix(".tmp.png"))
        path.with_suffix(".tmp.png").rename(path)
    return np.asarray(Image.open(path), dtype=np.float32) / 255


def native_samples(pipe: Any, work: Path, prompt: str, call: dict[str, Any]) -> Pixels:
    """``[2 * SAMPLES, side, side, 3]``: images at the model's own size, the two sets one after the other."""
    side, whole = NATIVE * PX, Way(TilingConfig(tile=NATIVE))
    seeds = [first + index for first in (1000, 2000) for index in range(SAMPLES)]
    paths = [work / f"{side} native {prompt} {seed}.png" for seed in seeds]
    images = [made(path, whole, pipe, prompt, side, seed, call) for path, seed in zip(paths, seeds, strict=True)]
    return np.stack(images)


def judge(image: Pixels, native: Pixels, lines: tuple[list[int], list[int]], period: int) -> Figures:
    """The figures of one image. ``lines`` (y, x) are where tiles meet and ``period`` is as in bench/quality.py; px."""
    seams = seam_check(image, *lines, period=period)
    windows = cut_windows(image, native.shape[1], WINDOWS)
    return {
        "seam_mean": seams.mean,
        "seam_worst_over_limit": seams.worst / seams.limit,
        "low_frequency_kept": low_frequency_power(windows) / low_frequency_power(native),
        "patches": patch_distance(windows, native),
        "likeness": likeness(image, native.shape[1]),
    }


def mean(figures: Iterable[Figures]) -> Figures:
    """Means over images; the worst seam is the worst of all."""
    found = list(figures)
    values = {key: [one[key] for one in found] for key in found[0]}
    return {key: max(of) if key == "seam_worst_over_limit" else fmean(of) for key, of in values.items()}


def judged(pipe: Any, chosen: dict[str, Way], args: argparse.Namespace) -> tuple[dict[str, dict[Key, Figures]], Any]:
    """Figures of each image of each way, and the noise floors."""
    network, family = network_of(pipe.pipe)
    period, call = PX * family.patch(network), call_defaults(args.model) | {"num_inference_steps": args.steps}
    found: dict[str, dict[Key, Figures]] = {name: {} for name in chosen}
    floors, work = [], args.work / f"{args.model}, {args.steps} steps, {args.dtype}"
    for prompt in args.prompts:
        native = native_samples(pipe, work, prompt, call)
        one, two = native[:SAMPLES], native[SAMPLES:]
        low = low_frequency_power(two) / low_frequency_power(one)
        floors.append({"low_frequency_kept": low, "patches": patch_distance(two, one)})
        for seed in range(args.seeds):
            for name, way in chosen.items():
                path = work / f"{args.size} {name.replace('/', '-')} {prompt} {seed}.png"
                image = made(path, way, pipe, prompt, args.size, seed, call)
                figures = judge(image, native, lines_of(way, pipe, args.size, args.steps), period)
                found[name][prompt, seed] = figures | json.loads(path.with_suffix(".json").read_text())
                print(name, prompt, seed, {k: round(v, 3) for k, v in found[name][prompt, seed].items()}, flush=True)
    return found, floors


def against(way: dict[Key, Figures], default: dict[Key, Figures]) -> dict[str, list[float | None]]:
    """Mean difference of a way from the default on the images of both, and its standard error (None of one image).

    Less is better: differences are those of the distance from the ideal value.
    """
    both = [image for image in way if image in default]
    result: dict[str, list[float | None]] = {}
    for key, ideal in IDEAL.items() if both else ():
        apart = [abs(way[image][key] - ideal) - abs(default[image][key] - ideal) for image in both]
        error = float(np.std(apart, ddof=1)) / len(apart) ** 0.5 if len(apart) > 1 else None
        result[key] = [fmean(apart), error]
    return result


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each way: in what it is better or worse than the default by more than two standard errors."""
    lines = []
    for row in (row for row in rows if row.get("against")):
        sides: dict[str, list[str]] = {"better": [], "worse": []}
        for key, (mean, error) in row["against"].items():
            if error is not None and abs(mean) > 2 * error:
                sides["worse" if mean > 0 else "better"].append(f"{COLUMNS[key]} ({mean:+.4f} ± {error:.4f})")
        told = [f"{side} in {', '.join(found)}" for side, found in sides.items() if found]
        lines.append(f"- {row['name']}: {'; '.join(told) or 'no difference'}")
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table. Columns that no row has are left out, and missing figures are dashes."""
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]

    def cell(key: str, value: float | None) -> str:
        return "–" if value is None or not np.isfinite(value) else f"{value:.{DIGITS.get(key, 2)}f}"

    cells = ([row["name"], *(cell(key, row.get(key)) for key in shown)] for row in rows)
    return measure.markdown(["way", *(COLUMNS[key] for key in shown)], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="px")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1, help="images of each prompt")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--only", nargs="+", help="names of ways")
    parser.add_argument("--work", type=Path, default=Path("runs/modes"), help="images are kept there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", default="earth", help="earth, or earth-flux, for which there are no other methods")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    every = {name: way for name, way in ways().items() if args.model == "earth" or way.tiling is not None}
    if unknown := set(args.only or []) - every.keys():
        parser.error(f"--only {', '.join(unknown)}: must be of {', '.join(every)}")
    chosen = {name: way for name, way in every.items() if name in (args.only or every)}
    pipe = TiledPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    found, floors = judged(pipe, chosen, args)
    rows: list[dict[str, Any]] = []
    for name, images in found.items():
        row = {"name": name} | mean(images.values()) | {"images": len(images)}
        row["seconds"] = median(figures["seconds"] for figures in images.values())
        rows.append(row | {"against": None if name == DEFAULT else against(images, found.get(DEFAULT, {}))})
    rows.append({"name": "native samples"} | mean(floors))
    print(table(rows), *verdict(rows), sep="\n")
    about = {key: getattr(args, key) for key in ("model", "size", "prompts", "seeds", "steps", "dtype")}
    measure.save(args.json, torch.device("cpu"), about=about, rows=rows)


if __name__ == "__main__":
    main()

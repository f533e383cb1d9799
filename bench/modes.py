"""Every way of covering a canvas with one model, side by side: cost, seams, low frequencies, patches.

    python -m bench.modes --model earth --size 2048 --seeds 2 --json bench/results/modes_earth.json

Images are kept in ``--work`` and not made again, so a run that was stopped goes on where it was; ``--cached`` judges
those that are there. Each row is a mean over its images, one for each prompt and seed, except for the seam check, of
which the worst case is given:

- seam: mean ratio of the lines on which tiles of that way meet, relative to other lines of the same place in a latent
  pixel or patch (1 is an ordinary line), and the worst one over the limit, the 99.9th percentile of all other lines
  (bench/quality.py). Shifted tiles meet elsewhere in each step: the lines are those of the last one, and, where
  steps that are blended come after it, those of both.
- low: power at one to two cycles per native side, in 128 windows of native size at random places, over that of 64
  native samples of the same prompt.
- patches: sliced Wasserstein distance of the same windows to the same samples.

Both are given for one half of the native samples against the other, too: the noise floor. Fewer windows and samples
will not do: with 32 of each, chance moved the distance of single images by up to 0.02.

Ways of an area factor of at most 1.1 are compared with the 25 % ramp on the images that both have: mean difference and
its standard error (none of one image), where less is better for all (of low, the distance from 1). Of low, which is in
units of what few native samples have, also the 95 % interval of the mean over other such samples, drawn from these with
replacement (bootstrap, Efron 1979).

Times are of one denoising step of the whole canvas, guidance included, without decoding; the ways take
turns, and the median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench import timing
from bench.quality import cut_windows, low_frequency_power, seam_check
from tiledcore import TiledPipeline, TileGrid, TilingConfig
from tiledcore.models import call_defaults
from tiledcore.models.architecture import NATIVE
from tiledcore.models.evaluate import patch_distance
from tiledcore.tiles.families import network_of

PROMPTS = ["topographic map of a rugged coast", "satellite view of desert", "relief map of mountains"]
WINDOWS = 128  # cut from each image
SAMPLES = 32  # native ones, in each of two sets
RAMP = "25 % ramp"  # what the cheap ways are compared with
PX = 8  # image pixels per latent pixel

Images = NDArray[np.floating[Any]]


def ways(tile: int) -> dict[str, dict[str, Any]]:
    """Arguments of TilingConfig for each row of the table."""
    fade = tile * 3 // 16
    return {
        "no overlap": {"overlap": 0, "window": "core"},
        "12 % ramp": {"overlap": tile // 8},
        "25 % ramp": {"overlap": tile // 4},
        "50 % ramp": {"overlap": tile // 2},
        "50 % mean": {"overlap": tile // 2, "window": "mean"},
        "no overlap + halo half": {"halo": tile // 2},
        "shift": {"shift": True},
        "shift + halo half": {"shift": True, "halo": tile // 2},
        "shift, last 3 blended": {"shift": True, "blend_steps": 3},
        "shift, fading": {"shift": True, "fade": fade},
        "shift, fading, last step blended": {"shift": True, "fade": fade, "blend_steps": 1},
        "shift, fading, first 2 and last blended": {"shift": True, "fade": fade, "blend_first": 2, "blend_steps": 1},
        "canvas, halo 0": {"mode": "canvas", "halo": 0},
        "canvas, halo half": {"mode": "canvas", "halo": tile // 2},
        "canvas, halo whole": {"mode": "canvas", "halo": tile},
        # Each tile sees as much as the network was trained on, and no distance that it was not.
        "canvas, native windows": {"mode": "canvas", "tile": tile // 4, "halo": tile * 3 // 8},
    }


def period(pipe: Any) -> int:
    """Image pixels of what the network takes for one pixel: see bench/quality.py."""
    network, family = network_of(pipe.pipe)
    return PX * family.patch(network)


def run(pipe: Any, prompt: str, size: int, seed: int, tiling: TilingConfig, **call: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, height=size, width=size, generator=generator, tiling=tiling, **call).images


def kept(path: Path, make: Any) -> Images:
    """The image(s) stored at ``path``, made first if they are not there; 0..1."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.concatenate(make())
        Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path.with_suffix(".tmp.png"))
        path.with_suffix(".tmp.png").rename(path)
    return np.asarray(Image.open(path), dtype=np.float32) / 255


def native_samples(pipe: Any, work: Path, prompt: str, first: int, call: dict[str, Any]) -> Images:
    side = NATIVE * PX
    whole = TilingConfig(tile=NATIVE)

    def make() -> list[Images]:
        seeds = range(first, first + SAMPLES)
        return [run(pipe, prompt, side, seed, whole, output_type="np", **call)[0] for seed in seeds]

    return kept(work / f"native {prompt} {first}.png", make).reshape(SAMPLES, side, side, 3)


def other_samples(native: Images, draws: int = 2000) -> NDArray[np.float64]:
    """``[draws]``: what "low" is to be multiplied by, had the native samples been others like them."""
    powers = np.array([low_frequency_power(sample[None]) for sample in native])
    means = np.random.default_rng(0).choice(powers, (draws, len(powers))).mean(1)
    factors: NDArray[np.float64] = powers.mean() / means
    return factors


def meeting_lines(pipe: Any, config: TilingConfig, size: int, steps: int) -> list[list[int]]:
    """The y and the x lines on which tiles meet, in image pixels; where they move, in the last step in which they do,
    and in those that are blended after it."""
    grid = config.grid(size // PX, size // PX, NATIVE)
    if config.mode == "tiles" and grid.overlap != (0, 0) and not config.shift:
        return [[PX * line for line in axis] for axis in grid.lines]
    if config.shift:
        parts = TileGrid(grid.height, grid.width, grid.tile_size, wrap=grid.wrap)
        moved = parts.shifted(steps - 1 - config.blend_steps, config.seed)
        found = [{start for start, _ in axis if start} for axis in (moved.rows, moved.cols)]
    else:
        sides = zip((grid.height, grid.width), grid.tile_size, strict=True)
        found = [set(range(tile, size, tile)) for size, tile in sides]
    if config.blend_steps:
        found = [starts | set(lines) for starts, lines in zip(found, grid.lines, strict=True)]
    return [[PX * line for line in sorted(axis)] for axis in found]


def judge(image: Images, native: Images, lines: list[list[int]], grid: int) -> dict[str, float]:
    seams = seam_check(image, lines[0], lines[1], period=grid)
    windows = cut_windows(image, native.shape[1], WINDOWS)
    return {
        "seam_mean": seams.mean,
        "seam_worst_over_limit": seams.worst / seams.limit,
        "low_frequency_kept": low_frequency_power(windows) / low_frequency_power(native),
        "patches": patch_distance(windows, native),
    }


def step_times(
    pipe: Any, names: dict[str, TilingConfig], size: int, rounds: int, call: dict[str, Any]
) -> dict[str, float]:
    """Median seconds of one denoising step for each way; they take turns. Of a way whose last steps differ, the mean
    over all steps, each kind timed by itself."""
    steps = call["num_inference_steps"]
    call = call | {"num_inference_steps": 1, "output_type": "latent"}
    kinds = {config for way in names.values() for config in step_kinds(way, steps)}
    seconds: dict[TilingConfig, list[float]] = {config: [] for config in kinds}
    for _ in range(rounds):
        for config, values in seconds.items():
            start = time.perf_counter()
            run(pipe, PROMPTS[0], size, 0, config, **call)
            values.append(time.perf_counter() - start)
    middle = {config: statistics.median(values) for config, values in seconds.items()}
    return {
        name: sum(share * middle[config] for config, share in step_kinds(way, steps).items())
        for name, way in names.items()
    }


def step_kinds(config: TilingConfig, steps: int) -> dict[TilingConfig, float]:
    """The kinds of steps of a way, each as one that takes it for its only step, and their shares."""
    if not config.blended_steps:
        return {config: 1.0}
    blended = config.blended_steps / steps
    overlapping = replace(config, blend_first=0, blend_steps=1, fade=0, halo=None)
    return {replace(overlapping, blend_steps=0, overlap=None, halo=config.halo): 1 - blended, overlapping: blended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="earth", help="earth or earth-flux")
    parser.add_argument("--size", type=int, default=2048, help="px")
    parser.add_argument("--tile", type=int, default=NATIVE, help="latent pixels")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--seeds", type=int, default=1, help="images of each prompt")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="+", help="names of ways")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing; 0 leaves it out")
    parser.add_argument("--work", type=Path, default=Path("runs/modes"))
    parser.add_argument("--cached", action="store_true", help="make no image; times of an earlier --json are kept")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    pipe = TiledPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    call = call_defaults(args.model) | {"num_inference_steps": args.steps}
    work = args.work / args.model
    chosen = {
        n: TilingConfig(**({"tile": args.tile} | a)) for n, a in ways(args.tile).items() if n in (args.only or [n])
    }
    seconds = step_times(pipe, chosen, args.size, args.rounds, call) if args.rounds else earlier_times(args.json)
    found: dict[str, dict[tuple[str, int], dict[str, float]]] = {name: {} for name in chosen}
    floor, others = [], {}
    for prompt in args.prompts:
        native, other = (native_samples(pipe, work, prompt, first, call) for first in (1000, 2000))
        floor.append({"patches": patch_distance(other, native)})
        floor[-1]["low_frequency_kept"] = low_frequency_power(other) / low_frequency_power(native)
        native = np.concatenate([native, other])
        others[prompt] = other_samples(native)
        for seed in range(args.seeds):
            for name, config in chosen.items():
                path = work / f"{args.size} {args.tile} {name} {prompt} {seed}.png"
                if args.cached and not path.exists():
                    continue
                image = kept(
                    path, lambda c=config, p=prompt, s=seed: run(pipe, p, args.size, s, c, output_type="np", **call)
                )
                lines = meeting_lines(pipe, config, args.size, args.steps)
                found[name][prompt, seed] = judge(image, native, lines, period(pipe))
                print(name, prompt, seed, {k: round(v, 3) for k, v in found[name][prompt, seed].items()}, flush=True)
    rows = []
    for name, config in chosen.items():
        if not (images := list(found[name].values())):
            continue
        row = {k: float(np.mean([f[k] for f in images])) for k in images[0]}
        row["seam_worst_over_limit"] = max(f["seam_worst_over_limit"] for f in images)
        area = config.area_factor(config.grid(args.size // PX, args.size // PX, NATIVE), args.steps)
        about = {"name": name, "area_factor": area, "seconds": seconds.get(name), "images": len(images)}
        cheap = against_ramp(found[name], found.get(RAMP, {}), others) if area <= 1.1 else None
        rows.append(about | row | {"against_ramp": cheap})
    rows.append({"name": "native samples"} | {k: float(np.mean([f[k] for f in floor])) for k in floor[0]})
    print(table(rows))
    print("\n".join(verdict(rows)))
    if args.json:
        about = {
            "model": args.model,
            "size": args.size,
            "tile": args.tile,
            "prompts": args.prompts,
            "seeds": args.seeds,
            "call": call,
        }
        machine = timing.machine(torch.device("cpu"))
        if not args.rounds and args.json.exists():  # whose times these are
            machine = json.loads(args.json.read_text())["machine"]
        args.json.write_text(json.dumps({"machine": machine, "about": about, "rows": rows}, indent=1) + "\n")


def earlier_times(path: Path | None) -> dict[str, float]:
    """Seconds of a step of each way in the results that are to be replaced."""
    if path is None or not path.exists():
        return {}
    return {row["name"]: row["seconds"] for row in json.loads(path.read_text())["rows"] if row.get("seconds")}


def against_ramp(
    way: dict[tuple[str, int], dict[str, float]],
    ramp: dict[tuple[str, int], dict[str, float]],
    others: dict[str, NDArray[np.float64]],
) -> dict[str, list[float | None]]:
    """By how much a way is above the ramp on the images that both have, and the standard error of that; of low also the
    ends of the interval with ``others`` for the native samples of each prompt."""
    result: dict[str, list[float | None]] = {}
    for key in ("seam_mean", "low_frequency_kept", "patches"):
        cost = (lambda v: abs(v - 1)) if key == "low_frequency_kept" else float
        apart = [cost(way[image][key]) - cost(ramp[image][key]) for image in way if image in ramp]
        if apart:
            error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else None
            result[key] = [statistics.fmean(apart), error]
    both = [image for image in way if image in ramp]
    if both:
        low = [[v["low_frequency_kept"] for v in (way[image], ramp[image])] for image in both]
        drawn = [abs(w * others[p] - 1) - abs(r * others[p] - 1) for (p, _), (w, r) in zip(both, low, strict=True)]
        result["low_frequency_kept"] += np.percentile(np.mean(drawn, 0), (2.5, 97.5)).tolist()
    return result


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    names = {"seam_mean": "seam", "low_frequency_kept": "low", "patches": "patches"}
    lines = []
    for row in rows:
        if row.get("against_ramp"):
            found = [
                f"{names[k]} {mean:+.4f}"
                + (f" ± {error:.4f}" if error is not None else "")
                + (f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else "")
                for k, (mean, error, *interval) in row["against_ramp"].items()
            ]
            lines.append(f"- {row['name']}: {', '.join(found)}")
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "images": "images",
        "area_factor": "area factor",
        "seconds": "s a step",
        "seam_mean": "seam, mean",
        "seam_worst_over_limit": "worst / limit",
        "low_frequency_kept": "low",
        "patches": "patches",
    }
    digits = {"patches": 4, "images": 0}
    lines = ["| way | " + " | ".join(columns.values()) + " |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        cells = ["–" if row.get(column) is None else f"{row[column]:.{digits.get(column, 2)}f}" for column in columns]
        lines.append(" | ".join([f"| {row['name']}", *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

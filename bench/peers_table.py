"""tiledcore and its peers side by side: same weights, noise, prompt, steps and output size.

    python -m bench.peers_table --size 1024 --steps 8 --json bench/results/peers_earth.json

Every result is kept in ``--work`` (image, seconds, memory), so a run that was stopped goes on where it was. One step of
all ways at 1024² costs as much as about 80 of the plain grid do; the stride of an eighth alone costs 39.

- s: of denoising, text encoding included, without decoding; one run, so trust nothing below some per cent of it.
- area: latent pixels given to the network over canvas pixels, steps and guidance branches; counted, not calculated.
- calls: forwards of the network; windows go in batches of 4, but for diffusers' panorama, which is run as it ships.
- MB: growth of the resident set (CUDA: of what is allocated) at its peak over what it was before, denoising alone.
- seam: mean seam ratio (bench/quality.py) of the lines on which the method's own windows start and end, and of the
  plain grid's for what has none that stay, over that of all other lines between two latent pixels; 1 is ideal. Such
  lines stand out in any image of this decoder, so they are compared with their like. Worst: the largest ratio of a
  line over the 99.9th percentile of the others. Tone: tone step on the plain grid's lines over that elsewhere.
- low, patches: power at low frequencies over that of native samples, and sliced Wasserstein distance to them, both as
  bench/modes.py has them.
- repeat: largest normalised cross-correlation between distant tiles (bench/repetition.py). PSNR: against the
  dense whole canvas, in dB.

A peer is beaten by a way that is faster and at least as good in seam and patches, where as good is within 5 %: one
seed tells no more. Seam to repeat are means over prompts and seeds, but for the worst line. All images are decoded
whole, by one decoder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import timing
from bench.modes import PX, WINDOWS, Images, kept, native_samples
from bench.peers import methods
from bench.peers.model import Model, counted, starts
from bench.quality import cut_windows, low_frequency_power, psnr, seam_check, tone_step
from bench.repetition import repetition
from tiledcore import TiledPipeline, TilingConfig
from tiledcore.models import call_defaults
from tiledcore.models.evaluate import patch_distance

Denoise = Callable[[Any, Tensor, str, dict[str, Any]], Tensor]
EQUAL = 1.05
"""Seam ratios and patch distances that differ by less count as equal."""
COLUMNS = {
    "seconds": "s",
    "area_factor": "area",
    "evaluations": "calls",
    "peak_megabytes": "MB",
    "seam_mean": "seam",
    "seam_worst_over_limit": "worst / limit",
    "tone": "tone",
    "low_frequency_kept": "low",
    "patches": "patches",
    "repetition": "repeat",
    "psnr_to_whole": "PSNR",
}


def tiledcore_ways(tile: int) -> dict[str, TilingConfig]:
    return {
        "tiledcore, 25 % ramp": TilingConfig(tile=tile, overlap=tile // 4),
        "tiledcore, 12 % ramp": TilingConfig(tile=tile),
        "tiledcore, shift": TilingConfig(tile=tile, shift=True),
        "tiledcore, default": TilingConfig(tile=tile, shift=True, blend_first=2, blend_steps=1, fade=tile * 3 // 16),
        "tiledcore, canvas, halo half": TilingConfig(tile=tile, mode="canvas"),
    }


def peer(method: Callable[..., Tensor], **options: Any) -> Denoise:
    def run(pipe: Any, noise: Tensor, prompt: str, call: dict[str, Any]) -> Tensor:
        model = Model(pipe, prompt, call["num_inference_steps"], call["guidance_scale"])
        if method is methods.panorama:
            return method(model, noise, prompt)
        return method(model, noise, **options)

    return run


def ours(config: TilingConfig) -> Denoise:
    def run(pipe: Any, noise: Tensor, prompt: str, call: dict[str, Any]) -> Tensor:
        px: dict[str, Any] = {"height": PX * noise.shape[2], "width": PX * noise.shape[3]}
        result: Tensor = TiledPipeline.from_pipe(pipe, tiling=config)(
            prompt, latents=noise, output_type="latent", **px, **call
        ).images
        return result

    return run


def ways(tile: int) -> dict[str, tuple[Denoise, int]]:
    """Name -> what denoises, and how far apart its windows start; 0 for ours, whose configuration tells."""
    peers: dict[str, tuple[Denoise, int]] = {
        "dense whole canvas": (peer(methods.dense), tile),
        "MultiDiffusion, stride 1/8": (peer(methods.multidiffusion), tile // 8),
        "MultiDiffusion, stride 1/2": (peer(methods.multidiffusion, stride=tile // 2), tile // 2),
        "Mixture of Diffusers": (peer(methods.mixture_of_diffusers), tile - tile * 3 // 8),
        "SpotDiffusion": (peer(methods.spotdiffusion), tile),
        "DemoFusion": (peer(methods.demofusion), tile // 2),
        "diffusers' panorama as it ships": (peer(methods.panorama), 8),
    }
    return {name: (ours(config), 0) for name, config in tiledcore_ways(tile).items()} | peers


def lines(name: str, stride: int, side: int, tile: int) -> list[int]:
    """Latent lines along one axis on which windows start or end."""
    if not stride:
        config = tiledcore_ways(tile)[name]
        if not config.shift:
            return list(config.grid(side, side, tile).lines[0])
        stride = tile
    window = 64 if name.startswith("diffusers") else tile
    at = starts(side, window, stride)
    found = {line for start in at for line in (start, start + window)} - {0, side}
    return sorted(found) or list(range(tile, side, tile))  # one window: the plain grid's


def make(
    pipe: Any, denoise: Denoise, size: int, prompt: str, seed: int, call: dict[str, Any]
) -> tuple[Images, dict[str, float]]:
    """One image ``[size, size, 3]`` in 0..1, and what it cost."""
    side, device = size // PX, pipe._execution_device
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=generator).to(device, pipe.unet.dtype)
    latents, seconds = noise, 0.0

    def run() -> None:
        nonlocal latents, seconds
        begin = time.perf_counter()
        latents = denoise(pipe, noise, prompt, call)
        if latents.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin

    with torch.inference_mode():
        with counted(pipe) as spent:
            memory = timing.peak_growth(run, torch.device(device))
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    image = (decoded[0].permute(1, 2, 0).float().cpu().numpy() / 2 + 0.5).clip(0, 1)
    area = spent.pixels / (2 * call["num_inference_steps"] * side * side)
    cost = {"seconds": seconds, "area_factor": area, "evaluations": spent.evaluations, "peak_megabytes": memory / 1e6}
    return image, cost


def made(path: Path, run: Callable[[], tuple[Images, dict[str, float]]]) -> tuple[Images, dict[str, float]]:
    """The image and its cost stored at ``path``; made first if they are not there."""

    def image() -> list[Images]:
        pixels, cost = run()
        path.with_suffix(".json").write_text(json.dumps(cost))  # first: an image without its cost would stay so
        return [pixels]

    pixels = kept(path, image)
    return pixels, json.loads(path.with_suffix(".json").read_text())


def judge(image: Images, whole: Images, native: Images, at: list[int], tile: int) -> dict[str, float]:
    """All columns that are about the image."""
    plain = list(range(PX * tile, image.shape[0], PX * tile))
    windows, on = cut_windows(image, native.shape[1], WINDOWS), [PX * line for line in at]
    seams = seam_check(image, on, on, period=PX)
    return {
        "seam_mean": seams.mean,
        "seam_worst_over_limit": seams.worst / seams.limit,
        "tone": tone_step(image, plain, plain).ratio,
        "low_frequency_kept": low_frequency_power(windows) / low_frequency_power(native),
        "patches": patch_distance(windows, native),
        "repetition": repetition(image, PX * tile),
        "psnr_to_whole": psnr(image, whole),
    }


def table(rows: list[dict[str, Any]]) -> str:
    text = ["| way | " + " | ".join(COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in rows:
        cells = []
        for column in COLUMNS:
            value = row.get(column)
            digits = {"patches": 4, "evaluations": 0, "peak_megabytes": 0, "seconds": 1, "psnr_to_whole": 1}
            plain = value is None or not np.isfinite(value)
            cells.append("–" if plain else f"{value:.{digits.get(column, 2)}f}")
        text.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """For every tiled peer, the fastest way of ours that is at least as good in seams and patches, or that none is."""
    mine = [row for row in rows if row["name"].startswith("tiledcore")]
    text = []
    for row in rows:
        if row in mine or "seconds" not in row or row["name"].startswith("dense"):
            continue
        good = [m for m in mine if all(m[key] <= EQUAL * row[key] for key in ("seam_mean", "patches"))]
        ahead = [m for m in good if m["seconds"] < row["seconds"]]
        best = min(ahead or good or mine, key=lambda m: m["seconds"])
        ratio = f"{row['seconds'] / best['seconds']:.1f}×"
        if ahead:
            text.append(f"{row['name']}: {best['name']} is {ratio} as fast, at equal or better seam ratio and patches")
        elif good:
            text.append(f"{row['name']}: NOT ahead: as good, but slower ({ratio} as fast, {best['name']})")
        else:
            least = [min(m[key] for m in mine) for key in ("seam_mean", "patches")]
            text.append(
                f"{row['name']}: NOT ahead: no way of ours is as good in both its seam ratio, {row['seam_mean']:.2f}, "
                f"and its patch distance, {row['patches']:.4f}; "
                f"the best of ours in each are {least[0]:.2f}, {least[1]:.4f}"
            )
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="px, a multiple of 256")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1, help="images of each prompt")
    parser.add_argument("--prompts", nargs="+", default=["relief map of a rugged coast"])
    parser.add_argument("--only", nargs="+", help="names of ways")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    Image.MAX_IMAGE_PIXELS = None
    pipe = TiledPipeline.from_pretrained("earth").pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    tile = pipe.unet.config.sample_size
    if args.size % (PX * tile):
        parser.error(f"--size {args.size}: must be a multiple of {PX * tile}")
    call = call_defaults("earth") | {"num_inference_steps": args.steps}
    work, chosen = args.work / f"earth {args.device} {args.steps} steps", ways(tile)
    if unknown := set(args.only or []) - chosen.keys():
        parser.error(f"--only {', '.join(unknown)}: must be of {', '.join(chosen)}")
    chosen = {n: way for n, way in chosen.items() if n in (args.only or [n])}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    floor: list[dict[str, float]] = []
    native_pipe = TiledPipeline.from_pipe(pipe)
    for prompt in args.prompts:
        native, other = (native_samples(native_pipe, work, prompt, first, call) for first in (1000, 2000))
        low = low_frequency_power(other) / low_frequency_power(native)
        floor.append({"patches": patch_distance(other, native), "low_frequency_kept": low})
        native = np.concatenate([native, other])
        for seed in range(args.seeds):
            about = f"{args.size} {prompt} {seed}.png"
            dense = partial(make, pipe, peer(methods.dense), args.size, prompt, seed, call)
            whole, _ = made(work / f"dense whole canvas {about}", dense)
            for name, (denoise, stride) in chosen.items():
                run = partial(make, pipe, denoise, args.size, prompt, seed, call)
                image, cost = made(work / f"{name.replace('/', '-')} {about}", run)
                at = lines(name, stride, args.size // PX, tile)
                found[name].append(cost | judge(image, whole, native, at, tile))
                print(name, prompt, seed, {k: round(v, 3) for k, v in found[name][-1].items()}, flush=True)
    rows: list[dict[str, Any]] = []
    for name, each in found.items():
        row = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        worst = max(one["seam_worst_over_limit"] for one in each)
        rows.append({"name": name} | row | {"seam_worst_over_limit": worst})
    rows.append({"name": "native samples"} | {k: float(np.mean([one[k] for one in floor])) for k in floor[0]})
    print(table(rows), *verdict(rows), sep="\n")
    if args.json:
        about_run = {"size": args.size, "tile": tile, "prompts": args.prompts, "seeds": args.seeds, "call": call}
        machine = timing.machine(torch.device(args.device))
        data = {"machine": machine, "about": about_run, "rows": rows, "verdict": verdict(rows)}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

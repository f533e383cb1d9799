"""tiledcore and other methods side by side: same weights, noise, prompt, steps and output size.

    python -m bench.peers_table --size 1024 --steps 8 --json bench/results/peers_earth.json

Images and costs are kept in ``--work``. One step of all ways at 1024² costs as much as about 80 of the plain grid; the
stride of an eighth alone costs 39.

- s: of denoising, text encoding included, without decoding; one run, so differences of some per cent mean nothing.
- area: latent pixels given to the network, over canvas pixels, steps and guidance branches; counted while running.
- calls: of the network. Windows go in batches of 4, except for diffusers' panorama, which runs as it ships.
- MB: growth of the resident set (CUDA: of what is allocated) at its peak while denoising.
- seam, worst / limit, low, patches: as in bench/study.py. The lines are those on which the method's own windows start
  and end, or the plain grid's if it has none that stay. All images are decoded as a whole by one decoder, so lines are
  compared with lines between latent pixels.
- tone: tone step on the plain grid's lines over that elsewhere; alike: likeness of distant tiles (bench/quality.py).

A method is beaten by a way that is faster and at least as good in seam and patches. Up to 5 % apart counts as equal:
one seed tells no more. Figures are means over prompts and seeds, except for the worst line.
"""

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

from bench import measure, study
from bench.peers import methods
from bench.peers.model import Model, counted, starts
from bench.quality import Pixels, likeness, tone_step
from bench.study import PX, Figures
from tiledcore import Motion, TiledPipeline, TilingConfig
from tiledcore.models import call_defaults

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
    "likeness": "alike",
}
DIGITS = {"patches": 4, "evaluations": 0, "peak_megabytes": 0, "seconds": 1}


def tiledcore_ways(tile: int) -> dict[str, TilingConfig]:
    return {
        "tiledcore, 25 % ramp": TilingConfig(tile=tile, overlap=tile // 4),
        "tiledcore, 12 % ramp": TilingConfig(tile=tile),
        "tiledcore, shift": TilingConfig(tile=tile, motion=Motion(0, 0, 0)),
        "tiledcore, default": TilingConfig(tile=tile, motion="moving"),
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
        if not config.moving:
            return list(config.grid(side, side, tile).lines[0])
        stride = tile
    window = 64 if name.startswith("diffusers") else tile
    at = starts(side, window, stride)
    found = {line for start in at for line in (start, start + window)} - {0, side}
    return sorted(found) or list(range(tile, side, tile))  # one window: the plain grid's


def make(
    pipe: Any, denoise: Denoise, size: int, prompt: str, seed: int, call: dict[str, Any]
) -> tuple[Pixels, Figures]:
    """One image ``[size, size, 3]``, 0 to 1, and what it cost."""
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
            memory = measure.peak_growth(run, torch.device(device))
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    image = (decoded[0].permute(1, 2, 0).float().cpu().numpy() / 2 + 0.5).clip(0, 1)
    area = spent.pixels / (2 * call["num_inference_steps"] * side * side)
    cost = {"seconds": seconds, "area_factor": area, "evaluations": spent.evaluations, "peak_megabytes": memory / 1e6}
    return image, cost


def made(path: Path, run: Callable[[], tuple[Pixels, Figures]]) -> tuple[Pixels, Figures]:
    """The image stored at ``path`` and its cost, stored beside it. Both are made first if they are not there."""
    costs = path.with_suffix(".json")

    def image() -> list[Pixels]:
        pixels, cost = run()
        costs.parent.mkdir(parents=True, exist_ok=True)
        costs.write_text(json.dumps(cost))  # before the image: an image without its cost would stay so
        return [pixels]

    pixels = study.kept(path, image)
    return pixels, json.loads(costs.read_text())


def judge(image: Pixels, native: Pixels, at: list[int], tile: int) -> Figures:
    """All figures of an image. ``at`` has the method's own lines and ``tile`` the grid's, in latent pixels."""
    on, plain = [PX * line for line in at], list(range(PX * tile, image.shape[0], PX * tile))
    more = {"tone": tone_step(image, plain, plain), "likeness": likeness(image, PX * tile)}
    return study.judge(image, native, (on, on), PX) | more


def table(rows: list[dict[str, Any]]) -> str:
    return study.table(rows, COLUMNS, DIGITS)


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each tiled method: by which way of ours it is beaten, or that it is not."""
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


def judged(
    pipe: Any, chosen: dict[str, tuple[Denoise, int]], args: argparse.Namespace, tile: int, call: dict[str, Any]
) -> tuple[dict[str, list[Figures]], list[Figures]]:
    """Figures of each image of each way, and the noise floors."""
    work, tiled = args.work / f"earth {args.device} {args.steps} steps", TiledPipeline.from_pipe(pipe)
    found: dict[str, list[Figures]] = {name: [] for name in chosen}
    floors = []
    for prompt in args.prompts:
        natives = study.native_samples(tiled, work, prompt, call)
        floors.append(study.noise_floor(natives))
        native = np.concatenate(natives)
        for seed in range(args.seeds):
            about = f"{args.size} {prompt} {seed}.png"
            for name, (denoise, stride) in chosen.items():
                run = partial(make, pipe, denoise, args.size, prompt, seed, call)
                image, cost = made(work / f"{name.replace('/', '-')} {about}", run)
                at = lines(name, stride, args.size // PX, tile)
                found[name].append(cost | judge(image, native, at, tile))
                print(name, prompt, seed, {k: round(v, 3) for k, v in found[name][-1].items()}, flush=True)
    return found, floors


def main(argv: list[str] | None = None) -> None:
    parser = study.parser(__doc__, 8, ["relief map of a rugged coast"], "runs/peers")
    parser.set_defaults(size=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    Image.MAX_IMAGE_PIXELS = None
    pipe = TiledPipeline.from_pretrained("earth").pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    tile = pipe.unet.config.sample_size
    if args.size % (PX * tile):
        parser.error(f"--size {args.size}: must be a multiple of {PX * tile}")
    call, every = call_defaults("earth") | {"num_inference_steps": args.steps}, ways(tile)
    if unknown := set(args.only or []) - every.keys():
        parser.error(f"--only {', '.join(unknown)}: must be of {', '.join(every)}")
    chosen = {name: way for name, way in every.items() if name in (args.only or every)}
    found, floors = judged(pipe, chosen, args, tile, call)
    rows: list[dict[str, Any]] = [{"name": name} | study.mean(figures) for name, figures in found.items()]
    rows.append({"name": "native samples"} | study.mean(floors))
    print(table(rows), *verdict(rows), sep="\n")
    about = {"size": args.size, "tile": tile, "prompts": args.prompts, "seeds": args.seeds, "call": call}
    measure.save(args.json, torch.device(args.device), about=about, rows=rows, verdict=verdict(rows))


if __name__ == "__main__":
    main()

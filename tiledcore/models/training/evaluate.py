"""Measure an embedded model against real crops of the held-out longitudes, and draw sheets of its samples.

``python -P -m tiledcore.models.training.evaluate --json bench/results/earth.json`` generates one image of native size
for the caption of each of ``--count`` held-out crops with the plain diffusers pipeline. It prints

- distances of spectrum, colour and patches to these crops, per style, for the samples and for the autoencoder's
  reconstructions, with two floors: other held-out crops, and training crops that have the same captions. A model knows
  the held-out area by captions only, so the second is as near as it can come;
- the same distances to training crops with the same captions, with another disjoint set of these as the floor;
- how often a small network tells samples from real crops (0.5 is perfect);
- how well what is seen in the samples goes with what was asked for, read by a network that learned on real crops.

``--sheet`` draws samples for fixed captions; ``--nearest`` draws samples beside their nearest training crops.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from . import data, judges
from .common import MODELS, WORK
from .metrics import Images, colour_distance, patch_distance, psnr, spectrum_distance

CONTENTS = ("a rugged coast", "islands in the ocean", "desert", "forest", "mountains", "ice", "continents and oceans")
SHEET = [f"{style} of {c}" for style in ("satellite view", "relief map", "topographic map") for c in CONTENTS]
METRICS = {"spectrum": spectrum_distance, "colour": colour_distance, "patches": patch_distance}


def open_pipeline(folder: Path) -> Any:
    """The model's own pipeline; FLUX may lack an autoencoder and then takes the UNet's."""
    extra: dict[str, Any] = {}
    if not (folder / "vae").exists():
        extra["vae"] = diffusers.AutoencoderKL.from_pretrained(MODELS / "earth" / "vae")
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(pipe: Any, count: int, steps: int, guidance: float) -> dict[str, Any]:
    """What the model was made for: true guidance, and for FLUX 24 text tokens."""
    if hasattr(pipe, "transformer"):
        negative = {"negative_prompt": [""] * count, "max_sequence_length": 24}
        return {"num_inference_steps": steps, "true_cfg_scale": guidance, **negative}
    return {"num_inference_steps": steps, "guidance_scale": guidance}


def generate(pipe: Any, prompts: list[str], steps: int, guidance: float, seed: int, size: int = 256) -> Images:
    """One image for each prompt, ``float [N, size, size, 3]`` in 0..1, in batches of 4."""
    out = []
    for i in range(0, len(prompts), 4):
        batch = prompts[i : i + 4]
        generators = [torch.Generator().manual_seed(seed + i + k) for k in range(len(batch))]
        with torch.autocast("cpu", torch.bfloat16):
            call = call_arguments(pipe, len(batch), steps, guidance)
            made = pipe(batch, height=size, width=size, generator=generators, output_type="latent", **call).images
            if made.ndim == 3:
                made = pipe._unpack_latents(made, size, size, pipe.vae_scale_factor)
            out.append(decode(pipe.vae, made.float()))
    return np.concatenate(out)


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor) -> Images:
    """Latents of unit variance to images in 0..1."""
    y = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    return ((y.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def rebuild(vae: Any, images: Images) -> Images:
    """The autoencoder's reconstructions."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        y = [vae.decode(vae.encode(part).latent_dist.mean).sample.float() for part in x.split(4)]
    return ((torch.cat(y).clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()


def distances(images: Images, real: Images) -> dict[str, float]:
    return {name: round(metric(images, real), 4) for name, metric in METRICS.items()}


def per_style(images: Images, real: Images, style: np.ndarray[Any, Any]) -> dict[str, dict[str, float]]:
    """Distances for all images together and for each style alone."""
    result = {"all": distances(images, real)}
    for k, name in enumerate(data.STYLES):
        result[name] = distances(images[style == k], real[style == k])
    return result


def draw_sheet(images: Images, captions: list[str], columns: int = 7) -> Image.Image:
    n, size = len(images), images.shape[1]
    sheet = Image.new("RGB", (columns * (size + 4), -(-n // columns) * (size + 18)), "white")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (size + 4), i // columns * (size + 18)
        sheet.paste(Image.fromarray((image * 255).round().astype(np.uint8)), (x, y))
        ImageDraw.Draw(sheet).text((x + 2, y + size + 2), caption, fill="black")
    return sheet


def nearest(images: Images, rasters: data.Rasters, count: int = 4000, seed: int = 5) -> Images:
    """For each image the nearest of ``count`` training crops, by colour at 16x16 px."""
    rng = np.random.default_rng(seed)
    crops = np.stack([data.random_crop(rasters, images.shape[1], rng).image for _ in range(count)])  # bytes: 0.8 GB

    def small(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        step = x.shape[1] // 16
        return x.reshape(len(x), 16, step, 16, step, 3).mean((2, 4)).reshape(len(x), -1)

    near = ((small(images)[:, None] - small(crops)[None] / 255) ** 2).mean(-1).argmin(1)
    return crops[near] / 255


def balanced_crops(rasters: data.Rasters, count: int, seed: int) -> list[data.Crop]:
    """Held-out crops of native size, as many of each style."""
    rng, crops, want = np.random.default_rng(seed), [], -(-count // len(data.STYLES))
    room = dict.fromkeys(data.STYLES, want)
    while any(room.values()):
        crop = data.random_crop(rasters, 256, rng, held_out=True)
        if room[crop.style]:
            room[crop.style] -= 1
            crops.append(crop)
    return crops


def same_captions(rasters: data.Rasters, styles: list[str], prompts: list[str], seed: int) -> list[Images]:
    """Two disjoint sets of training crops. Each has one crop for each prompt, with that prompt's style and words."""
    rng = np.random.default_rng(seed)
    wanted = [(style, text.split(" of ", 1)[1]) for style, text in zip(styles, prompts, strict=True)]
    missing, found = Counter(wanted * 2), dict[tuple[str, str], list[Any]]()
    while missing.total():
        crop = data.random_crop(rasters, 256, rng)
        key = crop.style, data.content(crop.fractions.mean((1, 2)) / 255, crop.scale, rng)
        if missing[key] > 0:
            missing[key] -= 1
            found.setdefault(key, []).append(crop.image)
    return [np.stack([found[key].pop() for key in wanted]) / 255 for _ in range(2)]


def measure(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    start, rasters, rng = time.monotonic(), data.load_rasters(), np.random.default_rng(0)
    crops, others = (balanced_crops(rasters, args.count, seed) for seed in (0, 1))
    # Both sets in the order of their styles, so that they can be compared style by style.
    order = list(data.STYLES)
    crops, others = (sorted(c, key=lambda crop: order.index(crop.style)) for c in (crops, others))
    style = np.array([order.index(c.style) for c in crops])
    asked = np.stack([c.fractions.mean((1, 2)) / 255 for c in crops])
    prompts = [data.prompt(c.style, f, c.scale, rng) for c, f in zip(crops, asked, strict=True)]
    real, other = (np.stack([c.image for c in group]) / 255 for group in (crops, others))
    made, rebuilt = generate(pipe, prompts, args.steps, args.guidance, seed=0), rebuild(pipe.vae, real)
    trained, others_trained = same_captions(rasters, [c.style for c in crops], prompts, seed=7)
    reader = judges.reader(rasters, args.reader)
    shuffled = np.random.default_rng(1).permutation(len(crops))
    return {
        "count": len(crops),
        "steps": args.steps,
        "guidance": args.guidance,
        "autoencoder_psnr_db": round(psnr(rebuilt, real), 2),
        "distances": {
            "model": per_style(made, real, style),
            "autoencoder": per_style(rebuilt, real, style),
            "floor: other held-out crops": per_style(other, real, style),
            "floor: training crops with the same captions": per_style(trained, real, style),
        },
        "distances_to_training_crops_with_the_same_captions": {
            "model": per_style(made, trained, style),
            "floor: other such crops": per_style(others_trained, trained, style),
        },
        "two_sample_accuracy": {
            "model": round(judges.two_sample_accuracy(made, real), 3),
            "autoencoder": round(judges.two_sample_accuracy(rebuilt, other), 3),
            "floor: other held-out crops": round(judges.two_sample_accuracy(other, real), 3),
            "model, from training crops with the same captions": round(judges.two_sample_accuracy(made, trained), 3),
        },
        "obedience": {
            "model": judges.obedience(judges.read(reader, made), style, asked),
            "ceiling: the crops themselves": judges.obedience(judges.read(reader, real), style, asked),
            "chance: captions shuffled": judges.obedience(judges.read(reader, made[shuffled]), style, asked),
        },
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "device": platform.processor() or platform.machine(),
        "seconds": round(time.monotonic() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=MODELS / "earth", help="diffusers folder")
    parser.add_argument("--count", type=int, default=96, help="held-out crops, and images generated")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--reader", type=Path, default=WORK / "reader.pt", help="the network that reads content")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the sheets")
    parser.add_argument("--sheet", type=Path, help="write a sheet of samples here and measure nothing")
    parser.add_argument("--nearest", type=Path, help="write samples and their nearest training crops here, likewise")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = open_pipeline(args.folder)
    if args.sheet:
        draw_sheet(generate(pipe, SHEET, args.steps, args.guidance, args.seed), SHEET).save(args.sheet)
    if args.nearest:
        prompts = SHEET[::3]
        made = generate(pipe, prompts, args.steps, args.guidance, args.seed)
        both = np.concatenate([made, nearest(made, data.load_rasters())])
        draw_sheet(both, prompts + ["nearest training crop"] * len(prompts)).save(args.nearest)
    if args.sheet or args.nearest:
        return
    result = measure(pipe, args)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

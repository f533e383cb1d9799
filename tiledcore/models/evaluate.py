"""Measure the embedded checkpoint against the held-out longitudes, and draw a sheet of its samples.

``python -m tiledcore.models.evaluate`` generates one native-size image for the caption of each of
``--count`` held-out crops and prints three distances to those crops, beside the same distances for
the autoencoder's reconstruction, for crops of the training area and for noise. Lower is better; the row
of the training crops is what a perfect model could reach, since they are real.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tiledcore.models import EMBEDDED, call_defaults, data

Images = NDArray[np.floating[Any]]  # [N, H, W, 3] in 0..1

SHEET = [
    f"{style} of {content}"
    for style in ("satellite view", "relief map", "topographic map")
    for content in (
        "a rugged coast",
        "islands in the ocean",
        "desert",
        "forest",
        "mountains",
        "ice",
        "continents and oceans",
    )
]


def spectrum_distance(a: Images, b: Images) -> float:
    """Mean |difference| of the log10 radially averaged power spectra of the luminance, Hann-windowed."""

    def spectrum(images: Images) -> NDArray[np.float64]:
        size = images.shape[1]
        window = np.hanning(size)[:, None] * np.hanning(size)[None]
        grey = images.mean(-1)
        power = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2
        ky, kx = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
        radius = np.rint(np.hypot(ky, kx) * size).astype(int)
        total = np.bincount(radius.ravel(), power.mean(0).ravel())
        return np.log10((total / np.bincount(radius.ravel()))[1 : size // 2] + 1e-12)

    return float(np.abs(spectrum(a) - spectrum(b)).mean())


def colour_distance(a: Images, b: Images) -> float:
    """Wasserstein-1 distance of the colour histograms, mean over the channels, in units of 0..1."""
    quantiles = np.linspace(0, 1, 513)
    return float(
        np.mean(
            [np.abs(np.quantile(a[..., c], quantiles) - np.quantile(b[..., c], quantiles)).mean() for c in range(3)]
        )
    )


def patch_distance(a: Images, b: Images, patch: int = 16, count: int = 8192, seed: int = 0) -> float:
    """Sliced Wasserstein-1 distance of random ``patch``-sized patches, 256 projections (Rabin et al. 2011)."""

    def patches(images: Images) -> NDArray[np.float64]:
        rng = np.random.default_rng(seed)  # the same places in both sets
        i = rng.integers(0, len(images), count)
        y, x = (rng.integers(0, n - patch + 1, count) for n in images.shape[1:3])
        rows, cols = y[:, None] + np.arange(patch), x[:, None] + np.arange(patch)
        return images[i[:, None, None], rows[:, :, None], cols[:, None, :]].reshape(count, -1).astype(np.float64)

    directions = np.random.default_rng(seed + 1).normal(size=(patch * patch * 3, 256))
    directions /= np.linalg.norm(directions, axis=0)
    pa, pb = (np.sort(patches(images) @ directions, axis=0) for images in (a, b))
    return float(np.abs(pa - pb).mean())


def distances(images: Images, real: Images) -> dict[str, float]:
    metrics = {"spectrum": spectrum_distance, "colour": colour_distance, "patches": patch_distance}
    return {name: round(metric(images, real), 4) for name, metric in metrics.items()}


def generate(pipe: Any, prompts: list[str], size: int, call: dict[str, Any], seed: int) -> Images:
    out = []
    for i in range(0, len(prompts), 4):
        batch = prompts[i : i + 4]
        generators = [torch.Generator().manual_seed(seed + i + k) for k in range(len(batch))]
        if "negative_prompt" in call:  # one for each image
            call = call | {"negative_prompt": [""] * len(batch)}
        out.append(pipe(batch, height=size, width=size, generator=generators, output_type="np", **call).images)
    return np.concatenate(out)


def draw_sheet(images: Images, captions: list[str], columns: int = 7) -> Image.Image:
    n, size = len(images), images.shape[1]
    sheet = Image.new("RGB", (columns * (size + 4), -(-n // columns) * (size + 18)), "white")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (size + 4), i // columns * (size + 18)
        sheet.paste(Image.fromarray((image * 255).round().astype(np.uint8)), (x, y))
        ImageDraw.Draw(sheet).text((x + 2, y + size + 2), caption, fill="black")
    return sheet


def main() -> None:
    from tiledcore import TiledPipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=EMBEDDED, default="earth")
    parser.add_argument("--count", type=int, default=96, help="held-out crops, and images generated")
    parser.add_argument("--size", type=int, default=256, help="px")
    parser.add_argument("--sheet", type=Path, help="write a sheet of samples here and measure nothing")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    pipe = TiledPipeline.from_pretrained(args.model).pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    call = call_defaults(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.sheet:
        images = generate(pipe, SHEET, args.size, call, seed=0)
        draw_sheet(images, SHEET).save(args.sheet)
        return
    start, rasters, rng = time.monotonic(), data.load_rasters(), np.random.default_rng(0)
    crops = [data.random_crop(rasters, args.size, rng, held_out=True) for _ in range(args.count)]
    train = [data.random_crop(rasters, args.size, rng, held_out=False, scale=c.scale) for c in crops]
    prompts = [data.prompt(c.style, c.fractions.mean((1, 2)) / 255, c.scale, rng) for c in crops]
    real, other = (np.stack([c.image for c in group]) / 255 for group in (crops, train))
    with torch.no_grad():
        x = torch.from_numpy(real).permute(0, 3, 1, 2).float().to(pipe.device) * 2 - 1
        y = torch.cat([pipe.vae(part).sample for part in x.split(4)]).clamp(-1, 1)
    rebuilt = (y.permute(0, 2, 3, 1).cpu().numpy() + 1) / 2
    made = generate(pipe, prompts, args.size, call, seed=0)
    psnr = -10 * np.log10(((rebuilt - real) ** 2).mean((1, 2, 3))).mean()
    figures = {
        "model": distances(made, real),
        "autoencoder reconstruction": distances(rebuilt, real),
        "training crops": distances(other, real),
        "noise": distances(rng.uniform(size=real.shape), real),
    }
    result = {
        "count": args.count,
        "size": args.size,
        "call": call,
        "autoencoder_psnr_db": round(float(psnr), 2),
        "distance_to_held_out_crops": figures,
        "torch": torch.__version__,
        "device": str(pipe.device),
        "seconds": round(time.monotonic() - start),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Cut crops, encode them once, and draw training windows with captions from this cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from . import data
from .common import WORK, save_state, to_float

CROP = 384  # px; at zooms where so much does not fit between the polar limits, 256
# (height, width) in latent pixels; the batch is chosen so that every step sees about the same area.
SIZES = [(32, 32), (16, 16), (24, 24), (32, 16), (16, 32), (48, 48), (24, 40), (40, 24), (32, 48), (48, 32)]
SIZE_WEIGHTS = [0.50, 0.10, 0.08, 0.05, 0.05, 0.06, 0.04, 0.04, 0.04, 0.04]

Cache = list[dict[str, Any]]


@torch.no_grad()
def encode(vae: Any, crops: list[data.Crop]) -> Cache:
    """Entries with ``latents fp16 [C,h,w]`` (the posterior's mean), ``fractions uint8 [7,h,w]``, scale and style."""
    entries: Cache = []
    for crop in crops:
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(to_float(crop.image[None])).latent_dist.mean[0].half()
        entries.append(
            {"latents": z, "fractions": torch.from_numpy(crop.fractions), "scale": crop.scale, "style": crop.style}
        )
    return entries


def make_cache(vae: Any, path: Path, count: int, seed: int) -> None:
    """Write ``count`` training crops to ``path`` and 48 held-out ones beside it, then say so."""
    rasters, rng = data.load_rasters(), np.random.default_rng(seed)
    held = np.random.default_rng(12345)
    save_state(
        path.with_suffix(".held"),
        {"entries": encode(vae, [data.random_crop(rasters, 256, held, held_out=True) for _ in range(48)])},
    )
    entries: Cache = []
    while len(entries) < count:
        zoom = float(rng.choice(data.ZOOMS, p=data.ZOOM_WEIGHTS))
        size = CROP if CROP * zoom < 1950 else 256
        entries += encode(vae, [data.random_crop(rasters, size, rng, scale=zoom)])
        if len(entries) % 500 == 0:
            print(f"latents {len(entries)}/{count}", flush=True)
            save_state(path, {"entries": entries})


def draw(cache: Cache, rng: np.random.Generator, area: int) -> tuple[torch.Tensor, list[str]]:
    """Windows of one size and together ``area``, with prompts for exactly those windows."""
    h, w = SIZES[rng.choice(len(SIZES), p=SIZE_WEIGHTS)]
    latents: list[torch.Tensor] = []
    prompts: list[str] = []
    while len(latents) < max(1, round(area / (h * w))):
        entry = cache[int(rng.integers(len(cache)))]
        height, width = entry["latents"].shape[1:]
        if h > height or w > width:
            continue
        y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        latents.append(entry["latents"][:, y : y + h, x : x + w])
        fractions = entry["fractions"][:, y : y + h, x : x + w].double().mean((1, 2)).numpy() / 255
        text = data.prompt(entry["style"], fractions, entry["scale"], rng)
        prompts.append("" if rng.random() < 0.1 else text)
    return torch.stack(latents).float(), prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=WORK / "encoder", help="diffusers folder of the autoencoder")
    parser.add_argument("--out", type=Path, default=WORK / "latents.pt")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.out.exists():
        print(f"{args.out} is there; remove it to make another")
        return
    torch.set_num_threads(1)
    make_cache(AutoencoderKL.from_pretrained(args.vae).eval(), args.out, args.count, args.seed)


if __name__ == "__main__":
    main()

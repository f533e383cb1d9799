"""Check an image of ``tiledcore generate``: ``python -m bench.seams demo.png``; exits with 1 if something is wrong.

- Seams: lines on which tiles meet must not stand out. Where they meet is noted in the PNG.
- ``--native small.png``, of the same prompt and seed at the model's own size: distant tiles of 256 px must not be more
  alike than the same parts of the small image (``bench.quality.likeness``).
- ``--source photo.jpg``, which the image enlarges: the PSNR of the low-passes (Gaussian of 4 px at the source's size)
  must be at least 35 dB, and the gradient energy above that of a bicubic enlargement.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bench.quality import PERCENTILE, Pixels, SeamCheck, likeness, seam_check
from tiledcore.schedulers.pull import low_pass, low_pass_matrix

TILE = 256  # px
LIKENESS_ERROR = 0.02
"""Likenesses that differ by less count as equal. Staged images of 1024² and seeds 0 to 3 differed by up to 0.010."""


def read(path: Path) -> tuple[Pixels, dict[str, Any]]:
    """The pixels of a PNG, and the tiling from its ``tiledcore`` text chunk."""
    with Image.open(path) as image:
        image.load()  # text chunks may follow the pixels
        noted = image.info.get("tiledcore")
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    if noted is None:
        raise SystemExit(f"{path}: no tiledcore text chunk; only images of `tiledcore generate` have one")
    return pixels, json.loads(noted)["tiling"]


def table(check: SeamCheck) -> str:
    """One row for each axis."""
    text = [f"seam ratio: 1 is an ordinary line; limit: the {PERCENTILE}th percentile of ordinary lines"]
    text.append(f"{'axis':<6}{'lines':>5}{'mean':>8}{'worst':>8}{'at px':>8}{'limit':>8}  seams")
    for label, ratios in (("y", check.y), ("x", check.x)):
        worst, where = max(((ratio, line) for line, ratio in ratios.items()), default=(math.nan, "-"))
        mean = fmean(ratios.values()) if ratios else math.nan
        figures = f"{len(ratios):>5}{mean:>8.3f}{worst:>8.3f}{where:>8}{check.limit:>8.3f}"
        text.append(f"{label:<6}{figures}  {'VISIBLE' if worst > check.limit else 'none'}")
    return "\n".join(text)


def repeats(image: Pixels, native: Pixels) -> tuple[str, bool]:
    """Whether distant tiles are more alike than the same parts of the native image."""
    here, there = likeness(image, TILE), likeness(native, max(1, TILE * native.shape[0] // image.shape[0]))
    good = here <= there + LIKENESS_ERROR
    return f"likeness of distant tiles: {here:.3f}; native image: {there:.3f}  {'ok' if good else 'REPEATS'}", good


def fidelity(image: Pixels, source: Pixels) -> tuple[str, bool]:
    """Whether an enlargement keeps the source's structure and adds detail. Both ``[H, W, 3]``, 0 to 1."""
    height, width = source.shape[:2]
    as_tensor = [torch.from_numpy(pixels).movedim(-1, 0)[None] for pixels in (image, source)]
    small = F.interpolate(as_tensor[0], (height, width), mode="area")
    filters = [low_pass_matrix(side, 4.0, False).float() for side in (height, width)]
    error = low_pass(small, *filters) - low_pass(as_tensor[1], *filters)
    psnr = -10 * math.log10(float(error.square().mean()))
    bicubic = F.interpolate(as_tensor[1], image.shape[:2], mode="bicubic")
    energy = [sum(float(x.diff(dim=dim).square().mean()) for dim in (2, 3)) for x in (as_tensor[0], bicubic)]
    good = psnr >= 35 and energy[0] > energy[1]
    text = f"low-pass: {psnr:.1f} dB; gradient energy: {energy[0] / energy[1]:.2f} of bicubic"
    return f"{text}  {'ok' if good else 'WRONG'}", good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.seams", description=__doc__)
    parser.add_argument("image", type=Path, help="PNG of `tiledcore generate`")
    parser.add_argument("--native", type=Path, help="the same picture at the model's own size")
    parser.add_argument("--source", type=Path, help="the image that was enlarged")
    args = parser.parse_args(argv)
    Image.MAX_IMAGE_PIXELS = None  # large images are what this is for
    pixels, tiling = read(args.image)
    check = seam_check(pixels, tiling["lines_y"], tiling["lines_x"], tiling["wrap"], tiling["period"])
    print(table(check))
    good = [check.passes]
    for path, judge in ((args.native, repeats), (args.source, fidelity)):
        if path is not None:
            with Image.open(path) as other:
                told, fine = judge(pixels / 255, np.asarray(other.convert("RGB"), dtype=np.float32) / 255)
            print(told)
            good.append(fine)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

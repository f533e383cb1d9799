"""What studies of whole images have in common: make the images of several ways, judge each, take means.

Images are kept on disk and not made again, so a study that was stopped goes on where it was.

Figures of an image (smaller is better, except ``low_frequency_kept``, where 1 is ideal):

- seam_mean, seam_worst_over_limit: mean seam ratio of the lines on which tiles meet (1 is an ordinary line), and the
  worst line divided by the limit, the 99.9th percentile of all other lines (bench/quality.py).
- low_frequency_kept: power at one to two cycles per native side, in 128 windows of the native size at random places,
  divided by that of the model's native samples with the same prompt.
- patches: sliced Wasserstein distance of the same windows to the same samples.

The last two are also given for one half of the native samples against the other. This is the noise floor. With fewer
windows and samples, chance alone moved the patch distance of single images by up to 0.02.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.quality import Pixels, cut_windows, low_frequency_power, seam_check
from tiledcore import TilingConfig
from tiledcore.models import NATIVE
from tiledcore.models.training.metrics import patch_distance

WINDOWS = 128  # cut from each image
SAMPLES = 32  # native ones, in each of two sets
PX = 8  # image pixels per latent pixel

Figures = dict[str, float]
Key = tuple[str, int]
"""Prompt and seed of an image."""


def parser(doc: str | None, steps: int, prompts: list[str], work: str) -> argparse.ArgumentParser:
    """The arguments that studies share."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--size", type=int, default=2048, help="px")
    result.add_argument("--steps", type=int, default=steps)
    result.add_argument("--seeds", type=int, default=1, help="images of each prompt")
    result.add_argument("--prompts", nargs="+", default=prompts)
    result.add_argument("--only", nargs="+", help="names of ways")
    result.add_argument("--work", type=Path, default=Path(work), help="images are kept there")
    result.add_argument("--json", type=Path)
    return result


def generate(pipe: Any, prompt: str, size: int, seed: int, tiling: TilingConfig, **call: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, height=size, width=size, generator=generator, tiling=tiling, **call).images


def kept(path: Path, make: Callable[[], Any]) -> Pixels:
    """The image at ``path``, 0 to 1. If there is none, the images of ``make`` are stored there one below the other."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.concatenate(make())
        Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path.with_suffix(".tmp.png"))
        path.with_suffix(".tmp.png").rename(path)
    return np.asarray(Image.open(path), dtype=np.float32) / 255


def native_samples(pipe: Any, work: Path, prompt: str, call: dict[str, Any]) -> tuple[Pixels, Pixels]:
    """Two sets ``[SAMPLES, side, side, 3]`` of images at the model's own size."""
    side, whole = NATIVE * PX, TilingConfig(tile=NATIVE)

    def samples(first: int) -> Pixels:
        def make() -> list[Pixels]:
            seeds = range(first, first + SAMPLES)
            return [generate(pipe, prompt, side, seed, whole, output_type="np", **call)[0] for seed in seeds]

        return kept(work / f"native {prompt} {first}.png", make).reshape(SAMPLES, side, side, 3)

    return samples(1000), samples(2000)


def noise_floor(natives: tuple[Pixels, Pixels]) -> Figures:
    one, other = natives
    low = low_frequency_power(other) / low_frequency_power(one)
    return {"low_frequency_kept": low, "patches": patch_distance(other, one)}


def judge(image: Pixels, native: Pixels, lines: tuple[list[int], list[int]], period: int) -> Figures:
    """The figures of one image. ``lines`` (y, x) are where tiles meet and ``period`` is as in bench/quality.py; px."""
    seams = seam_check(image, *lines, period=period)
    windows = cut_windows(image, native.shape[1], WINDOWS)
    return {
        "seam_mean": seams.mean,
        "seam_worst_over_limit": seams.worst / seams.limit,
        "low_frequency_kept": low_frequency_power(windows) / low_frequency_power(native),
        "patches": patch_distance(windows, native),
    }


def mean(figures: Iterable[Figures]) -> Figures:
    """Means over images, except for the worst seam."""
    found = list(figures)
    result = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    if "seam_worst_over_limit" in result:
        result["seam_worst_over_limit"] = max(one["seam_worst_over_limit"] for one in found)
    return result


def table(rows: list[dict[str, Any]], columns: dict[str, str], digits: dict[str, int]) -> str:
    """A Markdown table. Columns that no row has are left out, and missing figures are dashes."""
    shown = [key for key in columns if any(row.get(key) is not None for row in rows)]
    lines = [f"| way | {' | '.join(columns[key] for key in shown)} |", "|---" * (1 + len(shown)) + "|"]
    for row in rows:
        values = [row.get(key) for key in shown]
        cells = [
            f"{value:.{digits.get(key, 2)}f}" if value is not None and np.isfinite(value) else "–"
            for key, value in zip(shown, values, strict=True)
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)

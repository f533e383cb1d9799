"""A prompt for each tile on the embedded models: its pixels have the colours and the spectrum of its own prompt."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from bench.quality import seam_check, seam_profile
from tiledcore import TiledPipeline, TilingConfig

LEFT, RIGHT = "topographic map of mountains", "satellite view of ocean"
TILE, OVERLAP, PERIOD = 256, 64, 8  # px; of the network's own grid
CORE = TILE - OVERLAP
Picture = np.ndarray[Any, Any]


def picture(pipe: TiledPipeline, steps: int, height: int, width: int, prompt: str = LEFT, **more: Any) -> Picture:
    call = {"height": height, "width": width, "num_inference_steps": steps, "output_type": "np"} | more
    if hasattr(pipe.pipe, "unet"):
        call["guidance_scale"] = 3.0  # the default burns an ocean to black
    image: Picture = pipe(prompt, generator=torch.Generator().manual_seed(3), **call).images[0]
    return image


def colours(image: Picture) -> Picture:
    """Mean and deviation of each channel, ``[6]``."""
    return np.concatenate([image.mean((0, 1)), image.std((0, 1))])


def spectrum(image: Picture) -> Picture:
    """Decades of power in bands of one octave, ``[bands]``, of the image's brightness."""
    grey = image.mean(2)
    window = np.outer(*(np.hanning(n) for n in grey.shape))
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
    y, x = (np.fft.fftfreq(n) for n in grey.shape)
    octave = np.floor(np.log2(np.hypot(y[:, None], x[None]).clip(1e-6)))
    return np.array([np.log10(power[octave == band].mean() + 1e-12) for band in range(-6, -1)])


@pytest.mark.parametrize(
    ("model", "side", "steps"),
    [
        ("earth", 448, 3),
        pytest.param("earth", 1024, 6, marks=pytest.mark.slow),
        pytest.param("earth-flux", 1024, 6, marks=pytest.mark.slow),
    ],
)
def test_each_tile_has_colours_and_spectrum_of_its_own_prompt_without_seams(model: str, side: int, steps: int) -> None:
    pipe = TiledPipeline.from_pretrained(model, tiling=TilingConfig(tile=TILE // PERIOD, overlap=OVERLAP // PERIOD))
    pipe.set_progress_bar_config(disable=True)
    starts = range(0, side - OVERLAP, CORE)
    border = len(starts) // 2 * CORE  # where the first tiles of the other prompt begin
    image = picture(pipe, steps, side, side, prompt_for_tile=lambda box: LEFT if box[0] < border else RIGHT)
    alone = {text: picture(pipe, steps, TILE, TILE + CORE, prompt=text) for text in (LEFT, RIGHT)}
    for y, x, measure in product(starts, starts, (colours, spectrum)):
        own, other = (LEFT, RIGHT) if x < border else (RIGHT, LEFT)
        x += OVERLAP if own == RIGHT else 0  # a tile without the overlap with the other prompt's
        seen = measure(image[y : y + CORE, x : x + CORE])
        near, far = (float(np.abs(seen - measure(alone[text][:CORE, :CORE])).mean()) for text in (own, other))
        print(model, measure.__name__, (y, x), round(near, 3), round(far, 3))
        assert near < 0.75 * far, (own, measure.__name__, (y, x), near, far)
    pixels, limits = (255 * image).astype(np.uint8), []
    lines = sorted({n for start in starts for n in (start, start + TILE)} - {0, side})
    for first, last in ((0, border), (border + OVERLAP, side)):  # the parts of one prompt, both directions
        inner = [n - first for n in lines if first < n < last]
        check = seam_check(pixels[:, first:last], lines, inner, period=PERIOD)
        print(model, (first, last), check)
        assert check.passes
        limits.append(check.limit)
    # Between the prompts the picture changes, but not where the tiles begin and end.
    between = seam_profile(pixels, period=PERIOD)[1][[border, border + OVERLAP]]
    print(model, between)
    assert between.max() <= max(limits)

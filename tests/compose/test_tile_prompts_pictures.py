"""A prompt for each tile on the embedded models: its pixels have the colours and the spectrum of its own prompt.

At 512x512 px, where the models' own size is 256x256: at 1024x1024 four times the work says the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bench.quality import seam_check
from tiledcore import TiledPipeline, TilingConfig

LEFT, RIGHT = "topographic map of mountains", "satellite view of ocean"
SIDE, TILE = 512, 32  # px, latent pixels


def picture(pipe: TiledPipeline, **more: Any) -> np.ndarray[Any, Any]:
    call = {"height": SIDE, "width": SIDE, "num_inference_steps": 4, "output_type": "np"} | more
    image: np.ndarray[Any, Any] = pipe(
        call.pop("prompt", LEFT), generator=torch.Generator().manual_seed(3), **call
    ).images[0]
    return image


def colours(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean and deviation of each channel, ``[6]``."""
    return np.concatenate([image.mean((0, 1)), image.std((0, 1))])


def spectrum(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Decades of power in bands of one octave, ``[bands]``, of the image's brightness."""
    grey = image.mean(2)
    window = np.outer(*(np.hanning(n) for n in grey.shape))
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
    y, x = (np.fft.fftfreq(n) for n in grey.shape)
    octave = np.floor(np.log2(np.hypot(y[:, None], x[None]).clip(1e-6)))
    return np.array([np.log10(power[octave == band].mean() + 1e-12) for band in range(-6, -1)])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["earth", "earth-flux"])
def test_each_tile_has_colours_and_spectrum_of_its_own_prompt(model: str) -> None:
    pipe = TiledPipeline.from_pretrained(model, tiling=TilingConfig(tile=TILE, overlap=TILE // 4))
    pipe.set_progress_bar_config(disable=True)
    mixed = picture(pipe, prompt_for_tile=lambda box: LEFT if (box[0] + box[2]) / 2 < 0.45 * SIDE else RIGHT)
    alone = {text: picture(pipe, prompt=text) for text in (LEFT, RIGHT)}
    parts = {LEFT: np.s_[:, :128], RIGHT: np.s_[:, -192:]}  # seen by tiles of one prompt only
    for own, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
        part = parts[own]
        for measure in (colours, spectrum):
            near, far = (
                float(np.abs(measure(mixed[part]) - measure(alone[text][part])).mean()) for text in (own, other)
            )
            print(model, own, measure.__name__, round(near, 4), round(far, 4))
            assert near < 0.5 * far, (own, measure.__name__, near, far)
    grid = pipe.grid(SIDE, SIDE)
    lines = [sorted({8 * n for part in parts for n in part} - {0, SIDE}) for parts in (grid.rows, grid.cols)]
    check = seam_check((255 * mixed).astype(np.uint8), *lines, period=8)
    print(model, check)
    # Lines between rows of tiles. Along the line between the two prompts the picture itself changes.
    assert max(check.y.values()) <= check.limit

"""A decode over several ranks equals that of one process up to rounding; rows reach rank 0 from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from processes import on_ranks
from runs import quiet
from tilings import still
from tiny import tiny_sd
from torch import Tensor

import tiledcore.call
import tiledcore.parallel.slabs
from tiledcore import TiledPipeline
from tiledcore.parallel.ranks import current
from tiledcore.parallel.slabs import divided, rows_needed, slabs
from tiledcore.vae.exact import exact_bands
from tiledcore.vae.layers import program


def four_levels() -> AutoencoderKL:
    return tiny_sd().vae


def two_levels() -> AutoencoderKL:
    """Two residual blocks on each, as in SDXL."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=2,
            norm_num_groups=2,
        ).eval()


def taesd() -> AutoencoderTiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        channels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        return AutoencoderTiny(**channels, num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1)).eval()


def decoded(make: Any, latents: Tensor, band_px: int | None) -> Any:
    """On a rank: the image as a whole, and its rows on rank 0."""
    vae, ranks = make(), current()
    assert ranks is not None
    with torch.no_grad(), exact_bands(vae, 0, band_px, decode=partial(slabs, ranks)):
        image = vae.decode(latents).sample
    rows: list[Tensor] = []

    def collect(bands: Iterator[Tensor], height: int) -> Tensor:
        rows.extend(bands)
        return torch.zeros(1, 3, 1, 1)

    with torch.no_grad(), exact_bands(vae, 0, band_px, decode=partial(slabs, ranks, to_first=True), collect=collect):
        vae.decode(latents)
    return image, rows


@pytest.mark.parametrize(
    ("make", "count", "height", "band_px"),
    [
        (four_levels, 2, 37, 64),
        (two_levels, 3, 64, None),
        pytest.param(two_levels, 4, 5, 4, marks=pytest.mark.slow),
        pytest.param(taesd, 3, 40, 64, marks=pytest.mark.slow),
        pytest.param(four_levels, 4, 90, 32, marks=pytest.mark.slow),
    ],
)
def test_slabs_are_the_image(make: Any, count: int, height: int, band_px: int | None) -> None:
    latents = torch.randn(1, 4, height, 11, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = make().decode(latents).sample
    for rank, (image, rows) in enumerate(on_ranks(count, lambda rank: decoded(make, latents, band_px))):
        torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-5)
        assert bool(rows) == (rank == 0)
        if rank == 0:
            assert torch.equal(torch.cat(rows, 2), image)


@pytest.mark.parametrize(
    ("make", "count", "height", "dtype"),
    [
        (two_levels, 3, 37, torch.float32),
        pytest.param(four_levels, 2, 90, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(two_levels, 4, 64, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(taesd, 3, 40, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_own_rows_have_the_bits_of_one_process(
    make: Any, count: int, height: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The autoencoder's own decode, its rows divided. Two images: torch has another convolution for one small one."""
    monkeypatch.setattr(tiledcore.parallel.slabs, "LEAST_PIXELS", 0)
    vae = make().to(dtype)
    latents = torch.randn(2, 4, height, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        expected = vae.decode(latents).sample

    def work(rank: int) -> Tensor:
        ranks = current()
        assert ranks is not None
        with torch.no_grad(), divided(ranks, vae.decoder, 8):
            return vae.decode(latents).sample

    for image in on_ranks(count, work):
        assert torch.equal(image, expected)


def test_a_slab_needs_few_rows_beside_it() -> None:
    layers = program(four_levels().decoder)
    (first, own), *_, (last, end) = rows_needed(layers, (40, 60), 100)
    assert own == (40 - first[0], 60 - first[0]) and 40 - first[0] == first[1] - 60 and 10 < 40 - first[0] < 24
    assert last == (320, 480) and end == (0, 160)
    assert rows_needed(layers, (0, 50), 100)[0][0][0] == 0


def test_a_large_picture_is_decoded_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one level of the picture of one process; its rows go to rank 0."""
    monkeypatch.setattr(tiledcore.call, "EXACT_DECODE_PIXELS", 128 * 128)

    def work(rank: int) -> Any:
        pipe = TiledPipeline(quiet(tiny_sd()), still(overlap=4, wrap=(False, True)))
        call = {"height": 192, "width": 256, "num_inference_steps": 2, "output_type": "pil"}
        bands: list[Any] = []
        image = pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images[0]
        more = {"rows": lambda rows: bands.extend(np.array(band) for band in rows)}
        pipe("a cat", generator=torch.Generator().manual_seed(0), **call, **more)
        return np.asarray(image), np.concatenate(bands) if bands else None

    expected, _ = work(0)
    (image, rows), (other, none) = on_ranks(2, work)
    assert np.abs(image.astype(int) - expected).max() <= 1
    assert np.array_equal(image, other) and np.array_equal(image, rows) and none is None

"""AutoencoderDC in row bands against diffusers' own decode and encode of the whole image."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from tilings import still
from tiny_transformers import build as build_pipe
from tiny_transformers import call, tiny_sana

from tiledcore import TiledPipeline
from tiledcore.vae import exact as bands
from tiledcore.vae.bands import Save, UnsupportedError
from tiledcore.vae.layers import LinearAttention
from tiledcore.vae.live_bytes import LiveBytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCKS = ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock")
HEAD = 4
"""Channels of a head: of up to so many pixels diffusers' attention keeps the scores, of more it does not."""
SANA: dict[str, Any] = {
    "latent_channels": 8,
    "attention_head_dim": HEAD,
    "encoder_block_types": BLOCKS,
    "decoder_block_types": BLOCKS,
    "encoder_block_out_channels": (8, 8, 16, 16),
    "decoder_block_out_channels": (8, 8, 16, 16),
    "encoder_layers_per_block": (1, 1, 1, 2),
    "decoder_layers_per_block": (2, 1, 2, 1),
    "encoder_qkv_multiscales": ((), (), (5,), (3, 5)),
    "decoder_qkv_multiscales": ((), (), (5,), ()),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
}
SHUFFLES = SANA | {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"}
OTHERS = SANA | {"decoder_norm_types": "batch_norm"}
KINDS = {"sana": SANA, "shuffles": SHUFFLES, "batch norm": OTHERS}
FACTOR = 8


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """With norms that scale and shift."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        vae = AutoencoderDC(**KINDS[name]).eval()
        for module in vae.modules():
            if type(module).__name__ == "RMSNorm":
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.5)
    return torch.nn.Module.to(vae, device=DEVICE, dtype=dtype)


def given_for(vae: Any, direction: str, height: int, width: int, batch: int = 1) -> torch.Tensor:
    """Latents of this size, or the image of that many."""
    generator = torch.Generator().manual_seed(1)
    if direction == "decode":
        given = torch.randn(batch, vae.config.latent_channels, height, width, generator=generator)
    else:
        given = torch.rand(batch, 3, FACTOR * height, FACTOR * width, generator=generator) * 2 - 1
    return given.to(DEVICE, vae.dtype)


def relative(result: torch.Tensor, exact: torch.Tensor) -> float:
    assert result.shape == exact.shape and result.isfinite().all()
    return float((result.double() - exact.double()).abs().max() / exact.double().abs().max())


@torch.no_grad()
def whole(vae: Any, given: torch.Tensor, direction: str) -> torch.Tensor:
    return vae.decode(given).sample if direction == "decode" else vae.encode(given).latent


def banded(vae: Any, given: torch.Tensor, direction: str, *args: Any) -> torch.Tensor:
    with bands.exact_bands(vae, 0, *args):
        return whole(vae, given, direction)


def network(vae: Any, direction: str) -> Any:
    return vae.decoder if direction == "decode" else vae.encoder


@pytest.mark.parametrize("size", [(7, 5), (1, 4), (1, 1), (12, 9)])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_every_band_height_gives_the_untiled_image(direction: str, size: tuple[int, int]) -> None:
    """Down to one row of the image, which is less than a row of latents; heights that divide nothing."""
    vae = build("sana")
    given = given_for(vae, direction, *size, batch=2)
    exact = whole(vae, given, direction)
    for height in (None, 1, 13, 24):
        assert relative(banded(vae, given, direction, height), exact) <= 1e-5, height


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_what_the_bands_are_there_for(direction: str) -> None:
    """In double precision nothing is left but diffusers' own casts to float32; its tiles are far off."""
    vae = build("sana", torch.float64)
    given = given_for(vae, direction, 12, 12)
    exact = whole(vae, given, direction)
    assert relative(banded(vae, given, direction, 16), exact) < 1e-6
    vae.enable_tiling(48, 48, 32, 32)
    assert relative(whole(vae, given, direction), exact) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, HEAD), (9, 7)])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_half_precision_errs_no_more_than_the_untiled_network(
    direction: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    vae = build("sana", dtype)
    given = given_for(vae, direction, *size)
    exact = whole(copy.deepcopy(vae).double(), given.double(), direction)
    plain = (whole(vae, given, direction).double() - exact).abs().max()
    error = (banded(vae, given, direction, 16).double() - exact).abs().max()
    assert error <= 2 * plain + 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_sums_over_bands_are_those_of_all_pixels() -> None:
    """Against the definition, one pixel after the other in double precision."""
    vae = build("sana")
    attention = vae.decoder.up_blocks[3][0].attn
    rows = torch.randn(2, 3 * 16, 23, 5, device=DEVICE) + torch.linspace(-3, 40, 23, device=DEVICE)[:, None]
    sums = LinearAttention(attention)
    sums.start(23 * 5)
    for part in rows.split([1, 4, 11, 7], 2):
        sums.update(part)
    expected = torch.zeros(2, 4, HEAD + 1, HEAD, dtype=torch.float64, device=DEVICE)
    for y in range(23):
        for x in range(5):
            _, key, value = rows[:, :, y, x].double().view(2, 4, 3, HEAD).unbind(2)
            one = torch.cat([value, torch.ones_like(value[:, :, :1])], 2)
            expected += one[:, :, :, None] * key.clamp(min=0)[:, :, None]
    torch.testing.assert_close(sums.sums, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_wherever_the_inputs_of_attention_are_kept_the_image_is_the_same(direction: str) -> None:
    vae = build("sana")
    given = given_for(vae, direction, 9, 7)
    exact = whole(vae, given, direction)
    part = network(vae, direction)
    plan = bands.plan(part, given, 16)
    waits = [i for i, layer in enumerate(bands.program(part)) if layer.reduces]
    saves = [i for i, layer in enumerate(bands.program(part)) if isinstance(layer, Save)]
    before = {i: max(k for k in saves if k < i) for i in waits}
    assert len(waits) == 3
    for keeps in ({}, {i: i for i in waits}, before, {waits[1]: waits[1]}, {waits[0]: before[waits[0]]}):
        rows = list(bands.run(part, given, replace(plan, keeps=keeps)))
        assert relative(torch.cat(rows, 2), exact) <= 1e-5, keeps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_peak_is_bounded_and_as_counted(direction: str, dtype: torch.dtype) -> None:
    vae = build("sana", dtype)
    given = given_for(vae, direction, 32, 4)
    part = network(vae, direction)
    chosen = bands.plan(part, given, 64)
    with LiveBytes() as live:
        for rows in bands.run(part, given, chosen):
            del rows
    assert 0.6 * chosen.peak_bytes < live.peak <= chosen.peak_bytes
    with LiveBytes() as live:
        whole(vae, given, direction)
    assert chosen.peak_bytes < live.peak / 2
    tall = given.repeat(1, 1, 3, 1)
    # Only what waits for attention grows, which is on the levels of a quarter and an eighth of the image's size.
    assert bands.plan(part, tall, 64, 1.5 * chosen.peak_bytes).recomputed < 1.2


def test_the_least_budget_that_an_error_names_is_enough() -> None:
    vae = build("sana")
    given = given_for(vae, "decode", 40, 12)
    with pytest.raises(ValueError, match="would") as caught:
        banded(vae, given, "decode", 64, 1000)
    need = int(str(caught.value).rsplit("px; ", 1)[1].removesuffix(" would").replace(",", ""))
    assert relative(banded(vae, given, "decode", 64, need), whole(vae, given, "decode")) <= 1e-5


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_context_replaces_the_vaes_own_calls(direction: str) -> None:
    vae = build("sana")
    given = given_for(vae, direction, 6, 4, 2)
    exact = whole(vae, given, direction)
    with bands.exact_bands(vae, larger_than=48 * 32):
        assert torch.equal(whole(vae, given, direction), exact)
    with bands.exact_bands(vae, larger_than=48 * 32 - 1, band_px=16):
        result = whole(vae, given, direction)
    assert not torch.equal(result, exact) and relative(result, exact) <= 1e-5
    assert torch.equal(whole(vae, given, direction), exact)


def test_sana_decodes_large_images_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pixels and as rows; the same network, latents and seed up to the limit and above."""
    pipe = build_pipe(tiny_sana)
    wrapped = TiledPipeline.from_pipe(pipe, tiling=still(tile=4, overlap=2))
    pixels = math.prod(size := (7, 6)) * wrapped.vae_scale_factor**2

    def run(**kwargs: Any) -> Any:
        return call(wrapped, tiny_sana, size, output_type="np", num_inference_steps=1, **kwargs)

    calls: list[int] = []
    run_bands = bands.run
    monkeypatch.setattr(bands, "run", lambda *a: calls.append(1) or run_bands(*a))
    monkeypatch.setattr("tiledcore.call.EXACT_DECODE_PIXELS", pixels)
    small = run()
    assert not calls
    monkeypatch.setattr("tiledcore.call.EXACT_DECODE_PIXELS", pixels - 1)
    large = run()
    assert calls == [1] and not pipe.vae.use_tiling
    assert small.std() > 0.01 and abs(large - small).max() < 1e-5
    rows: list[Any] = []
    run(rows=rows.extend)
    assert calls == [1, 1]
    assert abs(np.concatenate(rows).astype(int) - (small[0] * 255).round().astype(int)).max() <= 1


def test_what_cannot_run_in_bands_is_refused_in_words() -> None:
    vae = build("sana")
    assert bands.why_not_exact(vae, 10**9) is None
    vae.encoder.down_blocks[2][0].attn.processor = lambda *_: None
    assert "function is not known" in str(bands.why_not_exact(vae))
    vae = build("batch norm")
    assert "BatchNorm2d is not known" in str(bands.why_not_exact(vae))
    with pytest.raises(UnsupportedError, match=r"BatchNorm2d"):
        bands.rows_of(vae.decoder, torch.zeros(1, 8, 4, 4))
    assert "DCUpBlock2d.interpolate is False" in str(bands.why_not_exact(build("shuffles")))
    vae = build("sana")
    vae.decoder.up_blocks[1][0].interpolation_mode = "bilinear"
    assert "DCUpBlock2d.interpolation_mode is bilinear; computable in bands is nearest" in str(bands.why_not_exact(vae))
    vae = build("sana")
    vae.decoder.up_blocks[2][1].attn.to_q = torch.nn.Sequential(vae.decoder.up_blocks[2][1].attn.to_q)
    assert "Sequential is not known" in str(bands.why_not_exact(vae))

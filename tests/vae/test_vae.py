"""Exact bands: against the whole image at once, in every way of keeping or recomputing activations."""

import copy
import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from tilings import RAMP
from tiny import tiny_sd
from tiny_transformers import tiny_flux
from torch.profiler import ProfilerActivity, profile

from tiledcore import TiledPipeline
from tiledcore.vae import exact as bands
from tiledcore.vae.bands import Statistics
from tiledcore.vae.live_bytes import LiveBytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SD = LEVELS | {"block_out_channels": (4, 8, 16, 16), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 4}
SD3 = SD | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
TINY = {"encoder_block_out_channels": (6,) * 4, "decoder_block_out_channels": (6,) * 4}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd": (AutoencoderKL, SD | {"sample_size": 64}),
    "sd3": (AutoencoderKL, SD3),
    "no attention": (AutoencoderKL, SD | {"mid_block_add_attention": False, "layers_per_block": 1}),
    "short": (AutoencoderKL, SD | {"layers_per_block": 1}),
    "tiny": (AutoencoderTiny, TINY),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """With norms that scale and shift, so that an error in their statistics shows."""
    kind, config = KINDS[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        vae = kind(**config).eval()
        for module in vae.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.5)
    return torch.nn.Module.to(vae, device=DEVICE, dtype=dtype)


def latents_for(vae: Any, height: int, width: int, batch: int = 1) -> torch.Tensor:
    noise = torch.randn(batch, vae.config.latent_channels, height, width, generator=torch.Generator().manual_seed(1))
    return noise.to(DEVICE, next(vae.parameters()).dtype)


def image_for(vae: Any, height: int, width: int, batch: int = 1) -> torch.Tensor:
    noise = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return noise.to(DEVICE, next(vae.parameters()).dtype)


def encoded(output: Any) -> torch.Tensor:
    return output.latents if hasattr(output, "latents") else output.latent_dist.parameters


def relative(result: torch.Tensor, exact: torch.Tensor) -> float:
    assert result.shape == exact.shape and result.isfinite().all()
    return float((result.double() - exact.double()).abs().max() / exact.double().abs().max())


@torch.no_grad()
def whole(vae: Any, given: torch.Tensor, direction: str) -> torch.Tensor:
    return vae.decode(given).sample if direction == "decode" else encoded(vae.encode(given))


def banded(vae: Any, given: torch.Tensor, direction: str, *args: Any) -> torch.Tensor:
    with bands.exact_bands(vae, 0, *args):
        return whole(vae, given, direction)


def network(vae: Any, direction: str) -> Any:
    return vae.decoder if direction == "decode" else vae.encoder


@pytest.mark.parametrize("name", ["sd", "sd3", "no attention", "tiny"])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_every_band_height_gives_the_untiled_image(name: str, direction: str) -> None:
    """Odd sizes, two images; in float64, where nothing but an error of the method can differ."""
    vae = build(name, torch.float64)
    given = latents_for(vae, 25, 13, 2) if direction == "decode" else image_for(vae, 203, 101, 2)
    exact = whole(vae, given, direction)
    for height in (None, 8, 64, 72):
        assert relative(banded(vae, given, direction, height), exact) < 1e-12, height


@pytest.mark.parametrize("name", ["sd", "tiny"])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_single_precision(name: str, direction: str) -> None:
    vae = build(name)
    given = latents_for(vae, 32, 24) if direction == "decode" else image_for(vae, 256, 192)
    exact = whole(vae, given, direction)
    assert relative(banded(vae, given, direction, 64), exact) <= 1e-5
    if name == "sd":
        vae.enable_tiling()
        assert relative(whole(vae, given, direction), exact) > 1e-2  # what the bands are there for


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_half_precision_errs_no_more_than_the_untiled_network(dtype: torch.dtype, direction: str) -> None:
    vae = build("sd", dtype)
    given = latents_for(vae, 24, 16) if direction == "decode" else image_for(vae, 192, 128)
    exact = whole(copy.deepcopy(vae).double(), given.double(), direction)
    plain = (whole(vae, given, direction).double() - exact).abs().max()
    error = (banded(vae, given, direction, 64).double() - exact).abs().max()
    assert error <= 2 * plain + 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_statistics_merge_exactly() -> None:
    """Bands of any heights, far from zero: the variance between bands is not lost."""
    norm = torch.nn.GroupNorm(2, 6, device=DEVICE)
    x = torch.randn(2, 6, 40, 9, device=DEVICE) + torch.linspace(-50, 300, 40, device=DEVICE)[:, None]
    statistics = Statistics(norm)
    statistics.start(40 * 9)
    for part in x.split([1, 7, 12, 19, 1], 2):
        statistics.update(part)
    statistics.finish()
    variance, mean = torch.var_mean(x.double().view(2, 2, -1), 2, correction=0)
    torch.testing.assert_close(statistics.mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.rstd.double(), (variance + norm.eps).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_less_memory_means_more_work_and_the_same_image(direction: str) -> None:
    vae = build("short")
    given = latents_for(vae, 32, 16) if direction == "decode" else image_for(vae, 256, 128)
    exact, part = whole(vae, given, direction), network(vae, direction)
    most = bands.plan(part, given, 64).peak_bytes
    work = []
    for share in (1.0, 0.9, 0.75, 0.65):
        chosen = bands.plan(part, given, 64, share * most)
        assert chosen.peak_bytes <= share * most
        work.append(chosen.recomputed)
        assert relative(banded(vae, given, direction, 64, share * most), exact) <= 1e-5
    assert work == sorted(work) and work[0] == 1 and work[-1] > 1.1


def test_the_highest_bands_that_recompute_least() -> None:
    decoder, shape = build("short").decoder, (1, 4, 128, 128)
    ample = bands.choose(decoder, shape, math.inf)
    assert ample.band_px == 512 and ample.recomputed == 1
    less = 0.6 * ample.peak_bytes
    lower = bands.choose(decoder, shape, less)
    assert lower.band_px < 512 and lower.recomputed <= bands.choose(decoder, shape, less, 512).recomputed
    assert bands.choose(decoder, shape, 1).band_px == 64


def allocated_peak(run: Any) -> int:
    """Most bytes that torch's CPU allocator had given out, by its own events, at the end of an operation.

    At its end and not within: what a convolution's library takes and gives back in between is no tensor.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    changes, ends, until = [], [], 0
    for event in events:
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
        elif event.start_ns() >= until:
            until = event.start_ns() + event.duration_ns()
            ends.append(until)
    live = peak = at = 0
    for end in ends:
        while at < len(changes) and changes[at][0] <= end:
            live += changes[at][1]
            at += 1
        peak = max(peak, live)
    return peak


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU allocator's events")
@pytest.mark.parametrize("share", [None, 0.8, 0.6])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_predicted_peak_is_what_the_allocator_gives_out(direction: str, share: float | None) -> None:
    vae = build("short")
    given = latents_for(vae, 48, 24) if direction == "decode" else image_for(vae, 384, 192)
    part = network(vae, direction)
    budget = math.inf if share is None else share * bands.plan(part, given, 64).peak_bytes
    chosen = bands.plan(part, given, 64, budget)

    def rows() -> None:
        for row in bands.run(part, given, chosen):
            del row

    rows()  # what torch keeps after the first call is not the bands'
    assert 0.75 * chosen.peak_bytes < allocated_peak(rows) <= chosen.peak_bytes


def test_rows_come_top_to_bottom_and_the_peak_does_not_grow_with_the_height() -> None:
    vae = build("tiny")
    latents = latents_for(vae, 40, 10)
    rows = list(bands.rows_of(vae.decoder, latents, 64))
    assert len(rows) > 2 and max(row.shape[2] for row in rows) <= 80
    assert relative(torch.cat(rows, 2), whole(vae, latents, "decode")) < 1e-5
    short, tall = (bands.choose(vae.decoder, (1, 4, height, 10), 1e9, 64).peak_bytes for height in (40, 200))
    assert tall == short


def test_an_image_of_bands_is_not_held_twice_and_its_plan_is_not_counted() -> None:
    vae = build("tiny")
    latents = latents_for(vae, 200, 10)
    most = bands.plan(vae.decoder, latents, 64).peak_bytes
    with torch.no_grad(), bands.exact_bands(vae, 0, 64), LiveBytes() as live:
        image = vae.decode(latents).sample
    assert image.nbytes > 2 * most
    assert live.peak < 1.2 * image.nbytes + most


def test_a_batch_is_its_images_and_a_call_is_repeatable() -> None:
    vae = build("sd", torch.float64)
    latents = latents_for(vae, 16, 12, 3)
    both = banded(vae, latents, "decode", 64)
    assert torch.equal(both, banded(vae, latents, "decode", 64))
    for i in range(3):
        assert relative(banded(vae, latents[i : i + 1], "decode", 64), both[i : i + 1]) < 1e-12


def test_latents_of_another_dtype() -> None:
    vae = build("sd")
    (rows,) = bands.rows_of(vae.decoder, latents_for(vae, 8, 8).double())
    assert rows.dtype == torch.float32


@pytest.mark.parametrize("method", ["decode", "encode"])
def test_the_context_replaces_the_vaes_own_calls(method: str) -> None:
    vae = build("sd")
    given = latents_for(vae, 16, 16, 2) if method == "decode" else image_for(vae, 128, 128, 2)
    exact = whole(vae, given, method)
    state = dict(vars(vae.decoder))
    with bands.exact_bands(vae, larger_than=128 * 128):
        assert torch.equal(whole(vae, given, method), exact)
    vae.enable_slicing()
    with bands.exact_bands(vae, larger_than=128 * 128 - 1, band_px=64):
        result = whole(vae, given, method)
    assert not torch.equal(result, exact) and relative(result, exact) <= 1e-5
    assert vars(vae.decoder) == state and "forward" not in vars(vae.encoder)
    vae.disable_slicing()
    assert torch.equal(whole(vae, given, method), exact)


@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_a_pipeline_decodes_large_images_exactly(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    side = 192
    pipe = make()
    wrapped = TiledPipeline.from_pipe(pipe, tiling=RAMP)
    call = {"height": side, "width": side, "num_inference_steps": 1, "output_type": "np"}

    def run() -> Any:
        return wrapped("a coast", generator=torch.Generator().manual_seed(0), **call).images

    calls: list[int] = []
    run_bands = bands.run
    monkeypatch.setattr(bands, "run", lambda *a: calls.append(1) or run_bands(*a))
    small = run()
    assert not calls
    monkeypatch.setattr("tiledcore.call.EXACT_DECODE_PIXELS", side * side - 1)
    large = run()
    assert calls == [1] and not pipe.vae.use_tiling
    assert abs(large - small).max() < 1e-5
    monkeypatch.setattr("tiledcore.call.EXACT_DECODE_PIXELS", side * side)
    assert (run() == small).all()


def test_what_cannot_run_in_bands_is_refused_in_words() -> None:
    assert "VQModel is none of AutoencoderKL, " in str(bands.why_not_exact(VQModel()))
    vae = build("sd")
    assert bands.why_not_exact(vae) is None
    vae.decoder.conv_in.register_forward_pre_hook(lambda *_: None)
    assert "conv_in has a hook" in str(bands.why_not_exact(vae))
    vae = build("sd")
    vae.decoder.mid_block.resnets[0].nonlinearity = torch.nn.Tanh()
    assert "Tanh is not known to be computable in bands" in str(bands.why_not_exact(vae))
    kind = AutoencoderKL(**(SD | {"down_block_types": ("AttnDownEncoderBlock2D",) * 4}))
    assert "AttnDownEncoderBlock2D" in str(bands.why_not_exact(kind))


def test_the_least_budget_that_an_error_names_is_enough() -> None:
    vae = build("short")
    latents = latents_for(vae, 32, 16)
    with pytest.raises(ValueError, match=r"budget=1,000 bytes do not hold .* would") as caught:
        bands.rows_of(vae.decoder, latents, 64, 1000)
    need = int(str(caught.value).rsplit("px; ", 1)[1].removesuffix(" would").replace(",", ""))
    assert bands.plan(vae.decoder, latents, 64, need).peak_bytes <= need

"""Features in pairs: the fused loop and the pipeline's own loop make the same latents, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from pair_matrix import pairs
from peft import LoraConfig
from PIL import Image
from tilings import FADING, canvas_mode, moving, still
from tiny import tiny_sd, tiny_sdxl
from tiny_transformers import build, tiny_flux, tiny_sd3

from tiledcore import Pull, Region, TiledPipeline, TilingConfig
from tiledcore.loop.checkpoint import Checkpoint

HEIGHT, WIDTH = 192, 256
Y, X = np.mgrid[:HEIGHT, :WIDTH]
PICTURE = Image.fromarray(np.stack([X, Y, (X + Y) % 256], -1).astype(np.uint8))
MASK = Image.fromarray(((X > 100) * 255).astype(np.uint8))
REGIONS = [Region("a dog", box=(0, 0, 128, HEIGHT), feather=16)]


def run(pipe: Any, **kwargs: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    call = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 4, "output_type": "latent"} | kwargs
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images


@pytest.mark.parametrize(
    ("make", "tiling", "arguments"),
    [
        (tiny_sd, FADING, {"image": PICTURE, "strength": 0.8}),
        (tiny_sd, FADING, {"image": PICTURE, "mask_image": MASK, "strength": 0.8}),
        (tiny_sd, FADING, {"image": PICTURE, "strength": 0.9, "pull": Pull()}),
        (tiny_sd, still(overlap=4, wrap=True), {"regions": REGIONS}),
        (tiny_sd, moving(fade=3, wrap=True), {"regions": REGIONS}),
        (tiny_sd, FADING, {"regions": REGIONS, "num_images_per_prompt": 2}),
        (tiny_sd, canvas_mode(), {"regions": REGIONS}),
        (tiny_sd, FADING, {"guidance_scale": 1.0}),
        (lambda: build(tiny_flux), FADING, {}),
        (lambda: build(tiny_sd3), moving(fade=4), {}),
    ],
)
def test_both_loops_agree(make: Any, tiling: TilingConfig, arguments: dict[str, Any]) -> None:
    fused, own = (run(TiledPipeline(make(), tiling, fused=way), **arguments) for way in (True, False))
    torch.testing.assert_close(fused, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop", [4, 9, 14])
def test_tiles_that_move_and_fade_go_on_to_the_same_bits(stop: int, tmp_path: Path) -> None:
    whole = run(TiledPipeline(tiny_sd(), FADING), num_inference_steps=6)
    pipe, calls = TiledPipeline(tiny_sd(), FADING), iter(range(1000))

    def interrupt(*_: Any) -> None:
        if next(calls) == stop:
            raise KeyboardInterrupt

    handle = pipe.unet.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, num_inference_steps=6, checkpoint=Checkpoint(tmp_path / "run"))
    handle.remove()
    assert torch.equal(run(pipe, num_inference_steps=6, checkpoint=tmp_path / "run"), whole)
    assert 0 < pipe.report.resumed < 6


@pytest.mark.parametrize("tiling", [FADING, still(overlap=4, wrap=True)])
def test_rows_are_those_of_the_whole_decode(tiling: TilingConfig) -> None:
    bands: list[Any] = []
    pipe = TiledPipeline(tiny_sd(), tiling)
    run(pipe, output_type="pil", rows=lambda rows: bands.extend(np.array(band) for band in rows))
    assert np.array_equal(np.concatenate(bands), np.asarray(run(pipe, output_type="pil")[0]))


def test_what_is_watched_or_planned_changes_nothing(tmp_path: Path) -> None:
    plain = run(TiledPipeline(tiny_sd(), FADING))
    watched = run(TiledPipeline(tiny_sd(), FADING), preview=tmp_path / "now.png", checkpoint=tmp_path / "run")
    assert torch.equal(watched, plain) and (tmp_path / "now.png").exists()
    assert torch.equal(run(TiledPipeline(tiny_sd(), FADING, memory_budget="2GiB")), plain)


def test_one_object_sees_what_changes_between_its_calls() -> None:
    pipe = TiledPipeline(tiny_sd())
    config, first = pipe.scheduler.config, run(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    other = run(pipe)
    pipe.scheduler = DDIMScheduler.from_config(config)
    assert torch.equal(run(pipe), first) and not torch.allclose(other, first, atol=1e-2)
    adapter = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.unet.add_adapter(adapter, adapter_name="one")
    assert not torch.allclose(run(pipe), first, atol=1e-3)
    pipe.unet.disable_adapters()
    assert torch.equal(run(pipe), first)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, lambda: build(tiny_flux)], ids=["sd", "sdxl", "flux"])
def test_the_default_tiling_in_half_precision_is_near_that_in_full(make: Any) -> None:
    full = run(TiledPipeline(make()))
    half = run(TiledPipeline(make().to(torch.bfloat16))).float()
    assert float((half - full).norm() / full.norm()) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_every_two_features_agree_or_are_refused_in_one_line(model: str) -> None:
    assert not {names: text for names, text in pairs(model) if text != "=" and not text.startswith("- ")}


def test_a_refiner_goes_on_where_the_base_stopped() -> None:
    base, tiling = tiny_sdxl(), still(overlap=4)
    whole = run(TiledPipeline(base, tiling))
    half = run(TiledPipeline(base, tiling), denoising_end=0.5)
    parts = {name: part for name, part in base.components.items() if name not in ("image_encoder", "feature_extractor")}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    refined = run(TiledPipeline(refiner, tiling), image=half, denoising_start=0.5)
    assert not torch.allclose(half, whole, atol=1e-2)
    torch.testing.assert_close(refined, whole, rtol=1e-3, atol=1e-3)

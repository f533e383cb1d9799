"""Moving tiles whose first and last steps are blended: which steps these are, in every loop, family and schedule."""

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler
from runs import generate, quiet
from tilings import BLENDED, MOVING, RAMP, moving
from tiny import tiny_sd, tiny_sdxl
from tiny_transformers import build, call, tiny_flux, tiny_pixart_sigma, tiny_qwen, tiny_sd3, tiny_z_image

from tiledcore import Motion, TiledPipeline, TilingConfig, apply_tiling
from tiledcore.geometry import TileGrid, Tiling
from tiledcore.hook import STEPWISE, default_tiling, with_fade
from tiledcore.tiles.denoiser import TileDenoiser


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Tiling]]:
    """The timestep and the tiles of each evaluation from now on."""
    found: list[tuple[float, Tiling]] = []
    place = TileDenoiser.place

    def spy(self: TileDenoiser, size: Any, timestep: Any, device: Any) -> bool:
        result = place(self, size, timestep, device)
        assert self.placed is not None
        found.append((float(torch.as_tensor(timestep).flatten()[0]), self.placed))
        return result

    monkeypatch.setattr(TileDenoiser, "place", spy)
    return found


def blended(ways: list[tuple[float, Tiling]]) -> list[bool]:
    # In tokens of two latent pixels where the pipeline packs them.
    assert all(w.overlap in ((4, 4), (2, 2)) and len(w) > 1 for _, w in ways if isinstance(w, TileGrid))
    return [isinstance(w, TileGrid) for _, w in ways]


@pytest.mark.parametrize("fused", [False, True])
def test_the_last_steps_are_blended(fused: bool, ways: Any) -> None:
    generate(quiet(tiny_sd()), fused, BLENDED)
    assert blended(ways) == [False, False, True, True]


def test_heun_evaluates_a_timestep_twice(ways: Any) -> None:
    pipe = quiet(tiny_sd())
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    generate(pipe, True, BLENDED)
    times = [t for t, _ in ways]
    last = sorted(set(times))[:2]
    assert len(times) == 7 and blended(ways) == [t in last for t in times]


@pytest.mark.parametrize("fused", [False, True])
def test_image_to_image_counts_from_the_end(fused: bool, ways: Any) -> None:
    image = torch.rand(1, 3, 160, 256, generator=torch.Generator().manual_seed(1))
    arguments = {"image": image, "strength": 0.6, "height": None, "width": None, "num_inference_steps": 5}
    generate(quiet(tiny_sd()), fused, BLENDED, **arguments)
    assert blended(ways) == [False, True, True]


def test_another_scheduler_of_a_later_call_is_seen(ways: Any) -> None:
    pipe = quiet(tiny_sd())
    wrapped = TiledPipeline.from_pipe(pipe, tiling=BLENDED)
    for _ in range(2):
        ways.clear()
        wrapped("a cat", height=160, width=256, num_inference_steps=3, output_type="latent")
        assert blended(ways) == [False, True, True]
        wrapped.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")


FAMILIES = [tiny_sd3, tiny_flux, tiny_pixart_sigma, tiny_z_image, tiny_qwen]
PRECISIONS = [*((make, torch.float32) for make in FAMILIES), (tiny_flux, torch.bfloat16)]


@pytest.mark.parametrize(("make", "dtype"), PRECISIONS)
def test_every_family_finds_its_timesteps(make: Any, dtype: torch.dtype, ways: Any) -> None:
    pipe = build(make).to(dtype)
    call(apply_tiling(pipe, BLENDED), make, (32, 40), num_inference_steps=12)
    times = list(dict.fromkeys(t for t, _ in ways))  # guidance may take a call of its own
    assert len(times) == 12 and blended(ways) == [t in times[-2:] for t, _ in ways]


def test_blended_steps_move_the_result_toward_a_ramps() -> None:
    pipe = quiet(tiny_sd())
    ramp = RAMP
    every = moving(blend_last=9, overlap=4)
    assert torch.equal(generate(pipe, True, every)[0], generate(pipe, True, ramp)[0])
    always, last = (generate(pipe, True, tiling)[0] for tiling in (MOVING, BLENDED))
    assert not torch.allclose(always, last)


@pytest.mark.parametrize("fused", [False, True])
def test_the_first_steps_are_blended(fused: bool, ways: Any) -> None:
    generate(quiet(tiny_sd()), fused, moving(blend_first=2, overlap=4))
    assert blended(ways) == [True, True, False, False]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_run_that_starts_from_an_image_blends_more_of_its_last_steps_instead(strength: float, ways: Any) -> None:
    image = torch.rand(1, 3, 160, 256, generator=torch.Generator().manual_seed(1))
    arguments = {"image": image, "strength": strength, "height": None, "width": None, "num_inference_steps": 8}
    generate(quiet(tiny_sd()), True, moving(blend_first=1, blend_last=2, overlap=4), **arguments)
    assert blended(ways) == [False] * (round(8 * strength) - 3) + [True] * 3


def test_the_area_factor_is_the_mean_over_the_steps() -> None:
    grid = BLENDED.grid(32, 40, 16)
    assert BLENDED.area_factor(grid, 8) == pytest.approx((6 + 2 * grid.area_factor) / 8)
    assert BLENDED.area_factor(grid, 1) == grid.area_factor
    assert MOVING.area_factor(MOVING.grid(32, 40, 16), 8) == 1
    plain = RAMP
    assert plain.area_factor(plain.grid(32, 40, 16), 8) == grid.area_factor > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blend_last": -1}, "blend_last=-1 must be an int of at least 0"),
        ({"blend_last": True}, "blend_last=True must be an int of at least 0"),
        ({"blend_first": 0.5}, "blend_first=0.5 must be an int of at least 0"),
        ({"seed": 1.5}, "seed=1.5 must be an int"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Motion(**arguments)


def test_blended_steps_need_an_overlap_below_the_tile() -> None:
    with pytest.raises(ValueError, match="overlap="):
        moving(tile=16, blend_last=1, overlap=16)


DEFAULT = TilingConfig(motion="moving")


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_unets_fade_and_blend_three_steps_by_default(make: Any, ways: Any) -> None:
    pipe = quiet(make())
    assert default_tiling(pipe) == DEFAULT == TiledPipeline.from_pipe(pipe).tiling
    assert with_fade(pipe, DEFAULT, fades=False) == TilingConfig(motion=STEPWISE)
    latents, _ = generate(pipe, True, default_tiling(pipe))
    assert [isinstance(tiles, TileGrid) for _, tiles in ways] == [True, True, False, True]
    faded = TilingConfig(motion=Motion(blend_first=2, blend_last=1, fade=3))  # 3/16 of the native 16
    assert torch.equal(latents, generate(pipe, True, faded)[0])


def test_where_nothing_fades_the_last_three_steps_are_blended(ways: Any) -> None:
    pipe = apply_tiling(quiet(tiny_sd()))
    pipe("a coast", height=256, width=256, num_inference_steps=4, output_type="latent")
    assert [isinstance(tiles, TileGrid) for _, tiles in ways] == [False, True, True, True]


def test_the_default_of_transformers() -> None:
    flux = build(tiny_flux)
    flux.transformer.native_size = 32  # eighths of 4 latent pixels: two tokens
    assert default_tiling(flux) == DEFAULT
    motions = ("moving", Motion(fade=6))  # 3/16 of 32
    wrapped = (TiledPipeline.from_pipe(flux, tiling=TilingConfig(motion=motion)) for motion in motions)
    default, faded = (call(pipe, tiny_flux, (48, 64), num_inference_steps=5) for pipe in wrapped)
    assert torch.equal(default, faded)
    flux.transformer.native_size = 24  # eighths of 3
    assert default_tiling(flux) == TilingConfig()
    for make in (tiny_sd3, tiny_pixart_sigma, tiny_qwen, tiny_z_image):
        assert default_tiling(build(make)) == TilingConfig()

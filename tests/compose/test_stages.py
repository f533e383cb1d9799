"""Plans of stages in numbers, and staged runs of tiny pipelines."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tilings import MOVING, ONE, RAMP, moving, still
from tiny import tiny_sd
from tiny_transformers import build, call, tiny_flux, tiny_pixart_sigma, tiny_sd3

from tiledcore import Motion, Region, TiledPipeline, TilingConfig
from tiledcore.compose.pictures import match_colour
from tiledcore.compose.regions import scale_regions
from tiledcore.compose.stages import Stage, StagePlan, Staging, plan_call, plan_stages, staging
from tiledcore.schedulers.pull import Pull
from tiledcore.tiles.denoiser import TileDenoiser

SIDES = st.integers(1, 64).map(lambda n: 64 * n)


@settings(max_examples=200)
@given(SIDES, SIDES, st.sampled_from([512, 1024]), st.floats(1.5, 4), st.booleans())
@example(704, 1536, 1024, 4.0, False)  # the native size, rounded down, is a little smaller
def test_stages_grow_by_at_most_the_factor(height: int, width: int, native: int, factor: float, picture: bool) -> None:
    start = (min(64, height), max(64, width // 6)) if picture else None
    stages = plan_stages((height, width), (native, native), 16, Staging(factor=factor), start)
    assert (stages[-1].height, stages[-1].width) == (height, width)
    sizes = ([start] if start else []) + [(s.height, s.width) for s in stages]
    assert [s.strength is None for s in stages] == [not picture] + [False] * (len(stages) - 1)
    for (h, w), (below_h, below_w) in zip(sizes[1:], sizes[:-1], strict=True):
        assert h % 16 == 0 and w % 16 == 0
        assert h >= below_h - 8 and w >= below_w - 8
        if min(height, width) >= 1024:  # rounding is small there
            assert max(h / below_h, w / below_w) <= factor * 1.1
    if start is None and max(height, width) <= 4 * min(height, width):
        assert stages[0].height * stages[0].width <= 1.1 * native**2 + 16 * (height + width)


def test_the_plan_of_sdxl_at_4096() -> None:
    stages = plan_stages((4096, 4096), (1024, 1024), 8, Staging(strength=0.5))
    assert stages == [Stage(1024, 1024, None), Stage(2048, 2048, 0.5), Stage(4096, 4096, 0.5)]
    panorama = plan_stages((1024, 8192), (1024, 1024), 8, Staging())
    assert (panorama[0].height, panorama[0].width) == (512, 4096)  # longer than native: tiled, but coherent in height


def test_a_small_image_has_one_stage() -> None:
    assert plan_stages((512, 768), (1024, 1024), 8, Staging()) == [Stage(768, 512, None)]
    # A picture of the final size is still refined once.
    assert plan_stages((512, 768), (1024, 1024), 8, Staging(), (512, 768)) == [Stage(768, 512, 0.6)]


def tiny(stages: Any = None, tiling: TilingConfig = MOVING) -> TiledPipeline:
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    return TiledPipeline.from_pipe(pipe, tiling=tiling, stages=stages)


def make(pipe: TiledPipeline, seed: int = 0, **kwargs: Any) -> Any:
    arguments: dict[str, Any] = {"height": 256, "width": 256, "num_inference_steps": 4, "output_type": "pt"}
    return pipe("a coast", generator=torch.Generator().manual_seed(seed), **(arguments | kwargs)).images


def test_the_cost_is_what_the_network_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    areas: list[int] = []
    network = TileDenoiser._network

    def counted(forward: Any, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        areas.append(inputs.shape[0] * inputs.shape[2] * inputs.shape[3])
        return network(forward, inputs, **kwargs)

    monkeypatch.setattr(TileDenoiser, "_network", staticmethod(counted))
    for tiling in (MOVING, RAMP):
        areas.clear()
        pipe = tiny("auto", tiling)
        make(pipe, height=512, width=512, num_inference_steps=5, guidance_scale=1.0)
        plan = plan_call(pipe, {"stages": "auto", "height": 512, "width": 512, "num_inference_steps": 5})
        assert [s.width for s in plan.stages] == [128, 256, 512]
        assert sum(areas) == pytest.approx(64 * 64 * sum(c.canvases for c in plan.costs(5)))


def of_floor(plan: StagePlan, steps: int) -> float:
    costs = plan.costs(steps)
    return sum(cost.canvases for cost in costs) / costs[-1].steps


@pytest.mark.parametrize("native", [32, 64, 128])
@pytest.mark.parametrize("scale", [4, 8])
def test_all_stages_cost_at_most_one_and_a_half_times_the_floor_of_the_last(native: int, scale: int) -> None:
    pipe = tiny()
    pipe.unet.register_to_config(sample_size=native)
    plan = StagePlan(pipe, (8 * native * scale,) * 2, Staging(), moving(tile=native))
    assert of_floor(plan, 10) <= 1.5
    default = moving(tile=native, blend_first=2, blend_last=1, fade=4)
    plan = StagePlan(pipe, (8 * native * scale,) * 2, Staging(), default)
    first, *between, last = (tiling.motion for tiling in plan.tilings())
    assert first == "still" and set(between) <= {Motion(blend_first=0, blend_last=0, fade=4)}
    assert last == Motion(blend_first=0, blend_last=3, fade=4)
    assert of_floor(plan, 10 if scale == 8 else 20) <= 1.5


def test_stages_one_by_one_are_the_librarys_own_calls() -> None:
    pull = Pull(weight=0.5)
    pipe = tiny()
    staged = make(pipe, stages=Staging(strength=0.5, pull=pull, match=False))
    generator = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt", "generator": generator}
    first = pipe("a coast", height=128, width=128, tiling=ONE, **arguments).images
    picture = torch.nn.functional.interpolate(first, (256, 256), mode="bicubic", antialias=True).clamp(0, 1)
    second = pipe("a coast", image=picture, strength=0.5, pull=pull, **arguments).images
    assert torch.equal(staged, second)
    matched = make(pipe, stages=Staging(strength=0.5, pull=pull))
    assert torch.equal(matched, match_colour(second, first))
    assert not torch.allclose(matched, make(pipe, stages=Staging(strength=0.5, pull=None)), atol=1e-3)
    assert torch.equal(make(pipe, stages=None), make(tiny()))  # off by default


def test_the_pipelines_own_stages_and_those_of_a_call() -> None:
    given_ = [Stage(128, 128, None), Stage(192, 256, 0.5)]
    pipe = tiny(given_)
    result = make(pipe, height=256, width=192)
    assert result.shape == (1, 3, 256, 192)
    assert torch.equal(result, make(tiny(), height=256, width=192, stages=given_))
    assert not torch.equal(result, make(pipe, height=256, width=192, stages=None))


def test_batches_and_output_types() -> None:
    pipe = tiny("auto")
    out = pipe(
        ["a coast", "ice"], height=256, width=192, num_inference_steps=2, num_images_per_prompt=2, return_dict=False
    )
    assert isinstance(out, tuple) and [image.size for image in out[0]] == [(192, 256)] * 4
    assert make(pipe, output_type="latent", num_inference_steps=2).shape == (1, 4, 32, 32)


def test_a_photo_is_enlarged_in_stages() -> None:
    photo = Image.effect_noise((128, 96), 60).convert("RGB")
    pipe = tiny()
    plan = plan_call(pipe, {"image": photo, "stages": "auto", "height": 384, "width": 512, "strength": 0.3})
    assert plan.stages == [Stage(256, 192, 0.3), Stage(512, 384, 0.3)]
    result = make(pipe, image=photo, stages="auto", strength=0.5, height=384, width=512)
    assert result.shape == (1, 3, 384, 512)
    same = make(pipe, image=photo, stages="auto", strength=0.5, height=None, width=None)
    assert same.shape == (1, 3, 96, 128)


def test_a_wrapped_first_stage_has_more_than_one_tile() -> None:
    wrapped = moving(wrap=(False, True))
    plan = plan_call(tiny(tiling=wrapped), {"stages": "auto", "height": 256, "width": 256})
    grids = [
        tiling.grid(stage.height // 8, stage.width // 8, 16)
        for stage, tiling in zip(plan.stages, plan.tilings(), strict=True)
    ]
    assert all(grid.tile_size[1] < grid.width for grid in grids)
    assert make(tiny(tiling=wrapped), stages="auto").shape == (1, 3, 256, 256)


@pytest.mark.parametrize("family", [tiny_flux, tiny_sd3])
def test_transformers(family: Any) -> None:
    pipe = TiledPipeline.from_pipe(build(family), tiling=RAMP, stages="auto")
    result = call(pipe, family, (32, 48), output_type="pt")
    assert result.shape == (1, 3, 32 * pipe.vae_scale_factor, 48 * pipe.vae_scale_factor)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"factor": 1.0}, "factor=1.0 must be above 1 and at most 4"),
        ({"factor": math.nan}, "factor=nan"),
        ({"factor": "2"}, "factor='2' must be above 1 and at most 4"),
        ({"match": "no"}, "match='no' must be one of True, False"),
        ({"sizes": [(1, 2, 3)]}, "must be Stages"),
        ({"strength": 0.0}, "strength=0.0 must be above 0 up to 1"),
    ],
)
def test_bad_stagings(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Staging(**kwargs)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(128, 128, None), Stage(192, 192, 0.5)], "last one is 192x192 px, but the call's size is 256x256"),
        ([Stage(128, 128, 0.5), Stage(256, 256, 0.5)], "stage 1 of 128x128 px: strength=0.5: a first stage without"),
        ([Stage(128, 128, None), Stage(256, 256, None)], "stage 2 of 256x256 px: strength=None: a first stage without"),
        ([Stage(130, 128, None), Stage(256, 256, 0.5)], "each side must be a multiple of 8 px"),
        ([Stage(320, 256, None), Stage(256, 256, 0.5)], "stage 2 of 256x256 px: is smaller"),
        ([], "at least one Stage"),
        (Staging(strength=0.2), "strength=0.2 leaves none of 4 steps"),
    ],
)
def test_stages_that_lead_nowhere(stages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny(), stages=stages)


def test_prompts_for_parts_are_of_the_final_size() -> None:
    """A region or a tile's prompt that covers the canvas is the prompt; boxes are scaled to each stage."""
    wanted = make(tiny("auto"))
    whole = Region("a coast", box=(0, 0, 256, 256))
    of_prompt = make(tiny("auto"), regions=[whole])
    torch.testing.assert_close(of_prompt, wanted, rtol=1e-4, atol=1e-4)
    other = make(tiny("auto"), regions=[replace(whole, prompt="a forest")])
    assert (other - wanted).abs().max() > 1e-3
    seen = []
    made = make(tiny("auto"), prompt_for_tile=lambda box: seen.append(box) or "a forest")
    torch.testing.assert_close(made, other, rtol=1e-4, atol=1e-4)
    assert (0, 0, 256, 256) in seen and min(min(box) for box in seen) == 0 and max(max(box) for box in seen) == 256
    assert len({right - left for left, _, right, _ in seen}) > 1  # one tile in the first stage, small ones in the last
    with pytest.raises(
        ValueError, match=r"regions\[0\].box=\(0, 0, 257, 9\): does not lie inside the canvas of 256x256"
    ):
        make(tiny("auto"), regions=[Region("a forest", box=(0, 0, 257, 9))])


def test_regions_scale_with_the_canvas() -> None:
    mask = torch.zeros(64, 96)
    mask[:, 48:] = 1
    box, masked = scale_regions(
        [Region("a", box=(24, 0, 96, 32), feather=16), Region("b", mask=mask, feather=0)], (64, 96), (32, 48)
    )
    assert (box.box, box.feather) == ((12, 0, 48, 16), 8)
    assert masked.mask.shape == (32, 48) and masked.bounds() == (24, 0, 48, 32)
    wrapped = scale_regions([Region("c", box=(60, 0, 156, 64))], (64, 96), (21, 31))[0]
    assert wrapped.box == (19, 0, 50, 21)  # as wide as the canvas, never wider


def test_what_does_not_go_with_stages() -> None:
    pipe = tiny("auto")
    for name, value in (("latents", torch.zeros(1, 4, 32, 32)), ("timesteps", [1]), ("mask_image", 3)):
        with pytest.raises(ValueError, match=f"{name}: not with stages"):
            make(pipe, **{name: value})
    with pytest.raises(ValueError, match="has no guidance_rescale; leave it out"):
        make(pipe, guidance_rescale=0.5)
    with pytest.raises(ValueError, match="256x250: each side must be a multiple of 8 px"):
        make(pipe, height=250)
    for wrong in ("yes", 3, [3]):
        with pytest.raises(TypeError, match="must be None, 'auto', a Staging or a list of Stage"):
            staging(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength=2 must be above 0"):
        Stage(64, 64, 2)
    sibling = TiledPipeline.from_pipe(StableDiffusionImg2ImgPipeline.from_pipe(pipe.pipe), stages="auto")
    with pytest.raises(ValueError, match="StableDiffusionImg2ImgPipeline starts from an image"):
        sibling("a coast", num_inference_steps=2)
    pixart = TiledPipeline.from_pipe(build(tiny_pixart_sigma), stages="auto")
    with pytest.raises(ValueError, match="PixArtSigmaPipeline has no image-to-image pipeline"):
        call(pixart, tiny_pixart_sigma, (32, 32))


@pytest.mark.parametrize("config", [moving(blend_last=1, fade=2, overlap=4), still(overlap=4)])
def test_the_first_stage_is_whole_whatever_the_tiling_of_the_others(config: TilingConfig) -> None:
    first, last = StagePlan(tiny(), (256, 256), Staging(), config).tilings()
    assert first == still(tile=(16, 16)) and last == config.refining()

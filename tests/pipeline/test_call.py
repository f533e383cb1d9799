"""A call as a value: arguments by position, pictures in every form, the default tiling, settings of the sibling."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image
from tiny import tiny_sd
from tiny_transformers import build, tiny_flux

import tiledcore.call
from tiledcore import Region, TiledPipeline, TilingConfig
from tiledcore.call import current_device
from tiledcore.hook import default_tiling


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8))


@pytest.fixture
def pipe() -> TiledPipeline:
    made = TiledPipeline(tiny_sd())
    made.set_progress_bar_config(disable=True)
    return made


REGION = Region("ice", box=(0, 0, 64, 64), seed=1)


def run(pipe: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    kwargs = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)} | kwargs
    return pipe(*args, **kwargs).images


def test_positional_arguments_are_those_of_the_pipeline_that_the_caller_holds(pipe: TiledPipeline) -> None:
    by_name = run(pipe, prompt="a cat", height=160, width=192)
    assert torch.equal(run(pipe, "a cat", 160, 192), by_name)
    image = picture(100, 80)
    refined = run(pipe, "a cat", 160, 192, image=image, strength=0.9)
    assert refined.shape[-2:] == (160, 192)
    assert torch.equal(refined, run(pipe, prompt="a cat", height=160, width=192, image=image, strength=0.9))
    assert run(pipe, "a cat", 256, 256, stages="auto", num_inference_steps=4).shape[-2:] == (256, 256)
    with pytest.raises(TypeError, match="height: given by position and by name"):
        run(pipe, "a cat", 160, height=160)


def test_every_form_of_a_picture_has_a_size(pipe: TiledPipeline) -> None:
    image = picture(168, 136)
    array = np.asarray(image).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = {"PIL": image, "list": [image], "array": array[None], "tensor": tensor[None], "one tensor": tensor}
    for name, form in forms.items():
        assert run(pipe, "a cat", image=form, strength=0.9).shape[-2:] == (136, 168), name
        assert run(pipe, "a cat", image=form, strength=0.9, height=128, width=192).shape[-2:] == (128, 192), name
    mask = Image.fromarray((np.arange(168) > 80).astype(np.uint8)[None].repeat(136, 0) * 255)
    for form in (image, [image], tensor[None]):
        assert run(pipe, "a cat", image=form, mask_image=mask, strength=0.9).shape[-2:] == (136, 168)


def test_a_picture_of_another_size_is_rounded_down_by_one_rule(pipe: TiledPipeline) -> None:
    """263x201 px: the unit is 8 px here, in image-to-image and in inpainting."""
    image, mask = picture(263, 201), Image.new("L", (263, 201), 255)
    assert run(pipe, "a cat", image=image, strength=0.9).shape[-2:] == (200, 256)
    assert run(pipe, "a cat", image=image, mask_image=mask, strength=0.9).shape[-2:] == (200, 256)


def test_the_unit_of_a_packed_family_is_that_of_its_tokens() -> None:
    pipe = TiledPipeline(build(tiny_flux))
    pipe.set_progress_bar_config(disable=True)
    unit = 2 * pipe.vae_scale_factor
    image = picture(9 * unit + 3, 8 * unit + unit - 1)
    assert run(pipe, "a cat", image=image, strength=0.9).shape[-2:] == (8 * unit, 9 * unit)


def test_hidden_colours_and_sixteen_bits(pipe: TiledPipeline) -> None:
    """Alpha is composed on white; 16 bits become 8 and not 2 levels."""
    grey = np.linspace(0, 65535, 128 * 128).reshape(128, 128).astype(np.uint16)
    same = Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
    deep = run(pipe, "a cat", image=Image.fromarray(grey), strength=0.9)
    torch.testing.assert_close(deep, run(pipe, "a cat", image=same, strength=0.9), atol=2 / 255, rtol=0)
    clear = Image.new("RGBA", (128, 128), (255, 0, 0, 0))
    white = run(pipe, "a cat", image=Image.new("RGB", (128, 128), "white"), strength=0.9)
    assert torch.equal(run(pipe, "a cat", image=clear, strength=0.9), white)


def test_settings_reach_the_sibling(pipe: TiledPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    run(pipe, "a cat", image=picture(128, 128), strength=0.9)
    assert capsys.readouterr().err == ""  # the progress bar is off there too

    seen: list[int] = []

    def stop(_: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(index)
        pipe._interrupt = True  # on what the caller holds, not on the sibling that runs
        return kwargs

    arguments = {"image": picture(128, 128), "strength": 0.9, "num_inference_steps": 8}
    assert torch.isfinite(run(pipe, "a cat", callback_on_step_end=stop, **arguments)).all()
    assert seen == [0]


def test_an_interrupted_call_returns_the_canvas_as_it_is(pipe: TiledPipeline) -> None:
    """Whoever sets ``_interrupt`` from outside of a callback gets latents of the whole canvas, not of one pixel."""
    calls = iter(range(100))

    def interrupt(*_: Any) -> None:
        if next(calls) == 5:
            pipe._interrupt = True

    handle = pipe.unet.register_forward_pre_hook(interrupt)
    latents = run(pipe, "a cat", 256, 256, output_type="latent", num_inference_steps=6)
    handle.remove()
    assert latents.shape == (1, 4, 32, 32) and float(latents.std()) > 0.1


def test_a_tiled_pipeline_passes_for_what_it_wraps(pipe: TiledPipeline) -> None:
    assert isinstance(pipe, DiffusionPipeline) and isinstance(pipe, TiledPipeline)
    assert AutoPipelineForImage2Image.from_pipe(pipe).unet is pipe.unet


def test_without_an_autoencoder_there_are_latents() -> None:
    inner = tiny_sd()
    inner.vae = None
    pipe = TiledPipeline(inner)
    assert run(pipe, "a cat", 160, 192, output_type="latent").shape == (1, 4, 20, 24)
    with pytest.raises(ValueError, match="rows, preview: the pipeline has no vae to decode with"):
        run(pipe, "a cat", 160, 192, output_type="latent", preview="now.png")


def schedulers() -> list[str]:
    """Classes that this text-to-image pipeline takes, fused or not."""
    starts = ("DDIM", "DDPM", "DEIS", "DPMS", "EDM", "Euler", "Heun", "IPNDM", "KDPM2", "LCM", "LMS", "PNDM", "TCD")
    more = ("UniPCMultistepScheduler", "SASolverScheduler", "CMStochasticIterativeScheduler")
    # The first is of another architecture, the second needs torchsde.
    other = ("DDPMWuerstchenScheduler", "DPMSolverSDEScheduler")
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and name not in other]
    return [name for name in names if name.startswith(starts) or name in more]


@pytest.mark.parametrize("name", schedulers())
def test_the_default_tiling_runs_with_any_scheduler_set_after_construction(pipe: TiledPipeline, name: str) -> None:
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    latents = run(pipe, "a cat", 160, 256, output_type="latent", num_inference_steps=4)
    assert latents.shape == (1, 4, 20, 32) and torch.isfinite(latents).all()
    assert pipe.tiling == TilingConfig(motion="moving")


def test_the_default_follows_the_pipeline(pipe: TiledPipeline) -> None:
    assert pipe.tiling == default_tiling(pipe.pipe)
    pipe.tiling = TilingConfig(overlap=2)
    assert pipe.tiling.overlap == 2
    pipe.tiling = None
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert pipe.tiling == default_tiling(pipe.pipe)


def test_a_pipeline_on_the_second_gpu_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    with current_device(torch.device("cuda:1")), current_device(torch.device("cpu")):
        assert entered == [torch.device("cuda:1")]


def test_a_call_makes_the_pipelines_device_the_current_one(
    pipe: TiledPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[Any] = []
    monkeypatch.setattr(tiledcore.call, "current_device", lambda device: entered.append(device) or nullcontext())
    run(pipe, "a cat", 160, 256, output_type="latent", num_inference_steps=1)
    assert entered == [pipe.device]


def test_pipelines_that_cannot_be_tiled_say_so_in_one_line() -> None:
    class IFPipeline:
        """Works on pixels, as DeepFloyd IF does."""

        unet = tiny_sd().unet

    with pytest.raises(TypeError, match="pipe=IFPipeline: has no autoencoder; tiling needs a latent pipeline"):
        TiledPipeline(IFPipeline())
    sizeless = tiny_sd()
    sizeless.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="UNet2DConditionModel names no native size"):
        TiledPipeline(sizeless)("a cat")
    adapted = tiny_sd()
    adapted.adapter = adapted.unet
    with pytest.raises(ValueError, match="stages: StableDiffusionPipeline is not refined in stages"):
        TiledPipeline(adapted)("a cat", 256, 256, stages="auto")


@pytest.mark.parametrize("make", [tiny_sd, lambda: build(tiny_flux)], ids=["sd", "flux"])
@pytest.mark.parametrize("returns", [False, True])
def test_a_callback_may_change_the_latents_in_place(make: Any, returns: bool) -> None:
    def halve(_: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            given["latents"].mul_(0.5)
        return given if returns else {}

    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    size = 16 * pipe.vae_scale_factor  # one tile: diffusers' own result is the right one
    arguments = {"height": size, "width": size, "output_type": "latent", "num_inference_steps": 4}
    own = run(pipe, "a cat", callback_on_step_end=halve, **arguments)
    found = run(TiledPipeline(pipe, TilingConfig(tile=16)), "a cat", callback_on_step_end=halve, **arguments)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(own, run(pipe, "a cat", **arguments), atol=1e-2)


def test_settings_that_would_do_nothing_are_refused() -> None:
    for more in ({"window": "mean"}, {"mode": "canvas"}):
        with pytest.raises(ValueError, match="ramp=4: only for mode='tiles' with window='ramp'"):
            TilingConfig(ramp=4, **more)


def test_a_setting_acts_when_it_is_set_later(tmp_path: Any) -> None:
    pipe = TiledPipeline(tiny_sd())
    pipe.memory_budget = "1MiB"
    with pytest.raises(ValueError, match="preview: its decode is not counted by the memory_budget"):
        pipe("a cat", preview=tmp_path / "now.png")
    pipe.memory_budget, pipe.cuda_graph = None, True
    with pytest.raises(RuntimeError, match="cuda_graph=True: "):
        run(pipe, "a cat", num_inference_steps=1)
    wrong: dict[str, Any] = {"memory_budget": "a lot", "cuda_graph": "yes", "fused": "no", "parallel": True}
    wrong |= {"stages": "all", "execution": 4, "tiling": {"tile": 16}}
    for name, value in wrong.items():
        with pytest.raises((ValueError, TypeError), match=f"=.?{value}"):
            setattr(pipe, name, value)
        with pytest.raises((ValueError, TypeError), match=f"=.?{value}"):
            TiledPipeline(pipe.pipe, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0}, "height=0 must be an int of at least 1"),
        ({"width": 128.0}, "width=128.0 must be an int of at least 1"),
        ({"num_inference_steps": -1}, "num_inference_steps=-1 must be an int of at least 1"),
        ({"strength": "a"}, "strength='a' must be a number from 0 to 1"),
        ({"image": picture(128, 128), "strength": 0.01}, "strength=0.01: leaves none of num_inference_steps=2"),
        ({"image": picture(128, 128), "strength": 0}, "strength=0: leaves none of num_inference_steps=2"),
        ({"image": picture(256, 256), "strength": 0.9, "stages": "auto", "regions": [REGION]}, "regions: a seed is of"),
        ({"regions": REGION}, "regions: must be a list"),
        ({"prompt_for_tile": "ice"}, "prompt_for_tile='ice': must be a function"),
        ({"pull": True}, "pull=True: must be"),
        ({"rows": 3}, "rows=3: must be a function"),
        ({"image": np.full((128, 128, 3), 200.0), "keep_colour": True}, "image: has values from 200 to 200"),
        ({"tiling": {"tile": 16}}, "tiling={'tile': 16}: must be"),
        ({"strength": 0.5}, "strength: StableDiffusionPipeline has no such argument"),
        ({"region": [REGION]}, "region: StableDiffusionPipeline has no such argument"),
    ],
)
def test_what_an_argument_cannot_be_is_named(pipe: TiledPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        run(pipe, "a cat", **arguments)


def test_one_side_alone_is_that_side(pipe: TiledPipeline) -> None:
    """Stable Diffusion ignores a height without a width."""
    assert run(pipe, "a cat", height=np.int64(160)).shape[-2:] == (160, 128)
    assert run(pipe, "a cat", width=160, stages="auto").shape[-2:] == (128, 160)


def test_a_tiling_from_json_is_that_of_tuples() -> None:
    made = TilingConfig(tile=[16, 8], overlap=[4, 2], wrap=[False, True])  # type: ignore[arg-type]
    assert made == TilingConfig(tile=(16, 8), overlap=(4, 2), wrap=(False, True)) and hash(made)

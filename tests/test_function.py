"""tile and sample: any function of a tile, without a pipeline."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from tilings import MOVING, RAMP, canvas_mode, moving, still
from tiny import SCHEDULE, TEXT_WIDTH, tiny_unet

import tiledcore
from tiledcore import Execution, TilingConfig

CANVAS = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [RAMP, MOVING, still(overlap=4, wrap=True), still(tile=64)])
def test_a_pointwise_function_is_the_function_of_the_canvas(config: TilingConfig) -> None:
    level, shift = torch.rand(2, 1, 40, 56), torch.tensor([1.0, 2.0])

    def fn(x: torch.Tensor, time: float, level: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return (x.sin() * level + shift[:, None, None, None] * time)[:, :2]

    tiled = tiledcore.tile(fn, config, Execution(tile_batch=3))
    torch.testing.assert_close(tiled(CANVAS, 0.5, level, shift), fn(CANVAS, 0.5, level, shift))


def test_a_module_sees_tile_batches_and_a_wrapped_canvas_has_no_border() -> None:
    blur = torch.nn.Conv2d(3, 3, 5, padding=2)
    sizes: list[Any] = []
    blur.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    config = still(overlap=8, wrap=True, window="ramp", ramp=1)
    with torch.no_grad():
        made = tiledcore.tile(blur, config, Execution(tile_batch=4))(CANVAS)
        assert max(sizes) == (8, 3, 16, 16)  # four tiles of two images
        around = torch.nn.functional.pad(CANVAS, (2, 2, 2, 2), mode="circular")
        plain = torch.nn.functional.conv2d(around, blur.weight, blur.bias)
    torch.testing.assert_close(made, plain)  # cores meet in the middle of the overlap, far from a tile's border


def diffusers_loop(denoise: Any, noise: torch.Tensor, scheduler: Any) -> torch.Tensor:
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    generator = torch.Generator().manual_seed(1)
    own = {} if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else {"generator": generator}
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(denoise(x, t), t, latents, **own).prev_sample
    return latents


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**SCHEDULE, clip_sample=False),
        DDIMScheduler(**SCHEDULE, clip_sample=True),  # not linear: its own step
        DDPMScheduler(**SCHEDULE, clip_sample=False),
        EulerDiscreteScheduler(**SCHEDULE),
        FlowMatchEulerDiscreteScheduler(),
    ],
)
@pytest.mark.parametrize("config", [still(tile=32), RAMP, moving(blend_last=1)])
def test_the_loop_is_that_of_diffusers(scheduler: Any, config: TilingConfig) -> None:
    unet = tiny_unet(cross_attention_dim=TEXT_WIDTH)
    text = torch.randn(1, 8, TEXT_WIDTH, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(1, 4, 24, 32, generator=torch.Generator().manual_seed(3))

    def fn(x: torch.Tensor, t: Any, text: torch.Tensor) -> torch.Tensor:
        return unet(x, t, encoder_hidden_states=text).sample

    scheduler.set_timesteps(4)
    made = tiledcore.sample(fn, noise, scheduler, config, text, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(4)
    denoiser, forward = tiledcore.function._denoiser(fn, config, None)
    denoiser.timesteps = lambda: scheduler.timesteps.tolist()
    with torch.no_grad():
        plain = diffusers_loop(lambda x, t: denoiser(forward, x, t, args=(t, text)), noise, scheduler)
    torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4)


def test_the_loop_is_that_of_a_pipeline() -> None:
    """The embedded model with guidance, once as a pipeline and once as a function."""
    pipe = tiledcore.TiledPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, pipe.unet.config.in_channels, 40, 56, generator=torch.Generator().manual_seed(0))
    text, empty = pipe.encode_prompt("a rugged coast", "cpu", 1, True)
    call = {"prompt_embeds": text, "negative_prompt_embeds": empty, "num_inference_steps": 3, "guidance_scale": 3.0}
    config = TilingConfig(tile=32, overlap=8)
    plain = pipe(tiling=config, latents=noise, height=320, width=448, output_type="latent", **call).images

    def fn(x: torch.Tensor, t: Any, text: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        both = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([empty, text])).sample
        without, with_text = both.chunk(2)
        return without + 3.0 * (with_text - without)

    pipe.scheduler.set_timesteps(3)
    made = tiledcore.sample(fn, noise, pipe.scheduler, config, text, empty)
    torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [(TilingConfig(), "tile=None"), (canvas_mode(), "mode='canvas'"), (moving(fade=3), "fade=3: only a TiledPipeline")],
)
def test_what_a_function_cannot_have_is_named(config: TilingConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiledcore.tile(torch.sin, config)


def test_a_result_of_another_size_and_motion_without_a_time_are_named() -> None:
    with pytest.raises(ValueError, match=r"fn: gave \(8, 3, 8, 8\) for tiles of \(8, 3, 16, 16\)"):
        tiledcore.tile(lambda x: x[..., ::2, ::2], RAMP)(CANVAS)
    with pytest.raises(ValueError, match="motion: tiles move with the first argument"):
        tiledcore.tile(torch.sin, MOVING)(CANVAS)


@pytest.mark.parametrize("config", [RAMP, MOVING, still(tile=64)])
def test_a_result_is_the_callers_own_and_has_no_gradient(config: TilingConfig) -> None:
    network = torch.nn.Conv2d(3, 3, 1)
    tiled = tiledcore.tile(lambda x, time: network(x), config)
    first = tiled(CANVAS, 1)
    before = first.clone()
    tiled(CANVAS + 1, 2)
    assert torch.equal(first, before) and not first.requires_grad


@pytest.mark.parametrize("config", [RAMP, MOVING])
@pytest.mark.parametrize(
    "change", [lambda x, i: x[:, : 1 + i % 2], lambda x, i: x if i % 2 else x.double()], ids=["channels", "dtype"]
)
def test_tiles_of_several_kinds_are_named(config: TilingConfig, change: Any) -> None:
    calls = iter(range(100))
    tiled = tiledcore.tile(lambda x, time: change(x, next(calls)), config, Execution(tile_batch=1))
    with pytest.raises(ValueError, match=r"the network gave \d channels of torch.float\d\d for some tiles, and"):
        tiled(CANVAS, 1)


@pytest.mark.parametrize("canvas", [CANVAS[0], CANVAS[:0], CANVAS.long(), CANVAS.numpy(), None])
def test_what_is_no_canvas_is_named(canvas: Any) -> None:
    with pytest.raises(ValueError, match="x: must be a tensor"):
        tiledcore.tile(torch.nn.Identity(), RAMP)(canvas)
    with pytest.raises(TypeError, match="must be a function and a TilingConfig"):
        tiledcore.tile(canvas, RAMP)


@pytest.mark.parametrize("tile_batch", [1, 2, 4])  # of nine tiles: the last batch has one, too
def test_a_function_may_write_into_its_arguments(tile_batch: int) -> None:
    x, scale = torch.ones(1, 1, 32, 32), torch.ones(1, 1, 1, 1)
    tiled = tiledcore.tile(lambda x, scale: x * scale.mul_(2), RAMP, Execution(tile_batch))
    torch.testing.assert_close(tiled(x, scale), 2 * x)
    assert scale == 1


@pytest.mark.parametrize("config", [RAMP, MOVING])
def test_a_call_in_inference_mode_does_not_spoil_the_next(config: TilingConfig) -> None:
    x = torch.randn(1, 2, 32, 32)
    tiled = tiledcore.tile(lambda x, time: x + time, config)
    with torch.inference_mode():
        first = tiled(x, 1.0)
    assert torch.equal(tiled(x, 1.0), first)

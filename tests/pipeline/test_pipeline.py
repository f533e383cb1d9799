"""apply_tiling and TiledPipeline on tiny pipelines of the real classes."""

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForInpainting,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from tilings import CANVAS, ONE, canvas_mode, moving, still
from tiny import tiny_sd, tiny_sdxl

from tiledcore import Execution, TiledPipeline, TilingConfig, apply_tiling, ops, remove_tiling

TILES = still(overlap=4)


def run(pipe: Any, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    defaults = {"prompt": "a coast", "num_inference_steps": 2, "output_type": "latent"}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**{**defaults, **kwargs}, generator=generator).images


@pytest.fixture(params=[tiny_sd, tiny_sdxl])
def pipe(request: pytest.FixtureRequest) -> Any:
    made = request.param()
    made.set_progress_bar_config(disable=True)
    return made


def test_one_tile_is_the_untiled_pipeline(pipe: Any) -> None:
    plain = run(pipe, height=128, width=128)
    assert torch.equal(run(apply_tiling(pipe, ONE), height=128, width=128), plain)


def test_removal_is_bit_identical(pipe: Any) -> None:
    plain = run(pipe, height=192, width=160)
    tiled = run(apply_tiling(pipe, TILES), height=192, width=160)
    assert not torch.equal(tiled, plain)
    assert torch.equal(run(remove_tiling(pipe), height=192, width=160), plain)
    assert torch.equal(run(remove_tiling(pipe), height=192, width=160), plain)


def test_applying_twice_keeps_the_second(pipe: Any) -> None:
    once = run(apply_tiling(pipe, TILES), height=192, width=160)
    apply_tiling(pipe, still(tile=8))
    assert torch.equal(run(apply_tiling(pipe, TILES), height=192, width=160), once)


@pytest.mark.parametrize("size", [(136, 264), (8, 200), (64, 64), (328, 128)])
def test_any_size_that_the_vae_allows(pipe: Any, size: tuple[int, int]) -> None:
    apply_tiling(pipe, TILES, Execution(tile_batch=3))
    images = run(pipe, height=size[0], width=size[1], output_type="np", num_inference_steps=1)
    assert images.shape == (1, *size, 3)


def test_tile_batch_does_not_matter(pipe: Any) -> None:
    batches = [Execution(tile_batch=n) for n in (1, 2, 7, 100)]
    results = [run(apply_tiling(pipe, TILES, batch), height=200, width=264) for batch in batches]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler])
def test_the_scheduler_steps_once_for_the_canvas(pipe: Any, scheduler: Any) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    calls: list[torch.Size] = []
    step = pipe.scheduler.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape)
        return step(*args, **kwargs)

    pipe.scheduler.step = counted
    run(apply_tiling(pipe, TILES), height=192, width=160, num_inference_steps=4)
    assert calls == [torch.Size((1, 4, 24, 20))] * len(pipe.scheduler.timesteps)


def test_a_shifted_wrapped_grid_needs_no_overlap(pipe: Any) -> None:
    config = moving(wrap=True)
    first = run(apply_tiling(pipe, config), height=256, width=256)
    assert torch.equal(run(pipe, height=256, width=256), first)
    other = moving(wrap=True, seed=1)
    assert not torch.equal(run(apply_tiling(pipe, other), height=256, width=256), first)


def test_callbacks_guidance_and_batches_still_work(pipe: Any) -> None:
    apply_tiling(pipe, TILES)
    seen: list[tuple[int, torch.Size]] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else tensors

    kwargs: dict[str, Any] = {"height": 192, "width": 160, "num_images_per_prompt": 2}
    images = run(pipe, prompt=["a coast", "ice"], negative_prompt=["x", "y"], **kwargs)
    assert images.shape == (4, 4, 24, 20)
    assert run(pipe, guidance_scale=1.0, **kwargs).shape == (2, 4, 24, 20)
    final = run(pipe, callback_on_step_end=callback, **kwargs)
    assert seen == [(0, torch.Size((2, 4, 24, 20))), (1, torch.Size((2, 4, 24, 20)))]
    assert not final.any()


def test_each_image_of_a_batch_is_what_it_is_alone() -> None:
    pipe = apply_tiling(tiny_sd(), TILES)
    prompts = ["a coast", "ice"]
    kwargs: dict[str, Any] = {"height": 192, "width": 160, "num_inference_steps": 2}

    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = pipe(prompts, generator=seeded(1, 2), output_type="latent", **kwargs).images
    for i, prompt in enumerate(prompts):
        alone = pipe([prompt], generator=seeded(i + 1), output_type="latent", **kwargs).images
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_lora_changes_the_tiled_result_and_can_be_switched_off(pipe: Any) -> None:
    from peft import LoraConfig

    apply_tiling(pipe, TILES)
    plain = run(pipe, height=192, width=160)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(lora)
    assert not torch.allclose(run(pipe, height=192, width=160), plain)
    pipe.unet.disable_adapters()
    torch.testing.assert_close(run(pipe, height=192, width=160), plain)


@pytest.mark.parametrize("make", [tiny_sd, pytest.param(tiny_sdxl, marks=pytest.mark.slow)])
def test_a_compiled_unet_is_called_on_tile_batches_of_one_shape(make: Any) -> None:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    expected = run(apply_tiling(pipe, TILES), height=256, width=256)
    remove_tiling(pipe)
    unet, shapes = pipe.unet, set[torch.Size]()

    def backend(graph: Any, inputs: list[torch.Tensor]) -> Any:
        def call(*args: torch.Tensor) -> Any:
            shapes.update(a.shape for a in args if a.ndim == 4 and a.shape[0] == 8 and a.shape[1] == 4)
            return graph(*args)

        return call

    pipe.unet = torch.compile(unet, backend=backend, dynamic=False)
    try:
        torch.testing.assert_close(run(apply_tiling(pipe, TILES), height=256, width=256), expected)
        remove_tiling(pipe)
    finally:
        pipe.unet = unet
        torch._dynamo.reset()
    assert torch.Size((8, 4, 16, 16)) in shapes
    assert torch.Size((8, 4, 32, 32)) not in shapes


def test_inpainting_keeps_its_mask_and_tiles(pipe: Any) -> None:
    inpaint = AutoPipelineForInpainting.from_pipe(pipe)
    inpaint.set_progress_bar_config(disable=True)
    image = Image.effect_noise((160, 192), 60).convert("RGB")
    mask = Image.new("L", (160, 192))
    mask.paste(255, (80, 0, 160, 192))
    kwargs: dict[str, Any] = {"image": image, "mask_image": mask, "height": 192, "width": 160, "strength": 1.0}
    tiled = run(apply_tiling(inpaint, TILES), **kwargs)
    plain = run(remove_tiling(inpaint), **kwargs)
    assert torch.equal(tiled[..., :10], plain[..., :10])  # outside the mask both are the image
    assert not torch.allclose(tiled[..., 10:], plain[..., 10:])


def test_image_to_image_through_both_doors() -> None:
    pipe = tiny_sd()
    image = Image.effect_noise((160, 192), 60).convert("RGB")
    sibling = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    kwargs: dict[str, Any] = {"image": image, "strength": 0.5, "num_inference_steps": 4}
    expected = run(apply_tiling(sibling, TILES), **kwargs)
    remove_tiling(sibling)
    wrapped = TiledPipeline.from_pipe(pipe, tiling=TILES)
    ours = run(wrapped, **kwargs)  # with one fused step where diffusers has several
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert run(wrapped, height=256, width=128, **kwargs).shape == (1, 4, 32, 16)
    assert run(TiledPipeline.from_pipe(sibling, tiling=TILES), **kwargs).equal(ours)


def test_the_wrapper_is_the_same_pipeline(pipe: Any, tmp_path: Any) -> None:
    expected = run(apply_tiling(pipe, TILES), height=192, width=160)
    remove_tiling(pipe)
    wrapped = TiledPipeline.from_pipe(pipe, tiling=TILES)
    torch.testing.assert_close(run(wrapped, height=192, width=160), expected, rtol=1e-5, atol=1e-5)
    wrapped.fused = False
    assert torch.equal(run(wrapped, height=192, width=160), expected)
    wrapped.fused = True
    output = wrapped("a coast", height=64, width=64, num_inference_steps=1)
    assert type(output) is type(pipe("a coast", height=64, width=64, num_inference_steps=1))
    assert isinstance(output.images[0], Image.Image)
    wrapped.scheduler = UniPCMultistepScheduler.from_config(wrapped.scheduler.config)
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler)
    assert wrapped.to("cpu") is wrapped
    pipe.save_pretrained(tmp_path)
    opened = TiledPipeline.from_pretrained(tmp_path, tiling=TILES)
    # Not bit for bit: weights mapped from a file are aligned otherwise, and CPU kernels round otherwise.
    torch.testing.assert_close(run(opened, height=192, width=160), run(wrapped, height=192, width=160))


def test_tiling_and_execution_are_of_one_call_or_of_all() -> None:
    wrapped = TiledPipeline.from_pipe(tiny_sd(), tiling=TILES)
    wrapped.set_progress_bar_config(disable=True)
    rows: list[int] = []
    hook = wrapped.unet.register_forward_pre_hook
    hook(lambda module, args, kwargs: rows.append(len(kwargs["sample"])), with_kwargs=True)

    def seen(**kwargs: Any) -> list[int]:
        rows.clear()
        run(wrapped, height=192, width=160, num_inference_steps=1, **kwargs)
        return list(rows)

    assert seen() == [8]  # four tiles, each of both guidance branches
    assert seen(execution=Execution(tile_batch=3)) == [6, 2]
    wrapped.execution = Execution(tile_batch=2)
    assert seen() == [4, 4]
    assert seen(tiling=still(tile=32)) == [2]
    assert seen() == [4, 4]
    wrapped.tiling = still(tile=32)
    assert seen() == [2]
    wrapped.tiling = None
    assert wrapped.tiling == TilingConfig(motion="moving")  # the default of a UNet


def test_the_wrapped_pipeline_stays_untiled_even_after_an_error(pipe: Any) -> None:
    plain = run(pipe, height=192, width=160)
    wrapped = TiledPipeline.from_pipe(pipe, tiling=TILES)

    def fail(*args: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(wrapped, height=192, width=160, callback_on_step_end=fail)
    assert torch.equal(run(pipe, height=192, width=160), plain)


def test_a_tiling_that_was_there_before_comes_back(pipe: Any) -> None:
    before = run(apply_tiling(pipe, TILES), height=192, width=160)
    run(TiledPipeline.from_pipe(pipe, tiling=still(tile=8)), height=192, width=160)
    assert torch.equal(run(pipe, height=192, width=160), before)


def test_a_vae_without_bands_is_tiled_where_the_image_is_too_large(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiledcore.call.EXACT_DECODE_PIXELS", 64 * 64)
    monkeypatch.setattr("tiledcore.call.why_not_exact", lambda vae, pixels: "it is of another class")
    used: list[bool] = []
    decode = AutoencoderKL.decode

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        used.append(self.use_tiling)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", spy)
    wrapped = TiledPipeline.from_pipe(pipe, tiling=TILES)
    for size in (64, 72):
        run(wrapped, height=size, width=size, output_type="np", num_inference_steps=1)
    assert used == [False, True]
    assert not pipe.vae.use_tiling


def test_what_cannot_be_tiled_is_named() -> None:
    with pytest.raises(TypeError, match="pipe=int"):
        apply_tiling(3)
    pipe = apply_tiling(tiny_sd(), TILES)
    with pytest.raises(ValueError, match="divisible by 8"):
        run(pipe, height=130, width=128)


def test_settings_of_canvas_mode_reach_the_network(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    attention = ops.neighbor_attention

    def spy(q: torch.Tensor, *others: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append({**kwargs, "images": len(q)})
        return attention(q, *others, **kwargs)

    monkeypatch.setattr("tiledcore.canvas.processors.ops.neighbor_attention", spy)
    config = canvas_mode(halo=(4, 2), wrap=(False, True))
    lean = Execution(guidance_batch=False, impl="reference")
    size = {"height": 192, "width": 160, "num_inference_steps": 1}
    one_by_one = run(TiledPipeline.from_pipe(pipe, tiling=config, execution=lean), **size)
    finest = [call for call in calls if call["canvas"] == (24, 20)]
    assert {(c["tile"], c["halo"], c["wrap"]) for c in finest} == {((16, 16), (4, 2), (False, True))}
    assert {(c["images"], c["impl"]) for c in calls} == {(1, "reference")}
    calls.clear()
    both = run(TiledPipeline.from_pipe(pipe, tiling=config), **size)
    assert {(c["images"], c["impl"]) for c in calls} == {(2, None)}
    torch.testing.assert_close(one_by_one, both, rtol=1e-4, atol=1e-4)


def test_a_compiled_unet_runs_in_canvas_mode() -> None:
    pipe, config = tiny_sd(), CANVAS
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 192, "width": 160, "num_inference_steps": 1}
    plain, expected = run(pipe, **size), run(apply_tiling(pipe, config), **size)
    remove_tiling(pipe)
    unet = pipe.unet
    pipe.unet = torch.compile(unet, backend="eager")
    try:
        torch.testing.assert_close(run(apply_tiling(pipe, config), **size), expected, rtol=1e-4, atol=1e-4)
        remove_tiling(pipe)
    finally:
        pipe.unet = unet
        torch._dynamo.reset()
    assert torch.equal(run(pipe, **size), plain)  # no hook is left on the network inside

"""Tile mode on tiny transformer pipelines of the real classes."""

from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from tilings import moving, still
from tiny_transformers import (
    ALL,
    CHANNELS,
    NATIVE,
    PACKED,
    build,
    call,
    canvas,
    side,
    tiles,
    tiny_flux,
    tiny_pixart_alpha,
    tiny_pixart_sigma,
    tiny_qwen,
    tiny_sana,
    tiny_sd3,
    tiny_z_image,
)

from tiledcore import Execution, TiledPipeline, TilingConfig, apply_tiling, remove_tiling
from tiledcore.hook import tiled
from tiledcore.tiles.families import network_of, to_image, to_tokens


def static(pipe: Any) -> Any:
    """The same noise levels at every size."""
    if pipe.scheduler.config.get("use_dynamic_shifting"):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipe


@pytest.mark.parametrize("make", ALL)
def test_one_tile_is_the_untiled_pipeline(make: Any) -> None:
    pipe, size = build(make), (side(make), side(make))
    plain = call(pipe, make, size)
    assert torch.isfinite(plain).all()
    assert torch.equal(call(apply_tiling(pipe, tiles(make)), make, size), plain)


@pytest.mark.parametrize("make", ALL)
def test_a_larger_canvas_and_back(make: Any) -> None:
    pipe, size = build(make), canvas(make)
    plain = call(pipe, make, size)
    results = [call(apply_tiling(pipe, tiles(make), Execution(n)), make, size) for n in (3, 3, 1, 100)]
    assert results[0].shape == plain.shape
    assert torch.isfinite(results[0]).all()
    assert torch.equal(results[0], results[1])
    for result in results[2:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0], plain)
    assert torch.equal(call(remove_tiling(pipe), make, size), plain)
    assert "set_timesteps" not in vars(pipe.scheduler)


@pytest.mark.parametrize("make", ALL)
def test_tiles_that_move_need_no_overlap(make: Any) -> None:
    pipe, size = build(make), canvas(make)
    results = []
    for n in (2, 100):
        apply_tiling(pipe, moving(tile=side(make)), Execution(n))
        results.append(call(pipe, make, size))
    assert torch.isfinite(results[0]).all()
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    small = call(pipe, make, (2, 2))  # within one tile, which is then no multiple of anything but a token
    assert torch.equal(call(remove_tiling(pipe), make, (2, 2)), small)


@pytest.mark.parametrize("make", ALL)
def test_images_have_the_size_that_was_asked_for(make: Any) -> None:
    wrapped = TiledPipeline.from_pipe(build(make), tiling=tiles(make), execution=Execution(tile_batch=100))
    size = (10, 6) if make is tiny_sana else (26, 18)
    images = call(wrapped, make, size, output_type="np")
    assert images.shape == (1, size[0] * wrapped.vae_scale_factor, size[1] * wrapped.vae_scale_factor, 3)


@pytest.mark.parametrize("make", ALL)
def test_tiles_and_what_belongs_to_an_image_stay_together(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is a function of each pixel and of what else belongs to the image gives the same canvas."""
    pipe, size = static(build(make)), canvas(make)
    seen: list[int] = []

    def row(value: Any, i: int) -> torch.Tensor:
        return value[i].float().mean()

    def forward(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        images = kwargs["x"] if "x" in kwargs else args[0] if args else kwargs["hidden_states"]
        captions = kwargs.get("cap_feats", args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states"))
        time = kwargs.get("t", args[1] if len(args) > 1 else kwargs.get("timestep"))
        names = ("encoder_attention_mask", "encoder_hidden_states_mask", "pooled_projections", "guidance")
        rows = [kwargs[name] for name in names if kwargs.get(name) is not None]
        assert len(images) == len(captions) == len(time)
        assert all(len(value) == len(images) for value in rows)
        seen.append(len(images))
        out = []
        for i, image in enumerate(images):
            offset = row(captions, i) + row(time, i) / 1000 + sum(row(value, i) for value in rows)
            out.append(0.5 * image + torch.sin(3 * image) + offset)
        if isinstance(images, list):
            return (out,)
        out = torch.stack(out)
        return (torch.cat([out, out], dim=1) if make in (tiny_pixart_alpha, tiny_pixart_sigma) else out,)

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    plain = call(pipe, make, size, images=2)
    whole = max(seen)
    for config in (moving(tile=side(make)), tiles(make)):
        seen.clear()
        apply_tiling(pipe, config, Execution(tile_batch=3))
        torch.testing.assert_close(call(pipe, make, size, images=2), plain, rtol=1e-5, atol=1e-5)
    assert max(seen) == 3 * whole
    assert not torch.allclose(plain[0], plain[1])


def calls_of(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments that the network itself gets from now on."""
    seen: list[dict[str, Any]] = []
    forward = pipe.transformer.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", spy)
    return seen


def test_a_flux_tile_has_the_positions_of_an_image_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build(tiny_flux)
    seen = calls_of(pipe, monkeypatch)
    call(pipe, tiny_flux, (NATIVE, NATIVE))
    native = seen[0]["img_ids"]
    seen.clear()
    call(apply_tiling(pipe, tiles(tiny_flux)), tiny_flux, (22, 32))
    for arguments in seen:
        assert arguments["img_ids"].dtype == native.dtype
        assert torch.equal(arguments["img_ids"], native)
        assert arguments["hidden_states"].shape[1:] == (64, 4 * CHANNELS)
        assert arguments["txt_ids"].shape == (16, 3)


def test_flux_finds_the_canvas_where_bfloat16_rounds_its_positions() -> None:
    ids = tiny_flux_ids(2, 514)
    assert float(ids[-1, 2]) != 513  # what is to be survived
    tokens = torch.arange(2.0 * 514).view(1, -1, 1)
    arguments = {"hidden_states": tokens, "img_ids": ids}
    _, family = network_of(build(tiny_flux))
    assert torch.equal(family.canvas(arguments), tokens.view(1, 1, 2, 514))
    assert torch.equal(family.canvas({**arguments, "img_ids": ids[None]}), tokens.view(1, 1, 2, 514))


def tiny_flux_ids(height: int, width: int) -> torch.Tensor:
    return build(tiny_flux)._prepare_latent_image_ids(1, height, width, "cpu", torch.bfloat16)


def test_a_qwen_tile_has_the_shape_of_an_image_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build(tiny_qwen)
    seen = calls_of(pipe, monkeypatch)
    call(apply_tiling(pipe, tiles(tiny_qwen), Execution(tile_batch=3)), tiny_qwen, (22, 32), images=2)
    assert {str(arguments["img_shapes"]) for arguments in seen} == {str([[(1, 8, 8)]] * 6)}


def test_pixart_alpha_tiles_have_their_own_size_as_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build(tiny_pixart_alpha)
    seen = calls_of(pipe, monkeypatch)
    config = still(tile=(16, 8), overlap=0)
    call(apply_tiling(pipe, config, Execution(tile_batch=2)), tiny_pixart_alpha, (32, 16), images=2)
    for arguments in seen:
        conditions = arguments["added_cond_kwargs"]
        assert conditions["resolution"].tolist() == [[128.0, 64.0]] * 8  # 2 tiles, 2 images, 2 guidance branches
        assert conditions["aspect_ratio"].tolist() == [[2.0]] * 8


def test_packing_and_back() -> None:
    image = torch.randn(2, 3, 4, 5)
    assert torch.equal(to_tokens(image)[1, 5 * 2 + 3], image[1, :, 2, 3])
    assert torch.equal(to_image(to_tokens(image), (4, 5)), image)


@pytest.mark.parametrize("make", ALL)
def test_the_default_tile_is_the_size_of_the_training(make: Any) -> None:
    with tiled(build(make), TilingConfig()) as hook:
        denoiser = hook.denoiser
    # Z-Image's is not in its configuration: 1024 px. PixArt-α's tiny network has the real one's.
    native = {tiny_z_image: 128, tiny_pixart_alpha: 128}.get(make, side(make))
    unit = 2 if make in PACKED else 1
    tiling = denoiser.tiling(2 * native // unit, 2 * native // unit, 0)
    assert tiling.tile_size == (native // unit, native // unit)
    assert tiling.overlap == (native // 8 // unit, native // 8 // unit)


# --- what a pipeline's own call offers


@pytest.mark.parametrize("make", PACKED)
def test_true_guidance_callbacks_and_batches_still_work(make: Any) -> None:
    pipe = apply_tiling(build(make), tiles(make))
    shapes: list[torch.Size] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        shapes.append(tensors["latents"].shape)
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else tensors

    size = canvas(make)
    guided = {"true_cfg_scale": 3.0} | ({"negative_prompt": ["x", "y"]} if make is tiny_flux else {})
    shape = torch.Size((4, size[0] * size[1] // 4, 4 * CHANNELS))
    result = call(pipe, make, size, images=2, num_images_per_prompt=2, **guided)
    assert result.shape == shape
    plain = call(pipe, make, size, images=2, num_images_per_prompt=2, true_cfg_scale=1.0)
    assert not torch.allclose(result, plain)
    final = call(pipe, make, size, images=2, num_images_per_prompt=2, callback_on_step_end=callback, **guided)
    assert shapes == [shape, shape]
    assert not final.any()


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux, tiny_z_image])
def test_image_to_image_keeps_the_size_of_the_image(make: Any) -> None:
    wrapped = TiledPipeline.from_pipe(build(make), tiling=tiles(make))
    image = Image.effect_noise((208, 160), 60).convert("RGB")
    kwargs = {"image": image, "strength": 0.5, "height": None, "width": None}
    result = call(wrapped, make, (1, 1), **kwargs, output_type="np")
    assert result.shape == (1, 160, 208, 3)
    resized = call(wrapped, make, (1, 1), **{**kwargs, "height": 176}, output_type="np")
    assert resized.shape == (1, 176, 208, 3)


def test_skip_layer_guidance_runs_on_the_same_tiles() -> None:
    pipe = build(tiny_sd3)
    skip = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    results = []
    for n in (1, 4):
        apply_tiling(pipe, tiles(tiny_sd3), Execution(n))
        results.append(call(pipe, tiny_sd3, (22, 24), **skip))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(call(pipe, tiny_sd3, (22, 24)), results[0])
    one = call(pipe, tiny_sd3, (16, 16), **skip)
    assert torch.equal(call(remove_tiling(pipe), tiny_sd3, (16, 16), **skip), one)


@pytest.mark.parametrize("make", [tiny_pixart_sigma, tiny_sana])
def test_binning_is_off_unless_asked_for(make: Any) -> None:
    """There is no table of trained sizes for networks as small as these: with binning the pipelines refuse them."""
    wrapped = TiledPipeline.from_pipe(build(make), tiling=tiles(make))
    off = call(wrapped, make, canvas(make), use_resolution_binning=False)
    assert torch.equal(call(wrapped, make, canvas(make)), off)
    with pytest.raises(ValueError, match="Invalid sample size"):
        call(wrapped, make, canvas(make), use_resolution_binning=True)


def test_a_vae_without_exact_bands_is_tiled_only_where_the_image_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = TiledPipeline.from_pipe(build(tiny_qwen), tiling=tiles(tiny_qwen))
    small = side(tiny_qwen)
    monkeypatch.setattr("tiledcore.call.EXACT_DECODE_PIXELS", (small * wrapped.vae_scale_factor) ** 2)
    used: list[bool] = []
    decode = type(wrapped.vae).decode

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        used.append(self.use_tiling)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(type(wrapped.vae), "decode", spy)
    for size in ((small, small), (small + 2, small)):
        assert call(wrapped, tiny_qwen, size, output_type="np", num_inference_steps=1).shape[0] == 1
    assert used == [False, True]
    assert not wrapped.vae.use_tiling


def test_a_compiled_transformer_is_called_on_tile_batches_of_one_shape() -> None:
    pipe, config, size = build(tiny_flux), tiles(tiny_flux), (28, 28)
    expected = call(apply_tiling(pipe, config), tiny_flux, size)
    remove_tiling(pipe)
    transformer, sizes = pipe.transformer, set[int]()

    def backend(graph: Any, inputs: list[torch.Tensor]) -> Any:
        def run(*args: torch.Tensor) -> Any:
            sizes.update(a.shape[0] for a in args if a.ndim > 2)
            return graph(*args)

        return run

    pipe.transformer = torch.compile(transformer, backend=backend, dynamic=False)
    try:
        compiled = call(apply_tiling(pipe, config), tiny_flux, size)
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
        remove_tiling(pipe)
    finally:
        pipe.transformer = transformer
        torch._dynamo.reset()
    assert sizes == {4}
    # The hooks of the compiled network and of the one inside are not mixed up.
    assert torch.equal(call(apply_tiling(pipe, config), tiny_flux, size), expected)

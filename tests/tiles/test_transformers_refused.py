"""Tile mode on transformers: sizes and arguments that cannot be tiled are named."""

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig
from tilings import MOVING, ONE, still
from tiny_transformers import (
    CHANNELS,
    NATIVE,
    build,
    call,
    canvas,
    tiles,
    tiny_flux,
    tiny_pixart_sigma,
    tiny_qwen,
    tiny_sd3,
    tiny_z_image,
)

from tiledcore import Execution, TiledPipeline, TilingConfig, apply_tiling, remove_tiling
from tiledcore.hook import NetworkHook


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (tiny_flux, {"tile": 15}, r"tile=\(15, 15\).*multiples of 2"),
        (tiny_flux, {"overlap": 3}, r"overlap=\(3, 3\).*multiples of 2"),
        (tiny_qwen, {"tile": (16, 6), "overlap": (1, 2)}, r"overlap=\(1, 2\).*multiples of 2"),
        (tiny_sd3, {"tile": (16, 15)}, r"tile=\(16, 15\).*multiples of 2"),
        (tiny_z_image, {"tile": 9}, r"tile=\(9, 9\).*multiples of 2"),
        (tiny_sd3, {"tile": 24, "motion": "moving"}, r"tile=\(24, 24\).*multiples of 16"),
        (tiny_flux, {"overlap": NATIVE}, f"overlap={(NATIVE, NATIVE)!r}".replace("(", r"\(").replace(")", r"\)")),
    ],
)
def test_sizes_that_are_no_whole_tokens_are_named(make: Any, arguments: dict[str, Any], message: str) -> None:
    pipe = build(make)
    with pytest.raises(ValueError, match=message):
        apply_tiling(pipe, TilingConfig(**arguments))
    before = call(pipe, make, (NATIVE, NATIVE))  # still untiled
    assert torch.equal(call(remove_tiling(pipe), make, (NATIVE, NATIVE)), before)


def test_a_packed_grid_is_asked_for_in_latent_pixels_and_given_in_tokens() -> None:
    grid = still(tile=(16, 24), overlap=(4, 6)).grid(40, 48, native=128, unit=2)
    assert (grid.height, grid.width, grid.tile_size, grid.overlap) == (20, 24, (8, 12), (2, 3))
    assert still(tile=24).grid(48, 48, native=128, unit=2).overlap == (1, 1)  # an eighth, whole tokens
    with pytest.raises(ValueError, match=r"canvas=\(40, 47\).*multiples of 2"):
        ONE.grid(40, 47, native=128, unit=2)


@pytest.mark.parametrize(("ramp", "same"), [(1, 2), (3, 4)])
def test_a_ramp_of_half_a_token_is_rounded_up(ramp: int, same: int) -> None:
    pipe = build(tiny_flux)
    results = [call(apply_tiling(pipe, tiles(tiny_flux, ramp=n)), tiny_flux, (22, 32)) for n in (ramp, same)]
    assert torch.equal(*results)


def test_an_odd_overlap_is_fine_where_tokens_are_made_in_the_network() -> None:
    pipe = build(tiny_sd3)
    one, all_at_once, even = (
        call(apply_tiling(pipe, still(overlap=overlap), Execution(n)), tiny_sd3, (22, 24))
        for overlap, n in ((3, 1), (3, 100), (4, 1))
    )
    torch.testing.assert_close(one, all_at_once, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one, even)


@pytest.mark.parametrize(("height", "tiling"), [(15, ONE), (33, MOVING)])
def test_a_canvas_of_half_tokens_is_named(height: int, tiling: TilingConfig) -> None:
    pipe = apply_tiling(build(tiny_pixart_sigma), tiling)
    with pytest.raises(ValueError, match=rf"tile=.* on a canvas of {height}x24 latent pixels: a token has 2x2"):
        call(pipe, tiny_pixart_sigma, (height, 24))


ROWS = torch.zeros(1, 8, 8)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (tiny_sd3, {"block_controlnet_hidden_states": [ROWS]}, "8 tokens for a canvas"),
        (tiny_flux, {"controlnet_block_samples": [ROWS]}, "8 tokens for a canvas"),
        (tiny_z_image, {"x": [[ROWS]]}, "all must be"),
        (tiny_qwen, {"img_shapes": [[(1, 11, 16), (1, 8, 8)]]}, "for 176 tokens: frames and layers"),
        (tiny_qwen, {"img_shapes": [[(2, 11, 8)]]}, "frames and layers"),
        (tiny_flux, {"img_ids": torch.ones(11 * 16, 3)}, "row by row"),
    ],
)
def test_what_cannot_be_tiled_is_refused(
    make: Any, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = apply_tiling(build(make), tiles(make))
    hook = NetworkHook.__call__

    def extended(self: NetworkHook, network: Any, *args: Any, **kwargs: Any) -> Any:
        if "x" in arguments:
            return hook(self, network, arguments["x"], *args[1:], **kwargs)
        return hook(self, network, *args, **{**kwargs, **arguments})

    monkeypatch.setattr(NetworkHook, "__call__", extended)
    with pytest.raises(ValueError, match=message):
        call(pipe, make, canvas(make))


@pytest.mark.parametrize(
    ("config", "tiling", "message"),
    [
        (FirstBlockCacheConfig(threshold=0.1), MOVING, "enable_cache: tiles that move"),
        (PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500), still(tile=16), "different tiles"),
    ],
)
def test_a_cache_that_tiles_cannot_keep_is_refused(config: Any, tiling: TilingConfig, message: str) -> None:
    pipe = apply_tiling(build(tiny_flux), tiling)
    before = call(pipe, tiny_flux, (22, 32))
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match=message):
        call(pipe, tiny_flux, (22, 32))
    pipe.transformer.disable_cache()
    assert torch.equal(call(pipe, tiny_flux, (22, 32)), before)


@pytest.mark.parametrize("wrap", [apply_tiling, TiledPipeline])
@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=1.0),
        MagCacheConfig(num_inference_steps=6, mag_ratios=torch.ones(6), retention_ratio=0.2),
    ],
)
def test_each_tile_has_its_own_cache(config: Any, wrap: Any) -> None:
    """Tiles without overlap: each is the image that the pipeline makes of that part of the noise with its cache."""
    noise = torch.randn(1, 16 * 16, 4 * CHANNELS, generator=torch.Generator().manual_seed(1)).unflatten(1, (16, 16))
    more = {"num_inference_steps": 6}

    def part(rows: slice, columns: slice) -> torch.Tensor:
        return noise[:, rows, columns].flatten(1, 2)

    pipe = build(tiny_flux)
    pipe.transformer.enable_cache(config)
    halves = (slice(0, 8), slice(8, 16))
    alone = [[call(pipe, tiny_flux, (16, 16), latents=part(y, x), **more) for x in halves] for y in halves]
    pipe = build(tiny_flux)
    more["latents"] = part(slice(16), slice(16))
    plain = call(apply_tiling(pipe, still(tile=16, overlap=0)), tiny_flux, (32, 32), **more)
    remove_tiling(pipe).transformer.enable_cache(config)
    tiled = wrap(pipe, still(tile=16, overlap=0), execution=Execution(1))
    made = call(tiled, tiny_flux, (32, 32), **more)
    assert not torch.allclose(made, plain, atol=1e-3)  # the cache does something
    made = made.unflatten(1, (16, 16))
    for y, row in zip(halves, alone, strict=True):
        for x, one in zip(halves, row, strict=True):
            torch.testing.assert_close(made[:, y, x].flatten(1, 2), one, rtol=1e-4, atol=1e-4)


def test_a_pipeline_without_a_known_network_is_named() -> None:
    pipe = build(tiny_flux)
    pipe.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"network=Linear: its forward.*has no canvas"):
        apply_tiling(pipe)

"""ControlNets on UNets: the hint is cut to the tile; in guess mode the residuals are."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionAdapterPipeline, StableDiffusionControlNetPipeline, T2IAdapter
from PIL import Image
from tilings import CANVAS, MOVING, ONE, RAMP, still
from tiny import tiny_sd

from tiledcore import TiledPipeline, TilingConfig, apply_tiling
from tiledcore.hook import default_tiling
from tiledcore.tiles.denoiser import TileDenoiser


@pytest.fixture
def pipe() -> Any:
    parts = tiny_sd()
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(parts.unet, conditioning_channels=3).eval()
    for parameter in controlnet.parameters():
        if not parameter.any():  # its zero convolutions
            torch.nn.init.normal_(parameter, std=0.05)
    made = StableDiffusionControlNetPipeline(**parts.components, controlnet=controlnet, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe: Any, tiling: TilingConfig, hint: Image.Image, **kwargs: Any) -> torch.Tensor:
    wrapped = TiledPipeline.from_pipe(pipe, tiling=tiling)
    generator = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", **kwargs}
    return wrapped("a coast", image=hint, generator=generator, **arguments).images


def hint(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 80).convert("RGB")


def test_tiles_that_move_are_not_the_default_here(pipe: Any) -> None:
    assert default_tiling(pipe) == TilingConfig() == TiledPipeline.from_pipe(pipe).tiling


def test_the_control_network_sees_tile_batches_and_their_part_of_the_hint(pipe: Any) -> None:
    seen: list[Any] = []
    pipe.controlnet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    picture = hint(224, 128)
    run(pipe, still(overlap=4), picture, num_inference_steps=1)
    (given,) = seen
    whole = pipe.control_image_processor.preprocess(picture, 128, 224)
    parts = [whole[..., :128], whole[..., 96:]]
    assert given["sample"].shape == (4, 4, 16, 16)
    assert torch.equal(given["controlnet_cond"], torch.cat(parts * 2))


def test_in_guess_mode_each_tile_gets_its_own_part_of_the_residuals(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[Any] = []
    tiles: list[tuple[torch.Tensor, Any]] = []
    evaluate, network = TileDenoiser.evaluate, TileDenoiser._network

    def spy(self: Any, forward: Any, sample: Any, timestep: Any, **kwargs: Any) -> Any:
        whole.append((self._parts[0].tolist(), kwargs))
        return evaluate(self, forward, sample, timestep, **kwargs)

    def look(forward: Any, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        tiles.append((inputs, kwargs))
        return network(forward, inputs, **kwargs)

    monkeypatch.setattr(TileDenoiser, "evaluate", spy)
    monkeypatch.setattr(TileDenoiser, "_network", staticmethod(look))
    run(pipe, still(overlap=4), hint(224, 128), num_inference_steps=1, guess_mode=True)
    ((offsets, given),), ((inputs, got),) = whole, tiles
    assert offsets == [[0, 0], [0, 12]] and inputs.shape == (4, 4, 16, 16)
    down, mid = given["down_block_additional_residuals"], given["mid_block_additional_residual"]
    pairs = [*zip(down, got["down_block_additional_residuals"], strict=True)]
    pairs.append((mid, got["mid_block_additional_residual"]))
    assert {28 // canvas.shape[3] for canvas, _ in pairs} == {1, 2}
    for canvas, cut in pairs:
        f = 28 // canvas.shape[3]
        expected = torch.cat([image[None, :, :, x // f : (x + 16) // f] for image in canvas for _, x in offsets])
        assert torch.equal(cut, expected)


def test_one_tile_and_canvas_mode_are_the_pipelines_own(pipe: Any) -> None:
    picture = hint(128, 128)
    plain = pipe(
        "a coast",
        image=picture,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert torch.equal(run(pipe, ONE, picture), plain)
    large = hint(224, 160)
    tiled = run(pipe, RAMP, large)
    assert tiled.shape == (1, 4, 20, 28)
    other = run(pipe, RAMP, hint(224, 160).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert not torch.allclose(tiled, other)
    assert run(pipe, CANVAS, large).shape == (1, 4, 20, 28)


def test_tiles_may_lie_anywhere(pipe: Any) -> None:
    picture = hint(232, 128)
    for tiling in (RAMP, still(tile=15, overlap=4), MOVING):
        assert run(pipe, tiling, picture).isfinite().all()


def test_tiles_between_a_levels_pixels_are_refused_where_residuals_are_cut(pipe: Any) -> None:
    with pytest.raises(ValueError, match="tiles must begin and end at multiples of 2"):
        run(pipe, still(tile=15, overlap=4), hint(256, 128), guess_mode=True)
    with pytest.raises(ValueError, match=r"canvas of 16x29 .* multiples of 2; the nearest such canvas is 16x28"):
        apply_tiling(pipe, RAMP)("a coast", image=hint(232, 128), num_inference_steps=1, guess_mode=True)


def with_adapter() -> Any:
    parts = {name: part for name, part in tiny_sd().components.items() if name != "image_encoder"}
    torch.manual_seed(0)
    adapter = T2IAdapter(3, channels=[16, 32], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter")
    made = StableDiffusionAdapterPipeline(**parts, adapter=adapter.eval(), requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_t2i_adapters_residuals_are_cut_and_other_sizes_refused() -> None:
    picture = hint(256, 128)
    tiling = still(tile=16, overlap=0, ramp=1)
    size = {"height": 128, "width": 256, "num_inference_steps": 1}
    whole = run(with_adapter(), tiling, picture, **size)
    half = Image.new("RGB", picture.size)
    half.paste(picture.crop((0, 0, 128, 128)))
    left = run(with_adapter(), tiling, half, **size)
    # The adapter sees a little beyond the line, so only the far columns are the same.
    torch.testing.assert_close(left[..., :8], whole[..., :8], rtol=0.2, atol=0.2)
    assert (left - whole)[..., 16:].abs().mean() > 4 * (left - whole)[..., :16].abs().mean()
    with pytest.raises(ValueError, match=r"canvas of 16x29 .* multiples of 2; the nearest such canvas is 16x28"):
        run(with_adapter(), RAMP, hint(232, 128), height=128, width=232)


def test_any_size_of_one_tile_works_as_in_diffusers(pipe: Any) -> None:
    picture = hint(120, 104)
    arguments = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    plain = pipe("a coast", image=picture, **arguments).images
    torch.testing.assert_close(run(pipe, RAMP, picture, num_inference_steps=1), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1536, 1920, 1088, 2560, 3072])
def test_common_sizes_have_tiles_that_all_levels_can_cut(width: int) -> None:
    """SD 1.5's tile of 64 and its levels of 1 to 8 latent pixels."""
    for overlap in (None, 0.25, 6):
        grid = TilingConfig(tile=64, overlap=overlap).grid(width // 8, 1088 // 8, 64, snap=8)
        least = 8 if overlap is None else 16 if overlap == 0.25 else 6
        for size, parts in ((grid.height, grid.rows), (grid.width, grid.cols)):
            starts = [start for start, _ in parts]
            assert all(start % 8 == 0 for start in starts) and starts[0] == 0 and starts[-1] == size - 64
            assert all(a + 64 - b >= least for a, b in pairwise(starts))

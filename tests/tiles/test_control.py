"""ControlNets of all families: a tile's hint is its part of the image, and the ControlNet sees tile batches only."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from tilings import CANVAS, still
from tiny import TEXT_WIDTH
from tiny_controls import (
    SOURCES,
    control_flux,
    control_qwen,
    control_sana,
    control_sd,
    control_sd3,
    control_z_image,
    hint,
)
from tiny_transformers import CHANNELS, build, call, side, tiles, tiny_flux, tiny_sd3
from torch._subclasses.fake_tensor import FakeTensorMode

from tiledcore import Execution, Region, TiledPipeline, TilingConfig, apply_tiling, remove_tiling
from tiledcore.memory.prediction import build as fake
from tiledcore.memory.prediction import simulated
from tiledcore.tiles.conditioning import LATER, ControlHook
from tiledcore.tiles.denoiser import TileDenoiser
from tiledcore.tiles.families import FAMILIES

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
ALL = list(SOURCES)


def run(make: Any, pipe: Any, size: tuple[int, int], colours: Any = COLOURS, **kwargs: Any) -> torch.Tensor:
    """Latents ``[B, C, H, W]``, or tokens as an image, of a canvas in latent pixels."""
    source, factor = SOURCES[make], pipe.vae_scale_factor
    image = hint(size[0] * factor, size[1] * factor, colours)
    count = 2 if hasattr(pipe.controlnet, "nets") else 1
    given = image if count == 1 else [image] * count
    name = "image" if make is control_sd else "control_image"
    more: dict[str, Any] = {name: given, "controlnet_conditioning_scale": 1.0 if count == 1 else [1.0] * count}
    if make is control_sd:
        kwargs.setdefault("num_inference_steps", 1)
        more |= {"prompt": "a coast", "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        return pipe(**more | kwargs).images
    made = call(pipe, source, size, **{"num_inference_steps": 1} | more | kwargs)
    return made if made.ndim != 3 else made.transpose(1, 2).unflatten(2, (size[0] // 2, size[1] // 2))


def quadrants(make: Any) -> tuple[TilingConfig, tuple[int, int]]:
    """A canvas of two by two tiles without overlap."""
    tile = side(SOURCES[make])
    return still(tile=tile, overlap=0), (2 * tile, 2 * tile)


@pytest.mark.parametrize("make", ALL)
def test_a_tile_has_the_hint_of_its_own_quadrant(make: Any) -> None:
    tiling, size = quadrants(make)
    pipe = make()
    apply_tiling(pipe, tiling, Execution(tile_batch=3))
    made = run(make, pipe, size)
    for i, colour in enumerate(COLOURS):
        y, x = divmod(i, 2)
        one, mine = (
            image.unflatten(-1, (2, -1))[..., x, :].unflatten(-2, (2, -1))[..., y, :, :]
            for image in (run(make, pipe, size, [colour]), made)
        )
        torch.testing.assert_close(mine, one, rtol=1e-3, atol=1e-4)
        other = run(make, pipe, size, [COLOURS[i - 1]]).unflatten(-1, (2, -1))[..., x, :]
        assert not torch.allclose(other.unflatten(-2, (2, -1))[..., y, :, :], mine, atol=1e-3)


@pytest.mark.parametrize("make", ALL)
def test_one_tile_is_diffusers_own_and_the_pipeline_is_as_before(make: Any) -> None:
    tiling, (height, width) = quadrants(make)
    size = (height // 2, width // 2)
    pipe = make()
    plain = run(make, pipe, size, num_inference_steps=2)
    assert torch.equal(run(make, apply_tiling(pipe, tiling), size, num_inference_steps=2), plain)
    assert torch.equal(run(make, remove_tiling(pipe), size, num_inference_steps=2), plain)


@pytest.mark.parametrize("make", ALL)
def test_the_control_network_sees_no_more_than_a_tile_batch(make: Any) -> None:
    tiling, size = quadrants(make)
    seen: dict[int, list[int]] = {}
    results = []
    for tile_batch in (1, 4):
        pipe = make()
        counts = seen.setdefault(tile_batch, [])

        def look(_: Any, args: Any, kwargs: Any, counts: list[int] = counts) -> None:
            tensors = [v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
            counts.append(sum(v.numel() for v in tensors))

        pipe.controlnet.register_forward_pre_hook(look, with_kwargs=True)
        results.append(run(make, apply_tiling(pipe, tiling, Execution(tile_batch=tile_batch)), size))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    assert len(seen[1]) == 4 * len(seen[4]) and max(seen[1]) < 0.5 * seen[4][0]


@pytest.mark.parametrize("make", [control_sd, control_flux, control_sd3, control_qwen])
def test_several_at_once(make: Any) -> None:
    tiling, size = quadrants(make)
    one, four = (run(make, apply_tiling(make(2), tiling, Execution(n)), size) for n in (1, 4))
    torch.testing.assert_close(four, one, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(one, run(make, apply_tiling(make(), tiling), size), atol=1e-3)


@pytest.mark.parametrize("make", [control_flux, control_sd3])
@pytest.mark.parametrize("regions", [False, True])
def test_prompts_of_tiles_and_regions_reach_the_control_network(make: Any, regions: bool) -> None:
    tiling, size = quadrants(make)
    half = 8 * size[1] // 2
    more: dict[str, Any] = {"prompt_for_tile": ["ice", "a dog", "ice", "a dog"]}
    if regions:
        boxes = ((0, 0, half, 2 * half), (half, 0, 2 * half, 2 * half))
        more = {
            "regions": [Region(text, box=box, feather=0) for text, box in zip(("ice", "a dog"), boxes, strict=True)]
        }
    made = run(make, TiledPipeline(make(), tiling, execution=Execution(3)), size, **more)
    whole = [run(make, apply_tiling(make(), tiling), size, prompt=text) for text in ("ice", "a dog")]
    for x, one in enumerate(whole):
        mine, own, other = (image.unflatten(-1, (2, -1))[..., x, :] for image in (made, one, whole[x - 1]))
        torch.testing.assert_close(mine, own, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(mine, other, atol=1e-3)


@pytest.mark.parametrize("make", [control_sd3, control_flux, control_sana, control_z_image])
def test_overlapping_and_moving_tiles_and_canvas_mode(make: Any) -> None:
    tile = side(SOURCES[make])
    size = (tile + tile // 2, 2 * tile - tile // 2)
    tilings = [still(tile=tile, overlap=tile // 4, wrap=True)]
    if make is control_flux:
        tilings += [TilingConfig(tile=tile, motion="moving"), CANVAS]
    for tiling in tilings:
        assert run(make, apply_tiling(make(), tiling), size, num_inference_steps=2).isfinite().all()


def test_the_memory_of_the_control_network_is_that_of_a_tile_batch() -> None:
    """Simulated: one block of the size of Qwen-Image's ControlNet, images of 4096x4096 and 8192x8192 px."""
    mode = FakeTensorMode()
    net = fake(lambda: diffusers.QwenImageControlNetModel(num_layers=1), torch.bfloat16, mode)
    family = next(family for family in FAMILIES if family.model is QwenImageTransformer2DModel)
    peaks = []
    for side_px in (4096, 8192):
        n = side_px // 16  # tokens along an axis
        denoiser = TileDenoiser(TilingConfig(tile=128), Execution(), 128, pixels=8, patch=2, unit=2)
        hook = ControlHook(SimpleNamespace(denoiser=denoiser, family=family, time=lambda time: time), net)
        with simulated(mode, [net], "cpu") as run:
            canvas = torch.empty(1, 64, n, n, dtype=torch.bfloat16)
            tokens = torch.empty(1, n * n, 64, dtype=torch.bfloat16)
            given = {
                "hidden_states": tokens,
                "controlnet_cond": tokens,
                "timestep": torch.empty(1, dtype=torch.bfloat16),
                "encoder_hidden_states": torch.empty(1, 64, 3584, dtype=torch.bfloat16),
                "img_shapes": [[(1, n, n)]],
            }
            denoiser.place((n, n), 0, canvas.device)
            assert hook(net, return_dict=False, **given) == (LATER, LATER)
            kept = denoiser.placed
            assert kept is not None and len(kept) > 4
            kwargs = hook.take({"controlnet_block_samples": LATER})
            denoiser.evaluate(lambda tiles, timestep, **_: (torch.empty_like(tiles),), canvas, 0, **kwargs)
            peaks.append(run.live.reset())
    activations = 4 * 64 * 64 * 3072 * 2  # one activation of a tile batch: 100 MB; of the canvas of 8192²: 1.6 GB
    assert peaks[1] - peaks[0] < 8 * 64 * 2 * (512**2 - 256**2) + activations  # canvases of 64 channels grow
    assert peaks[1] < 30 * activations


def flux_control() -> Any:
    parts = build(lambda: wider_flux(8 * CHANNELS)).components
    return as_flux(diffusers.FluxControlPipeline, parts)


def flux_fill() -> Any:
    return as_flux(diffusers.FluxFillPipeline, build(lambda: wider_flux(8 * CHANNELS + 256)).components)


def wider_flux(channels: int) -> Any:
    pipe = tiny_flux()
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    config |= {"in_channels": channels, "out_channels": 4 * CHANNELS}
    pipe.transformer = diffusers.FluxTransformer2DModel.from_config(config).eval()
    return pipe


def as_flux(kind: Any, parts: dict[str, Any]) -> Any:
    known = kind.__init__.__code__.co_varnames
    made = kind(**{name: part for name, part in parts.items() if name in known})
    made.set_progress_bar_config(disable=True)
    made.default_sample_size = 16
    return made


@pytest.mark.parametrize("make", [flux_control, flux_fill])
def test_flux_control_and_fill(make: Any) -> None:
    results = {}
    for size in ((16, 16), (22, 32)):
        image = hint(size[0] * 8, size[1] * 8, COLOURS)
        more = {"control_image": image} if make is flux_control else {"image": image, "mask_image": image.convert("L")}
        more["generator"] = torch.Generator().manual_seed(0)

        def run(pipe: Any, size: Any = size, more: Any = more) -> torch.Tensor:
            return call(pipe, tiny_flux, size, **more | {"generator": torch.Generator().manual_seed(0)})

        plain = run(make())
        results[size] = [run(apply_tiling(make(), tiles(tiny_flux), Execution(n))) for n in (1, 4)]
        torch.testing.assert_close(*results[size], rtol=1e-4, atol=1e-4)
        assert torch.equal(results[size][0], plain) == (size == (16, 16))


def flux_with_ip_adapter() -> Any:
    pipe = build(tiny_flux)
    random, width = torch.Generator().manual_seed(1), pipe.transformer.inner_dim
    layers = {
        f"0.to_{part}_ip.{kind}": 0.1 * torch.randn(*shape, generator=random)
        for part in "kv"
        for kind, shape in (("weight", (width, TEXT_WIDTH)), ("bias", (width,)))
    }
    projection = {
        "proj.weight": torch.randn(4 * TEXT_WIDTH, 8, generator=random),
        "proj.bias": torch.zeros(4 * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    pipe.transformer._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return pipe


def test_an_ip_adapter_of_a_transformer_is_repeated_for_each_tile() -> None:
    embeds = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(2))
    more = {"ip_adapter_image_embeds": [embeds[0]], "negative_ip_adapter_image_embeds": [embeds[1]]}
    more |= {"true_cfg_scale": 2.0, "negative_prompt": "mist"}
    tiling = tiles(tiny_flux)
    one, four = (
        call(apply_tiling(flux_with_ip_adapter(), tiling, Execution(n)), tiny_flux, (22, 32), **more) for n in (1, 4)
    )
    torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-4)
    other = call(
        apply_tiling(flux_with_ip_adapter(), tiling),
        tiny_flux,
        (22, 32),
        **more | {"ip_adapter_image_embeds": [-embeds[0]]},
    )
    assert not torch.allclose(other, one, atol=1e-3)
    plain = call(flux_with_ip_adapter(), tiny_flux, (16, 16), **more)
    assert torch.equal(call(apply_tiling(flux_with_ip_adapter(), tiling), tiny_flux, (16, 16), **more), plain)


def sd3_with_ip_adapter() -> Any:
    pipe = build(tiny_sd3)
    network, settings = pipe.transformer, pipe.transformer.config
    width, head = network.inner_dim, settings.attention_head_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        sizes = {"hidden_size": width, "ip_hidden_states_dim": width, "head_dim": head, "timesteps_emb_dim": width}
        network.set_attn_processor(
            {name: SD3IPAdapterJointAttnProcessor2_0(**sizes) for name in network.attn_processors}
        )
        queries = {"heads": 2, "dim_head": 8, "num_queries": 4, "depth": 1, "timestep_in_dim": 16}
        network.image_proj = IPAdapterTimeImageProjection(8, width, 16, **queries, timestep_freq_shift=0)
    return pipe


def test_an_ip_adapter_of_sd3_is_repeated_for_each_tile() -> None:
    embeds = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))  # negative and positive
    more = {"ip_adapter_image_embeds": embeds, "guidance_scale": 2.0, "num_inference_steps": 2}
    tiling = tiles(tiny_sd3)

    def run(size: tuple[int, int], tiling: Any = None, tile_batch: int = 4, **others: Any) -> torch.Tensor:
        pipe = sd3_with_ip_adapter()
        return call(
            apply_tiling(pipe, tiling, Execution(tile_batch)) if tiling else pipe, tiny_sd3, size, **more | others
        )

    one, four = (run((22, 32), tiling, n) for n in (1, 4))
    torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run((22, 32), tiling, ip_adapter_image_embeds=-embeds), one, atol=1e-3)
    assert torch.equal(run((16, 16), tiling), run((16, 16)))

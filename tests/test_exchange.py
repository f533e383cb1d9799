"""Tiles that exchange halos: against brute force layer by layer, and through whole pipelines."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from networks import DIM, HEADS, TEXT, build, flux, normal
from test_engine import generate, quiet
from test_graph import Double
from tiny import tiny_sd, tiny_sdxl
from tiny_transformers import build as build_pipe
from tiny_transformers import call, tiny_flux, tiny_pixart_sigma, tiny_qwen, tiny_sana, tiny_sd3, tiny_z_image
from torch import Tensor

from tiledcore import TiledPipeline, TilingConfig, apply_tiling, attention, processors, remove_tiling
from tiledcore import canvas as canvas_mode
from tiledcore.denoiser import TileDenoiser
from tiledcore.exchange import Exchange, current
from tiledcore.geometry import TileGrid

GEOMETRIES = [  # heights, widths, halo, wrap: one size of tiles, several, and windows that go round
    ((2, 2), (3, 3), (1, 2), (False, False)),
    ((2, 3), (4, 2, 2), (1, 1), (False, False)),
    ((3, 2, 3), (2, 4), (1, 3), (True, False)),
    ((2, 3), (3, 4), (9, 2), (True, True)),
    ((2, 2), (2, 3), (0, 0), (False, True)),
]
EVERY = pytest.mark.parametrize("geometry", GEOMETRIES)


def tiles_of(rows: tuple[int, ...], columns: tuple[int, ...]) -> list[tuple[slice, slice]]:
    def spans(sizes: tuple[int, ...]) -> list[slice]:
        return [slice(a, a + n) for a, n in zip(accumulate(sizes, initial=0), sizes, strict=False)]

    return [(y, x) for y in spans(rows) for x in spans(columns)]


def seen(span: slice, size: int, halo: int, wrap: bool) -> list[int]:
    """Offsets from the tile's first position, of all that it sees along an axis, the nearest way to each."""
    if not wrap:
        return [p - span.start for p in range(size) if span.start - halo <= p < span.stop + halo]
    length = span.stop - span.start
    around = sorted(range(-size, size + length), key=lambda p: (max(-p, p - length + 1), -p))
    found: dict[int, int] = {}
    for p in around:
        if max(-p, p - length + 1) <= halo:
            found.setdefault((span.start + p) % size, p)
    return sorted(found.values())


def exchanged(canvas: Tensor, geometry: Any, layer: Any, halo: tuple[int, int]) -> Tensor:
    """Run ``layer(state, tokens [T * B, n, C])`` on the canvas ``[B, H, W, C]`` cut into tiles."""
    rows, columns, _, wrap = geometry
    exchange = Exchange(rows, columns, wrap)
    by_size: dict[tuple[int, int], list[tuple[slice, slice]]] = {}
    for y, x in tiles_of(rows, columns):
        by_size.setdefault((y.stop - y.start, x.stop - x.start), []).append((y, x))
    assert list(by_size) == list(exchange.groups)
    state = canvas_mode.Canvas(0, None)  # one for all, as inside of a network

    def body(size: tuple[int, int], places: list[tuple[slice, slice]]) -> Any:
        def evaluate() -> Tensor:
            state.enter([canvas_mode.Windows(size, size, halo, (False, False), size)])
            return layer(state, torch.cat([canvas[:, y, x].flatten(1, 2) for y, x in places]))

        return evaluate

    results = exchange.run([body(size, places) for size, places in by_size.items()])
    assert current() is None
    out = torch.full_like(canvas, torch.nan)
    for (size, places), tiles in zip(by_size.items(), results, strict=True):
        for (y, x), tile in zip(places, tiles.split(len(canvas)), strict=True):
            out[:, y, x] = tile.unflatten(1, size)
    return out


@EVERY
@torch.no_grad()
def test_self_attention_is_the_masked_plain_processor_on_the_canvas(geometry: Any) -> None:
    rows, columns, halo, wrap = geometry
    h, w = sum(rows), sum(columns)
    torch.manual_seed(0)
    layer = Attention(HEADS * DIM, heads=HEADS, dim_head=DIM, bias=True, residual_connection=True).eval()
    canvas = 3 * normal(2, h, w, HEADS * DIM)
    bias = torch.full((h, w, h, w), -torch.inf)
    for y, x in tiles_of(rows, columns):
        for dy in seen(y, h, halo[0], wrap[0]):
            for dx in seen(x, w, halo[1], wrap[1]):
                bias[y, x, (y.start + dy) % h, (x.start + dx) % w] = 0
    mask = bias.view(h * w, h * w).expand(2 * HEADS, -1, -1)
    expected = AttnProcessor2_0()(layer, canvas.flatten(1, 2), attention_mask=mask)
    actual = exchanged(canvas, geometry, lambda state, t: processors.SelfProcessor(state)(layer, t), halo)
    torch.testing.assert_close(actual.flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


@EVERY
@torch.no_grad()
def test_joint_attention_has_a_halo_at_its_distance_and_the_tiles_own_text(geometry: Any) -> None:
    """Each tile of FLUX by itself, with diffusers' own rotations: the halo's ids go on from the tile's, 0, 1, ..."""
    rows, columns, halo, wrap = geometry
    h, w = sum(rows), sum(columns)
    network = build(flux)
    layer = network.transformer_blocks[0].attn
    canvas = normal(2, h, w, HEADS * DIM)
    still = torch.zeros(TEXT, 3)

    def text_of(tiles: Tensor) -> Tensor:
        return tiles[:, :1] + normal(1, TEXT, HEADS * DIM, seed=1)  # another one for every tile and image

    def ours(state: Any, tiles: Tensor) -> Tensor:
        processor = processors.FluxProcessor(state, canvas_mode.Rotary((2, 2, 4), 10000.0))
        emb = network.pos_embed(torch.zeros(TEXT + tiles.shape[1], 3))  # the image's part of it is not used
        image, text = processor(layer, tiles, text_of(tiles), image_rotary_emb=emb)
        return image + text.mean(1, keepdim=True)  # both are looked at

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, DIM))

    def turn(x: Tensor, ids: Tensor) -> Tensor:
        return apply_rotary_emb(x, network.pos_embed(ids), sequence_dim=1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)

    expected = torch.full_like(canvas, torch.nan)
    for y, x in tiles_of(rows, columns):
        tile = canvas[:, y, x].flatten(1, 2)
        text = text_of(tile)
        places = [(dy, dx) for dy in seen(y, h, halo[0], wrap[0]) for dx in seen(x, w, halo[1], wrap[1])]
        around = torch.stack([canvas[:, (y.start + dy) % h, (x.start + dx) % w] for dy, dx in places], 1)
        ids = torch.tensor([[0.0, dy, dx] for dy, dx in places])
        own = torch.tensor([[0.0, i, j] for i in range(y.stop - y.start) for j in range(x.stop - x.start)])
        tq, tk, tv = (heads(p(text)) for p in (layer.add_q_proj, layer.add_k_proj, layer.add_v_proj))
        tq, tk = turn(layer.norm_added_q(tq), still), turn(layer.norm_added_k(tk), still)
        q = turn(layer.norm_q(heads(layer.to_q(tile))), own)
        k, own_k = (turn(layer.norm_k(heads(layer.to_k(t))), at) for t, at in ((around, ids), (tile, own)))
        v, own_v = (heads(layer.to_v(t)) for t in (around, tile))
        image = layer.to_out[0](attend(q, torch.cat([tk, k], 1), torch.cat([tv, v], 1)))
        words = layer.to_add_out(attend(tq, torch.cat([tk, own_k], 1), torch.cat([tv, own_v], 1)))
        expected[:, y, x] = (image + words.mean(1, keepdim=True)).unflatten(1, expected[:, y, x].shape[1:3])
    torch.testing.assert_close(exchanged(canvas, geometry, ours, halo), expected, rtol=1e-5, atol=1e-5)


# --- whole pipelines

SHIFT = TilingConfig(tile=16, shift=True, halo=8)
FIXED = TilingConfig(tile=16, halo=8)
TRANSFORMERS = [tiny_sd3, tiny_flux, tiny_pixart_sigma, tiny_z_image, tiny_qwen]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_a_halo_of_nothing_is_the_plain_tiles(make: Any) -> None:
    pipe = quiet(make())
    for shift in (False, True):
        plain, _ = generate(pipe, True, TilingConfig(tile=16, shift=shift, overlap=0), height=256)
        alone, _ = generate(pipe, True, TilingConfig(tile=16, shift=shift, halo=0), height=256)
        close(alone, plain)
        coupled, _ = generate(pipe, True, TilingConfig(tile=16, shift=shift, halo=4), height=256)
        assert (coupled - plain).abs().max() > 100 * (alone - plain).abs().max()


@pytest.mark.parametrize("make", TRANSFORMERS)
def test_every_family_exchanges_halos(make: Any) -> None:
    pipe, size = build_pipe(make), (24, 32)
    results = []
    for arguments in ({}, {"halo": 0}, {"halo": 4}, {"halo": 4, "guidance_batch": False}):
        apply_tiling(pipe, TilingConfig(tile=16, shift=True, **arguments))
        results.append(call(pipe, make, size, images=2))
    plain, alone, coupled, one_by_one = results
    close(alone, plain)
    assert (coupled - plain).abs().max() > 100 * (alone - plain).abs().max()
    close(one_by_one, coupled)
    again = call(remove_tiling(pipe), make, (16, 16), images=2)
    assert torch.equal(call(apply_tiling(pipe, TilingConfig(tile=16)), make, (16, 16), images=2), again)


@pytest.mark.parametrize("tiling", [SHIFT, FIXED], ids=["shift", "fixed"])
@pytest.mark.parametrize("size", [(256, 256), (160, 264)])
def test_the_engine_the_own_loop_and_one_image_at_a_time_agree(tiling: TilingConfig, size: tuple[int, int]) -> None:
    pipe = quiet(tiny_sdxl())
    arguments = {"height": size[0], "width": size[1], "num_images_per_prompt": 2}
    expected, report = generate(pipe, True, tiling, **arguments)
    assert report is not None and report.fused
    close(generate(pipe, False, tiling, **arguments)[0], expected)
    split = TilingConfig(**{**vars(tiling), "guidance_batch": False})
    close(generate(pipe, True, split, **arguments)[0], expected)


def test_tiles_of_one_size_are_one_batch_and_others_a_batch_for_each_size() -> None:
    pipe, shapes = quiet(tiny_sd()), list[tuple[int, ...]]()
    forward = pipe.unet.forward

    def spy(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(sample.shape))
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = spy
    one = {"num_inference_steps": 1, "height": 256, "width": 256}
    generate(pipe, True, FIXED, **one)
    assert shapes == [(2 * 4, 4, 16, 16)]
    shapes.clear()
    generate(pipe, True, TilingConfig(tile=16, shift=True, halo=8, wrap=True), **one)
    assert shapes == [(2 * 4, 4, 16, 16)]
    shapes.clear()
    generate(pipe, True, SHIFT, **one)
    assert len(shapes) == len(set(shapes)) > 1
    assert sum(b * h * w for b, _, h, w in shapes) == 2 * 32 * 32


def test_rolling_a_wrapped_canvas_by_whole_tiles_rolls_the_result() -> None:
    """Nothing knows where a torus is cut open: neither the op nor the layout."""
    unet = quiet(tiny_sd()).unet
    attention.install(unet, tile=8, halo=4, tiles=True)
    denoiser = TileDenoiser(TilingConfig(tile=8, halo=4, wrap=True), 8, 8)
    canvas, text = normal(1, 4, 16, 24), normal(1, 7, 32)

    def evaluate(latents: Tensor) -> Tensor:
        def forward(tiles: Tensor, timestep: Any, **kwargs: Any) -> Any:
            return unet(tiles, timestep, return_dict=False, **kwargs)

        with torch.no_grad():
            return denoiser(forward, latents, torch.tensor(500), encoder_hidden_states=text)

    close(evaluate(canvas.roll((8, 16), (2, 3))), evaluate(canvas).roll((8, 16), (2, 3)))


def test_a_graph_replays_where_all_tiles_have_one_size_and_is_refused_elsewhere() -> None:
    pipe = quiet(tiny_sdxl())
    moving = TilingConfig(tile=(10, 16), shift=True, wrap=True, halo=4)
    expected, _ = generate(pipe, True, moving)
    for tiling, replays in ((moving, 3), (SHIFT, 0)):
        wrapped = TiledPipeline.from_pipe(pipe, tiling=tiling, cuda_graph=True if replays else "auto")
        wrapped._graphs.backend = Double()
        generator = torch.Generator().manual_seed(0)
        arguments: dict[str, Any] = {"height": 160, "width": 256, "num_inference_steps": 4, "guidance_scale": 5.0}
        result = wrapped("a cat", generator=generator, output_type="latent", **arguments).images
        assert wrapped.report is not None and wrapped.report.graph.replays == replays
        if replays:
            assert torch.equal(result, expected)
        else:
            assert "several sizes" in (wrapped.report.graph.reason or "")


def test_compiled_networks_exchange_halos() -> None:
    pipe, size = build_pipe(tiny_flux), (16, 40)  # two or three widths of tiles
    one: dict[str, Any] = {"num_inference_steps": 1}
    expected = call(apply_tiling(pipe, SHIFT), tiny_flux, size, **one)
    remove_tiling(pipe)
    transformer = pipe.transformer
    pipe.transformer = torch.compile(transformer, backend="eager")
    try:
        close(call(apply_tiling(pipe, SHIFT), tiny_flux, size, **one), expected)
        remove_tiling(pipe)
    finally:
        pipe.transformer = transformer
        torch._dynamo.reset()


def test_an_error_in_one_tile_is_the_error_of_the_call() -> None:
    pipe = quiet(tiny_sd())
    block, calls = pipe.unet.mid_block, list[int]()
    forward = block.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("in the second group")
        return forward(*args, **kwargs)

    block.forward = fail
    with pytest.raises(ArithmeticError, match="in the second group"):
        generate(pipe, True, SHIFT, height=256)
    assert len(calls) == 2 and current() is None
    block.forward = forward
    assert torch.isfinite(generate(pipe, True, SHIFT, height=256)[0]).all()


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="overlap=2: tiles with halo=4 do not overlap"):
        TilingConfig(halo=4, overlap=2)
    with pytest.raises(ValueError, match="halo=-1"):
        apply_tiling(tiny_sd(), TilingConfig(halo=-1))
    with pytest.raises(TypeError, match="halo=2: Sana's self-attention is linear"):
        apply_tiling(build_pipe(tiny_sana), TilingConfig(tile=4, halo=2))
    with pytest.raises(ValueError, match="global_tokens=4"):
        TilingConfig(halo=4, global_tokens=4)


def test_a_partition_lies_on_the_tiles_own_lines() -> None:
    assert TileGrid(39, 52, 16).partition().rows == ((0, 16), (16, 23))
    assert TileGrid(40, 52, 16).partition().cols == ((0, 16), (16, 16), (32, 20))
    assert TileGrid(40, 32, 16, wrap=True).partition().rows == ((0, 12), (12, 14), (26, 14))
    assert TileGrid(10, 16, 16).partition().rows == ((0, 10),)

"""Canvas mode: neighbour attention inside diffusers' own networks, against the plain networks and brute force."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from networks import DIM, FAMILIES, HEADS, NATIVE, TEXT, build, flux, make, normal, sd3
from torch import Tensor

from tiledcore import attention, ops, processors
from tiledcore import canvas as canvas_mode
from tiledcore.attention import install, remove

EVERY = pytest.mark.parametrize("family", FAMILIES)
NEIGHBOUR = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sana"])


@torch.no_grad()
def run(network: Any, inputs: dict[str, Any]) -> Tensor:
    out = network(**inputs, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def same(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 1e-2  # else anything would pass
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


@EVERY
def test_one_tile_is_the_plain_network(family: str) -> None:
    network, inputs = make(family, NATIVE, NATIVE)
    plain = run(network, inputs)
    hook = install(network, tile=NATIVE, global_tokens=4)
    assert bool(hook.layers) == (family != "sana")
    same(run(network, inputs), plain)


@pytest.mark.parametrize("size", [(8, 12), (9, 13), (6, 7)])
@pytest.mark.parametrize("family", ["unet", "sdxl"])
def test_halo_of_the_canvas_is_the_plain_unet(family: str, size: tuple[int, int]) -> None:
    """Also at sizes that the stride-2 convolutions round up."""
    network, inputs = make(family, *size)
    plain = run(network, inputs)
    install(network, tile=4, halo=16)
    same(run(network, inputs), plain)


@NEIGHBOUR
def test_halo_of_the_canvas_with_the_networks_own_positions_is_plain(family: str) -> None:
    network, inputs = make(family, 12, 8)
    plain = run(network, inputs)
    install(network, tile=4, halo=16, positions="canvas")
    same(run(network, inputs), plain)


@NEIGHBOUR
def test_a_small_halo_changes_the_result_and_remove_restores_it(family: str) -> None:
    network, inputs = make(family, 8, 12)
    layers = {name: layer.processor for name, layer in attention._layers(network)}
    plain = run(network, inputs)
    hook = install(network, tile=4, halo=2)
    assert not torch.allclose(run(network, inputs), plain, atol=1e-3)
    now = {name: layer.processor for name, layer in attention._layers(network)}
    assert {name for name in layers if now[name] is not layers[name]} == set(hook.layers)

    remove(network)
    assert all(layer.processor is layers[name] for name, layer in attention._layers(network))
    assert torch.equal(run(network, inputs), plain)
    remove(network)  # nothing to do


@EVERY
def test_one_image_after_the_other_gives_the_same(family: str) -> None:
    network, inputs = make(family, 8, 12)
    sizes: list[int] = []
    install(network, tile=4, halo=2, global_tokens=3)
    together = run(network, inputs)
    hook = install(network, tile=4, halo=2, global_tokens=3, guidance_batch=False)
    forward = hook.fn_ref.original_forward

    def counting(**kwargs: Any) -> Any:
        sizes.append(len(kwargs.get("sample", kwargs.get("hidden_states", kwargs.get("x")))))
        return forward(**kwargs)

    hook.fn_ref.original_forward = counting
    same(run(network, inputs), together)
    assert sizes == [1, 1]
    out = network(**inputs)
    assert type(out).__name__ in ("UNet2DConditionOutput", "Transformer2DModelOutput") and len(out.sample) == 2


def test_arguments_may_come_by_position() -> None:
    network, inputs = make("unet", 8, 8)
    install(network, tile=4)
    assert torch.equal(network(*inputs.values(), return_dict=False)[0], run(network, inputs))


def spy(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    op = ops.neighbor_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        calls.append({**kwargs, "q": q, "k": k, "v": v})
        return op(q, k, v, **kwargs)

    monkeypatch.setattr(processors.ops, "neighbor_attention", record)
    return calls


def test_windows_follow_the_resolution_of_each_level(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = make("unet", 13, 18, batch=1)
    calls = spy(monkeypatch)
    install(network, tile=(6, 5), halo=(3, 4), wrap=(False, True))
    run(network, inputs)
    seen = {(c["canvas"], c["tile"], c["halo"], c["wrap"]) for c in calls}
    assert seen == {
        ((13, 18), (6, 5), (3, 4), (False, True)),
        ((7, 9), (3, 3), (2, 2), (False, True)),
    }


@pytest.mark.parametrize("family", ["sd3", "pixart", "flux", "qwen", "z_image"])
def test_windows_of_transformers_are_in_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = make(family, 12, 16, batch=1)
    calls = spy(monkeypatch)
    install(network, tile=(8, 6), native=8)
    run(network, inputs)
    assert {(c["canvas"], c["tile"], c["halo"]) for c in calls} == {((6, 8), (4, 3), (2, 2))}
    # SD3's dual attention has no text, PixArt's text comes by cross-attention.
    with_text = [c["global_k"] is not None for c in calls]
    assert any(with_text) == (family != "pixart") and all(with_text) == (family not in ("sd3", "pixart"))


def visible(canvas: tuple[int, int], tile: tuple[int, int], halo: tuple[int, int], wrap: tuple[bool, bool]) -> Tensor:
    """Which key each query sees, ``[N, N]``, pair by pair from the definition."""
    h, w = canvas
    mask = torch.zeros(h * w, h * w, dtype=torch.bool)
    for query in range(h * w):
        for key in range(h * w):
            inside = True
            places = zip(divmod(query, w), divmod(key, w), canvas, tile, halo, wrap, strict=True)
            for q, k, n, t, margin, around in places:
                first, last = q // t * t - margin, min(q // t * t + t, n) + margin
                inside &= any(first <= k + lap * n < last for lap in ((-2, -1, 0, 1, 2) if around else (0,)))
            mask[query, key] = inside
    return mask


GEOMETRIES = [
    ((5, 7), (2, 3), (1, 2), (False, False)),
    ((5, 7), (2, 3), (1, 2), (True, True)),
    ((4, 6), (3, 2), (0, 0), (False, True)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layout", ["tokens", "image"])
def test_self_attention_is_the_masked_plain_processor(geometry: Any, layout: str) -> None:
    """AttnProcessor2_0 on the same layer with an explicit mask, with every option of the layer that it keeps."""
    canvas, tile, halo, wrap = geometry
    (h, w), channels = canvas, HEADS * DIM
    torch.manual_seed(0)
    layer = Attention(
        channels,
        heads=HEADS,
        dim_head=DIM,
        bias=True,
        norm_num_groups=2,
        residual_connection=True,
        rescale_output_factor=1.5,
        qk_norm="rms_norm",
    ).eval()
    x = normal(2, channels, h, w) if layout == "image" else normal(2, h * w, channels)
    bias = torch.zeros(h * w, h * w).masked_fill(~visible(*geometry), float("-inf"))
    mask = bias.expand(2 * HEADS, -1, -1)
    with torch.no_grad():
        expected = AttnProcessor2_0()(layer, x, attention_mask=mask)
        state = canvas_mode.Canvas(0, None)
        state.enter([canvas_mode.Windows(canvas, tile, halo, wrap, tile)])
        actual = processors.SelfProcessor(state)(layer, x)
        same(actual, expected)
        layer.fuse_projections()
        same(processors.SelfProcessor(state)(layer, x), expected)


def test_what_is_far_does_not_matter_to_a_layer() -> None:
    layer = Attention(HEADS * DIM, heads=HEADS, dim_head=DIM).eval()
    state = canvas_mode.Canvas(0, None)
    state.enter([canvas_mode.Windows((6, 8), (2, 2), (1, 1), (False, False), (2, 2))])
    x = normal(1, 48, HEADS * DIM)
    changed = x.clone().unflatten(1, (6, 8))
    changed[:, 2:, 3:] = 7.0  # outside of the first tile and its halo
    with torch.no_grad():
        before, after = (processors.SelfProcessor(state)(layer, t) for t in (x, changed.flatten(1, 2)))
    before, after = (t.unflatten(1, (6, 8)) for t in (before, after))
    assert torch.equal(before[:, :2, :2], after[:, :2, :2])
    assert not torch.allclose(before[:, :2, 2:4], after[:, :2, 2:4])


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen", "z_image"])
def test_wrapped_canvases_can_be_rolled(family: str) -> None:
    """Rolling a torus by whole tiles rolls what each of its image tokens attends to; rotary phases too."""
    canvas, tile = (4, 6), (2, 2)
    rotary = None if family == "sd3" else canvas_mode.Rotary((2, 2, 4), 10000.0, centred=family == "qwen")
    image = canvas_mode.QKV(*(3 * normal(2, 24, HEADS, DIM, seed=i) for i in range(3)))

    def attended(tokens: canvas_mode.QKV, halo: tuple[int, int]) -> Tensor:
        state = canvas_mode.Canvas(0, None)
        state.enter([canvas_mode.Windows(canvas, tile, halo, (True, True), tile)])
        return processors.attend_jointly(state, tokens, None, rotary=rotary)[0].unflatten(1, canvas)

    def roll(t: Tensor) -> Tensor:
        return t.unflatten(1, canvas).roll((2, 4), (1, 2)).flatten(1, 2)

    for halo in ((1, 1), (1, 2), (0, 5)):
        rolled = attended(canvas_mode.QKV(*(roll(t) for t in image)), halo)
        same(rolled, attended(image, halo).roll((2, 4), (1, 2)))


def test_unrolling_continues_the_canvas_by_what_its_windows_reach() -> None:
    flat, (rows, columns) = canvas_mode.Windows((5, 7), (2, 3), (1, 1), (True, False), (2, 3)).unrolled()
    assert (list(rows), list(columns)) == ([-2, -1, 0, 1, 2, 3, 4, 5, 6], list(range(7)))
    assert (flat.canvas, flat.halo, flat.wrap) == ((9, 7), (1, 1), (False, False))
    # A whole-axis tile has no neighbours; a halo that goes round meets itself half way.
    assert canvas_mode.Windows((4, 4), (4, 2), (3, 3), (True, True), (4, 2)).unrolled()[0].halo == (3, 1)


def flux_oracle(layer: Any, image: Tensor, text: Tensor, geometry: Any, native: tuple[int, int], pos_embed: Any) -> Any:
    """FLUX's joint attention in canvas mode, written with diffusers' own rotations and one masked softmax."""
    canvas, tile, halo, wrap = geometry
    (h, w), count = canvas, text.shape[1]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, DIM))

    def turn(x: Tensor, ids: Tensor) -> Tensor:
        return apply_rotary_emb(x, pos_embed(ids), sequence_dim=1)

    ids = torch.tensor([[0.0, y, x] for y in range(h) for x in range(w)])
    scale = min((m - 1) / (n - 1) for m, n in zip(native, canvas, strict=True))
    q, k = layer.norm_q(heads(layer.to_q(image))), layer.norm_k(heads(layer.to_k(image)))
    near = torch.einsum("bqhd,bkhd->bhqk", turn(q, ids), turn(k, ids))
    near = near.masked_fill(~visible(canvas, tile, halo, wrap), float("-inf"))
    still = torch.zeros(count, 3)
    tq = turn(layer.norm_added_q(heads(layer.add_q_proj(text))), still)
    tk = turn(layer.norm_added_k(heads(layer.add_k_proj(text))), still)
    far_q, far_k = turn(q, ids * scale), turn(k, ids * scale)
    to_text = torch.einsum("bqhd,bkhd->bhqk", far_q, tk)
    from_text = torch.einsum("bqhd,bkhd->bhqk", tq, torch.cat([tk, far_k], 1))
    values = torch.cat([heads(layer.add_v_proj(text)), heads(layer.to_v(image))], 1)
    image_out, text_out = (
        torch.einsum("bhqk,bkhd->bqhd", (scores * DIM**-0.5).softmax(-1), values).flatten(2)
        for scores in (torch.cat([to_text, near], -1), from_text)
    )
    return layer.to_out[0](image_out), layer.to_add_out(text_out)


@torch.no_grad()
def test_flux_layer_with_positions_of_the_native_picture_against_the_text() -> None:
    network = build(flux)
    layer = network.transformer_blocks[0].attn
    image, text = normal(2, 5 * 9, HEADS * DIM), normal(2, TEXT, HEADS * DIM, seed=1)
    geometry = ((5, 9), (2, 3), (1, 2), (False, False))
    state = canvas_mode.Canvas(0, None)
    state.enter([canvas_mode.Windows(*geometry, native=(4, 4))])
    processor = processors.FluxProcessor(state, canvas_mode.Rotary((2, 2, 4), 10000.0))
    emb = network.pos_embed(torch.zeros(TEXT + 45, 3))  # the image's part of it is not used
    actual = processor(layer, image, text, image_rotary_emb=emb)
    expected = flux_oracle(layer, image, text, geometry, (4, 4), network.pos_embed)
    for ours, theirs in zip(actual, expected, strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (9, 9), (5, 16), (2, 3)])
def test_positions_against_the_text_stay_in_the_trained_range(size: tuple[int, int], centred: bool) -> None:
    """Read from the turns of one slow pair per axis: its angle is the position."""
    windows = canvas_mode.Windows(size, (2, 2), (1, 1), (False, False), (4, 4))
    rotary = canvas_mode.Rotary((2, 2, 2), 10000.0, centred)
    turns = rotary.picture(windows, *(torch.arange(n) for n in size)).unflatten(0, size)
    ys, xs = turns[:, 0, 1].angle(), turns[0, :, 2].angle()
    low, high = (-2, 1) if centred else (0, 3)
    for positions in (ys, xs):
        assert positions.min() >= low - 1e-5 and positions.max() <= high + 1e-5
        assert (positions.diff() > 0).all()
    longest = max(ys[-1] - ys[0], xs[-1] - xs[0])
    assert longest == pytest.approx(min(3, max(size) - 1), abs=1e-5)


@torch.no_grad()
def test_thumbnail_is_the_mean_of_each_cell() -> None:
    canvas, tile = (6, 9), (2, 3)
    tokens = canvas_mode.QKV(*(2 * normal(2, 54, HEADS, DIM, seed=i) for i in range(3)))
    state = canvas_mode.Canvas(6, None)
    windows = canvas_mode.Windows(canvas, tile, (1, 1), (False, False), tile)
    state.enter([windows])
    assert canvas_mode.thumbnail_cells(windows, 6) == (2, 3)
    q, k, v = (t.double() for t in tokens)
    small_k, small_v = (t.unflatten(1, (2, 3, 3, 3)).mean((2, 4)).flatten(1, 2) for t in (k, v))
    mask = visible(canvas, tile, (1, 1), (False, False))
    near = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(~mask, float("-inf"))
    scores = torch.cat([near, torch.einsum("bqhd,bkhd->bhqk", q, small_k)], -1) * DIM**-0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), torch.cat([v, small_v], 1)).float()
    same(processors.attend(state, windows, tokens, None), expected)
    same(processors.attend_jointly(state, tokens, None)[0], expected)


@pytest.mark.parametrize("cells", [(6, 9), (2, 3), (4, 5)])
def test_thumbnail_cells_stand_in_the_middle_of_their_tokens(cells: tuple[int, int]) -> None:
    """Positions are pooled as the tokens are, also by cells that overlap; scaling keeps the middle."""
    size = (6, 9)
    windows = canvas_mode.Windows(size, (2, 3), (1, 1), (False, False), (4, 4))
    rotary = canvas_mode.Rotary((2, 2, 2), 10000.0, centred=True)
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"))
    ys, xs = torch.nn.functional.adaptive_avg_pool2d(grid, cells)
    expected = rotary.picture(windows, ys[:, 0], xs[0])
    actual = canvas_mode.cell_turns(canvas_mode.Canvas(6, None), windows, rotary, cells, torch.device("cpu"))
    torch.testing.assert_close(actual, expected)


def test_thumbnail_lets_tiles_without_halo_see_each_other() -> None:
    network, inputs = make("flux", 12, 12, batch=1)
    install(network, tile=4, halo=0, global_tokens=4)
    with_thumbnail = run(network, inputs)
    install(network, tile=4, halo=0)
    assert not torch.allclose(run(network, inputs), with_thumbnail, atol=1e-3)


@pytest.mark.parametrize("family", ["sd3", "pixart"])
@torch.no_grad()
def test_absolute_positions_are_those_of_the_native_size(family: str) -> None:
    network, _ = make(family, 8, 8)
    native = network.pos_embed(torch.zeros(1, 4, 8, 8)).unflatten(1, (4, 4))
    install(network, tile=8)
    canvas = network.pos_embed(torch.zeros(1, 4, 20, 14)).unflatten(1, (10, 7))
    assert native.flatten(1, 2).std(1).max() > 0.1
    for y in range(10):
        for x in range(7):
            assert torch.equal(canvas[:, y, x], native[:, y % 4, x % 4])
    remove(network)
    assert torch.equal(network.pos_embed(torch.zeros(1, 4, 8, 8)), native.flatten(1, 2))


def test_sd3_runs_beyond_its_largest_position() -> None:
    network, inputs = make("sd3", 16, 20)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        run(network, inputs)
    install(network, tile=8)
    assert torch.isfinite(run(network, inputs)).all()


def test_sana_keeps_its_linear_attention() -> None:
    network, inputs = make("sana", 12, 16)
    plain = run(network, inputs)
    assert install(network, tile=4).layers == ()
    assert torch.equal(run(network, inputs), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["unet", "flux", "z_image"])
def test_low_precision_costs_what_it_costs_the_plain_network(family: str, dtype: torch.dtype) -> None:
    network, inputs = make(family, 8, 12)

    def low(value: Any) -> Any:
        if isinstance(value, list):
            return [low(v) for v in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    results = {}
    for precision in ("full", "low"):
        results["plain", precision] = run(network, inputs).float()
        install(network, tile=4, halo=2, global_tokens=3)
        results["canvas", precision] = run(network, inputs).float()
        remove(network)
        network.to(dtype)
        inputs = {name: value if name.endswith("ids") else low(value) for name, value in inputs.items()}
    plain, canvas = ((results[way, "low"] - results[way, "full"]).norm() for way in ("plain", "canvas"))
    assert 0 < canvas < 2 * plain


def test_errors_name_what_is_wrong() -> None:
    network, inputs = make("unet", 8, 8)
    with pytest.raises(TypeError, match="network=Linear: canvas mode knows UNet2DConditionModel"):
        install(torch.nn.Linear(2, 2), tile=4)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"tile": 0}, "tile=0"),
        ({"tile": 4, "halo": -1}, "halo=-1"),
        ({"tile": 4, "wrap": 3}, "wrap=3"),
        ({"tile": 4, "global_tokens": -2}, "global_tokens=-2"),
        ({"tile": 4, "positions": "none"}, "positions='none'"),
        ({"tile": 4, "native": 0}, "native=0"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            install(network, **arguments)
    assert not hasattr(network, "_diffusers_hook")
    install(network, tile=4)
    with pytest.raises(ValueError, match="attention_mask"):
        run(network, {**inputs, "attention_mask": torch.ones(2, 64)})
    with pytest.raises(ValueError, match="native"):
        install(build(sd3), tile=16)


def test_foreign_processors_are_refused_and_nothing_is_changed() -> None:
    network, _ = make("unet", 8, 8)
    layers = dict(attention._layers(network))
    name = next(name for name in reversed(layers) if name.endswith("attn1"))
    foreign = IPAdapterAttnProcessor2_0(16, 16)
    layers[name].set_processor(foreign)
    before = {key: layer.processor for key, layer in layers.items()}
    with pytest.raises(TypeError, match=f"{name}: IPAdapterAttnProcessor2_0"):
        install(network, tile=4)
    assert all(layer.processor is before[key] for key, layer in layers.items())


def test_flux_grid_survives_positions_in_bfloat16() -> None:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(520.0), torch.arange(300.0)).bfloat16()
    assert attention._packed_grid(ids, 520 * 300) == (520, 300)


def test_reference_images_are_refused() -> None:
    network, inputs = make("flux", 8, 8)
    install(network, tile=4)
    ids = inputs["img_ids"]
    for reference in (ids, ids + torch.tensor([1, 0, 0])):
        both = {"img_ids": torch.cat([ids, reference]), "hidden_states": normal(2, 32, 16)}
        with pytest.raises(ValueError, match="img_ids"):
            run(network, inputs | both)
    network, inputs = make("qwen", 8, 8)
    install(network, tile=4)
    with pytest.raises(ValueError, match="img_shapes"):
        run(network, inputs | {"img_shapes": [[(1, 2, 2), (1, 4, 4)]] * 2})
    network, inputs = make("z_image", 8, 8)
    install(network, tile=4)
    with pytest.raises(ValueError, match="x must be"):
        run(network, inputs | {"x": [normal(4, 1, 8, 8), normal(4, 1, 8, 10)]})

"""Single attention layers on a canvas: processors and positions, against brute force."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from networks import DIM, HEADS, TEXT, build, flux, normal, same
from torch import Tensor

from tiledcore.canvas import processors
from tiledcore.canvas.windows import QKV, Canvas, Prompt, Rotary, Windows


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
def test_self_attention_is_the_masked_plain_processor(geometry: Any) -> None:
    """AttnProcessor2_0 on the same layer with an explicit mask."""
    canvas, tile, halo, wrap = geometry
    (h, w), channels = canvas, HEADS * DIM
    torch.manual_seed(0)
    layer = Attention(
        channels,
        heads=HEADS,
        dim_head=DIM,
        bias=True,
        qk_norm="rms_norm",
    ).eval()
    x = normal(2, h * w, channels)
    bias = torch.zeros(h * w, h * w).masked_fill(~visible(*geometry), float("-inf"))
    mask = bias.expand(2 * HEADS, -1, -1)
    with torch.no_grad():
        expected = AttnProcessor2_0()(layer, x, attention_mask=mask)
        state = Canvas(None)
        state.enter([Windows(canvas, tile, halo, wrap, tile)])
        actual = processors.SelfProcessor(state)(layer, x)
        same(actual, expected)
        layer.fuse_projections()
        same(processors.SelfProcessor(state)(layer, x), expected)


def test_what_is_far_does_not_matter_to_a_layer() -> None:
    layer = Attention(HEADS * DIM, heads=HEADS, dim_head=DIM).eval()
    state = Canvas(None)
    state.enter([Windows((6, 8), (2, 2), (1, 1), (False, False), (2, 2))])
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
    rotary = None if family == "sd3" else Rotary((2, 2, 4), 10000.0, centred=family == "qwen")
    image = QKV(*(3 * normal(2, 24, HEADS, DIM, seed=i) for i in range(3)))

    def attended(tokens: QKV, halo: tuple[int, int]) -> Tensor:
        state = Canvas(None)
        state.enter([Windows(canvas, tile, halo, (True, True), tile)])
        return processors.attend_jointly(state, tokens, None, rotary=rotary)[0].unflatten(1, canvas)

    def roll(t: Tensor) -> Tensor:
        return t.unflatten(1, canvas).roll((2, 4), (1, 2)).flatten(1, 2)

    for halo in ((1, 1), (1, 2), (0, 5)):
        rolled = attended(QKV(*(roll(t) for t in image)), halo)
        same(rolled, attended(image, halo).roll((2, 4), (1, 2)))


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_each_text_is_attended_alone_and_mixed_by_the_shares(family: str, wrap: bool) -> None:
    """Three texts of different lengths, one of them masked; regions that are no whole tiles; soft edges."""
    rotary = None if family == "sd3" else Rotary((2, 2, 4), 10000.0)
    size, lengths = (10, 13), (5, 3, 4)
    image = QKV(*(3 * normal(2, 130, HEADS, DIM, seed=i) for i in range(3)))
    text = QKV(*(3 * normal(2, sum(lengths), HEADS, DIM, seed=9 + i) for i in range(3)))
    shares = torch.zeros(3, *size)
    shares[1, 4:7, 3:8], shares[2, :2, 11:], shares[1, 5, 8] = 1, 1, 0.25
    shares[0] = 1 - shares.sum(0)
    kept = [[torch.arange(n)] * 2 for n in lengths[:2]] + [[torch.tensor([0, 2]), torch.tensor([1, 2, 3])]]
    state = Canvas(None)
    state.enter([Windows(size, (3, 4), (2, 1), (wrap, wrap), (4, 4))])
    alone = [
        processors.attend_jointly(state, image, QKV(*(t.split(lengths, 1)[i] for t in text)), rotary, [kept[i]])
        for i in range(3)
    ]
    state.prompts = [Prompt(n, share) for n, share in zip(lengths, shares, strict=True)]
    image_out, text_out = processors.attend_jointly(state, image, text, rotary, kept)
    mixed = sum(share.flatten()[:, None, None] * out for share, (out, _) in zip(shares, alone, strict=True))
    same(image_out, torch.as_tensor(mixed))
    assert text_out is not None
    same(text_out, torch.cat([out for _, out in alone if out is not None], 1))
    other = QKV(*(torch.cat([t[:, :5], 7 * normal(2, 7, HEADS, DIM)], 1) for t in text))
    changed = processors.attend_jointly(state, image, other, rotary, kept)[0]
    untouched = shares[0].flatten() == 1
    assert torch.equal(changed[:, untouched], image_out[:, untouched])


def test_shares_sum_to_one_at_each_level_of_a_unet() -> None:
    shares = torch.rand(3, 13, 18)
    prompts = [Prompt(4, share) for share in shares / shares.sum(0)]
    for size in ((13, 18), (7, 9), (4, 5)):
        found = [Canvas(None).share(prompt, size, torch.device("cpu"))[1] for prompt in prompts]
        torch.testing.assert_close(torch.stack(found).sum(0), torch.ones(size))


def test_unrolling_continues_the_canvas_by_what_its_windows_reach() -> None:
    flat, (rows, columns) = Windows((5, 7), (2, 3), (1, 1), (True, False), (2, 3)).unrolled()
    assert (list(rows), list(columns)) == ([-2, -1, 0, 1, 2, 3, 4, 5, 6], list(range(7)))
    assert (flat.canvas, flat.halo, flat.wrap) == ((9, 7), (1, 1), (False, False))
    # A whole-axis tile has no neighbours; a halo that goes round meets itself half way.
    assert Windows((4, 4), (4, 2), (3, 3), (True, True), (4, 2)).unrolled()[0].halo == (3, 1)


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
    state = Canvas(None)
    state.enter([Windows(*geometry, native=(4, 4))])
    processor = processors.FluxProcessor(state, Rotary((2, 2, 4), 10000.0))
    emb = network.pos_embed(torch.zeros(TEXT + 45, 3))  # the image's part of it is not used
    actual = processor(layer, image, text, image_rotary_emb=emb)
    expected = flux_oracle(layer, image, text, geometry, (4, 4), network.pos_embed)
    for ours, theirs in zip(actual, expected, strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (9, 9), (5, 16), (2, 3)])
def test_positions_against_the_text_stay_in_the_trained_range(size: tuple[int, int], centred: bool) -> None:
    """Read from the turns of one slow pair per axis: its angle is the position."""
    windows = Windows(size, (2, 2), (1, 1), (False, False), (4, 4))
    rotary = Rotary((2, 2, 2), 10000.0, centred)
    turns = rotary.picture(windows, *(torch.arange(n) for n in size)).unflatten(0, size)
    ys, xs = turns[:, 0, 1].angle(), turns[0, :, 2].angle()
    low, high = (-2, 1) if centred else (0, 3)
    for positions in (ys, xs):
        assert positions.min() >= low - 1e-5 and positions.max() <= high + 1e-5
        assert (positions.diff() > 0).all()
    longest = max(ys[-1] - ys[0], xs[-1] - xs[0])
    assert longest == pytest.approx(min(3, max(size) - 1), abs=1e-5)

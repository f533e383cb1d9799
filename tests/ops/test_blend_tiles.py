"""blend_tiles: all implementations agree with the float64 oracle, and the oracle with the papers."""

import pytest
import torch
from examples import examples
from grids import Grid, even, grids, product
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close

from tiledcore import ops
from tiledcore.ops import dispatch, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Interpreted, a block that juts out of the canvas divides 0 by 0 where nothing is stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
windows = st.sampled_from(ops.WINDOWS)
dtypes = st.sampled_from(DTYPES)
ramps = st.integers(1, 20)


def runnable(device: torch.device = DEVICE) -> list[ops.Impl]:
    every: tuple[ops.Impl, ...] = ("reference", "native", "triton")
    return [impl for impl in every if ops.unavailable("blend_tiles", impl, device) is None]


def dirty_memory(numel: int, dtype: torch.dtype) -> None:
    """Leave NaNs in the blocks that the allocator hands out next, to expose outputs left unwritten."""
    for _ in range(3):
        torch.full((numel,), torch.nan, dtype=dtype, device=DEVICE)


# ----------------------------------------------------------------------------- the oracle


def test_mean_is_multidiffusion() -> None:
    offsets = product([0, 2, 5], [0, 3])
    tiles = torch.randn(6, 2, 4, 5, dtype=torch.float64)
    value, count = torch.zeros(1, 2, 9, 8, dtype=torch.float64), torch.zeros(1, 1, 9, 8)
    for tile, (y, x) in zip(tiles, offsets.tolist(), strict=True):
        value[..., y : y + 4, x : x + 5] += tile
        count[..., y : y + 4, x : x + 5] += 1
    torch.testing.assert_close(reference.blend_tiles(tiles, offsets, (9, 8), "mean"), value / count, rtol=1e-14, atol=0)


def test_gaussian_is_mixture_of_diffusers() -> None:
    h, w = 6, 9
    u, v = torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64)
    weight = torch.exp(-(((u + 0.5) / h - 0.5) ** 2) / 0.02)[:, None]
    weight = weight * torch.exp(-(((v + 0.5) / w - 0.5) ** 2) / 0.02)[None, :]
    offsets = product([0, 3, 4], [0, 5])
    tiles = torch.randn(6, 1, h, w, dtype=torch.float64)
    value, total = torch.zeros(1, 1, 10, 14, dtype=torch.float64), torch.zeros(10, 14).double()
    for tile, (y, x) in zip(tiles, offsets.tolist(), strict=True):
        value[..., y : y + h, x : x + w] += weight * tile
        total[y : y + h, x : x + w] += weight
    torch.testing.assert_close(
        reference.blend_tiles(tiles, offsets, (10, 14), "gaussian"), value / total, rtol=1e-12, atol=0
    )


def test_ramp_is_centred_on_the_border_of_the_core() -> None:
    """Two tiles of 8 over 12 pixels: the cores meet at 6; a ramp of 2 fades from 5 to 7."""
    left, right = reference.axis_weights([0, 4], 8, 12, "ramp", 2)
    assert left.tolist() == [1, 1, 1, 1, 1, 1, 0.5, 0]
    assert right.tolist() == [0, 0.5, 1, 1, 1, 1, 1, 1]


def test_core_is_a_hard_crop_with_ties_averaged() -> None:
    left, right = reference.axis_weights([0, 4], 8, 12, "core", 99)
    assert left.tolist() == [1] * 6 + [0] * 2 and right.tolist() == [0] * 2 + [1] * 6
    left, right = reference.axis_weights([0, 4], 7, 11, "core")
    assert left.tolist() == [1] * 6 + [0] and right.tolist() == [0] + [1] * 6


@examples(40, 400)
@given(grid=grids(), window=windows, ramp=ramps)
def test_deepest_tile_weighs_one(grid: Grid, window: ops.Window, ramp: int) -> None:
    (H, _), (h, _), offsets = grid
    starts = sorted(set(offsets[:, 0].tolist()))
    weights = reference.axis_weights(starts, h, H, window, ramp)
    best = torch.zeros(H, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        where = (start + torch.arange(h)) % H
        best[where] = torch.maximum(best[where], weight)
    assert (weights >= 0).all() and (best == 1).all()


# ----------------------------------------------------------------------------- implementations


@examples(6, 100)
@given(grid=grids(), window=windows, ramp=ramps, dtype=dtypes)
def test_inverts_gather(grid: Grid, window: ops.Window, ramp: int, dtype: torch.dtype) -> None:
    (H, W), tile, offsets = grid
    canvas = torch.randn(2, 3, H, W, dtype=torch.float64).to(DEVICE, dtype)
    offsets = offsets.to(DEVICE)
    tiles = reference.gather_tiles(canvas, offsets, tile)
    plain = reference.blend_tiles(tiles, offsets, (H, W), window, ramp)
    for impl in runnable():
        dirty_memory(canvas.numel(), dtype)
        blended = ops.blend_tiles(tiles, offsets, (H, W), window=window, ramp=ramp, impl=impl)
        assert blended.dtype == dtype and blended.is_contiguous()
        assert_close(blended, canvas.double(), plain, ulps=8)


@examples(6, 100)
@given(grid=grids(), window=windows, ramp=ramps, dtype=dtypes, C=st.integers(1, 5))
def test_agrees_with_the_oracle(grid: Grid, window: ops.Window, ramp: int, dtype: torch.dtype, C: int) -> None:
    (H, W), tile, offsets = grid
    tiles = torch.randn(2 * len(offsets), C, *tile, dtype=torch.float64).to(DEVICE, dtype)
    offsets = offsets.to(DEVICE)
    exact = reference.blend_tiles(tiles.double(), offsets, (H, W), window, ramp)
    plain = reference.blend_tiles(tiles, offsets, (H, W), window, ramp)
    # Sums cancel: what a value may be off by follows from the size of its terms.
    size = reference.blend_tiles(tiles.double().abs(), offsets, (H, W), window, ramp)
    slack = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * size.max()
    for impl in runnable():
        dirty_memory(exact.numel(), dtype)
        blended = ops.blend_tiles(tiles, offsets, (H, W), window=window, ramp=ramp, impl=impl)
        assert_close(blended, exact, plain.double() + slack * (plain >= exact).double().sub(0.5).sign())


@examples(4, 50)
@given(grid=grids(), window=windows, data=st.data())
def test_order_of_tiles_does_not_matter(grid: Grid, window: ops.Window, data: st.DataObject) -> None:
    size, tile, offsets = grid
    tiles = torch.randn(len(offsets), 2, *tile, device=DEVICE)
    order = data.draw(st.permutations(range(len(offsets))))
    for impl in runnable():
        one = ops.blend_tiles(tiles, offsets.to(DEVICE), size, window=window, impl=impl)
        other = ops.blend_tiles(tiles[order], offsets[order].to(DEVICE), size, window=window, impl=impl)
        assert torch.equal(one, other), impl


@examples(4, 60)
@given(grid=grids(), window=st.sampled_from(["core", "ramp"]), ramp=st.integers(1, 3), dtype=dtypes)
def test_pixels_without_weight_are_not_read(grid: Grid, window: ops.Window, ramp: int, dtype: torch.dtype) -> None:
    (H, W), (h, w), offsets = grid
    ys, xs = offsets[:, 0].tolist(), offsets[:, 1].tolist()
    weights_y = reference.axis_weights(ys, h, H, window, ramp)
    weights_x = reference.axis_weights(xs, w, W, window, ramp)
    weight = weights_y[:, :, None] * weights_x[:, None, :]
    tiles = torch.randn(len(offsets), 1, h, w).to(dtype)
    clean, poisoned = tiles, tiles.masked_fill(weight[:, None] == 0, torch.nan)
    offsets = offsets.to(DEVICE)
    for impl in runnable():
        results = [
            ops.blend_tiles(t.to(DEVICE), offsets, (H, W), window=window, ramp=ramp, impl=impl)
            for t in (clean, poisoned)
        ]
        assert torch.equal(*results), impl


def test_one_tile_alone_is_copied() -> None:
    """Bit for bit, also with weights whose quotient is not exact."""
    triton_windows = ("gaussian", "ramp")
    offsets = product([0, 10], [0, 10]).to(DEVICE)
    for dtype in DTYPES:
        canvas = torch.randn(1, 1, 22, 22, device=DEVICE).to(dtype)
        tiles = reference.gather_tiles(canvas, offsets, (12, 12))
        for impl in runnable():
            for window in triton_windows if impl == "triton" else ops.WINDOWS:
                blended = ops.blend_tiles(tiles, offsets, (22, 22), window=window, ramp=7, impl=impl)
                for corner in (slice(0, 10), slice(12, 22)):
                    assert torch.equal(blended[..., corner, corner], canvas[..., corner, corner])


def test_many_tiles() -> None:
    """More tiles than the Triton kernel looks at together."""
    offsets = product(even(17, 2, 16), even(17, 1, 17))  # 272 tiles; it looks at 256
    canvas = torch.randn(1, 1, 17, 17, dtype=torch.float64, device=DEVICE)
    tiles = reference.gather_tiles(canvas, offsets.to(DEVICE), (2, 1))
    for impl in runnable():
        blended = ops.blend_tiles(tiles, offsets.to(DEVICE), (17, 17), window="mean", impl=impl)
        torch.testing.assert_close(blended, canvas, rtol=1e-14, atol=1e-14)


def test_every_half_survives_the_native_conversion() -> None:
    """The native kernel converts by its own integer arithmetic: all 2^16 patterns, and rounding."""
    if (reason := ops.unavailable("blend_tiles", "native", torch.device("cpu"))) is not None:
        pytest.skip(reason)
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    offsets = product([0], [0, 128])
    for dtype in (torch.float16, torch.bfloat16):
        one = patterns.view(dtype).view(1, 1, 256, 256)
        other = patterns[torch.randperm(1 << 16)].view(dtype).view(1, 1, 256, 256)
        alone = ops.blend_tiles(one, product([0], [0]), (256, 256), impl="native")
        assert torch.equal(alone.nan_to_num(1.5), one.nan_to_num(1.5))
        both = ops.blend_tiles(torch.cat([one, other]), offsets, (256, 256), window="mean", impl="native")
        mean = (0.5 * one.float() + 0.5 * other.float().roll(128, -1)).to(dtype)
        assert torch.equal(both.nan_to_num(1.5), mean.nan_to_num(1.5))


def test_threads_do_not_change_the_result() -> None:
    offsets = product(even(96, 32, 5), even(80, 32, 4))
    tiles = torch.randn(len(offsets), 3, 32, 32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.blend_tiles(tiles, offsets, (96, 80)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_opcheck(impl: ops.Impl) -> None:
    if reason := ops.unavailable("blend_tiles", impl, DEVICE):
        pytest.skip(reason)
    op = getattr(torch.ops.tiledcore, f"blend_tiles_{impl}").default
    offsets = product([0, 5, 8], [0, 6]).to(DEVICE)
    strided = torch.randn(12, 1, 7, 6, device=DEVICE).mT
    torch.library.opcheck(op, (strided, offsets, 12, 12, "ramp", 3))
    if impl != "triton":  # interpreted, each check takes seconds
        for window in ("mean", "gaussian"):
            torch.library.opcheck(op, (strided.contiguous(), offsets, 12, 12, window, 3))


# ----------------------------------------------------------------------------- errors

TILES = torch.zeros(4, 2, 6, 6)
OFFSETS = product([0, 4], [0, 4])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tiles": TILES.int()}, TypeError, "tiles must be of dtype torch.float16 or"),
        ({"tiles": TILES.to(torch.float8_e5m2)}, TypeError, "tiles must be of dtype"),
        ({"tiles": TILES[0]}, ValueError, "tiles must have the shape"),
        ({"tiles": TILES[:3]}, ValueError, "tiles has 3 entries, no multiple of the 4 offsets"),
        ({"offsets": OFFSETS.float()}, TypeError, "offsets must be of dtype torch.int32"),
        ({"tiles": TILES[:3], "offsets": OFFSETS[:3]}, ValueError, "2 rows with each of the 2 columns exactly once"),
        ({"offsets": OFFSETS[[0, 1, 2, 2]]}, ValueError, "exactly once, got 4 offsets"),
        ({"offsets": product([0, 4], [0, 3])}, ValueError, "x = 9 to 9 of the canvas"),
        ({"canvas_size": (11, 10)}, ValueError, "leave y = 10 to 10 of the canvas"),
        ({"canvas_size": (5, 10)}, ValueError, "larger than the canvas"),
        ({"canvas_size": (10,)}, ValueError, r"canvas_size=\(10,\) must be a \(y, x\) pair"),
        ({"window": "hann"}, ValueError, "window='hann' must be one of mean, gaussian, ramp, core"),
        ({"ramp": 0}, ValueError, "ramp=0 must be an int of at least 1"),
        ({"ramp": 2.5}, ValueError, "ramp=2.5 must be an int"),
        ({"impl": "cpp"}, ValueError, "impl='cpp' is not one of"),
    ],
)
def test_errors(change, error, words) -> None:  # type: ignore[no-untyped-def]
    arguments = {"tiles": TILES, "offsets": OFFSETS, "canvas_size": (10, 10)} | change
    with pytest.raises(error, match=words):
        ops.blend_tiles(**arguments)


def test_named_impl_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_native_missing", "no such file")
    with pytest.raises(RuntimeError, match="blend_tiles: impl='native' is unavailable on cpu"):
        ops.blend_tiles(TILES, OFFSETS, (10, 10), impl="native")


def test_native_refuses_what_would_leave_its_memory() -> None:
    if reason := ops.unavailable("blend_tiles", "native", torch.device("cpu")):
        pytest.skip(reason)
    op = torch.ops.tiledcore.blend_tiles_native
    with pytest.raises(RuntimeError, match="not on the canvas"):
        op(TILES, product([0, 10], [0, 4]), 10, 10, "ramp", 8)
    with pytest.raises(RuntimeError, match="every pair"):
        op(TILES[:3], OFFSETS[:3], 10, 10, "ramp", 8)
    with pytest.raises(RuntimeError, match="the canvas does not fit 64 bits"):  # 2^64 pixels wrap to none
        op(TILES, OFFSETS, 2**32, 2**32, "ramp", 8)
    assert op(TILES[:, :0], OFFSETS, 2**40, 10, "ramp", 8).shape == (1, 0, 2**40, 10)  # allocates nothing
    with pytest.raises(RuntimeError, match="cannot be shared"):
        op(TILES[:3], OFFSETS, 10, 10, "ramp", 8)

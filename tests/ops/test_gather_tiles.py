"""gather_tiles: every implementation is an exact copy, and says clearly what it cannot do."""

import os
import subprocess
import sys

import pytest
import torch
from examples import examples
from grids import Grid, grids, product
from hypothesis import given
from hypothesis import strategies as st

from tiledcore import ops
from tiledcore.ops import dispatch, reference

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def runnable(name: str, device: torch.device = DEVICE) -> list[ops.Impl]:
    every: tuple[ops.Impl, ...] = ("reference", "native", "triton")
    return [impl for impl in every if ops.unavailable(name, impl, device) is None]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@examples(6, 100)
@given(grid=grids(), dtype=st.sampled_from(DTYPES), B=st.integers(1, 2), C=st.integers(1, 5))
def test_copies_exactly(grid: Grid, dtype: torch.dtype, B: int, C: int) -> None:
    (H, W), (h, w), offsets = grid
    canvas = torch.randn(B, C, H, W, dtype=torch.float64).to(DEVICE, dtype)
    for impl in runnable("gather_tiles"):
        tiles = ops.gather_tiles(canvas, offsets.to(DEVICE), (h, w), impl=impl)
        assert tiles.dtype == dtype and tiles.is_contiguous()
        for t, (y, x) in enumerate(offsets.tolist()):
            # Rolled so that the tile starts at the origin: a third way to say what a tile is.
            expected = canvas.roll((-y, -x), (-2, -1))[..., :h, :w]
            assert torch.equal(bits(tiles[t * B : (t + 1) * B]), bits(expected)), impl


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_every_bit_pattern_survives(dtype: torch.dtype) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    noise = torch.randint(0, 256, (1, 3, 33, 70 * size), dtype=torch.uint8, device=DEVICE)
    canvas = noise.view(dtype)
    offsets = product([0, 20], [5, 60]).to(DEVICE)
    expected = None
    for impl in runnable("gather_tiles"):
        if dtype == torch.float8_e4m3fn and impl == "reference" and DEVICE.type == "cpu":
            continue
        tiles = bits(ops.gather_tiles(canvas, offsets, (13, 66), impl=impl))
        expected = tiles if expected is None else expected
        assert torch.equal(tiles, expected), impl


def test_strided_canvas() -> None:
    canvas = torch.randn(2, 5, 24, 30, device=DEVICE).to(memory_format=torch.channels_last)
    canvas = canvas[:, 1:4, ::2]
    offsets = product([0, 11], [3, 29]).to(DEVICE)
    expected = reference.gather_tiles(canvas.contiguous(), offsets, (7, 9))
    for impl in runnable("gather_tiles"):
        assert torch.equal(ops.gather_tiles(canvas, offsets, (7, 9), impl=impl), expected)


def test_empty_batch() -> None:
    canvas, offsets = torch.empty(0, 4, 8, 8, device=DEVICE), product([0], [0]).to(DEVICE)
    for impl in runnable("gather_tiles"):
        assert ops.gather_tiles(canvas, offsets, (4, 4), impl=impl).shape == (0, 4, 4, 4)


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_opcheck(impl: ops.Impl) -> None:
    if reason := ops.unavailable("gather_tiles", impl, DEVICE):
        pytest.skip(reason)
    op = getattr(torch.ops.tiledcore, f"gather_tiles_{impl}").default
    offsets = product([0, 7], [0, 5, 13]).to(DEVICE)
    for canvas in (torch.randn(2, 3, 12, 14), torch.randn(2, 3, 14, 12).mT):
        torch.library.opcheck(op, (canvas.to(DEVICE), offsets, 5, 6))


def test_default_is_the_fastest() -> None:
    op = ops.choose("gather_tiles", None, CPU)
    native = ops.unavailable("gather_tiles", "native", CPU) is None
    assert op is getattr(torch.ops.tiledcore, f"gather_tiles_{'native' if native else 'reference'}")


def test_compiles_and_fakes_without_looking_at_the_offsets() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        canvas = torch.empty(2, 4, 64, 64)
        offsets = torch.empty(9, 2, dtype=torch.int32)
        tiles = ops.gather_tiles(canvas, offsets, (16, 24))
        assert tiles.shape == (18, 4, 16, 24)
        assert ops.blend_tiles(tiles, offsets, (64, 64)).shape == canvas.shape
    canvas, offsets = torch.randn(1, 2, 8, 8), product([0, 4], [0, 4])
    compiled = torch.compile(lambda c: ops.gather_tiles(c, offsets, (4, 4)), backend="eager")
    assert torch.equal(compiled(canvas), ops.gather_tiles(canvas, offsets, (4, 4)))


CANVAS = torch.zeros(1, 2, 8, 10)
OFFSETS = product([0], [0])


@pytest.mark.parametrize(
    ("canvas", "offsets", "tile", "error", "words"),
    [
        (CANVAS.tolist(), OFFSETS, (4, 4), TypeError, "canvas must be a tensor"),
        (CANVAS.int(), OFFSETS, (4, 4), TypeError, "canvas must have a floating-point dtype"),
        (CANVAS[0], OFFSETS, (4, 4), ValueError, r"canvas must have the shape .* \(2, 8, 10\)"),
        (CANVAS, OFFSETS.tolist(), (4, 4), TypeError, "offsets must be a tensor"),
        (CANVAS, OFFSETS.long(), (4, 4), TypeError, "torch.int32, got torch.int64"),
        (CANVAS, OFFSETS[0], (4, 4), ValueError, r"offsets must have the shape \[T, 2\]"),
        (CANVAS, OFFSETS[:0], (4, 4), ValueError, "T >= 1"),
        (CANVAS, OFFSETS, (0, 4), ValueError, r"tile=\(0, 4\)"),
        (CANVAS, OFFSETS, (9, 4), ValueError, r"tile \(9, 4\) is larger than the canvas \(8, 10\)"),
        (CANVAS, product([0], [10]), (4, 4), ValueError, r"offsets\[0\]=\(0, 10\) is not on"),
        (CANVAS, product([0, -1], [0]), (4, 4), ValueError, r"offsets\[1\]=\(-1, 0\) is not on"),
        (CANVAS, OFFSETS.to("meta"), (4, 4), ValueError, "offsets is on meta"),
    ],
)
def test_errors(canvas, offsets, tile, error, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        ops.gather_tiles(canvas, offsets, tile)


def test_unknown_impl() -> None:
    with pytest.raises(ValueError, match="impl='cuda' is not one of"):
        ops.gather_tiles(CANVAS, OFFSETS, (4, 4), impl="cuda")  # type: ignore[arg-type]


def test_named_impl_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_native_missing", "no such file")
    with pytest.raises(RuntimeError, match="gather_tiles: impl='native' is unavailable on cpu: no"):
        ops.gather_tiles(CANVAS, OFFSETS, (4, 4), impl="native")
    assert ops.choose("gather_tiles", None, CPU) is torch.ops.tiledcore.gather_tiles_reference
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="'triton' is unavailable on cpu: triton is not inst"):
        ops.gather_tiles(CANVAS, OFFSETS, (4, 4), impl="triton")


def test_triton_on_the_cpu_needs_the_interpreter() -> None:
    """And nothing imports Triton or its kernels before they are needed."""
    code = (
        "import sys, torch; from tiledcore import ops; assert 'triton' not in sys.modules;"
        "arguments = torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, dtype=torch.int32), (2, 2);"
        "ops.gather_tiles(*arguments, impl='reference'); assert 'tiledcore.kernels.gather_tiles' not in sys.modules;"
        "ops.gather_tiles(*arguments, impl='triton')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].endswith("it needs TRITON_INTERPRET=1 in the environment from the start")


def test_native_refuses_what_would_leave_its_memory() -> None:
    if reason := ops.unavailable("gather_tiles", "native", CPU):
        pytest.skip(reason)
    for offsets in (product([8], [0]), product([0], [-1]), OFFSETS.long()):
        with pytest.raises(RuntimeError, match="offset"):
            torch.ops.tiledcore.gather_tiles_native(CANVAS, offsets, 4, 4)
    nothing = torch.empty(2**61, 0, 8, 10)  # times 8 tiles is 2^64, which wraps to 0
    with pytest.raises(RuntimeError, match="tiles times batch does not fit 64 bits"):
        torch.ops.tiledcore.gather_tiles_native(nothing, OFFSETS.expand(8, 2), 4, 4)

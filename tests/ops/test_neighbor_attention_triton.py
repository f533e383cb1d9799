"""What the Triton kernels of neighbor_attention have of their own: lists of patches and variants."""

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor

from tiledcore import ops
from tiledcore.ops import reference
from tiledcore.ops.neighbor_attention import TRITON_HEAD_DIM, _op_name

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if reason := ops.unavailable("neighbor_attention", "triton", DEVICE):
    pytest.skip(reason, allow_module_level=True)

from tiledcore.kernels import neighbor_attention as kernel  # noqa: E402
from tiledcore.kernels.neighbor_attention_config import (  # noqa: E402
    CAPABILITIES,
    DTYPES,
    HEAD_DIMS,
    Config,
    configuration,
    split,
)
from tiledcore.kernels.neighbor_attention_patches import patch_lists  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

SMALL = Config((4, 4), (4, 4), 4, 2)
pairs = st.tuples(st.integers(1, 11), st.integers(1, 11))


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def launch(config: Config, tensors: dict[str, Tensor], geometry: tuple[Any, ...]) -> Tensor:
    names = ("q", "k", "v", "global_q", "global_k", "global_v")
    D = tensors["q"].shape[-1]
    given = (tensors.get(name) for name in names)
    return kernel.neighbor_attention(*given, *geometry, D**-0.5, config)


def exact(tensors: dict[str, Tensor], geometry: tuple[Any, ...]) -> Tensor:
    names = ("canvas", "tile", "halo", "wrap")
    arguments = dict(zip(names, geometry, strict=True))
    return reference.neighbor_attention(**{name: t.double() for name, t in tensors.items()}, **arguments)


def plain(tensors: dict[str, Tensor], geometry: tuple[Any, ...]) -> Tensor:
    names = ("canvas", "tile", "halo", "wrap")
    arguments = dict(zip(names, geometry, strict=True))
    return ops.neighbor_attention(**tensors, **arguments, impl="sdpa")


# --- lists of patches


def window(size: int, tile: int, index: int, halo: int, wrap: bool) -> set[int]:
    """The keys of an axis that tile number ``index`` sees, counted one by one."""
    start, stop = index * tile, min(index * tile + tile, size)
    reach = range(start - halo, stop + halo)
    return {at % size for at in reach} if wrap else {at for at in reach if 0 <= at < size}


@given(
    canvas=pairs, tile=pairs, halo=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    wrap=st.tuples(st.booleans(), st.booleans()), query=st.sampled_from([(1, 2), (4, 4), (2, 8)]),
    key=st.sampled_from([(2, 1), (4, 4), (2, 8)]),
)  # fmt: skip
def test_every_query_once_and_every_key_of_its_window_once(
    canvas: tuple[int, int], tile: tuple[int, int], halo: tuple[int, int], wrap: tuple[bool, bool],
    query: tuple[int, int], key: tuple[int, int],
) -> None:  # fmt: skip
    blocks, patches = patch_lists.__wrapped__(canvas, tile, halo, wrap, query, key, torch.device("cpu"))
    assert blocks.dtype == patches.dtype == torch.int32
    seen_queries = list[tuple[int, int]]()
    for y, x, h, w, begin, whole, end, _ in blocks.tolist():
        assert 1 <= h <= query[0] and 1 <= w <= query[1]
        mine = [(y + i, x + j) for i in range(h) for j in range(w)]
        seen_queries += mine
        tiles = {(i // tile[0], j // tile[1]) for i, j in mine}
        assert len(tiles) == 1, "a patch of queries in two tiles"
        index = tiles.pop()
        keys = list[tuple[int, int]]()
        for at, (origin, extent) in enumerate(patches[begin:end].tolist(), begin):
            (ky, kx), (rows, columns) = (divmod(packed, 1 << 16) for packed in (origin, extent))
            assert ky + rows <= canvas[0] and kx + columns <= canvas[1], "a patch crosses the border"
            assert ((rows, columns) == key) == (at < whole)
            keys += [(ky + i, kx + j) for i in range(rows) for j in range(columns)]
        rows_, columns_ = (window(*axis) for axis in zip(canvas, tile, index, halo, wrap, strict=True))
        assert sorted(keys) == sorted((i, j) for i in rows_ for j in columns_)
    assert sorted(seen_queries) == [(i, j) for i in range(canvas[0]) for j in range(canvas[1])]


def test_a_canvas_of_whole_patches_masks_nothing() -> None:
    blocks, _ = patch_lists((64, 64), (16, 32), (8, 16), (False, True), (8, 16), (8, 16), torch.device("cpu"))
    assert (blocks[:, 5] == blocks[:, 6]).all()


def test_a_side_too_long_for_the_lists_is_refused() -> None:
    with pytest.raises(ValueError, match=r"canvas=\(1, 32769\).*32768"):
        patch_lists((1, (1 << 15) + 1), (1, 1024), (0, 0), (False, False), (8, 8), (8, 8), torch.device("cpu"))


# --- the kernel


GEOMETRY = ((6, 9), (4, 8), (1, 2), (True, False))
N = 54


PATHS = list(product((True, False), (torch.float16, torch.bfloat16, torch.float32), (False, True)))
GATE = [(True, torch.float16, True), (False, torch.bfloat16, False), (False, torch.float32, True)]


@pytest.mark.parametrize(
    ("unmasked", "dtype", "own_queries"),
    [*GATE, *(pytest.param(*path, marks=pytest.mark.slow) for path in PATHS if path not in GATE)],
)
def test_every_path_of_the_kernel(unmasked: bool, dtype: torch.dtype, own_queries: bool) -> None:
    """Whole and partial patches, a split head dimension, and a rest of global tokens."""
    tensors = {name: tokens(1, N, 1, 40, dtype=dtype, seed=i) for i, name in enumerate("qkv")}
    tensors |= {f"global_{name}": tokens(1, 9, 1, 40, dtype=dtype, seed=7 + i) for i, name in enumerate("kv")}
    if own_queries:
        tensors["global_q"] = tokens(1, N, 1, 40, dtype=dtype, seed=9)
    config = SMALL._replace(unmasked=unmasked, chunk=16 if dtype == torch.float32 else 0)
    result = launch(config, tensors, GEOMETRY)
    assert_close(result, exact(tensors, GEOMETRY), plain(tensors, GEOMETRY))


@pytest.mark.parametrize(
    ("dtype", "fused"),
    [
        (torch.float16, True),
        pytest.param(torch.float16, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, False, marks=pytest.mark.slow),
    ],
)
def test_descriptors(dtype: torch.dtype, fused: bool) -> None:
    """As on Hopper; a patch of keys that a descriptor reads may lie anywhere."""
    parts = tokens(2, N, 3 * 2 * 64, dtype=dtype).chunk(3, -1)
    tensors = {n: (p if fused else p.contiguous()).unflatten(2, (2, 64)) for n, p in zip("qkv", parts, strict=True)}
    result = launch(SMALL._replace(descriptors=True), tensors, GEOMETRY)
    assert_close(result, exact(tensors, GEOMETRY), plain(tensors, GEOMETRY))


def production() -> list[Any]:
    """Every configuration of the table once for each head dimension and dtype. SDXL's on an H100 is in the gate."""
    found: dict[tuple[int, torch.dtype, Config], int] = {}
    for D, dtype, capability in product(HEAD_DIMS, DTYPES, CAPABILITIES):
        found.setdefault((D, dtype, configuration(D, dtype, capability)), capability)
    return [
        pytest.param(
            *key, id=f"sm_{at}-{key[0]}-{DTYPES[key[1]]}", marks=[pytest.mark.slow] * (key[:2] != FAST or at != 90)
        )
        for key, at in found.items()
    ]


FAST = (64, torch.float16)


@pytest.mark.parametrize(("D", "dtype", "config"), production())
def test_production_configurations_on_whole_patches(D: int, dtype: torch.dtype, config: Config) -> None:
    """Two by two tiles of a patch of queries; windows have patches of keys inside of them and across their border."""
    (QY, QX), (KY, KX) = config.query_patch, config.key_patch
    geometry = ((2 * QY, 2 * QX), (QY, QX), (KY // 2, KX // 2 + 1), (False, True))
    blocks, _ = patch_lists(*geometry, config.query_patch, config.key_patch, DEVICE)
    begin, whole, end = blocks[:, 4:7].unbind(1)
    assert (begin < whole).all() and (whole < end).all()
    N = 4 * QY * QX
    tensors = {name: tokens(1, N, 1, D, dtype=dtype, seed=i) for i, name in enumerate("qkv")}
    tensors |= {f"global_{name}": tokens(1, 9, 1, D, dtype=dtype, seed=7 + i) for i, name in enumerate("kv")}
    assert_close(launch(config, tensors, geometry), exact(tensors, geometry), plain(tensors, geometry))


def test_descriptors_refuse_what_tma_cannot_read() -> None:
    t = tokens(1, N, 2, 64, dtype=torch.float16)
    assert kernel._describe(t, (6, 9), (4, 4)) is not None
    assert kernel._describe(t.expand(2, -1, -1, -1), (6, 9), (4, 4)) is None
    assert kernel._describe(tokens(1, N, 2, 68, dtype=torch.float16)[..., :64], (6, 9), (4, 4)) is None


def test_views_of_a_projection_are_not_copied() -> None:
    t = tokens(2, 12, 3 * 5 * 40).chunk(3, -1)[1].unflatten(2, (5, 40))
    assert kernel.aligned(t, 8) is t
    odd = tokens(2, 12, 5, 41)[..., :40]
    assert kernel.aligned(odd, 8) is not odd and torch.equal(kernel.aligned(odd, 8), odd)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="it needs the interpreter")
def test_batch_entries_may_lie_far_apart() -> None:
    """A batch stride of 2**31 elements, in a process of its own: in 32 bits it would read elsewhere, and crash."""
    script = Path(__file__).with_name("long_strides.py")
    result = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_query_without_keys_becomes_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """No geometry has one; the kernel must not answer NaN all the same."""
    blocks, patches = patch_lists((4, 4), (4, 4), (0, 0), (False, False), (4, 4), (4, 4), DEVICE)
    empty = blocks.clone()
    empty[:, 5:7] = 0
    monkeypatch.setattr(kernel, "patch_lists", lambda *_: (empty, patches))
    tensors = {name: tokens(1, 16, 1, 40) for name in "qkv"}
    result = launch(SMALL, tensors, ((4, 4), (4, 4), (0, 0), (False, False)))
    assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_the_table_has_every_head_dimension(D: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for capability in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121):
            config = configuration(D, dtype, capability)
            assert 2**5 * config.warps <= 1024
    assert sum(split(D)) >= D and sum(split(D)) <= D * 1.2


def test_too_many_channels_are_refused() -> None:
    t = tokens(1, 4, 1, 168)
    with pytest.raises(ValueError, match=r"q has 168 channels a head.*at most 160"):
        ops.neighbor_attention(t, t, t, canvas=(2, 2), tile=(2, 2), halo=(0, 0), impl="triton")


def test_heads_too_wide_for_the_kernels_go_to_sdpa() -> None:
    assert HEAD_DIMS[-1] == TRITON_HEAD_DIM
    width = HEAD_DIMS[-1] + 8
    assert _op_name(None, torch.device("cuda"), torch.float16, width, 64) == "neighbor_attention_sdpa"

"""Every property is checked against brute force over pixels."""

from itertools import pairwise
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiledcore.geometry import TileGrid, Tiling

sizes = st.integers(1, 70)
wraps = st.tuples(st.booleans(), st.booleans())


@st.composite
def grids(draw: st.DrawFn, overlapping: bool = True) -> TileGrid:
    tile = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    overlap = draw(st.tuples(*(st.integers(0, t - 1) for t in tile))) if overlapping else (0, 0)
    return TileGrid(draw(sizes), draw(sizes), tile, overlap, draw(wraps))


def axes(tiling: Tiling) -> list[tuple[int, int, int, bool, tuple[int, ...], Any]]:
    """(size, tile, overlap, wrap, offsets, cores) of each axis."""
    return list(
        zip(
            (tiling.height, tiling.width),
            tiling.tile_size,
            tiling.overlap,
            tiling.wrap,
            [tuple(start for start, _ in parts) for parts in (tiling.rows, tiling.cols)],
            tiling.cores,
            strict=True,
        )
    )


def pixels(size: int, offset: int, length: int, wrap: bool) -> list[int]:
    """Canvas pixels of one tile; an open tile that leaves the canvas is a failure."""
    result = [offset + u for u in range(length)]
    if wrap:
        return [p % size for p in result]
    assert offset >= 0 and offset + length <= size
    return result


def coverage(tiling: Tiling) -> list[list[int]]:
    """How many tiles cover each canvas pixel."""
    count = [[0] * tiling.width for _ in range(tiling.height)]
    for y, x in tiling.offsets:
        for row in pixels(tiling.height, y, tiling.tile_size[0], tiling.wrap[0]):
            for col in pixels(tiling.width, x, tiling.tile_size[1], tiling.wrap[1]):
                count[row][col] += 1
    return count


@given(grids())
def test_grid_covers_canvas_flush_with_the_overlap(grid: TileGrid) -> None:
    for size, tile, overlap, wrap, offsets, _ in axes(grid):
        assert list(offsets) == sorted(set(offsets))
        covered = [p for o in offsets for p in pixels(size, o, tile, wrap)]
        assert set(covered) == set(range(size))
        following = list(offsets[1:]) + ([offsets[0] + size] if wrap else [])
        for a, b in zip(offsets, following, strict=False):
            assert a + tile - b >= overlap
        if not wrap:
            assert offsets[0] == 0 and offsets[-1] == size - tile


@given(grids())
def test_grid_has_the_fewest_tiles(grid: TileGrid) -> None:
    for size, tile, overlap, wrap, offsets, _ in axes(grid):
        if wrap:
            assert len(offsets) == ceil(size / (tile - overlap))
        elif size > tile:
            assert len(offsets) == ceil((size - overlap) / (tile - overlap))
        else:
            assert offsets == (0,)


@given(grids())
def test_area_factor_and_length_match_brute_force(grid: TileGrid) -> None:
    count = coverage(grid)
    assert len(grid) == len(grid.offsets) == len(grid.rows) * len(grid.cols)
    assert grid.area_factor * grid.height * grid.width == pytest.approx(sum(map(sum, count)))
    assert min(map(min, count)) >= 1


@given(grids())
def test_cores_partition_the_canvas_inside_their_tiles(grid: TileGrid) -> None:
    for size, tile, _, wrap, offsets, cores in axes(grid):
        owned = []
        for offset, (start, length) in zip(offsets, cores, strict=True):
            core = pixels(size, start, length, wrap)
            assert set(core) <= set(pixels(size, offset, tile, wrap))
            owned += core
        assert sorted(owned) == list(range(size))
    assert len(grid.cores[0]) * len(grid.cores[1]) == len(grid)


def test_cores_meet_in_the_middle_of_the_overlap() -> None:
    grid = TileGrid(56, 56, 32, 8)
    assert grid.rows == ((0, 32), (24, 32))
    assert grid.cores[0] == ((0, 28), (28, 28))
    assert grid.lines == ((24, 28, 32), (24, 28, 32))
    around = TileGrid(48, 48, 32, 8, wrap=True)
    assert around.rows == ((0, 32), (24, 32))
    assert around.cores[0] == ((4, 24), (28, 24))
    assert around.lines[0] == (0, 4, 8, 24, 28, 32)


@given(grids())
def test_lines_are_all_borders_but_an_open_canvas_has_none_at_its_edge(grid: TileGrid) -> None:
    found = grid.lines
    for (size, tile, _, wrap, offsets, cores), lines in zip(axes(grid), found, strict=True):
        assert list(lines) == sorted(set(lines))
        borders = {start % size for start, _ in cores}
        for offset in offsets:
            borders |= {offset % size, (offset + tile) % size}
        assert set(lines) == (borders if wrap else borders - {0})


@given(grids(overlapping=False), st.integers(0, 2**40), st.integers(0, 1000))
def test_shifted_tiles_partition_the_canvas(grid: TileGrid, seed: int, step: int) -> None:
    shifted = grid.shifted(step, seed)
    assert shifted == grid.shifted(step, seed)
    assert shifted.area_factor == 1 and shifted.cores == (shifted.rows, shifted.cols)
    canvas = (grid.height, grid.width)
    for size, tile, wrap, parts in zip(canvas, grid.tile_size, grid.wrap, (shifted.rows, shifted.cols), strict=True):
        assert sorted(p for start, length in parts for p in pixels(size, start, length, wrap)) == list(range(size))
        assert list(parts) == sorted(parts)
        for _, length in parts:
            assert length <= tile + 7 if wrap else length == size or tile // 2 <= length <= 1.5 * tile
    tiles = [(y, x, h, w) for (h, w), group in shifted.groups.items() for y, x in group]
    assert sorted(tiles) == sorted((y, x, h, w) for y, h in shifted.rows for x, w in shifted.cols)
    assert len(tiles) == len(shifted) and shifted.area_factor == 1


def test_shifted_sizes_are_multiples_of_an_eighth_of_the_tile() -> None:
    """What a network downsamples by divides them, where it divides the canvas."""
    for wrap in (False, True):
        grid = TileGrid(256, 320, 32, wrap=wrap)
        for step in range(50):
            shifted = grid.shifted(step, seed=0)
            assert all(length % 4 == 0 for _, length in (*shifted.rows, *shifted.cols))


@given(st.integers(4, 40), st.integers(4, 200), wraps, st.integers(0, 2**40))
def test_shifts_differ_between_steps_and_seeds(tile: int, extra: int, wrap: tuple[bool, bool], seed: int) -> None:
    grid = TileGrid(tile + extra, tile + extra, tile, 0, wrap)
    steps = {(s.rows, s.cols) for s in (grid.shifted(step, seed) for step in range(40))}
    assert len(steps) > 1 or tile + extra < 1.5 * tile
    seeds = {(s.rows, s.cols) for s in (grid.shifted(0, seed + k) for k in range(40))}
    assert len(seeds) > 1 or tile + extra < 1.5 * tile


def test_no_line_is_a_border_in_more_than_its_share_of_steps() -> None:
    """Eight places for the lines of an open axis, any for those of a wrapped one."""
    for height, wrap in ((128, False), (256, False), (128, True), (100, True)):
        grid = TileGrid(height, height, 32, 0, wrap)
        steps = [dict(grid.shifted(step, seed=0).rows) for step in range(800)]
        often = [sum(y in starts for starts in steps) / 800 for y in range(1, height)]
        assert max(often) < 0.17, (height, wrap)


def test_known_shift_does_not_change_between_versions() -> None:
    shifted = TileGrid(96, 96, 32).shifted(step=3, seed=7)
    assert shifted.rows == ((0, 24), (24, 32), (56, 40))
    assert shifted.cols == ((0, 32), (32, 32), (64, 32))


@given(st.integers(0, 2**40), st.booleans(), st.integers(0, 1000))
def test_lines_are_in_every_place_before_they_are_in_one_again(seed: int, wrap: bool, first: int) -> None:
    """Three eighths of a tile from those of the step before, and never nearer than an eighth within eight."""
    grid = TileGrid(256, 256, 32, wrap=wrap)
    for axis in ("rows", "cols"):
        places = [getattr(grid.shifted(first + k, seed), axis)[1][0] % 32 for k in range(9)]
        assert {(b - a) % 32 for a, b in pairwise(places)} == {12}
        assert len(set(places)) == 8 and places[8] == places[0]


def test_canvas_smaller_than_tile() -> None:
    grid = TileGrid(20, 64, 32, 16)
    assert grid.tile_size == (20, 32) and grid.rows == ((0, 20),) and grid.overlap == (10, 16)
    around = TileGrid(20, 64, 32, 16, wrap=True)
    assert around.rows == ((0, 20), (10, 20)), "the cut of one tile is inside the other"
    assert TileGrid(20, 20, 32, 0, wrap=True).offsets == ((0, 0),)
    assert TileGrid(1, 1, 32, 16, wrap=True).offsets == ((0, 0),)


def test_grid_is_a_value() -> None:
    grid = TileGrid(64, 64, 32, 8)
    assert grid == TileGrid(64, 64, (32, 32), (8, 8), False) and hash(grid) == hash(grid)
    assert grid != TileGrid(64, 64, 32, 4)
    with pytest.raises(AttributeError):
        grid.rows = (0,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0}, r"height=0 must be an int of at least 1"),
        ({"width": -3}, r"width=-3 must be"),
        ({"width": 64.0}, r"width=64.0 must be an int"),
        ({"height": True}, r"height=True must be an int"),
        ({"tile": 0}, r"tile=0 must be an int of at least 1"),
        ({"tile": (32, 0)}, r"tile=\(32, 0\) must be"),
        ({"tile": (32, 32, 32)}, r"tile=\(32, 32, 32\) must be .* \(y, x\) pair"),
        ({"tile": "32"}, r"tile='32' must be"),
        ({"overlap": -1}, r"overlap=-1 must be an int of at least 0"),
        ({"overlap": 1.5}, r"overlap=1.5 must be"),
        ({"overlap": 32}, r"overlap=32 must be smaller than tile=32 .* at most 31 along y"),
        ({"overlap": (0, 40)}, r"overlap=\(0, 40\) must be smaller .* at most 31 along x"),
        ({"wrap": 1}, r"wrap=1 must be a bool"),
        ({"wrap": (True,)}, r"wrap=\(True,\) must be a bool, or a \(y, x\) pair"),
    ],
)
def test_impossible_grids(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileGrid(**{"height": 64, "width": 64, "tile": 32, **arguments})


def test_impossible_shift() -> None:
    with pytest.raises(ValueError, match=r"overlap=\(8, 8\) cannot be shifted"):
        TileGrid(64, 64, 32, 8).shifted(0, 0)


def test_a_grid_that_would_only_fill_the_memory_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"tile=\(4, 4\), overlap=\(3, 3\): about \d+ tiles, more than 1048576"):
        TileGrid(2**40, 2**40, tile=4, overlap=3)
    assert len(TileGrid(2**13, 2**13, tile=8).rows) == 1024

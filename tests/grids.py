"""Grids of tiles for the ops' tests: integers only, independent of tiledcore.geometry."""

import torch
from hypothesis import strategies as st
from torch import Tensor

Grid = tuple[tuple[int, int], tuple[int, int], Tensor]  # canvas size, tile size, offsets


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """(canvas, tile, starts) of one axis: any starts that cover it, wrapped or not, even or not."""
    size = draw(st.integers(1, 24))
    extent = draw(st.integers((size + 3) // 4, size))
    wrap = draw(st.booleans())
    starts = [draw(st.integers(0, size - 1)) if wrap else 0]
    end = starts[0] + size if wrap else size  # where the last tile must reach
    while starts[-1] + extent < end:
        furthest = min(starts[-1] + extent, end - (0 if wrap else extent))
        nearest = max(starts[-1] + 1, min(furthest, starts[-1] + (extent + 1) // 2))
        starts.append(draw(st.integers(nearest, furthest)))
    return size, extent, sorted({start % size for start in starts})


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Rows times columns, in any order."""
    (H, h, ys), (W, w, xs) = draw(axes()), draw(axes())
    pairs = draw(st.permutations([(y, x) for y in ys for x in xs]))
    return (H, W), (h, w), torch.tensor(pairs, dtype=torch.int32)


def even(canvas: int, tile: int, count: int) -> list[int]:
    """Starts of tiles spread evenly from border to border."""
    return [round(i * (canvas - tile) / max(count - 1, 1)) for i in range(count)]


def product(ys: list[int], xs: list[int]) -> Tensor:
    return torch.tensor([(y, x) for y in ys for x in xs], dtype=torch.int32)

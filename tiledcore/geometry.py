"""Where tiles lie on a canvas: plain integers, no tensors.

Lengths and positions are in latent pixels, pairs are (y, x). A wrapped axis is a circle: pixel ``u`` of a tile is
canvas pixel ``(offset + u) % size``. A *line* ``y`` is the border between pixels ``y - 1`` and ``y``. Overlapping
tiles: MultiDiffusion (Bar-Tal et al. 2023). Tiles that move in each step: SpotDiffusion (Frolov et al. 2024).
"""

from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TypeVar

from tiledcore import validate

Pair = validate.Pair
T = TypeVar("T", int, bool)
MOST_TILES = 2**20


def both(value: T | tuple[T, T]) -> tuple[T, T]:
    """One value for both axes, or one for each: (y, x)."""
    return (value[0], value[1]) if isinstance(value, tuple | list) else (value, value)


@dataclass(frozen=True)
class Tiling:
    """Tiles at every pair of a row and a column, of one size or several."""

    height: int
    width: int
    tile_size: Pair  # At most the canvas; of most tiles, where there are several sizes
    overlap: Pair  # What adjacent tiles share at least; they may share more
    wrap: tuple[bool, bool]
    rows: tuple[Pair, ...]  # (start, size) along y, ascending; on a wrapped axis a tile may cross the border
    cols: tuple[Pair, ...]  # (start, size) along x

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)

    @cached_property
    def offsets(self) -> tuple[Pair, ...]:
        """(y, x) of every tile, row-major."""
        return tuple((y, x) for y, _ in self.rows for x, _ in self.cols)

    @cached_property
    def groups(self) -> dict[Pair, tuple[Pair, ...]]:
        """Tile size (h, w) -> the (y, x) offsets of all tiles of that size, row-major."""
        found: dict[Pair, list[Pair]] = {}
        for y, h in self.rows:
            for x, w in self.cols:
                found.setdefault((h, w), []).append((y, x))
        return {size: tuple(offsets) for size, offsets in found.items()}

    @property
    def area_factor(self) -> float:
        """Tile area evaluated per step over canvas area; 1.0 is the floor."""
        return sum(h for _, h in self.rows) * sum(w for _, w in self.cols) / (self.height * self.width)

    @cached_property
    def cores(self) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
        """(start, size) of the core of each row of tiles, and of each column. Cores meet in the middle of an overlap.

        A start lies on the canvas; on a wrapped axis a core may cross the border.
        """
        return _cores(self.height, self.rows, self.wrap[0]), _cores(self.width, self.cols, self.wrap[1])

    @cached_property
    def lines(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The (y, x) lines where seams could show: tiles start or end, or cores meet. 0 only on a wrapped axis."""
        return (
            _lines(self.height, self.wrap[0], self.rows, self.cores[0]),
            _lines(self.width, self.wrap[1], self.cols, self.cores[1]),
        )


class TileGrid(Tiling):
    """The fewest evenly spread tiles that cover a canvas with at least the requested overlap.

    On an open axis the first tile starts at 0 and the last ends with the canvas. On a wrapped axis tiles go round.
    A tile larger than the canvas is clamped to it, and the overlap to half of that: one tile on an open axis, at least
    two on a wrapped axis with overlap, so that the cut of one lies inside another.

    Args:
        height: canvas height.
        width: canvas width.
        tile: tile size, an int or (y, x).
        overlap: least overlap of adjacent tiles, an int or (y, x); smaller than ``tile``.
        wrap: whether the canvas is a torus, a bool or (y, x).
        snap: tiles start at multiples of it on an axis where tile and canvas are multiples of it.

    Raises:
        ValueError: names the argument, its value and what is valid.
    """

    def __init__(
        self,
        height: int,
        width: int,
        tile: int | Pair,
        overlap: int | Pair = 0,
        wrap: bool | tuple[bool, bool] = (False, False),
        snap: int = 1,
    ) -> None:
        canvas = (validate.integer("height", height, 1), validate.integer("width", width, 1))
        tiles, overlaps = validate.pair("tile", tile, 1), validate.pair("overlap", overlap, 0)
        wraps = validate.flags("wrap", wrap)
        for axis, t, o in zip("yx", tiles, overlaps, strict=True):
            if o >= t:
                raise ValueError(
                    f"overlap={overlap!r} must be smaller than tile={tile!r} on both axes: at most {t - 1} along {axis}"
                )
        fitted = zip(canvas, tiles, overlaps, strict=True)
        (h, overlap_y), (w, overlap_x) = ((t, o) if t <= size else (size, min(o, size // 2)) for size, t, o in fitted)
        count = -(-height // (h - overlap_y)) * -(-width // (w - overlap_x))
        if count > MOST_TILES:  # they would only fill the memory
            raise ValueError(
                f"tile={(h, w)}, overlap={(overlap_y, overlap_x)}: about {count} tiles, more than {MOST_TILES}; "
                "take larger ones"
            )
        rows = tuple((y, h) for y in _spread(height, h, overlap_y, wraps[0], snap))
        cols = tuple((x, w) for x in _spread(width, w, overlap_x, wraps[1], snap))
        super().__init__(height, width, (h, w), (overlap_y, overlap_x), wraps, rows, cols)

    def shifted(self, step: int, seed: int) -> Tiling:
        """A partition of the canvas with other lines in every step (SpotDiffusion); depends on (seed, step) only.

        No pixel is evaluated twice. A wrapped axis is rotated. On an open axis all lines move by the same part of a
        tile, and what is left at the ends is a tile of half to one and a half times the size. Lines move by eighths of
        a tile where it has such, so that sizes suit the network's downsampling. The start is random; then each step
        adds three eighths of a tile, so that all eight places are used before one repeats.

        Raises:
            ValueError: the grid has an overlap.
        """
        if self.overlap != (0, 0):
            raise ValueError(f"overlap={self.overlap!r} cannot be shifted: only a grid with overlap=0 can")
        # A string's hash, so that neighbouring seeds are unrelated; Python promises to keep the values of random().
        random = Random(str(seed))
        moved = [(random.random() + step * 3 / 8) % 1 for _ in range(2)]
        rows, cols = (
            _moved(*axis) for axis in zip((self.height, self.width), self.tile_size, self.wrap, moved, strict=True)
        )
        return Tiling(self.height, self.width, self.tile_size, (0, 0), self.wrap, rows, cols)


def _spread(size: int, tile: int, overlap: int, wrap: bool, snap: int) -> tuple[int, ...]:
    """Where the tiles of one axis start, at multiples of ``snap`` if they can."""
    if size % snap or tile % snap or overlap >= tile - snap:
        snap = 1
    size, tile, overlap = size // snap, tile // snap, -(-overlap // snap)
    n = -(-(size if wrap else size - overlap) // (tile - overlap))
    last, steps = (size, n) if wrap else (size - tile, max(1, n - 1))
    return tuple(i * last // steps * snap for i in range(n))


def _moved(size: int, tile: int, wrap: bool, random: float) -> tuple[Pair, ...]:
    """(start, size) of the tiles of one axis whose lines are moved by ``random`` of a tile."""
    unit = tile // 8 if tile % 8 == 0 else 1
    if wrap:
        n = -(-size // tile)
        lines = [i * (size // unit) // n * unit for i in range(n)]
        shift = int(random * size / n)  # what is rotated as a whole keeps its sizes
        starts = sorted((line + shift) % size for line in lines)
        following = (*starts[1:], starts[0] + size)
    elif size <= tile:
        return ((0, size),)
    else:
        shift = int(random * (tile // unit)) * unit
        # Pieces of less than half a tile at an end join their neighbour.
        inner = [y for y in range(shift, size, tile) if tile <= 2 * y and tile <= 2 * (size - y)]
        if not inner and 2 * size > 3 * tile:
            inner = [size // 2 // unit * unit]
        starts, following = [0, *inner], (*inner, size)
    return tuple((start, end - start) for start, end in zip(starts, following, strict=True))


def _cores(size: int, parts: tuple[Pair, ...], wrap: bool) -> tuple[Pair, ...]:
    following = (*(start for start, _ in parts[1:]), parts[0][0] + size)
    ends = [(start + extent + after) // 2 for (start, extent), after in zip(parts, following, strict=True)]
    if not wrap:
        ends[-1] = size
    starts = [ends[-1] - size, *ends[:-1]]
    return tuple((start % size, end - start) for start, end in zip(starts, ends, strict=True))


def _lines(size: int, wrap: bool, parts: tuple[Pair, ...], cores: tuple[Pair, ...]) -> tuple[int, ...]:
    borders = {line for start, extent in parts for line in (start, (start + extent) % size)}
    lines = borders | {start for start, _ in cores}
    return tuple(sorted(lines if wrap else lines - {0}))

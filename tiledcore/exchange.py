"""Tiles that exchange halos: in tile mode, each tile's self-attention also sees the tokens around it.

A tile is an image of its own to the network: its convolutions are padded, its norms are its own, it has its own text
tokens and positions 0, 1, ... So the network stays where it was trained. Only in self-attention does a tile look
over its border, at what its neighbours are in the same layer of the same step. For that all tiles of a step
are in the network at once: as one batch where they have one size, otherwise a batch for each size, which run in turns
(:mod:`tiledcore.turns`) and meet in every self-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiledcore import ops
from tiledcore.canvas import QKV, Canvas, Rotary, Windows, rotate
from tiledcore.geometry import Pair
from tiledcore.labels import label
from tiledcore.turns import Turns


class Layout(NamedTuple):
    """Where the tokens of all tiles lie on the canvas, in one layer."""

    rows: tuple[int, ...]
    """Heights of the tiles, in tokens."""
    columns: tuple[int, ...]
    order: Tensor
    """``[B * H * W]``: of each canvas token its place among the tiles' tokens, group by group ``[T * B, n]``."""
    back: Tensor
    """The inverse permutation."""


class Exchange:
    """The tiles of a partition, by size.

    Args:
        rows: heights of the tile rows, from wherever a wrapped canvas is cut open.
        columns: widths of the tile columns.
        wrap: whether the last tile has the first one as its neighbour, along (y, x).
    """

    def __init__(self, rows: Sequence[int], columns: Sequence[int], wrap: tuple[bool, bool]) -> None:
        self.rows, self.columns, self.wrap = tuple(rows), tuple(columns), wrap
        self.groups: dict[Pair, list[Pair]] = {}
        """Tile size -> (row, column) of all tiles of that size, in the order of ``Partition.groups``."""
        for row, h in enumerate(self.rows):
            for column, w in enumerate(self.columns):
                self.groups.setdefault((h, w), []).append((row, column))
        self._layouts: dict[Any, Layout] = {}

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """Evaluate the network on every group, by one function each, in the order of :attr:`groups`."""
        turns = Turns(len(self.groups))

        def inside(index: int, function: Callable[[], Any]) -> Any:
            token = _CURRENT.set(Member(self, turns, index))
            try:
                return function()
            finally:
                _CURRENT.reset(token)

        return turns.run([partial(inside, index, function) for index, function in enumerate(functions)])

    def layout(self, sizes: tuple[Pair, ...], batch: int, device: torch.device) -> Layout:
        """The layout of a layer in which tiles of each group have so many (rows, columns) of tokens."""
        key = (sizes, batch, device)
        if key not in self._layouts:
            self._layouts[key] = self._layout(sizes, batch, device)
        return self._layouts[key]

    def _layout(self, sizes: tuple[Pair, ...], batch: int, device: torch.device) -> Layout:
        heights = {h: size[0] for (h, _), size in zip(self.groups, sizes, strict=True)}
        widths = {w: size[1] for (_, w), size in zip(self.groups, sizes, strict=True)}
        rows, columns = [heights[h] for h in self.rows], [widths[w] for w in self.columns]
        tops, lefts = (list(accumulate(lengths, initial=0)) for lengths in (rows, columns))
        index = torch.empty(batch, tops[-1], lefts[-1], dtype=torch.int64)
        first = 0
        for places, (h, w) in zip(self.groups.values(), sizes, strict=True):
            tokens = torch.arange(first, first + len(places) * batch * h * w).view(len(places), batch, h, w)
            for tile, (row, column) in zip(tokens, places, strict=True):
                index[:, tops[row] : tops[row] + h, lefts[column] : lefts[column] + w] = tile
            first += tokens.numel()
        index = index.flatten()
        return Layout(tuple(rows), tuple(columns), index.to(device), index.argsort().to(device))


class Window(NamedTuple):
    """What a tile sees along one axis of the canvas."""

    start: int
    """First position; on a wrapped axis it may be negative."""
    length: int
    before: int
    """How many positions come before the tile's own first one."""


class Member(NamedTuple):
    """One group of tiles inside the network, as its attention layers know it."""

    exchange: Exchange
    turns: Turns
    group: int

    def attend(self, canvas: Canvas, windows: Windows, tokens: QKV, scale: float | None) -> Tensor:
        """Neighbour attention of the tiles' tokens ``[T * B, n, heads, D]``, on the canvas that they make up together.

        ``windows`` are those of one tile: its size and the halo in this layer's tokens.
        """

        def combine(parts: list[tuple[Pair, QKV]]) -> Sequence[Tensor]:
            layout = self._layout(parts)
            q, k, v = (self._to_canvas([part[i] for _, part in parts], layout) for i in range(3))
            rows, columns = layout.rows, layout.columns
            with label("attention"):
                out = ops.neighbor_attention(
                    q,
                    k,
                    v,
                    canvas=(sum(rows), sum(columns)),
                    tile=(_extent(rows), _extent(columns)),
                    halo=windows.halo,
                    wrap=self.exchange.wrap,
                    scale=scale,
                    impl=canvas.impl,
                )
            flat = out.flatten(0, 1).index_select(0, layout.back)
            shapes = [part.q.shape for _, part in parts]
            pieces = flat.split([shape[0] * shape[1] for shape in shapes])
            return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

        attended: Tensor = self._meet(canvas, (windows.canvas, tokens), combine)
        return attended

    def attend_jointly(
        self,
        canvas: Canvas,
        image: QKV,
        text: QKV | None,
        scale: float | None,
        rotary: Rotary | None,
        kept: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of the tiles' image tokens to their windows and, each, to the text tokens of its own tile.

        The arguments are those of :func:`tiledcore.processors.attend_jointly`, for images ``[T * B, ...]`` that are
        tiles. The op's global tokens are the same for the whole canvas, but every tile has its own text. So
        windows are gathered tile by tile here, and torch's attention does the rest. A window's tokens have the
        positions that they would have if the tile went on: negative ones before it. So one rotation of the
        queries serves the tile, its halo, and the text.

        Returns:
            What the image tokens attended to, and their tiles' own rotated keys.
        """
        windows, device = canvas.image(), image.q.device
        layout, k, v = self._meet(canvas, (windows.canvas, image), self._share)
        h, w = windows.canvas
        first = rotary.origin(windows)[1] if rotary is not None else (0, 0)

        def turn(x: Tensor, up: int, left: int, size: Pair) -> Tensor:
            if rotary is None:
                return x
            ys, xs = torch.arange(size[0], device=device), torch.arange(size[1], device=device)
            key = (device, "window", up, left, size)
            return rotate(x, canvas.table(key, lambda: rotary.grid(first[0] - up + ys, first[1] - left + xs)))

        q, own_k = turn(image.q, 0, 0, (h, w)), turn(image.k, 0, 0, (h, w))
        places = self._places()
        batch = len(q) // len(places)
        out = torch.empty(q.shape, dtype=q.dtype, device=device)
        for at, (y, x) in enumerate(self._windows(layout, windows.halo, places)):
            tile = slice(at * batch, (at + 1) * batch)
            seen_k, seen_v = (_cut(_cut(t, 1, y), 2, x).flatten(1, 2) for t in (k, v))
            keys, values = turn(seen_k, y.before, x.before, (y.length, x.length)), seen_v
            mask = None
            if text is not None:
                keys, values = torch.cat([keys, text.k[tile]], 1), torch.cat([values, text.v[tile]], 1)
            if text is not None and kept is not None:
                mask = torch.ones(batch, 1, 1, keys.shape[1], dtype=torch.bool, device=device)
                mask[..., seen_k.shape[1] :] = False
                for row, use in zip(mask, kept[tile], strict=True):
                    row[..., seen_k.shape[1] + use] = True
            with label("attention"):
                query, keys, values = (t.transpose(1, 2) for t in (q[tile], keys, values))
                attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
            out[tile] = attended.transpose(1, 2)
        return out, own_k

    def _share(self, parts: list[tuple[Pair, QKV]]) -> Sequence[tuple[Layout, Tensor, Tensor]]:
        """Keys and values of the canvas ``[B, H, W, heads, D]``, the same for all groups."""
        layout = self._layout(parts)
        size = (sum(layout.rows), sum(layout.columns))
        k, v = (self._to_canvas([part[i] for _, part in parts], layout).unflatten(1, size) for i in (1, 2))
        return [(layout, k, v)] * len(parts)

    def _meet(self, canvas: Canvas, part: Any, combine: Callable[[list[Any]], Sequence[Any]]) -> Any:
        state = canvas.state()  # while this group waits, others use the same layers
        result = self.turns.meet(self.group, part, combine)
        canvas.restore(state)
        return result

    def _places(self) -> list[Pair]:
        return list(self.exchange.groups.values())[self.group]

    def _layout(self, parts: list[tuple[Pair, QKV]]) -> Layout:
        batches = {
            len(part.q) // len(places) for (_, part), places in zip(parts, self.exchange.groups.values(), strict=True)
        }
        (batch,) = batches
        return self.exchange.layout(tuple(size for size, _ in parts), batch, parts[0][1].q.device)

    @staticmethod
    def _to_canvas(tiles: list[Tensor], layout: Layout) -> Tensor:
        """``[T * B, n, heads, D]`` of each group to ``[B, H * W, heads, D]``."""
        flat = [t.flatten(0, 1) for t in tiles]
        tokens = sum(layout.rows) * sum(layout.columns)
        return (flat[0] if len(flat) == 1 else torch.cat(flat)).index_select(0, layout.order).unflatten(0, (-1, tokens))

    def _windows(self, layout: Layout, halo: Pair, places: list[Pair]) -> Iterator[tuple[Window, Window]]:
        down, across = (
            _axis_windows(*axis) for axis in zip((layout.rows, layout.columns), halo, self.exchange.wrap, strict=True)
        )
        for row, column in places:
            yield down[row], across[column]


_CURRENT: ContextVar[Member | None] = ContextVar("tiledcore_exchange", default=None)


def current() -> Member | None:
    """The group of tiles that the calling layer works on, if tiles exchange halos at all."""
    return _CURRENT.get()


def _extent(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _axis_windows(sizes: tuple[int, ...], halo: int, wrap: bool) -> list[Window]:
    """What each tile of one axis sees; no position twice, and each at its shorter distance."""
    total = sum(sizes)
    found = []
    for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        if wrap:
            before = min(halo, (total - size) // 2)
            after = min(halo, total - size - before)
        else:
            before, after = min(halo, start), min(halo, total - start - size)
        found.append(Window(start - before, before + size + after, before))
    return found


def _cut(canvas: Tensor, dim: int, window: Window) -> Tensor:
    size = canvas.shape[dim]
    start = window.start % size
    if start + window.length <= size:
        return canvas.narrow(dim, start, window.length)
    here = size - start
    return torch.cat([canvas.narrow(dim, start, here), canvas.narrow(dim, 0, window.length - here)], dim)

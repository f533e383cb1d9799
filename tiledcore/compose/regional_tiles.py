"""Regions in tile mode: which tiles are evaluated for which prompts, and how the predictions are mixed.

Each tile of the canvas is evaluated once per prompt that has a share in it. A region with a seed has its own tiles,
laid out from its box, so that its content does not depend on the position of the box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tiledcore import ops
from tiledcore.compose.regions import Region
from tiledcore.config import Motion
from tiledcore.geometry import Pair, Partition, TileGrid, Tiling
from tiledcore.tiles.denoiser import Prediction

if TYPE_CHECKING:
    from tiledcore.tiles.denoiser import TileDenoiser


class Part(NamedTuple):
    """Tiles of one size that the network gets in one call, with one prompt."""

    prompt: int
    tile: Pair
    offsets: Tensor  # ``[n, 2]`` int32, on the canvas
    images: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(N, h, w)`` of its predictions ``[N, C, h, w]``."""
        return len(self.offsets) * self.images, *self.tile


@dataclass(frozen=True, eq=False)
class Shares:
    """The shares of the prompts in a canvas."""

    common: Tensor
    """``[P, H, W]``: shares on the tiles of the canvas; 0 for a prompt with its own tiles."""
    own: dict[int, tuple[Tensor, Tensor, Tensor]]
    """Per prompt with its own tiles: the rows and columns that they cover, and its share there."""


def split(regions: Sequence[Region], weights: Tensor, pixels: int, tile: Pair, wrap: tuple[bool, bool]) -> Shares:
    """Separate the regions with a seed from the other prompts.

    Args:
        regions: in the order of the weights.
        weights: ``[1 + regions, H, W]``, the global prompt first.
        pixels: image pixels per canvas pixel.
        tile: size in canvas pixels, (y, x).
        wrap: (y, x).
    """
    common, own = weights.clone(), {}
    for p, region in enumerate(regions, 1):
        if region.seed is None:
            continue
        left, top, right, bottom = region.bounds()
        margin = -(-region.feather // (2 * pixels))
        sides = ((top, bottom), (left, right))
        rows, columns = (
            _extent(low // pixels - margin, -(-high // pixels) + margin, size, side, wraps)
            for (low, high), size, side, wraps in zip(sides, weights.shape[1:], tile, wrap, strict=True)
        )
        own[p] = (rows, columns, weights[p][rows[:, None], columns])
        common[p] = 0
    return Shares(common, own)


def _extent(low: int, high: int, size: int, tile: int, wrap: bool) -> Tensor:
    """Positions on one axis from ``low`` to ``high``, at least one tile long, all inside the canvas."""
    length = min(size, max(high - low, tile))
    low -= max(0, length - (high - low)) // 2
    if not wrap:
        low = min(max(low, 0), size - length)
    return torch.arange(low, low + length) % size


def evaluate(
    denoiser: TileDenoiser,
    shares: Shares,
    prompts: list[dict[str, Any]],
    forward: Callable[..., Any],
    sample: Tensor,
    kwargs: dict[str, Any],
) -> tuple[Prediction, int]:
    """:meth:`tiledcore.tiles.denoiser.TileDenoiser.evaluate`, with the changes of each prompt to ``kwargs``.

    Returns the prediction, and how many tiles were evaluated.
    """
    batch, size, tiling = len(sample), (sample.shape[2], sample.shape[3]), denoiser.placed
    assert tiling is not None

    def run(part: Part) -> Tensor:
        offsets = part.offsets.to(sample.device)
        return denoiser._tile_batch(forward, sample, offsets, part.tile, {**kwargs, **prompts[part.prompt]})

    tilings = {p: _own_tiling(denoiser, (len(at[0]), len(at[1])), kwargs["timestep"]) for p, at in shares.own.items()}
    parts = _parts(shares, tilings, tiling, size, batch, denoiser.tile_batch)
    outs = iter(denoiser.deal(parts, run, sample))
    count = sum(len(part.offsets) for part in parts)
    own = {p: _own(denoiser, outs, tilings[p]) for p in shares.own}
    like = next(iter(own.values()), None)
    canvas: Tensor | None = None
    for tile, places in tiling.groups.items():
        offsets = torch.tensor(places, dtype=torch.int32)
        tiles = _common(outs, shares.common, offsets, tile, batch, like, denoiser.tile_batch)
        like = tiles
        if isinstance(tiling, Tiling):
            if not own:
                return Prediction(tiles, offsets.to(sample.device), size, denoiser.ramp(tiling)), count
            canvas = _blend(denoiser, tiling, tiles, offsets)
            break
        canvas = _put(canvas, tiles, places, size)
    assert canvas is not None
    for p, (rows, columns, share) in shares.own.items():
        canvas[:, :, rows[:, None].to(canvas.device), columns.to(canvas.device)] += own[p] * share.to(canvas)
    return denoiser.whole(canvas), count


def _parts(
    shares: Shares,
    tilings: dict[int, Tiling | Partition],
    tiling: Tiling | Partition,
    size: Pair,
    images: int,
    tile_batch: int,
) -> list[Part]:
    """The tile batches of a step: first of the prompts with own tiles, then of those that share the canvas'."""
    found = []
    for p, (rows, columns, _) in shares.own.items():
        corner = torch.tensor([[int(rows[0]), int(columns[0])]])
        for tile, places in tilings[p].groups.items():
            offsets = ((torch.tensor(places) + corner) % torch.tensor([size])).to(torch.int32)
            found += [Part(p, tile, part, images) for part in offsets.split(tile_batch)]
    for tile, places in tiling.groups.items():
        offsets = torch.tensor(places, dtype=torch.int32)
        weights = ops.gather_tiles(shares.common[None], offsets, tile)
        found += [Part(p, tile, offsets[chosen], images) for chosen, p in _batches(weights, tile_batch)]
    return found


def _common(
    outs: Iterator[Tensor],
    weights: Tensor,
    offsets: Tensor,
    tile: Pair,
    batch: int,
    like: Tensor | None,
    tile_batch: int,
) -> Tensor:
    """Tiles ``[T*B, C, h, w]``, each a mix of the prompts that have a share in it."""
    shares = ops.gather_tiles(weights[None], offsets, tile)
    tiles = None if like is None else like.new_zeros(len(offsets) * batch, like.shape[1], *tile)
    for chosen, p in _batches(shares, tile_batch):
        out = next(outs)
        tiles = out.new_zeros(len(offsets) * batch, *out.shape[1:]) if tiles is None else tiles
        parts = shares[chosen, p : p + 1].to(out)
        for i, t in enumerate(chosen):
            one = out[i * batch : (i + 1) * batch]
            whole = bool((shares[t, p] == 1).all())  # the only prompt here: not multiplied, so no bit changes
            tiles[t * batch : (t + 1) * batch] += one if whole else one * parts[i]
    assert tiles is not None
    return tiles


def _batches(shares: Tensor, tile_batch: int) -> Iterator[tuple[list[int], int]]:
    """(tiles, prompt) of every evaluation; only prompts with a share in the tile."""
    present = shares.amax((2, 3)) > 0
    for p in range(shares.shape[1]):
        mine = present[:, p].nonzero().flatten().tolist()
        for start in range(0, len(mine), tile_batch):
            yield mine[start : start + tile_batch], p


def _own_tiling(denoiser: TileDenoiser, size: Pair, timestep: Any) -> Tiling | Partition:
    """The tiles of a part of the canvas, from its corner on; shifted like those of the canvas in this step."""
    grid = grid_of(denoiser, size, (False, False))
    if not isinstance(denoiser.placed, Partition):
        return grid
    step, _ = denoiser.step(timestep)
    seed = (denoiser.config.moving or Motion()).seed
    return TileGrid(grid.height, grid.width, grid.tile_size).shifted(step, seed)


def _own(denoiser: TileDenoiser, outs: Iterator[Tensor], tiling: Tiling | Partition) -> Tensor:
    """The prediction ``[B, C, h, w]`` of a part of the canvas."""
    canvas: Tensor | None = None
    for places in tiling.groups.values():
        tiles = torch.cat([next(outs) for _ in range(0, len(places), denoiser.tile_batch)])
        if isinstance(tiling, Tiling):
            return _blend(denoiser, tiling, tiles, torch.tensor(places, dtype=torch.int32))
        canvas = _put(canvas, tiles, places, (tiling.height, tiling.width))
    assert canvas is not None
    return canvas


def grid_of(denoiser: TileDenoiser, size: Pair, wrap: tuple[bool, bool]) -> TileGrid:
    """The tiles of a canvas, or of a part of it, in canvas pixels; not shifted."""
    config, unit = replace(denoiser.config, wrap=wrap), denoiser.unit
    return config.grid(size[0] * unit, size[1] * unit, denoiser.native, unit)


def _blend(denoiser: TileDenoiser, tiling: Tiling, tiles: Tensor, offsets: Tensor) -> Tensor:
    if len(offsets) == 1:
        return tiles
    size, ramp, config = (tiling.height, tiling.width), denoiser.ramp(tiling), denoiser.config
    return ops.blend_tiles(
        tiles, offsets.to(tiles.device), size, window=config.window, ramp=ramp, impl=denoiser.execution.impl
    )


def _put(canvas: Tensor | None, tiles: Tensor, places: Sequence[Pair], size: Pair) -> Tensor:
    """Write tiles ``[T*B, C, h, w]`` into a canvas ``[B, C, *size]``, which is made if None; tiles may wrap."""
    batch = len(tiles) // len(places)
    canvas = tiles.new_empty(batch, tiles.shape[1], *size) if canvas is None else canvas
    for place, tile in zip(places, tiles.split(batch), strict=True):
        rows, columns = (
            torch.arange(start, start + n, device=canvas.device) % side
            for start, n, side in zip(place, tile.shape[2:], size, strict=True)
        )
        canvas[:, :, rows[:, None], columns] = tile
    return canvas

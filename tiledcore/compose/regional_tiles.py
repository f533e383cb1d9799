"""Regions in tile mode: which tiles are evaluated for which prompts, and how the predictions are mixed.

Each tile of the canvas is evaluated once per prompt that has a share in it. A region with a seed has its own tiles,
laid out from its box, so that its content does not depend on the position of the box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiledcore import ops
from tiledcore.compose.regions import Region
from tiledcore.config import Motion
from tiledcore.geometry import Pair, Partition, TileGrid, Tiling
from tiledcore.tiles.denoiser import Prediction

if TYPE_CHECKING:
    from tiledcore.tiles.denoiser import TileDenoiser

Run = Callable[[Tensor, Pair, int], Tensor]
"""``(offsets [n, 2], tile size, prompt)`` -> predictions ``[n*B, C, h, w]``."""


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
    count = 0

    def run(offsets: Tensor, tile: Pair, p: int) -> Tensor:
        nonlocal count
        count += len(offsets)
        return denoiser._tile_batch(forward, sample, offsets.to(sample.device), tile, {**kwargs, **prompts[p]})

    own = {p: _own(denoiser, run, at[0], at[1], kwargs["timestep"], size, p) for p, at in shares.own.items()}
    like = next(iter(own.values()), None)
    canvas: Tensor | None = None
    for tile, places in _groups(tiling).items():
        offsets = torch.tensor(places, dtype=torch.int32)
        tiles = _common(run, shares.common, offsets, tile, batch, like, denoiser.tile_batch)
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


def _groups(tiling: Tiling | Partition) -> dict[Pair, tuple[Pair, ...]]:
    return {tiling.tile_size: tiling.offsets} if isinstance(tiling, Tiling) else tiling.groups


def _common(
    run: Run, weights: Tensor, offsets: Tensor, tile: Pair, batch: int, like: Tensor | None, tile_batch: int
) -> Tensor:
    """Tiles ``[T*B, C, h, w]``, each a mix of the prompts that have a share in it."""
    shares = ops.gather_tiles(weights[None], offsets, tile)
    tiles = None if like is None else like.new_zeros(len(offsets) * batch, like.shape[1], *tile)
    for chosen, p in _batches(shares, tile_batch):
        out = run(offsets[chosen], tile, p)
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


def _own(denoiser: TileDenoiser, run: Run, rows: Tensor, columns: Tensor, timestep: Any, size: Pair, p: int) -> Tensor:
    """The prediction ``[B, C, h, w]`` of a part of the canvas, on tiles that start at its corner."""
    config, grid = denoiser.config, grid_of(denoiser, (len(rows), len(columns)), (False, False))
    tiling: Tiling | Partition = grid
    if isinstance(denoiser.placed, Partition):  # shifted like the tiles of the canvas in this step
        step, _ = denoiser.step(timestep)
        tiling = TileGrid(grid.height, grid.width, grid.tile_size).shifted(step, (config.moving or Motion()).seed)
    corner = torch.tensor([[int(rows[0]), int(columns[0])]])
    canvas: Tensor | None = None
    for tile, places in _groups(tiling).items():
        local = torch.tensor(places, dtype=torch.int32)
        offsets = ((local + corner) % torch.tensor([size])).to(torch.int32)
        tiles = torch.cat([run(part, tile, p) for part in offsets.split(denoiser.tile_batch)])
        if isinstance(tiling, Tiling):
            return _blend(denoiser, tiling, tiles, local)
        canvas = _put(canvas, tiles, places, (grid.height, grid.width))
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

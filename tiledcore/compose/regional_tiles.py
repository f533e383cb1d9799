"""Regions in tile mode: which tiles are evaluated for which prompts, and how the predictions are mixed.

Each tile of the canvas is evaluated once per prompt that has a share in it. A region with a seed has its own tiles,
laid out from its box, so that its content does not depend on the position of the box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tiledcore import ops
from tiledcore.compose.regions import Region
from tiledcore.config import Motion
from tiledcore.geometry import Pair, TileGrid, Tiling
from tiledcore.tiles.denoiser import Prediction

if TYPE_CHECKING:
    from tiledcore.tiles.denoiser import TileDenoiser


class Layer(NamedTuple):
    """A part of the canvas with its own tiles: all of it, or what a region with a seed covers."""

    rows: Tensor  # On the canvas
    columns: Tensor
    shares: Tensor  # ``[P, h, w]`` of the prompts


class Part(NamedTuple):
    """Tiles of one size that the network gets in one call, with one prompt."""

    prompt: int
    tile: Pair
    chosen: list[int]  # Which tiles of their size
    offsets: Tensor  # ``[n, 2]`` int32, on the canvas
    shares: Tensor  # ``[n, h, w]`` of the prompt
    shape: tuple[int, int, int]  # ``(N, h, w)`` of its predictions ``[N, C, h, w]``


def split(regions: Sequence[Region], weights: Tensor, pixels: int, tile: Pair, wrap: tuple[bool, bool]) -> list[Layer]:
    """The layer of the canvas, then one for each region with a seed.

    ``weights`` is ``[1 + regions, H, W]``, the global prompt first; ``pixels`` is image pixels per canvas pixel;
    ``tile`` is in canvas pixels, (y, x).
    """
    height, width = weights.shape[1:]
    common, own = weights.clone(), []
    for p, region in enumerate(regions, 1):
        if region.seed is None:
            continue
        left, top, right, bottom = region.bounds()
        margin = -(-region.feather // (2 * pixels))
        sides = ((top, bottom), (left, right))
        rows, columns = (
            _extent(low // pixels - margin, -(-high // pixels) + margin, size, side, wraps)
            for (low, high), size, side, wraps in zip(sides, (height, width), tile, wrap, strict=True)
        )
        shares = weights.new_zeros(len(weights), len(rows), len(columns))
        shares[p] = weights[p][rows[:, None], columns]
        own.append(Layer(rows, columns, shares))
        common[p] = 0
    return [Layer(torch.arange(height), torch.arange(width), common), *own]


def _extent(low: int, high: int, size: int, tile: int, wrap: bool) -> Tensor:
    """Positions on one axis from ``low`` to ``high``, at least one tile long, all inside the canvas."""
    length = min(size, max(high - low, tile))
    low -= max(0, length - (high - low)) // 2
    if not wrap:
        low = min(max(low, 0), size - length)
    return torch.arange(low, low + length) % size


def evaluate(
    denoiser: TileDenoiser,
    layers: list[Layer],
    prompts: list[dict[str, Any]],
    forward: Callable[..., Any],
    sample: Tensor,
    kwargs: dict[str, Any],
) -> tuple[Prediction, int]:
    """The prediction, with the changes of each prompt to ``kwargs``, and how many tiles were evaluated."""

    def run(part: Part) -> Tensor:
        offsets = part.offsets.to(sample.device)
        return denoiser._tile_batch(forward, sample, offsets, part.tile, {**kwargs, **prompts[part.prompt]})

    assert denoiser.placed is not None
    tilings = [denoiser.placed, *(_own_tiling(denoiser, layer, kwargs["timestep"]) for layer in layers[1:])]
    found = [_parts(layer, tiling, sample, denoiser.tile_batch) for layer, tiling in zip(layers, tilings, strict=True)]
    parts = [part for by_tile in found for some in by_tile.values() for part in some]
    outs = list(denoiser.deal(parts, run, sample))
    like, rest = outs[0].new_empty(len(sample), outs[0].shape[1], 0, 0), iter(outs)
    first, *own = [_mixed(denoiser, *one, rest, like) for one in zip(tilings, found, strict=True)]
    if own:
        canvas = denoiser.blended(first)
        for layer, prediction in zip(layers[1:], own, strict=True):
            rows, columns = layer.rows[:, None].to(canvas.device), layer.columns.to(canvas.device)
            canvas[:, :, rows, columns] += denoiser.blended(prediction)
        first = denoiser.whole(canvas)
    return first, sum(len(part.chosen) for part in parts)


def _own_tiling(denoiser: TileDenoiser, layer: Layer, timestep: Any) -> Tiling:
    """The tiles of a part of the canvas, from its corner on; shifted like those of the canvas in this step."""
    grid = grid_of(denoiser, (len(layer.rows), len(layer.columns)), (False, False))
    if isinstance(denoiser.placed, TileGrid):
        return grid
    seed = (denoiser.config.moving or Motion()).seed
    return TileGrid(grid.height, grid.width, grid.tile_size).shifted(denoiser.step(timestep)[0], seed)


def _parts(layer: Layer, tiling: Tiling, sample: Tensor, batch: int) -> dict[Pair, list[Part]]:
    """By tile size: the calls of the network that the tiles of a layer need."""
    images, size = len(sample), torch.tensor(sample.shape[2:])
    corner = torch.tensor([int(layer.rows[0]), int(layer.columns[0])])
    found = {}
    for tile, places in tiling.groups.items():
        local = torch.tensor(places, dtype=torch.int32)
        offsets = ((local + corner) % size).to(torch.int32)
        shares = ops.gather_tiles(layer.shares[None], local, tile)  # [T, P, h, w]
        found[tile] = [
            Part(p, tile, at.tolist(), offsets[at], shares[at, p], (len(at) * images, *tile))
            for p in range(shares.shape[1])
            for at in (shares[:, p].amax((1, 2)) > 0).nonzero().flatten().split(batch)
            if len(at)
        ]
    return found


def _mixed(
    denoiser: TileDenoiser, tiling: Tiling, found: dict[Pair, list[Part]], outs: Iterator[Tensor], like: Tensor
) -> Prediction:
    """The prediction of a layer: its tiles mix the prompts that have a share in them; ``like`` is ``[B, C, 0, 0]``."""
    size, device = (tiling.height, tiling.width), like.device
    canvas = like.new_empty(*like.shape[:2], *size)
    for tile, parts in found.items():
        places = tiling.groups[tile]
        tiles = like.new_zeros(len(places), *like.shape[:2], *tile)
        for part in parts:
            for t, share, out in zip(part.chosen, part.shares, next(outs).split(len(like)), strict=True):
                alone = bool((share == 1).all())  # the only prompt here: not multiplied, so no bit changes
                tiles[t] += out if alone else out * share.to(out)
        if len(found) == 1:
            offsets = torch.tensor(places, dtype=torch.int32, device=device)
            return Prediction(tiles.flatten(0, 1), offsets, size, denoiser.ramp(tiling))
        for (y, x), one in zip(places, tiles, strict=True):  # tiles of several sizes do not overlap, but may wrap
            rows, columns = torch.arange(y, y + tile[0]) % size[0], torch.arange(x, x + tile[1]) % size[1]
            canvas[:, :, rows[:, None].to(device), columns.to(device)] = one
    return denoiser.whole(canvas)


def grid_of(denoiser: TileDenoiser, size: Pair, wrap: tuple[bool, bool]) -> TileGrid:
    """The tiles of a canvas, or of a part of it, in canvas pixels; not shifted."""
    config, unit = replace(denoiser.config, wrap=wrap), denoiser.unit
    return config.grid(size[0] * unit, size[1] * unit, denoiser.native, unit)

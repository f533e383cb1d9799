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
from tiledcore.geometry import Pair, TileGrid, Tiling
from tiledcore.tiles.denoiser import Prediction

if TYPE_CHECKING:
    from tiledcore.tiles.denoiser import TileDenoiser


@dataclass(frozen=True, eq=False)
class Shares:
    """The shares of the prompts in a canvas."""

    common: Tensor
    """``[P, H, W]``: shares on the tiles of the canvas; 0 for a prompt with its own tiles."""
    own: dict[int, tuple[Tensor, Tensor, Tensor]]
    """Per prompt with its own tiles: the rows and columns that they cover, and its share there."""


def split(regions: Sequence[Region], weights: Tensor, pixels: int, tile: Pair, wrap: tuple[bool, bool]) -> Shares:
    """Separate the regions with a seed from the other prompts.

    ``weights`` is ``[1 + regions, H, W]``, the global prompt first; ``pixels`` is image pixels per canvas pixel;
    ``tile`` is in canvas pixels, (y, x).
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


class Part(NamedTuple):
    """Tiles of one size that the network gets in one call, with one prompt."""

    prompt: int
    tile: Pair
    chosen: Tensor  # ``[n]``: which tiles of their group
    offsets: Tensor  # ``[n, 2]`` int32, on the canvas
    images: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(N, h, w)`` of its predictions ``[N, C, h, w]``."""
        return len(self.offsets) * self.images, *self.tile


class Group(NamedTuple):
    """The tiles of one size in a tiling."""

    tile: Pair
    offsets: Tensor  # ``[T, 2]`` int32, in the tiling
    shares: Tensor  # ``[T, P, h, w]`` of the prompts in each tile, or ``[T, P, 1, 1]``
    parts: list[Part]


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
    images, size, common = len(sample), (sample.shape[2], sample.shape[3]), denoiser.placed
    assert common is not None

    def run(part: Part) -> Tensor:
        offsets = part.offsets.to(sample.device)
        return denoiser._tile_batch(forward, sample, offsets, part.tile, {**kwargs, **prompts[part.prompt]})

    tilings: dict[int, Tiling] = {
        p: _own_tiling(denoiser, (len(rows), len(columns)), kwargs["timestep"])
        for p, (rows, columns, _) in shares.own.items()
    }
    tilings[0] = common  # the global prompt's, and that of all regions without own tiles
    groups = {p: _groups(tiling, p, shares, size, images, denoiser.tile_batch) for p, tiling in tilings.items()}
    parts = [part for found in groups.values() for group in found for part in group.parts]
    count, outs = sum(len(part.offsets) for part in parts), iter(denoiser.deal(parts, run, sample))
    if len(common.groups) == 1 and not shares.own:
        (group,) = groups[0]
        tiles = _mixed(group, outs, images, None)
        return Prediction(tiles, group.offsets.to(sample.device), size, denoiser.ramp(common)), count
    canvas: Tensor | None = None
    canvases = {}
    for p, tiling in tilings.items():
        canvases[p] = canvas = _canvas(denoiser, tiling, groups[p], outs, images, canvas)
    whole = canvases[0]
    for p, (rows, columns, share) in shares.own.items():
        whole[:, :, rows[:, None].to(whole.device), columns.to(whole.device)] += canvases[p] * share.to(whole)
    return denoiser.whole(whole), count


def _own_tiling(denoiser: TileDenoiser, size: Pair, timestep: Any) -> Tiling:
    """The tiles of a part of the canvas, from its corner on; shifted like those of the canvas in this step."""
    grid = grid_of(denoiser, size, (False, False))
    if isinstance(denoiser.placed, TileGrid):
        return grid
    step, _ = denoiser.step(timestep)
    seed = (denoiser.config.moving or Motion()).seed
    return TileGrid(grid.height, grid.width, grid.tile_size).shifted(step, seed)


def _groups(tiling: Tiling, p: int, shares: Shares, size: Pair, images: int, batch: int) -> list[Group]:
    """The tiles of the prompt ``p``, or of all that share the canvas' tiles (0), and the calls that they need."""
    rows, columns, _ = shares.own.get(p, (torch.zeros(1), torch.zeros(1), None))
    corner = torch.tensor([[int(rows[0]), int(columns[0])]])
    found = []
    for tile, places in tiling.groups.items():
        local = torch.tensor(places, dtype=torch.int32)
        offsets = ((local + corner) % torch.tensor([size])).to(torch.int32)
        if p:
            weights = torch.zeros(len(places), len(shares.common), 1, 1)
            weights[:, p] = 1
        else:
            weights = ops.gather_tiles(shares.common[None], offsets, tile)
        parts = [
            Part(prompt, tile, chosen, offsets[chosen], images)
            for prompt in range(weights.shape[1])
            for chosen in (weights[:, prompt].amax((1, 2)) > 0).nonzero().flatten().split(batch)
            if len(chosen)
        ]
        found.append(Group(tile, local, weights, parts))
    return found


def _mixed(group: Group, outs: Iterator[Tensor], images: int, like: Tensor | None) -> Tensor:
    """The tiles ``[T*B, C, h, w]`` of a group, each a mix of the prompts that have a share in it."""

    def zeros(like: Tensor) -> Tensor:
        return like.new_zeros(len(group.offsets) * images, like.shape[1], *group.tile)

    tiles = None if like is None else zeros(like)  # a tile may be covered by regions with their own tiles
    for part in group.parts:
        out = next(outs)
        tiles = zeros(out) if tiles is None else tiles
        for t, one in zip(part.chosen.tolist(), out.split(images), strict=True):
            share = group.shares[t, part.prompt]
            alone = bool((share == 1).all())  # the only prompt here: not multiplied, so no bit changes
            tiles[t * images : (t + 1) * images] += one if alone else one * share.to(out)
    assert tiles is not None
    return tiles


def _canvas(
    denoiser: TileDenoiser,
    tiling: Tiling,
    groups: list[Group],
    outs: Iterator[Tensor],
    images: int,
    like: Tensor | None,
) -> Tensor:
    """``[B, C, height, width]`` from the tiles of all groups; ``like`` is another one, if there is one."""
    size, canvas = (tiling.height, tiling.width), None
    for group in groups:
        tiles = like = _mixed(group, outs, images, like)
        if len(groups) == 1:
            if len(tiling) == 1:
                return tiles
            window, ramp, impl = denoiser.config.window, denoiser.ramp(tiling), denoiser.execution.impl
            return ops.blend_tiles(tiles, group.offsets.to(tiles.device), size, window=window, ramp=ramp, impl=impl)
        canvas = tiles.new_empty(images, tiles.shape[1], *size) if canvas is None else canvas
        for place, one in zip(group.offsets.tolist(), tiles.split(images), strict=True):
            rows, columns = (  # a tile may wrap
                torch.arange(start, start + n, device=canvas.device) % side
                for start, n, side in zip(place, group.tile, size, strict=True)
            )
            canvas[:, :, rows[:, None], columns] = one
    assert canvas is not None
    return canvas


def grid_of(denoiser: TileDenoiser, size: Pair, wrap: tuple[bool, bool]) -> TileGrid:
    """The tiles of a canvas, or of a part of it, in canvas pixels; not shifted."""
    config, unit = replace(denoiser.config, wrap=wrap), denoiser.unit
    return config.grid(size[0] * unit, size[1] * unit, denoiser.native, unit)

"""What ControlNet and adapters add inside a UNet, cut to the tiles that it belongs to."""

from __future__ import annotations

from typing import Any

import torch

from tiledcore import ops
from tiledcore.arguments import RESIDUALS
from tiledcore.geometry import Pair, Partition, Tiling


def check_residuals(kwargs: dict[str, Any], tiling: Tiling | Partition, canvas: Pair) -> None:
    """Whether tiles have a whole part of each residual: at every level they begin and end between its pixels.

    Raises:
        ValueError: they do not.
    """
    given = [kwargs[name] for name in RESIDUALS if kwargs.get(name) is not None]
    levels = {_level(one, canvas) for each in given for one in (each if isinstance(each, list | tuple) else [each])}
    groups = tiling.groups if isinstance(tiling, Partition) else {tiling.tile_size: tiling.offsets}
    for size, places in groups.items():
        for fy, fx in levels:
            if size[0] % fy or size[1] % fx or any(y % fy or x % fx for y, x in places):
                raise ValueError(
                    f"ControlNet or adapter on a canvas of {canvas[0]}x{canvas[1]} latent pixels: tiles must begin and "
                    f"end at multiples of {max(fy, fx)}; choose tile, overlap and size so, and not shift"
                )


def _level(residual: torch.Tensor, canvas: Pair) -> Pair:
    """Canvas pixels per pixel of a residual, along both axes."""
    height, width = canvas[0] // residual.shape[2], canvas[1] // residual.shape[3]
    if (residual.shape[2] * height, residual.shape[3] * width) != canvas:
        raise ValueError(
            f"a residual of {residual.shape[2]}x{residual.shape[3]} does not divide the canvas of "
            f"{canvas[0]}x{canvas[1]} latent pixels: ControlNet needs sizes that all of its levels divide"
        )
    return height, width


def crop_residuals(residuals: Any, offsets: torch.Tensor, tile: Pair, canvas: Pair, impl: ops.Impl | None) -> Any:
    """A residual of the canvas, or a list of them, as those of a tile batch, tile-major: ``[T*B, C, h/f, w/f]``."""
    if isinstance(residuals, list | tuple):
        return type(residuals)(crop_residuals(one, offsets, tile, canvas, impl) for one in residuals)
    fy, fx = _level(residuals, canvas)
    places = offsets // torch.tensor([fy, fx], dtype=torch.int32).to(offsets.device)
    return ops.gather_tiles(residuals, places, (tile[0] // fy, tile[1] // fx), impl=impl)

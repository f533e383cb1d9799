"""Which arguments of a network belong to an image, to the canvas or to a level of it, and how they are cut to tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tiledcore import ops
from tiledcore.geometry import Pair, Partition, Tiling

PER_IMAGE = (
    "encoder_hidden_states",
    "timestep",
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
    "pooled_projections",
    "guidance",
    "added_cond_kwargs",
)
"""Conditions: a tile batch repeats them for each tile."""
RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
"""What adapters add to a UNet: images at the sizes of its levels, of which each tile gets its own part."""
REFUSED = ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")
"""What adapters add to a transformer's tokens, which tile mode does not know how to cut."""
SAMPLES = ("sample", "hidden_states")  # The image itself, as a tensor; Z-Image's is a list
_TENSORS = {*PER_IMAGE, *RESIDUALS, *REFUSED, *SAMPLES, "t", "additional_t_cond"}
_LISTS = ("x", "cap_feats", "img_shapes")


def one_image(arguments: dict[str, Any], i: int, batch: int) -> dict[str, Any]:
    """The arguments of image ``i`` of ``batch`` alone; tensors may be in lists and dicts, as adapters' are."""

    def cut(value: Tensor) -> Tensor:
        return value[i : i + 1] if value.ndim and value.shape[0] == batch else value

    out = {name: tree_map_only(Tensor, cut, value) if name in _TENSORS else value for name, value in arguments.items()}
    return out | {name: arguments[name][i : i + 1] for name in _LISTS if name in arguments}


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


def _level(residual: Tensor, canvas: Pair) -> Pair:
    """Canvas pixels per pixel of a residual, along both axes."""
    height, width = canvas[0] // residual.shape[2], canvas[1] // residual.shape[3]
    if (residual.shape[2] * height, residual.shape[3] * width) != canvas:
        raise ValueError(
            f"a residual of {residual.shape[2]}x{residual.shape[3]} does not divide the canvas of "
            f"{canvas[0]}x{canvas[1]} latent pixels: ControlNet needs sizes that all of its levels divide"
        )
    return height, width


def crop_residuals(residuals: Any, offsets: Tensor, tile: Pair, canvas: Pair, impl: ops.Impl | None) -> Any:
    """A residual of the canvas, or a list of them, as those of a tile batch, tile-major: ``[T*B, C, h/f, w/f]``."""
    if isinstance(residuals, list | tuple):
        return type(residuals)(crop_residuals(one, offsets, tile, canvas, impl) for one in residuals)
    fy, fx = _level(residuals, canvas)
    places = offsets // torch.tensor([fy, fx], dtype=torch.int32).to(offsets.device)
    return ops.gather_tiles(residuals, places, (tile[0] // fy, tile[1] // fx), impl=impl)

"""Which arguments of a network belong to an image, to the canvas or to a level of it, and how they are cut to tiles."""

from __future__ import annotations

import math
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


def images_of(arguments: dict[str, Any], images: slice, batch: int) -> dict[str, Any]:
    """The arguments of some images of ``batch`` alone; tensors may be in lists and dicts, as adapters' are."""

    def cut(value: Tensor) -> Tensor:
        return value[images] if value.ndim and value.shape[0] == batch else value

    out = {name: tree_map_only(Tensor, cut, value) if name in _TENSORS else value for name, value in arguments.items()}
    return out | {name: arguments[name][images] for name in _LISTS if name in arguments}


def swap_major(rows: Tensor, outer: int, inner: int) -> Tensor:
    """``[outer * inner, ...]`` -> ``[inner * outer, ...]``: tile-major to branch-major, or back."""
    if outer == 1 or inner == 1:
        return rows
    return rows.unflatten(0, (outer, inner)).transpose(0, 1).flatten(0, 1)


def check_residuals(kwargs: dict[str, Any], tiling: Tiling | Partition, canvas: Pair) -> None:
    """ValueError unless tiles begin and end between a residual's pixels at every level; names the nearest canvas."""
    given = [kwargs[name] for name in RESIDUALS if kwargs.get(name) is not None]
    levels = [_level(one, canvas) for each in given for one in (each if isinstance(each, list | tuple) else [each])]
    for size, places in tiling.groups.items():
        for fy, fx in levels:
            if size[0] % fy or size[1] % fx or any(y % fy or x % fx for y, x in places):
                raise ValueError(
                    f"ControlNet or adapter on a canvas of {canvas[0]}x{canvas[1]} latent pixels: tiles must begin and "
                    f"end at multiples of {max(fy, fx)}; choose tile and overlap so, and motion='still'"
                )


def _level(residual: Tensor, canvas: Pair) -> Pair:
    """Canvas pixels per pixel of a residual, along both axes."""
    height, width = canvas[0] // residual.shape[2], canvas[1] // residual.shape[3]
    if (residual.shape[2] * height, residual.shape[3] * width) != canvas:
        factor = max(2 ** round(math.log2(n / m)) for n, m in zip(canvas, residual.shape[2:], strict=True))
        nearest = "x".join(str(max(1, round(n / factor)) * factor) for n in canvas)
        raise ValueError(
            f"ControlNet or adapter on a canvas of {canvas[0]}x{canvas[1]} latent pixels: both sides must be multiples "
            f"of {factor}; the nearest such canvas is {nearest}"
        )
    return height, width


def crop_residuals(residuals: Any, offsets: Tensor, tile: Pair, canvas: Pair, impl: ops.Impl | None) -> Any:
    """A residual of the canvas, or a list of them, as those of a tile batch, branch-major: ``[B*T, C, h/f, w/f]``."""
    if isinstance(residuals, list | tuple):
        return type(residuals)(crop_residuals(one, offsets, tile, canvas, impl) for one in residuals)
    fy, fx = _level(residuals, canvas)
    places = offsets // torch.tensor([fy, fx], dtype=torch.int32).to(offsets.device)
    cut = ops.gather_tiles(residuals, places, (tile[0] // fy, tile[1] // fx), impl=impl)
    return swap_major(cut, len(offsets), len(residuals))


def cut_attention_kwargs(
    given: dict[str, Any], offsets: Tensor, tile: Pair, canvas: Pair, batch: int
) -> dict[str, Any]:
    """``cross_attention_kwargs`` of a tile batch, branch-major: IP-Adapter masks and GLIGEN boxes are cut to each tile.

    ``given`` are the canvas': ``ip_adapter_masks``: ``[1, images, H, W]`` in any resolution, or a list of such;
    ``gligen``: ``boxes [B, N, 4]`` (left, top, right, bottom, 0 to 1), ``masks [B, N]`` and others. ``offsets [T, 2]``,
    ``tile`` and ``canvas`` are (y, x) in canvas pixels; ``batch`` counts images with their guidance branches.
    """
    changed = dict(given)
    if (masks := given.get("ip_adapter_masks")) is not None:
        one = [masks] if isinstance(masks, Tensor) else masks
        cut = [_cut_mask(mask, offsets, tile, canvas).repeat(batch, 1, 1, 1) for mask in one]
        changed["ip_adapter_masks"] = cut[0] if isinstance(masks, Tensor) else cut
    if (gligen := given.get("gligen")) is not None and "boxes" in gligen:
        parts = {name: value.repeat_interleave(len(offsets), 0) for name, value in gligen.items()}
        boxes, seen = _cut_boxes(parts["boxes"], offsets.repeat(batch, 1), tile, canvas)
        changed["gligen"] = parts | {"boxes": boxes, "masks": parts["masks"] * seen.to(parts["masks"])}
    return changed


def _cut_mask(mask: Tensor, offsets: Tensor, tile: Pair, canvas: Pair) -> Tensor:
    """``[1, n, H, W]`` -> ``[T, n, h, w]``: what each tile sees of a mask of the canvas, at the mask's resolution."""
    axes = []
    for start, side, whole, size in zip(offsets.T.cpu(), tile, canvas, mask.shape[2:], strict=True):
        count = max(1, round(side * size / whole))
        at = start[:, None] + (torch.arange(count) + 0.5) * side / count
        axes.append((at * size / whole).long() % size)
    y, x = axes
    return torch.stack([mask[0][:, rows[:, None], columns] for rows, columns in zip(y, x, strict=True)])


def _cut_boxes(boxes: Tensor, offsets: Tensor, tile: Pair, canvas: Pair) -> tuple[Tensor, Tensor]:
    """Boxes ``[R, N, 4]`` of the canvas in coordinates of each row's tile, and which of them it sees, ``[R, N]``."""
    size, whole = boxes.new_tensor([tile[1], tile[0]]), boxes.new_tensor([canvas[1], canvas[0]])
    corner = offsets.flip(1)[:, None].to(boxes)
    low, high = (((part * whole - corner) / size).clamp(0, 1) for part in (boxes[..., :2], boxes[..., 2:]))
    seen = (high > low).all(-1)
    return torch.cat([low, high], -1) * seen[..., None], seen

"""Checks of arguments that several ops share."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from tiledcore import validate

Window = Literal["mean", "gaussian", "ramp", "core"]
WINDOWS: tuple[Window, ...] = ("mean", "gaussian", "ramp", "core")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    tensor: Any,
    dims: str,
    dtypes: Sequence[torch.dtype] = (),
    shape: tuple[int, ...] | None = None,
    like: Tensor | None = None,
) -> None:
    """A tensor of these dimensions, such as ``"[B, C, H, W]"``.

    ``dtypes``: what it may have; default: any floating-point dtype. ``shape``: what it must have. ``like``: a tensor
    whose device it must be on.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {dims}, got {type(tensor).__name__}")
    if not dtypes and not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if dtypes and tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be of dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.dim() != dims.count(",") + 1 or (shape is not None and tensor.shape != shape):
        wanted = dims if shape is None else f"{dims} = {shape}"
        raise ValueError(f"{name} must have the shape {wanted}, got {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, not on {like.device}")


def check_size(name: str, size: Sequence[int], least: int = 1) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2 or any(n < least for n in size):
        raise ValueError(f"{name}={size!r} must be a (y, x) pair of at least {least}")
    return size[0], size[1]


def check_offsets(
    offsets: Tensor, like: Tensor, canvas_size: tuple[int, int], tile: tuple[int, int], blended: bool = False
) -> None:
    """Corners of tiles that lie on the canvas. ``blended``: they are rows times columns, and cover the canvas."""
    check_tensor("offsets", offsets, "[T, 2]", (torch.int32,), like=like)
    if offsets.shape[0] == 0 or offsets.shape[1] != 2:
        raise ValueError(f"offsets must be [T, 2] with T >= 1, got {tuple(offsets.shape)}")
    if tile[0] > canvas_size[0] or tile[1] > canvas_size[1]:
        raise ValueError(f"tile {tile} is larger than the canvas {canvas_size}")
    if readable(offsets):
        _check_places(tuple(offsets.flatten().tolist()), canvas_size, tile, blended)


def readable(tensor: Tensor) -> bool:
    """Whether the values can be looked at: at once (on the CPU), and at all (not fake, not traced)."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


# A sampler calls with the same few offsets hundreds of times: looked at once, and known from then on.
@lru_cache(maxsize=128)
def _check_places(places: tuple[int, ...], canvas_size: tuple[int, int], tile: tuple[int, int], blended: bool) -> None:
    pairs = list(zip(places[::2], places[1::2], strict=True))
    for t, (y, x) in enumerate(pairs):
        if not (0 <= y < canvas_size[0] and 0 <= x < canvas_size[1]):
            raise ValueError(f"offsets[{t}]={(y, x)} is not on the canvas {canvas_size}")
    if not blended:
        return
    starts = [sorted(set(axis)) for axis in zip(*pairs, strict=True)]
    if len(set(pairs)) != len(pairs) or len(pairs) != len(starts[0]) * len(starts[1]):
        raise ValueError(
            f"offsets must be each of the {len(starts[0])} rows with each of the "
            f"{len(starts[1])} columns exactly once, got {len(pairs)} offsets"
        )
    for axis, start, extent, size in zip("yx", starts, tile, canvas_size, strict=True):
        for here, after in zip(start, [*start[1:], start[0] + size], strict=True):
            if here + extent < after:
                raise ValueError(
                    f"offsets leave {axis} = {(here + extent) % size} to {(after - 1) % size} of "
                    f"the canvas {canvas_size} without a tile"
                )


def check_window(window: Window, ramp: int) -> tuple[Window, int]:
    """The window and its ramp as the kernels know them: ``"core"`` is a ramp of one pixel."""
    if window not in WINDOWS:
        raise ValueError(f"window={window!r} is not one of {', '.join(WINDOWS)}")
    validate.integer("ramp", ramp, 1)
    return ("ramp", 1) if window == "core" else (window, ramp)

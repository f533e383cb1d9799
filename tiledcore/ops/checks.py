"""Checks of arguments that several ops share."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Window = Literal["mean", "gaussian", "ramp", "core"]
WINDOWS: tuple[Window, ...] = ("mean", "gaussian", "ramp", "core")

BLEND_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_image(name: str, tensor: Tensor, dims: str, dtypes: Sequence[torch.dtype] | None = None) -> None:
    """A floating-point tensor of four dimensions; of one of ``dtypes``, where given."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {dims}, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have the shape {dims}, got {tuple(tensor.shape)}")
    if dtypes is not None and tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be of one of {dtypes}, got {tensor.dtype}")


def check_like(name: str, tensor: Tensor, shape: tuple[int, ...], dims: str, dtype: torch.dtype, like: Tensor) -> None:
    """A tensor of this shape and dtype, on the device of ``like``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {dims}, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be of dtype {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {dims} = {shape}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, not on {like.device}")


def check_size(name: str, size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or any(n < 1 for n in size):
        raise ValueError(f"{name}={tuple(size)} must be a height and a width of at least 1")
    return size[0], size[1]


def check_offsets(offsets: Tensor, like: Tensor, canvas_size: tuple[int, int], tile: tuple[int, int]) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets must be an int32 tensor [T, 2], got {type(offsets).__name__}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be of dtype torch.int32, got {offsets.dtype}")
    if offsets.dim() != 2 or offsets.shape[1] != 2 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must be [T, 2] with T >= 1, got {tuple(offsets.shape)}")
    if offsets.device != like.device:
        raise ValueError(f"offsets are on {offsets.device}, but the image is on {like.device}")
    if tile[0] > canvas_size[0] or tile[1] > canvas_size[1]:
        raise ValueError(f"tile {tile} is larger than the canvas {canvas_size}")
    if readable(offsets):
        _check_places(tuple(offsets.flatten().tolist()), canvas_size, tile)


def readable(offsets: Tensor) -> bool:
    """Whether the values can be looked at: at once (on the CPU), and at all (not fake, not traced)."""
    return offsets.device.type == "cpu" and type(offsets) is Tensor and not torch.compiler.is_compiling()


def check_grid(offsets: Tensor, canvas_size: tuple[int, int], tile: tuple[int, int]) -> None:
    """Offsets that can be looked at are rows times columns, and their tiles cover the canvas."""
    if readable(offsets):
        _check_rows_and_columns(tuple(offsets.flatten().tolist()), canvas_size, tile)


# A sampler calls with the same few offsets hundreds of times: looked at once, and known from then on.
@lru_cache(maxsize=64)
def _check_places(places: tuple[int, ...], canvas_size: tuple[int, int], tile: tuple[int, int]) -> None:
    """Every tile starts on the canvas."""
    for t, (y, x) in enumerate(zip(places[::2], places[1::2], strict=True)):
        if not (0 <= y < canvas_size[0] and 0 <= x < canvas_size[1]):
            raise ValueError(f"offsets[{t}]={(y, x)} is not on the canvas {canvas_size}")


@lru_cache(maxsize=64)
def _check_rows_and_columns(places: tuple[int, ...], canvas_size: tuple[int, int], tile: tuple[int, int]) -> None:
    """The offsets are every pair of some rows and some columns, and the tiles cover the canvas."""
    pairs = list(zip(places[::2], places[1::2], strict=True))
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
    if isinstance(ramp, bool) or not isinstance(ramp, int):
        raise TypeError(f"ramp must be an int, got {ramp!r}")
    if ramp < 1:
        raise ValueError(f"ramp={ramp} must be at least 1")
    return ("ramp", 1) if window == "core" else (window, ramp)

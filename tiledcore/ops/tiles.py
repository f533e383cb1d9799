"""gather_tiles and blend_tiles: argument checks, schemas, fakes and the Python implementations."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from tiledcore import reference
from tiledcore.ops.dispatch import Impl, choose, define

Window = Literal["mean", "gaussian", "ramp", "core"]
WINDOWS: tuple[Window, ...] = ("mean", "gaussian", "ramp", "core")

_BLEND_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_GATHER = "(Tensor canvas, Tensor offsets, SymInt tile_h, SymInt tile_w) -> Tensor"
_BLEND = "(Tensor tiles, Tensor offsets, SymInt height, SymInt width, str window, int ramp) -> Tensor"


def _fake_gather(canvas: Tensor, offsets: Tensor, tile_h: int, tile_w: int) -> Tensor:
    B, C = canvas.shape[:2]
    return canvas.new_empty((offsets.shape[0] * B, C, tile_h, tile_w))


def _fake_blend(tiles: Tensor, offsets: Tensor, height: int, width: int, window: str, ramp: int) -> Tensor:
    return tiles.new_empty((tiles.shape[0] // offsets.shape[0], tiles.shape[1], height, width))


define("gather_tiles", _GATHER, _fake_gather)
define("blend_tiles", _BLEND, _fake_blend)


@torch.library.impl("tiledcore::gather_tiles_reference", ("cpu", "cuda"))
def _gather_reference(canvas: Tensor, offsets: Tensor, tile_h: int, tile_w: int) -> Tensor:
    return reference.gather_tiles(canvas, offsets, (tile_h, tile_w))


@torch.library.impl("tiledcore::blend_tiles_reference", ("cpu", "cuda"))
def _blend_reference(tiles: Tensor, offsets: Tensor, height: int, width: int, window: str, ramp: int) -> Tensor:
    return reference.blend_tiles(tiles, offsets, (height, width), window, ramp)


@torch.library.impl("tiledcore::gather_tiles_triton", ("cpu", "cuda"))
def _gather_triton(canvas: Tensor, offsets: Tensor, tile_h: int, tile_w: int) -> Tensor:
    from tiledcore.kernels.gather_tiles import gather_tiles as kernel

    return kernel(canvas, offsets, (tile_h, tile_w))


@torch.library.impl("tiledcore::blend_tiles_triton", ("cpu", "cuda"))
def _blend_triton(tiles: Tensor, offsets: Tensor, height: int, width: int, window: str, ramp: int) -> Tensor:
    from tiledcore.kernels.blend_tiles import blend_tiles as kernel

    return kernel(tiles, offsets, (height, width), window, ramp)


def _check_image(name: str, tensor: Tensor, dims: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {dims}, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have the shape {dims}, got {tuple(tensor.shape)}")


def _check_size(name: str, size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or any(n < 1 for n in size):
        raise ValueError(f"{name}={tuple(size)} must be a height and a width of at least 1")
    return size[0], size[1]


def _check_offsets(offsets: Tensor, like: Tensor, canvas_size: tuple[int, int], tile: tuple[int, int]) -> None:
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
    if _readable(offsets):
        _check_places(tuple(offsets.flatten().tolist()), canvas_size, tile)


def _readable(offsets: Tensor) -> bool:
    """Whether the values can be looked at: at once (on the CPU), and at all (not fake, not traced)."""
    return offsets.device.type == "cpu" and type(offsets) is Tensor and not torch.compiler.is_compiling()


def _check_grid(offsets: Tensor, canvas_size: tuple[int, int], tile: tuple[int, int]) -> None:
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


def gather_tiles(canvas: Tensor, offsets: Tensor, tile: tuple[int, int], *, impl: Impl | None = None) -> Tensor:
    """Cut tiles out of a canvas, tile-major.

    The canvas is a torus: element ``(t*B + b, c, u, v)`` of the result is
    ``canvas[b, c, (y_t + u) % H, (x_t + v) % W]``. On a canvas that does not wrap the offsets are
    such that no tile crosses the border. Every implementation copies bit for bit.

    Args:
        canvas: ``[B, C, H, W]``, any floating-point dtype. Copied if it is not contiguous.
        offsets: ``[T, 2]`` int32, the (y, x) of each tile's first pixel in canvas pixels, with
            ``0 <= y < H`` and ``0 <= x < W``, on the canvas's device. Checked on the CPU; on CUDA it
            is a precondition, for to look would wait for the device.
        tile: height and width ``(h, w)`` in canvas pixels, at most ``(H, W)``.
        impl: ``"reference"``, ``"native"`` or ``"triton"``; None picks the fastest there is.

    Returns:
        ``[T*B, C, h, w]``, contiguous, without a gradient.

    Raises:
        TypeError: ``canvas`` or ``offsets`` is not a tensor of such a dtype.
        ValueError: a shape, size, device, offset or ``impl`` is not as above.
        RuntimeError: ``impl`` was named and is unavailable here.
    """
    _check_image("canvas", canvas, "[B, C, H, W]")
    tile = _check_size("tile", tile)
    _check_offsets(offsets, canvas, (canvas.shape[2], canvas.shape[3]), tile)
    return choose("gather_tiles", impl, canvas.device)(canvas, offsets, tile[0], tile[1])


def blend_tiles(
    tiles: Tensor,
    offsets: Tensor,
    canvas_size: tuple[int, int],
    *,
    window: Window = "ramp",
    ramp: int = 8,
    impl: Impl | None = None,
) -> Tensor:
    """Blend overlapping tiles into a canvas: at each pixel a weighted mean of the tiles over it.

    The inverse of :func:`gather_tiles`: tiles that agree give back the canvas that they were cut
    from, to rounding, and bit for bit where one tile alone has weight. The weights are separable,
    ``w = w_y * w_x``, computed from coordinates, and normalised by their sum. Per axis:

    - ``"mean"``: 1 (MultiDiffusion, Bar-Tal et al. 2023).
    - ``"gaussian"``: ``exp(-((u + 0.5)/h - 0.5)**2 / 0.02)`` at pixel ``u`` of a tile of ``h``
      (Mixture of Diffusers, Jiménez 2023).
    - ``"ramp"``: ``clamp(1 - (d_max - d)/ramp, 0, 1)``, where ``d`` is the depth of the pixel's
      centre in the tile (its distance from the tile's border) and ``d_max`` the depth in the deepest
      tile over the pixel. A tile fades over ``ramp`` pixels centred on the border of its core.
    - ``"core"``: the ramp of one pixel, so each tile is cropped to its core; a tie is averaged.

    A pixel of a tile whose weight is 0 is not read, so nothing in it can spread. Sums are in float32
    (float64 for float64) and in the order of the corners (y, x): the order in which tiles are listed
    does not change a bit of the result, and neither does anything else from one call to the next.

    Args:
        tiles: ``[T*B, C, h, w]``, float16, bfloat16, float32 or float64, tile-major as from
            :func:`gather_tiles`. Copied if they are not contiguous.
        offsets: ``[T, 2]`` int32, the (y, x) of each tile's first pixel, in canvas pixels, on the
            tiles' device: each of some rows with each of some columns once, in any order, covering
            the canvas (a torus). Checked on the CPU; on CUDA it is a precondition, for to look would
            wait for the device, and a pixel without a tile becomes NaN.
        canvas_size: height and width ``(H, W)`` in pixels, at least the tile's.
        window: which weights.
        ramp: canvas pixels over which a tile fades, at least 1; used by ``"ramp"``.
        impl: ``"reference"``, ``"native"`` or ``"triton"``; None picks the fastest there is.

    Returns:
        ``[B, C, H, W]`` of the tiles' dtype, contiguous, without a gradient.

    Raises:
        TypeError: ``tiles``, ``offsets`` or ``ramp`` is not of such a type.
        ValueError: a shape, size, device, offset, window, ramp or ``impl`` is not as above.
        RuntimeError: ``impl`` was named and is unavailable here.
    """
    _check_image("tiles", tiles, "[T*B, C, h, w]")
    if tiles.dtype not in _BLEND_DTYPES:
        raise TypeError(f"tiles must be of one of {_BLEND_DTYPES}, got {tiles.dtype}")
    size = _check_size("canvas_size", canvas_size)
    tile = _check_size("the tile's size", tiles.shape[2:])
    _check_offsets(offsets, tiles, size, tile)
    if tiles.shape[0] % offsets.shape[0]:
        raise ValueError(f"tiles has {tiles.shape[0]} entries, no multiple of the {offsets.shape[0]} offsets")
    if _readable(offsets):
        _check_grid(offsets, size, tile)
    if window not in WINDOWS:
        raise ValueError(f"window={window!r} is not one of {', '.join(WINDOWS)}")
    if isinstance(ramp, bool) or not isinstance(ramp, int):
        raise TypeError(f"ramp must be an int, got {ramp!r}")
    if ramp < 1:
        raise ValueError(f"ramp={ramp} must be at least 1")
    window, ramp = ("ramp", 1) if window == "core" else (window, ramp)
    op = choose("blend_tiles", impl, tiles.device)
    return op(tiles, offsets, size[0], size[1], window, ramp)

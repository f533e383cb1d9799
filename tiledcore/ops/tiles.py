"""gather_tiles and blend_tiles: argument checks, schemas, fakes and the Python implementations."""

import torch
from torch import Tensor

from tiledcore import reference
from tiledcore.ops.checks import (
    BLEND_DTYPES,
    Window,
    check_grid,
    check_image,
    check_offsets,
    check_size,
    check_window,
    readable,
)
from tiledcore.ops.dispatch import Impl, choose, define

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
    check_image("canvas", canvas, "[B, C, H, W]")
    tile = check_size("tile", tile)
    check_offsets(offsets, canvas, (canvas.shape[2], canvas.shape[3]), tile)
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
    check_image("tiles", tiles, "[T*B, C, h, w]")
    if tiles.dtype not in BLEND_DTYPES:
        raise TypeError(f"tiles must be of one of {BLEND_DTYPES}, got {tiles.dtype}")
    size = check_size("canvas_size", canvas_size)
    tile = check_size("the tile's size", tiles.shape[2:])
    check_offsets(offsets, tiles, size, tile)
    if tiles.shape[0] % offsets.shape[0]:
        raise ValueError(f"tiles has {tiles.shape[0]} entries, no multiple of the {offsets.shape[0]} offsets")
    if readable(offsets):
        check_grid(offsets, size, tile)
    window, ramp = check_window(window, ramp)
    op = choose("blend_tiles", impl, tiles.device)
    return op(tiles, offsets, size[0], size[1], window, ramp)

"""blend_tiles: put overlapping tiles together into a canvas, by a weighted mean."""

import torch
from torch import Tensor

from tiledcore.ops import reference
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

_SCHEMA = "(Tensor tiles, Tensor offsets, SymInt height, SymInt width, str window, int ramp) -> Tensor"


def _fake(tiles: Tensor, offsets: Tensor, height: int, width: int, window: str, ramp: int) -> Tensor:
    return tiles.new_empty((tiles.shape[0] // offsets.shape[0], tiles.shape[1], height, width))


define("blend_tiles", _SCHEMA, _fake)


@torch.library.impl("tiledcore::blend_tiles_reference", ("cpu", "cuda"))
def _reference(tiles: Tensor, offsets: Tensor, height: int, width: int, window: str, ramp: int) -> Tensor:
    return reference.blend_tiles(tiles, offsets, (height, width), window, ramp)


@torch.library.impl("tiledcore::blend_tiles_triton", ("cpu", "cuda"))
def _triton(tiles: Tensor, offsets: Tensor, height: int, width: int, window: str, ramp: int) -> Tensor:
    from tiledcore.kernels.blend_tiles import blend_tiles as kernel

    return kernel(tiles, offsets, (height, width), window, ramp)


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
    from, up to rounding; where only one tile has weight, bit for bit. The weights are separable,
    ``w = w_y * w_x``, computed from coordinates, and normalised by their sum. Along each axis:

    - ``"mean"``: 1 (MultiDiffusion, Bar-Tal et al. 2023).
    - ``"gaussian"``: ``exp(-((u + 0.5)/h - 0.5)**2 / 0.02)`` at pixel ``u`` of a tile of ``h``
      (Mixture of Diffusers, Jiménez 2023).
    - ``"ramp"``: ``clamp(1 - (d_max - d)/ramp, 0, 1)``. The depth ``d`` of a pixel in a tile is the
      distance of the pixel's centre from the tile's border; ``d_max`` is the depth in the tile in which
      the pixel is deepest. So a tile fades over ``ramp`` pixels, centred on the border of its core.
    - ``"core"``: a ramp of one pixel. Each tile is cropped to its core, and ties are averaged.

    A pixel whose weight is 0 is not read, so a NaN there does not spread. Sums are in float32 (float64
    for float64), in the order of the tiles' corners (y, x). So the order in which tiles are listed does
    not change the result, and repeated calls give the same bits.

    Args:
        tiles: ``[T*B, C, h, w]``, float16, bfloat16, float32 or float64, tile-major as from
            :func:`gather_tiles`. Copied if they are not contiguous.
        offsets: ``[T, 2]`` int32 on the tiles' device: (y, x) of each tile's first pixel, in canvas
            pixels. They must be every pair of some rows and some columns, each once, in any order, and
            the tiles must cover the canvas (a torus). Checked on the CPU. On CUDA they are not checked,
            because reading them would wait for the device; a pixel without a tile becomes NaN.
        canvas_size: height and width ``(H, W)`` in pixels, at least the tile's.
        window: which weights.
        ramp: canvas pixels over which a tile fades, at least 1; used by ``"ramp"``.
        impl: ``"reference"``, ``"native"`` or ``"triton"``; None picks the fastest one available.

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
    op = choose("blend_tiles", impl, tiles.device, tiles.dtype)
    return op(tiles, offsets, size[0], size[1], window, ramp)

"""blend_tiles: put overlapping tiles together into a canvas, by a weighted mean."""

from torch import Tensor

from tiledcore.ops import dispatch, reference
from tiledcore.ops.dispatch import FLOATS, Impl, Window, check_offsets, check_size, check_tensor, check_window, choose

dispatch.define(
    "blend_tiles",
    "(Tensor tiles, Tensor offsets, SymInt height, SymInt width, str window, int ramp) -> Tensor",
    fake=lambda tiles, offsets, h, w, *_: tiles.new_empty((tiles.shape[0] // offsets.shape[0], tiles.shape[1], h, w)),
    reference=lambda tiles, offsets, h, w, *window: reference.blend_tiles(tiles, offsets, (h, w), *window),
)


def blend_tiles(
    tiles: Tensor,
    offsets: Tensor,
    canvas_size: tuple[int, int],
    *,
    window: Window = "ramp",
    ramp: int = 8,
    impl: Impl | None = None,
) -> Tensor:
    """Blend overlapping tiles into a canvas: each pixel is a weighted mean of the tiles over it.

    The inverse of :func:`gather_tiles`, up to rounding. Weights are separable, ``w = w_y * w_x``, and normalised by
    their sum. Along each axis:

    - ``"mean"``: 1 (MultiDiffusion, Bar-Tal et al. 2023).
    - ``"gaussian"``: ``exp(-((u + 0.5)/h - 0.5)**2 / 0.02)`` at pixel ``u`` of a tile of ``h`` (Mixture of Diffusers,
      Jiménez 2023).
    - ``"ramp"``: ``clamp(1 - (d_max - d)/ramp, 0, 1)``. ``d`` is the distance of the pixel's centre from the tile's
      border, ``d_max`` the largest ``d`` of all tiles over the pixel. So a tile fades over ``ramp`` pixels around its
      core's border.
    - ``"core"``: a ramp of one pixel. Each tile is cropped to its core, and ties are averaged.

    A pixel of weight 0 is not read, so a NaN there does not spread. Sums are in float32 (float64 for float64), in the
    order of the tiles' corners: repeated calls, and tiles listed in another order, give the same bits.

    Args:
        tiles: ``[T*B, C, h, w]``, float16, bfloat16, float32 or float64, tile-major as from :func:`gather_tiles`.
        offsets: ``[T, 2]`` int32 on the tiles' device: (y, x) of each tile's first pixel. Every pair of some rows and
            some columns, each once; the tiles must cover the canvas (a torus): a pixel without a tile becomes NaN.
        canvas_size: ``(H, W)`` in pixels, at least the tile's.
        window: which weights.
        ramp: pixels over which a tile fades, at least 1; for ``"ramp"``.

    Returns:
        ``[B, C, H, W]`` of the tiles' dtype, contiguous.
    """
    check_tensor("tiles", tiles, "[T*B, C, h, w]", FLOATS)
    size = check_size("canvas_size", canvas_size)
    check_offsets(offsets, tiles, size, check_size("the tile's size", tiles.shape[2:]), blended=True)
    if len(tiles) % len(offsets):
        raise ValueError(f"tiles has {len(tiles)} entries, no multiple of the {len(offsets)} offsets")
    op = choose("blend_tiles", impl, tiles.device, tiles.dtype)
    return op(tiles, offsets, *size, *check_window(window, ramp))

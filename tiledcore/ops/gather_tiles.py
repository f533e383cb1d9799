"""gather_tiles: cut tiles out of a canvas."""

from torch import Tensor

from tiledcore.ops import reference
from tiledcore.ops.dispatch import Impl, check_offsets, check_size, check_tensor, choose, define

define(
    "gather_tiles",
    "(Tensor canvas, Tensor offsets, SymInt tile_h, SymInt tile_w) -> Tensor",
    fake=lambda canvas, offsets, h, w: canvas.new_empty((offsets.shape[0] * canvas.shape[0], canvas.shape[1], h, w)),
    reference=lambda canvas, offsets, h, w: reference.gather_tiles(canvas, offsets, (h, w)),
)


def gather_tiles(canvas: Tensor, offsets: Tensor, tile: tuple[int, int], *, impl: Impl | None = None) -> Tensor:
    """Cut tiles out of a canvas. Every implementation copies bit for bit.

    The canvas is a torus: element ``(t*B + b, c, u, v)`` is ``canvas[b, c, (y_t + u) % H, (x_t + v) % W]``.

    Args:
        canvas: ``[B, C, H, W]``, any floating-point dtype.
        offsets: ``[T, 2]`` int32 on the canvas's device: (y, x) of each tile's first pixel, ``0 <= y < H``, ``0 <= x <
            W``.
        tile: ``(h, w)`` in pixels, at most ``(H, W)``.

    Returns:
        ``[T*B, C, h, w]``, contiguous.
    """
    check_tensor("canvas", canvas, "[B, C, H, W]")
    tile = check_size("tile", tile)
    check_offsets(offsets, canvas, (canvas.shape[2], canvas.shape[3]), tile)
    return choose("gather_tiles", impl, canvas.device, canvas.dtype)(canvas, offsets, tile[0], tile[1])

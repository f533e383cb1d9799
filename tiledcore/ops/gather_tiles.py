"""gather_tiles: cut tiles out of a canvas."""

import torch
from torch import Tensor

from tiledcore.ops import reference
from tiledcore.ops.checks import check_image, check_offsets, check_size
from tiledcore.ops.dispatch import Impl, choose, define

_SCHEMA = "(Tensor canvas, Tensor offsets, SymInt tile_h, SymInt tile_w) -> Tensor"


def _fake(canvas: Tensor, offsets: Tensor, tile_h: int, tile_w: int) -> Tensor:
    B, C = canvas.shape[:2]
    return canvas.new_empty((offsets.shape[0] * B, C, tile_h, tile_w))


define("gather_tiles", _SCHEMA, _fake)


@torch.library.impl("tiledcore::gather_tiles_reference", ("cpu", "cuda"))
def _reference(canvas: Tensor, offsets: Tensor, tile_h: int, tile_w: int) -> Tensor:
    return reference.gather_tiles(canvas, offsets, (tile_h, tile_w))


def gather_tiles(canvas: Tensor, offsets: Tensor, tile: tuple[int, int], *, impl: Impl | None = None) -> Tensor:
    """Cut tiles out of a canvas. Every implementation copies bit for bit.

    The canvas is a torus: element ``(t*B + b, c, u, v)`` is ``canvas[b, c, (y_t + u) % H, (x_t + v) % W]``.

    Args:
        canvas: ``[B, C, H, W]``, any floating-point dtype.
        offsets: ``[T, 2]`` int32 on the canvas's device: (y, x) of each tile's first pixel, ``0 <= y < H``, ``0 <= x <
            W``. Not checked on CUDA, where reading them would wait for the device.
        tile: ``(h, w)`` in pixels, at most ``(H, W)``.
        impl: ``"reference"``, ``"native"`` or ``"triton"``; None picks the fastest one available.

    Returns:
        ``[T*B, C, h, w]``, contiguous, without a gradient.

    Raises:
        TypeError: ``canvas`` or ``offsets`` is not a tensor of such a dtype.
        ValueError: a shape, size, device, offset or ``impl`` is not as above.
        RuntimeError: the named ``impl`` is unavailable here.
    """
    check_image("canvas", canvas, "[B, C, H, W]")
    tile = check_size("tile", tile)
    check_offsets(offsets, canvas, (canvas.shape[2], canvas.shape[3]), tile)
    return choose("gather_tiles", impl, canvas.device, canvas.dtype)(canvas, offsets, tile[0], tile[1])

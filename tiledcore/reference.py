"""Every op of tiledcore in the slowest, most obvious form: the oracle that the kernels are tested against.

Plain torch, any float dtype, any device, one Python loop over the tiles. In float64 the results are
exact to about 1e-15. Nothing here imports the ops or the kernels.
"""

import torch
from torch import Tensor


def gather_tiles(canvas: Tensor, offsets: Tensor, tile: tuple[int, int]) -> Tensor:
    """Cut the tiles out of the canvas; see :func:`tiledcore.ops.gather_tiles`."""
    height, width = canvas.shape[-2:]
    cut = []
    for y, x in offsets.tolist():
        rows = (y + torch.arange(tile[0], device=canvas.device)) % height
        columns = (x + torch.arange(tile[1], device=canvas.device)) % width
        cut.append(canvas[:, :, rows[:, None], columns[None, :]])
    return torch.cat(cut)


def blend_tiles(
    tiles: Tensor,
    offsets: Tensor,
    canvas_size: tuple[int, int],
    window: str = "ramp",
    ramp: int = 8,
) -> Tensor:
    """Blend the tiles into a canvas; see :func:`tiledcore.ops.blend_tiles`."""
    height, width = canvas_size
    h, w = tiles.shape[-2:]
    dtype = torch.float64 if tiles.dtype == torch.float64 else torch.float32
    corners = [(int(y), int(x)) for y, x in offsets.tolist()]
    batches = tiles.chunk(len(corners))
    weights_y = axis_weights([y for y, _ in corners], h, height, window, ramp)
    weights_x = axis_weights([x for _, x in corners], w, width, window, ramp)

    blended = torch.zeros(*batches[0].shape[:2], height, width, dtype=dtype, device=tiles.device)
    total = torch.zeros(height, width, dtype=dtype, device=tiles.device)
    # Ordered by corner, so that the rounding does not depend on the order in which tiles are listed.
    for t in sorted(range(len(corners)), key=corners.__getitem__):
        y, x = corners[t]
        rows = (y + torch.arange(h, device=tiles.device)) % height
        columns = (x + torch.arange(w, device=tiles.device)) % width
        weight = (weights_y[t][:, None] * weights_x[t][None, :]).to(tiles.device, dtype)
        # What has no weight is left out, so that a NaN there cannot spread.
        term = torch.where(weight > 0, weight * batches[t].to(dtype), 0)
        blended[:, :, rows[:, None], columns[None, :]] += term
        total[rows[:, None], columns[None, :]] += weight
    return (blended / total).to(tiles.dtype)


def axis_weights(starts: list[int], extent: int, size: int, window: str = "ramp", ramp: int = 8) -> Tensor:
    """The weight along one axis of every tile at each of its pixels, before normalisation.

    A pixel's depth in a tile is the distance of the pixel's centre from the tile's border. Weights
    are relative to the deepest tile that covers the pixel, which has weight 1: so the sum of the
    weights is never small, and a pixel that one tile alone covers is copied without rounding.

    Args:
        starts: the first pixel of each tile along the axis.
        extent: pixels that a tile covers along the axis.
        size: pixels of the canvas along the axis, a circle.
        window: ``"mean"``, ``"gaussian"``, ``"ramp"`` or ``"core"``.
        ramp: pixels over which a tile fades, for ``"ramp"``.

    Returns:
        ``[len(starts), extent]`` in float64.
    """
    pixel = torch.arange(extent, dtype=torch.float64)
    depth = torch.minimum(pixel + 0.5, extent - (pixel + 0.5))
    deepest = torch.zeros(size, dtype=torch.float64)
    covered = [(start + torch.arange(extent)) % size for start in starts]
    for where in covered:
        deepest[where] = torch.maximum(deepest[where], depth)

    def gaussian(d: Tensor) -> Tensor:
        # The distance from the tile's middle, as a share of the tile, is 0.5 - d / extent.
        return torch.exp(-((0.5 - d / extent) ** 2) / (2 * 0.01))

    weights = []
    for where in covered:
        if window == "mean":
            weight = torch.ones(extent, dtype=torch.float64)
        elif window == "gaussian":
            weight = gaussian(depth) / gaussian(deepest[where])
        elif window in ("ramp", "core"):
            fade = ramp if window == "ramp" else 1
            weight = (1 - (deepest[where] - depth) / fade).clamp(0, 1)
        else:
            raise ValueError(f"window={window!r} is not one of mean, gaussian, ramp, core")
        weights.append(weight)
    return torch.stack(weights)

"""The reference implementation of every op: plain torch, any dtype and device. Kernels are tested against it.

In float64 the results are exact to about 1e-15. Nothing here imports the other implementations.
"""

import torch
from torch import Tensor


def gather_tiles(canvas: Tensor, offsets: Tensor, tile: tuple[int, int]) -> Tensor:
    """Cut the tiles out of the canvas; see :func:`tiledcore.ops.gather_tiles`."""
    rows, columns = (
        (start[:, None] + torch.arange(extent, device=canvas.device)) % size
        for start, extent, size in zip(offsets.T, tile, canvas.shape[-2:], strict=True)
    )
    return canvas[:, :, rows[:, :, None], columns[:, None]].permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous()


def blend_tiles(
    tiles: Tensor, offsets: Tensor, canvas_size: tuple[int, int], window: str = "ramp", ramp: int = 8
) -> Tensor:
    """Blend the tiles into a canvas; see :func:`tiledcore.ops.blend_tiles`."""
    height, width = canvas_size
    h, w = tiles.shape[-2:]
    dtype = torch.promote_types(tiles.dtype, torch.float32)
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
    """The weight along one axis of every tile at each of its pixels, not normalised; float64 ``[len(starts), extent]``.

    Weights are relative to the deepest tile over the pixel, which has weight 1. So their sum is never small, and a
    pixel with one tile is copied without rounding. ``starts``: first pixels of the tiles; ``extent``: pixels of a tile;
    ``size``: pixels of the canvas, a circle; ``ramp``: pixels over which a tile fades, for ``window="ramp"``.
    """
    where = (torch.tensor(starts)[:, None] + torch.arange(extent)) % size
    middle = torch.arange(extent, dtype=torch.float64) + 0.5
    depth = torch.minimum(middle, extent - middle).expand(where.shape)
    deepest = torch.zeros(size, dtype=torch.float64).scatter_reduce(0, where.flatten(), depth.flatten(), "amax")[where]
    if window == "mean":
        return torch.ones_like(depth)
    if window == "gaussian":  # the distance from the tile's middle, as a share of the tile, is 0.5 - depth / extent
        own, best = (torch.exp(-((0.5 - d / extent) ** 2) / (2 * 0.01)) for d in (depth, deepest))
        return own / best
    return (1 - (deepest - depth) / (1 if window == "core" else ramp)).clamp(0, 1)


def neighbor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    canvas: tuple[int, int],
    tile: tuple[int, int],
    halo: tuple[int, int],
    wrap: tuple[bool, bool] = (False, False),
    scale: float | None = None,
    global_q: Tensor | None = None,
    global_k: Tensor | None = None,
    global_v: Tensor | None = None,
) -> Tensor:
    """Attend, one query after the other, to all keys of its window; see :func:`tiledcore.ops.neighbor_attention`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows, columns = (
        [_window(position, *axis) for position in range(axis[0])] for axis in zip(canvas, tile, halo, wrap, strict=True)
    )
    for y in range(canvas[0]):
        for x in range(canvas[1]):
            query = y * canvas[1] + x
            seen = [row * canvas[1] + column for row in rows[y] for column in columns[x]]
            scores = torch.einsum("bhd,bkhd->bhk", q[:, query].to(dtype), k[:, seen].to(dtype))
            values = v[:, seen].to(dtype)
            if global_k is not None and global_v is not None:
                other = (q if global_q is None else global_q)[:, query].to(dtype)
                scores = torch.cat([scores, torch.einsum("bhd,bkhd->bhk", other, global_k.to(dtype))], 2)
                values = torch.cat([values, global_v.to(dtype)], 1)
            attended = torch.einsum("bhk,bkhd->bhd", (scores * scale).softmax(2), values)
            out[:, query] = attended.to(q.dtype)
    return out


def _window(position: int, size: int, tile: int, halo: int, wrap: bool) -> list[int]:
    """The positions of one axis that the tile of ``position`` sees, each once."""
    start = position // tile * tile
    low, high = start - halo, min(start + tile, size) + halo
    # A position has copies at every multiple of the axis, if that is a circle; any of them counts.
    laps = range(-(halo // size) - 1, halo // size + 2) if wrap else [0]
    return [other for other in range(size) if any(low <= other + lap * size < high for lap in laps)]


def fused_step(
    tiles: Tensor,
    offsets: Tensor,
    state: Tensor,
    table: Tensor,
    input_scale: Tensor,
    step: Tensor,
    model_input: Tensor,
    guidance_scale: Tensor | None = None,
    noise: Tensor | None = None,
    window: str = "ramp",
    ramp: int = 8,
) -> None:
    """Blend, guide and move the state on by one evaluation; see :func:`tiledcore.ops.fused_step`."""
    slots, height, width = state.shape[0], *state.shape[-2:]
    evaluation = int(step)
    prediction = blend_tiles(tiles.to(state.dtype), offsets, (height, width), window, ramp)
    if guidance_scale is not None:
        unconditional, conditional = prediction.chunk(2)
        prediction = unconditional + guidance_scale.view(-1, 1, 1, 1) * (conditional - unconditional)

    inputs = [*state.clone(), prediction, noise]
    for slot, row in enumerate(table[evaluation].tolist()):
        if row == [float(j == slot) for j in range(slots + 2)]:
            continue
        total = torch.zeros_like(prediction)
        # What has no weight is left out, so that history not yet written cannot spread.
        for j, coefficient in enumerate(row):
            if coefficient != 0:
                value = inputs[j]
                if value is None:
                    raise ValueError(f"table[{evaluation}] has a coefficient for noise, but noise is None")
                total += coefficient * value
        state[slot] = total
    model_input.copy_(input_scale[evaluation + 1] * state[0])


def group_norm_silu(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool = True) -> Tensor:
    """Normalise by given statistics, scale, shift, and apply SiLU; see :func:`tiledcore.ops.group_norm_silu`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    per_group = x.shape[1] // mean.shape[1]
    mean, rstd = (s.to(dtype).repeat_interleave(per_group, 1)[:, :, None, None] for s in (mean, rstd))
    weight, bias = (p.to(dtype)[None, :, None, None] for p in (weight, bias))
    normalised = (x.to(dtype) - mean) * rstd * weight + bias
    return (normalised * torch.sigmoid(normalised) if silu else normalised).to(x.dtype)

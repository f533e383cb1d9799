"""Triton kernel of :func:`tiledcore.ops.blend_tiles`, in gather form.

Each program computes one block of the canvas, a few planes deep: it finds the tiles that overlap the block, sums them
with weights computed from coordinates, and stores the block once, without atomics, in a fixed order. Every tile element
with a non-zero weight is read once, every canvas element is written once.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Element size in bytes -> launch. A row of a block is at least 128 bytes of the canvas. Planes share the tile search
# and the weights; with more planes of 2 or 4 bytes, ptxas spills on sm_80-120.
CONFIGS = {
    2: {"BLOCK_H": 8, "BLOCK_W": 64, "PLANES": 2, "num_warps": 4},
    4: {"BLOCK_H": 8, "BLOCK_W": 64, "PLANES": 2, "num_warps": 4},
    8: {"BLOCK_H": 8, "BLOCK_W": 32, "PLANES": 4, "num_warps": 4},
}
SCAN = 256  # offsets looked at together
# By default ptxas spills some registers to fit one more block on a multiprocessor (on sm_120 with Triton 3.6); a limit
# that is never reached prevents that.
REGISTERS = 168

# A tile's key sorts by (y, x, index): 20 bits each. END is greater than every key.
_FIELD = tl.constexpr(20)
_MASK = tl.constexpr((1 << 20) - 1)
_END = tl.constexpr(1 << 62)
LIMIT = 1 << 20
PLANE_LIMIT = 1 << 29  # pixels: 32-bit addresses within the planes of a program, at most 4

# Triton must not compile variants for the values of these arguments (1, a multiple of 16, any other), because they
# change from call to call. So the variants compiled ahead of time are complete.
SCALARS = ["T", "H", "W", "h", "w", "planes", "ramp"]
_ELEMENTS = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}


@triton.jit
def _next_tile(
    offsets, T, after, y0, rows, x0, columns, H, W, h, w, SCAN: tl.constexpr
):  # fmt: skip
    """The smallest key greater than ``after`` of a tile that overlaps the block, or ``_END``.

    All offsets are compared at once, without a loop over tiles: the time is constant up to thousands of tiles, and the
    order is fixed.
    """
    best = tl.full([], _END, tl.int64)
    for start in range(0, T, SCAN):
        t = start + tl.arange(0, SCAN)
        valid = t < T
        y = tl.load(offsets + 2 * t, mask=valid, other=0)
        x = tl.load(offsets + 2 * t + 1, mask=valid, other=0)
        # Two arcs of a circle overlap if and only if one of them contains the start of the other.
        down = tl.where(y0 >= y, y0 - y, y0 - y + H) < h
        up = tl.where(y >= y0, y - y0, y - y0 + H) < rows
        right = tl.where(x0 >= x, x0 - x, x0 - x + W) < w
        left = tl.where(x >= x0, x - x0, x - x0 + W) < columns
        key = (y.to(tl.int64) << (2 * _FIELD)) | (x.to(tl.int64) << _FIELD) | t
        hit = valid & (down | up) & (right | left) & (key > after)
        best = tl.minimum(best, tl.min(tl.where(hit, key, _END)))
    return best


@triton.jit
def _inside(pixel, start, size):
    """The pixel's coordinate within a tile that starts at ``start`` on a circle of ``size``."""
    return tl.where(pixel >= start, pixel - start, pixel - start + size)


@triton.jit
def _depth(u, extent):
    """Whole pixels to the nearer border of the tile; negative outside it."""
    return tl.minimum(u, extent - 1 - u)


@triton.jit
def _weight(depth, deepest, extent, ramp, scale, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """The weight along one axis, relative to the deepest tile over the pixel (which has 1)."""
    gap = deepest - depth
    if WINDOW == "mean":
        weight = tl.full(gap.shape, 1, ACC)
    elif WINDOW == "gaussian":
        # exp(-c²/0.02) / exp(-c_deepest²/0.02), c = 0.5 - (depth + 0.5) / extent, with the difference of squares
        # factored, which avoids cancellation.
        weight = tl.exp(gap.to(ACC) * (extent - 1 - depth - deepest).to(ACC) * scale)
    else:
        weight = tl.where(gap == 0, 1, tl.maximum(ramp - gap, 0).to(ACC) * scale)
    return tl.where(depth >= 0, weight, 0)


@triton.jit
def _scale(extent, ramp, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """Factors for ``_weight``, computed once, because a division is a function call on a GPU."""
    one = tl.full([], 1, ACC)
    if WINDOW == "gaussian":
        length = one * extent
        scale = -50 * one / (length * length)
    else:
        scale = one / (one * ramp)
    return scale


@triton.jit(do_not_specialize=SCALARS)
def blend_tiles_kernel(
    tiles,  # [T, planes, h, w]
    offsets,  # [T, 2] int32
    out,  # [planes, H, W]
    T,
    H,
    W,
    h,
    w,
    planes,
    ramp,
    WINDOW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PLANES: tl.constexpr,
    SCAN: tl.constexpr,
):
    blocks_x = tl.cdiv(W, BLOCK_W)
    blocks_y = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    x0 = pid % blocks_x * BLOCK_W
    y0 = pid // blocks_x % blocks_y * BLOCK_H
    y = y0 + tl.arange(0, BLOCK_H)
    x = x0 + tl.arange(0, BLOCK_W)
    # The planes of a tile are contiguous, so batch and channel are one index.
    first = pid // (blocks_x * blocks_y) * PLANES
    plane = tl.arange(0, PLANES)[:, None, None]
    inside = ((y < H)[:, None] & (x < W)[None, :])[None, :, :] & (plane < planes - first)
    rows = tl.minimum(BLOCK_H, H - y0)
    columns = tl.minimum(BLOCK_W, W - x0)

    ACC: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    begin = tl.full([], -1, tl.int64)
    deepest_y = tl.full([BLOCK_H], -1, tl.int32)
    deepest_x = tl.full([BLOCK_W], -1, tl.int32)
    if WINDOW != "mean":
        key = _next_tile(offsets, T, begin, y0, rows, x0, columns, H, W, h, w, SCAN)
        while key < _END:
            u = _inside(y, (key >> (2 * _FIELD)).to(tl.int32), H)
            v = _inside(x, ((key >> _FIELD) & _MASK).to(tl.int32), W)
            deepest_y = tl.maximum(deepest_y, _depth(u, h))
            deepest_x = tl.maximum(deepest_x, _depth(v, w))
            key = _next_tile(offsets, T, key, y0, rows, x0, columns, H, W, h, w, SCAN)

    scale_y = _scale(h, ramp, WINDOW, ACC)
    scale_x = _scale(w, ramp, WINDOW, ACC)
    total = tl.zeros([BLOCK_H, BLOCK_W], ACC)
    value = tl.zeros([PLANES, BLOCK_H, BLOCK_W], ACC)
    key = _next_tile(offsets, T, begin, y0, rows, x0, columns, H, W, h, w, SCAN)
    while key < _END:
        u = _inside(y, (key >> (2 * _FIELD)).to(tl.int32), H)
        v = _inside(x, ((key >> _FIELD) & _MASK).to(tl.int32), W)
        weight_y = _weight(_depth(u, h), deepest_y, h, ramp, scale_y, WINDOW, ACC)
        weight_x = _weight(_depth(v, w), deepest_x, w, ramp, scale_x, WINDOW, ACC)
        weight = weight_y[:, None] * weight_x[None, :]
        # 64 bits for the offset of the tile's first plane, because the buffer of tiles can exceed 2^31 elements; 32
        # bits within it, because registers limit the number of loads in flight.
        source = tiles + ((key & _MASK) * planes + first) * h * w
        within = plane * (h * w) + (u[:, None] * w + v[None, :])[None, :, :]
        # Elements without weight are not read: this saves memory traffic, and a NaN there cannot spread.
        mask = inside & (weight > 0)[None, :, :]
        value += weight[None, :, :] * tl.load(source + within, mask=mask, other=0).to(ACC)
        total += weight
        key = _next_tile(offsets, T, key, y0, rows, x0, columns, H, W, h, w, SCAN)

    # Float32 division is approximate here, but a pixel covered by one tile must be an exact copy.
    total = tl.broadcast_to(total[None, :, :], value.shape)
    blended = tl.where(total == 1, value, value / total)
    target = out + first.to(tl.int64) * H * W
    within = plane * (H * W) + (y[:, None] * W + x[None, :])[None, :, :]
    tl.store(target + within, blended.to(out.dtype.element_ty), mask=inside)


def blend_tiles(tiles: Tensor, offsets: Tensor, H: int, W: int, window: str, ramp: int) -> Tensor:
    """Launch the kernel; arguments as in :func:`tiledcore.ops.blend_tiles`, already checked.

    ``window`` is ``"mean"``, ``"gaussian"`` or ``"ramp"``: ``"core"`` comes as a ramp of 1.
    """
    T = offsets.shape[0]
    B, C, h, w = tiles.shape[0] // T, *tiles.shape[1:]
    if max(T, H, W) > LIMIT or H * W > PLANE_LIMIT:
        raise ValueError(
            f"{T} tiles on a canvas of {(H, W)} exceed the Triton kernel's limits: {LIMIT} tiles, "
            f"{LIMIT} pixels a side, {PLANE_LIMIT} pixels in all"
        )
    out = tiles.new_empty((B, C, H, W))
    if out.numel() == 0:
        return out
    config: dict[str, Any] = CONFIGS[tiles.element_size()]
    blocks = triton.cdiv(H, config["BLOCK_H"]) * triton.cdiv(W, config["BLOCK_W"])
    grid = (blocks * triton.cdiv(B * C, config["PLANES"]),)
    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device(tiles.device) if tiles.is_cuda else nullcontext():
        blend_tiles_kernel[grid](
            tiles.contiguous(),
            offsets.contiguous(),
            out,
            *(T, H, W, h, w, B * C, ramp),
            WINDOW=window,
            SCAN=SCAN,
            **config,
            **({} if torch.version.hip else {"maxnreg": REGISTERS}),  # an option for NVIDIA alone
        )
    return out


def aot_configurations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, dict[str, Any]]]:
    """Yield (kernel, signature, constants, warps, options) of every variant that can be launched."""
    sizes = dict.fromkeys(SCALARS, "i32")
    for element, size in _ELEMENTS.items():
        for window in ("mean", "gaussian", "ramp"):
            constants: dict[str, Any] = {"WINDOW": window, "SCAN": SCAN, **CONFIGS[size]}
            warps = constants.pop("num_warps")
            signature = {"tiles": f"*{element}", "offsets": "*i32", "out": f"*{element}", **sizes}
            signature |= dict.fromkeys(constants, "constexpr")
            yield blend_tiles_kernel, signature, constants, warps, {"maxnreg": REGISTERS}

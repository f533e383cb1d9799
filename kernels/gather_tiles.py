"""Triton kernel of :func:`tiledcore.ops.gather_tiles`: a copy with wrapped coordinates.

It reads and writes every tile element once, ``2 * T * B * C * h * w`` elements. Elements are copied as integers of
their size, so that the copy is exact for every dtype (also for NaN), with four compiled variants.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Element size in bytes -> launch. A row of a block is at least 128 bytes. A thread moves 8 to 16 elements of one tile:
# enough loads in flight to hide the latency of reading the offset.
CONFIGS = {
    1: {"BLOCK_H": 8, "BLOCK_W": 128, "PLANES": 2, "num_warps": 4},
    2: {"BLOCK_H": 8, "BLOCK_W": 64, "PLANES": 4, "num_warps": 4},
    4: {"BLOCK_H": 8, "BLOCK_W": 64, "PLANES": 4, "num_warps": 4},
    8: {"BLOCK_H": 8, "BLOCK_W": 32, "PLANES": 4, "num_warps": 4},
}
PLANE_LIMIT = 1 << 29  # pixels: 32-bit addresses within the planes of a program, at most 4

# Triton must not compile variants for the values of these arguments (1, a multiple of 16, any other), because they
# change from call to call. So the variants compiled ahead of time are complete.
SCALARS = ["H", "W", "h", "w", "planes"]


@triton.jit(do_not_specialize=SCALARS)
def gather_tiles_kernel(
    canvas,  # [planes, H, W]
    offsets,  # [T, 2] int32
    out,  # [T, planes, h, w]
    H,
    W,
    h,
    w,
    planes,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PLANES: tl.constexpr,
):
    # One grid axis for everything, because the other axes are limited to 65535.
    blocks_x = tl.cdiv(w, BLOCK_W)
    blocks_y = tl.cdiv(h, BLOCK_H)
    groups = tl.cdiv(planes, PLANES)
    pid = tl.program_id(0)
    block_x = pid % blocks_x
    block_y = pid // blocks_x % blocks_y
    group = pid // (blocks_x * blocks_y) % groups
    t = pid // (blocks_x * blocks_y * groups)

    u = block_y * BLOCK_H + tl.arange(0, BLOCK_H)
    v = block_x * BLOCK_W + tl.arange(0, BLOCK_W)
    y = tl.load(offsets + 2 * t) + u
    x = tl.load(offsets + 2 * t + 1) + v
    y = tl.where(y >= H, y - H, y)
    x = tl.where(x >= W, x - W, x)
    # The planes of a tile are contiguous, so batch and channel are one index.
    first = (group * PLANES).to(tl.int64)
    plane = tl.arange(0, PLANES)[:, None, None]
    mask = ((u < h)[:, None] & (v < w)[None, :])[None, :, :] & (plane < planes - first)
    # 64 bits for the first plane, because a large canvas and the buffer of its tiles can exceed 2^31 elements; 32 bits
    # within it, because registers limit the number of loads in flight.
    source = canvas + first * H * W
    target = out + (t.to(tl.int64) * planes + first) * h * w
    at = plane * (H * W) + (y[:, None] * W + x[None, :])[None, :, :]
    to = plane * (h * w) + (u[:, None] * w + v[None, :])[None, :, :]
    tl.store(target + to, tl.load(source + at, mask=mask), mask=mask)


def gather_tiles(canvas: Tensor, offsets: Tensor, h: int, w: int) -> Tensor:
    """Launch the kernel; arguments as in :func:`tiledcore.ops.gather_tiles`, already checked."""
    B, C, H, W = canvas.shape
    T = offsets.shape[0]
    if H * W > PLANE_LIMIT:
        raise ValueError(f"a canvas of {(H, W)} exceeds the Triton kernel's {PLANE_LIMIT} pixels")
    out = canvas.new_empty((T * B, C, h, w))
    if out.numel() == 0:
        return out
    config: dict[str, Any] = CONFIGS[canvas.element_size()]
    integer = _INTEGERS[canvas.element_size()]
    blocks = triton.cdiv(h, config["BLOCK_H"]) * triton.cdiv(w, config["BLOCK_W"])
    grid = (T * triton.cdiv(B * C, config["PLANES"]) * blocks,)
    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device(canvas.device) if canvas.is_cuda else nullcontext():
        gather_tiles_kernel[grid](
            canvas.contiguous().view(integer),
            offsets.contiguous(),
            out.view(integer),
            *(H, W, h, w, B * C),
            **config,
        )
    return out


def aot_configurations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Yield (kernel, signature, constants, warps) of every variant that can be launched."""
    sizes = dict.fromkeys(SCALARS, "i32")
    for size, config in CONFIGS.items():
        constants: dict[str, Any] = dict(config)
        warps = constants.pop("num_warps")
        pointer = f"*i{8 * size}"
        signature = {"canvas": pointer, "offsets": "*i32", "out": pointer, **sizes}
        signature |= dict.fromkeys(constants, "constexpr")
        yield gather_tiles_kernel, signature, constants, warps

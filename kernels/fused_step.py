"""Triton kernel of :func:`tiledcore.ops.fused_step`, in gather form.

Each program computes one block of the canvas, a few planes deep: it sums the guided predictions of the tiles as in
blend_tiles, reads the block of every used state slot, and writes the new values and the network's next input. There
are no atomics, and the order is fixed; the update is in place because no other program uses the block. Every used tile
element and slot is read once, every changed slot and the model input is written once.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from tiledcore.kernels.blend_tiles import (
    _END,
    _FIELD,
    _MASK,
    LIMIT,
    PLANE_LIMIT,
    REGISTERS,
    SCAN,
    _depth,
    _inside,
    _next_tile,
    _scale,
    _weight,
)
from torch import Tensor

# Element size of the tiles in bytes -> launch. A thread holds its pixels of every slot in registers.
CONFIGS = {
    2: {"BLOCK_H": 8, "BLOCK_W": 64, "PLANES": 1, "num_warps": 4},
    4: {"BLOCK_H": 8, "BLOCK_W": 64, "PLANES": 1, "num_warps": 4},
    8: {"BLOCK_H": 8, "BLOCK_W": 32, "PLANES": 1, "num_warps": 4},
}

# Triton must not compile variants for the values of these arguments (1, a multiple of 16, any other), because they
# change from call to call. So the variants compiled ahead of time are complete.
SCALARS = ["T", "H", "W", "h", "w", "planes", "channels", "ramp", "guidance_stride", "has_noise"]


@triton.jit
def _predicted(tile, within, half, mask, guidance, G: tl.constexpr, ACC: tl.constexpr):
    """One tile's prediction at the block's pixels, with guidance if there are two halves."""
    value = tl.load(tile + within, mask=mask, other=0).to(ACC)
    if G == 2:
        conditional = tl.load(tile + half + within, mask=mask, other=0).to(ACC)
        value = value + guidance * (conditional - value)
    return value


@triton.jit
def _blended(
    tiles, offsets, T, y, x, y0, x0, rows, columns, first, plane, planes, inside, H, W, h, w, ramp, guidance,
    G: tl.constexpr, WINDOW: tl.constexpr, SCAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The guided prediction of the block: the weighted mean of the tiles over it.

    Guidance is applied before blending: blending is linear, so one sum is enough instead of two.
    """
    begin = tl.full([], -1, tl.int64)
    deepest_y = tl.full(y.shape, -1, tl.int32)
    deepest_x = tl.full(x.shape, -1, tl.int32)
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
    total = tl.zeros([y.shape[0], x.shape[0]], ACC)
    value = tl.zeros(inside.shape, ACC)
    half = planes.to(tl.int64) * h * w
    key = _next_tile(offsets, T, begin, y0, rows, x0, columns, H, W, h, w, SCAN)
    while key < _END:
        u = _inside(y, (key >> (2 * _FIELD)).to(tl.int32), H)
        v = _inside(x, ((key >> _FIELD) & _MASK).to(tl.int32), W)
        weight_y = _weight(_depth(u, h), deepest_y, h, ramp, scale_y, WINDOW, ACC)
        weight_x = _weight(_depth(v, w), deepest_x, w, ramp, scale_x, WINDOW, ACC)
        weight = weight_y[:, None] * weight_x[None, :]
        # 64 bits for the tile's first plane, 32 bits within it, as in blend_tiles.
        tile = tiles + ((key & _MASK) * G * planes + first) * h * w
        within = plane * (h * w) + (u[:, None] * w + v[None, :])[None, :, :]
        # Elements without weight are not read: this saves memory traffic, and a NaN there cannot spread.
        mask = inside & (weight > 0)[None, :, :]
        value += weight[None, :, :] * _predicted(tile, within, half, mask, guidance, G, ACC)
        total += weight
        key = _next_tile(offsets, T, key, y0, rows, x0, columns, H, W, h, w, SCAN)

    # Float32 division is approximate here, but a pixel covered by one tile must be an exact copy.
    total = tl.broadcast_to(total[None, :, :], value.shape)
    return tl.where(total == 1, value, value / total)


@triton.jit
def _plan(table, S: tl.constexpr):
    """(slots to write, inputs to read) as bits, from one evaluation's table.

    A row of the identity leaves its slot unchanged; an input is read if another row has a coefficient for it.
    """
    written = tl.full([], 0, tl.int32)
    read = tl.full([], 0, tl.int32)
    column = tl.arange(0, 16)
    for s in range(S):
        coefficients = tl.load(table + s * (S + 2) + column, mask=column < S + 2, other=0)
        row = tl.sum(tl.where(coefficients != 0, 1 << column, 0), 0)
        moves = (row != (1 << s)) | (tl.load(table + s * (S + 2) + s) != 1)
        written |= moves.to(tl.int32) << s
        read |= tl.where(moves, row, 0)
    return written, read


@triton.jit
def _combined(row, inputs, S: tl.constexpr, ACC: tl.constexpr):
    """One row of the table applied to the slots, the prediction and the noise."""
    total = tl.zeros(inputs[0].shape, ACC)
    for j in tl.static_range(S + 2):
        coefficient = tl.load(row + j)
        # An input without weight must add nothing: history that was never written may be NaN.
        total += tl.where(coefficient != 0, coefficient * inputs[j], 0)
    return total


@triton.jit
def _if_set(mask, plane, bits, place):
    """The mask if the bit is set, else an empty mask.

    Compared along the planes, because a scalar bool does not broadcast to a mask in Triton's interpreter.
    """
    return mask & (plane < ((bits >> place) & 1) << 20)


@triton.jit(do_not_specialize=SCALARS)
def fused_step_kernel(
    tiles,  # [T, G, planes, h, w]
    offsets,  # [T, 2] int32
    state,  # [S, planes, H, W]
    table,  # [n, S, S + 2]
    input_scale,  # [n + 1]
    step,  # [1] int64
    model_input,  # [planes, H, W]
    guidance_scale,  # [1] or [images]
    noise,  # [planes, H, W]
    T,
    H,
    W,
    h,
    w,
    planes,
    channels,
    ramp,
    guidance_stride,
    has_noise,
    S: tl.constexpr,
    G: tl.constexpr,
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
    first = pid // (blocks_x * blocks_y) * PLANES
    plane = tl.arange(0, PLANES)[:, None, None]
    inside = ((y < H)[:, None] & (x < W)[None, :])[None, :, :] & (plane < planes - first)
    ACC: tl.constexpr = state.dtype.element_ty

    image = (first + plane) // channels
    guidance = tl.zeros([PLANES, 1, 1], ACC)
    if G == 2:
        guidance = tl.load(guidance_scale + image * guidance_stride, mask=plane < planes - first, other=0)
    if WINDOW == "whole":  # one tile as large as the canvas: nothing to search, nothing to weigh
        u = _inside(y, tl.load(offsets), H)
        v = _inside(x, tl.load(offsets + 1), W)
        within = plane * (H * W) + (u[:, None] * W + v[None, :])[None, :, :]
        tile = tiles + first.to(tl.int64) * H * W
        half = planes.to(tl.int64) * H * W
        m = _predicted(tile, within, half, inside, guidance, G, ACC)
    else:
        rows = tl.minimum(BLOCK_H, H - y0)
        columns = tl.minimum(BLOCK_W, W - x0)
        m = _blended(
            tiles, offsets, T, y, x, y0, x0, rows, columns, first, plane, planes, inside, H, W, h, w, ramp,
            guidance, G, WINDOW, SCAN, ACC,
        )  # fmt: skip

    # Loaded after the blend, because ptxas spills registers that are held during its loop.
    evaluation = tl.load(step)
    table += evaluation * (S * (S + 2))
    written, read = _plan(table, S)
    read |= ~written & 1  # an unchanged sample is read for the model's input
    origin = first.to(tl.int64) * H * W
    size = planes.to(tl.int64) * H * W
    pixel = plane * (H * W) + (y[:, None] * W + x[None, :])[None, :, :]
    inputs = ()
    for j in tl.static_range(S):
        mask = _if_set(inside, plane, read, j)
        inputs += (tl.load(state + j * size + origin + pixel, mask=mask, other=0),)  # type: ignore[assignment]
    mask = _if_set(inside, plane, read, S + 1) & (plane < planes * has_noise)
    # If noise is needed but not given, the result is NaN.
    inputs += (m, tl.load(noise + origin + pixel, mask=mask, other=float("nan")))  # type: ignore[assignment]
    # All threads must load before any thread stores: a load and a store may assign the pixels of the block to threads
    # differently.
    tl.debug_barrier()

    fresh = _combined(table, inputs, S, ACC)
    tl.store(state + origin + pixel, fresh, mask=_if_set(inside, plane, written, 0))
    sample = tl.where((written & 1) != 0, fresh, inputs[0])  # type: ignore[misc]
    scaled = tl.load(input_scale + evaluation + 1) * sample
    tl.store(model_input + origin + pixel, scaled.to(model_input.dtype.element_ty), mask=inside)
    # Not unrolled: otherwise the coefficients of all rows are loaded, and registers spill.
    for s in range(1, S):
        fresh = _combined(table + s * (S + 2), inputs, S, ACC)
        tl.store(state + s * size + origin + pixel, fresh, mask=_if_set(inside, plane, written, s))


def fused_step(
    tiles: Tensor,
    offsets: Tensor,
    state: Tensor,
    table: Tensor,
    input_scale: Tensor,
    step: Tensor,
    model_input: Tensor,
    guidance_scale: Tensor | None,
    noise: Tensor | None,
    window: str,
    ramp: int,
) -> None:
    """Launch the kernel; arguments as in :func:`tiledcore.ops.fused_step`, already checked.

    ``window`` is ``"mean"``, ``"gaussian"`` or ``"ramp"``: ``"core"`` comes as a ramp of 1.
    """
    S, B, C, H, W = state.shape
    T, (h, w) = offsets.shape[0], tiles.shape[2:]
    if max(T, H, W) > LIMIT or H * W > PLANE_LIMIT:
        raise ValueError(
            f"{T} tiles on a canvas of {(H, W)} exceed the Triton kernel's limits: {LIMIT} tiles, "
            f"{LIMIT} pixels a side, {PLANE_LIMIT} pixels in all"
        )
    if model_input.numel() == 0:
        return
    config: dict[str, Any] = CONFIGS[tiles.element_size()]
    blocks = triton.cdiv(H, config["BLOCK_H"]) * triton.cdiv(W, config["BLOCK_W"])
    grid = (blocks * triton.cdiv(B * C, config["PLANES"]),)
    # Missing tensors are never read, so any pointer of the right type will do.
    guidance, added = (state if tensor is None else tensor.contiguous() for tensor in (guidance_scale, noise))
    stride = int(guidance_scale is not None and guidance_scale.shape[0] > 1)
    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device(tiles.device) if tiles.is_cuda else nullcontext():
        fused_step_kernel[grid](
            *(tiles.contiguous(), offsets.contiguous(), state, table.contiguous(), input_scale.contiguous(), step),
            *(model_input, guidance, added),
            *(T, H, W, h, w, B * C, C, ramp, stride, int(noise is not None)),
            S=S,
            G=1 if guidance_scale is None else 2,
            WINDOW="whole" if T == 1 else window,
            SCAN=SCAN,
            **({} if torch.version.hip else {"maxnreg": REGISTERS}),  # an option for NVIDIA alone
            **config,
        )


def aot_configurations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, dict[str, Any]]]:
    """Yield (kernel, signature, constants, warps, options) of a representative set of variants.

    Every dtype, every window, both numbers of halves, and the fewest and most slots, but not all combinations: these
    take minutes to compile and differ in little but registers.
    """
    variants = [("fp16", window, 2, 2) for window in ("mean", "gaussian", "ramp", "whole")]
    variants += [("fp32", "gaussian", 2, 3), ("fp64", "gaussian", 2, 2), ("bf16", "ramp", 1, 1)]
    variants += [("fp16", "ramp", 2, 4), ("fp32", "ramp", 2, 8)]
    for element, window, halves, slots in variants:
        size = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}[element]
        constants: dict[str, Any] = {"S": slots, "G": halves, "WINDOW": window, "SCAN": SCAN, **CONFIGS[size]}
        warps = constants.pop("num_warps")
        exact = "fp64" if element == "fp64" else "fp32"
        pointers = {"tiles": element, "offsets": "i32", "state": exact, "table": exact, "input_scale": exact}
        pointers |= {"step": "i64", "model_input": element, "guidance_scale": exact, "noise": exact}
        signature = {name: f"*{pointee}" for name, pointee in pointers.items()}
        signature |= dict.fromkeys(SCALARS, "i32") | dict.fromkeys(constants, "constexpr")
        yield fused_step_kernel, signature, constants, warps, {"maxnreg": REGISTERS}

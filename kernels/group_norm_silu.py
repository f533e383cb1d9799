"""Triton kernel of :func:`tiledcore.ops.group_norm_silu`: elementwise, one plane of a channel at a time.

Bound by memory: each element is read once and written once, ``2 * B * C * rows * W`` elements; the
statistics and parameters of a plane are four scalars.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}

# Element size in bytes -> launch. A thread moves 16 to 32 bytes at a time, and 16 elements in all.
CONFIGS = {
    2: {"BLOCK": 2048, "num_warps": 4},
    4: {"BLOCK": 2048, "num_warps": 4},
    8: {"BLOCK": 1024, "num_warps": 4},
}
PLANE_LIMIT = 1 << 30  # elements of a band's channel: addressed by 32 bits


# Triton makes no specialised variants for the values of most arguments. `n` and the strides have two each, multiple of
# 16 or not, because multiples let a thread move 16 bytes at a time.
@triton.jit(do_not_specialize=["C", "G"])
def group_norm_silu_kernel(
    x,  # [B, C, n], strides x_batch, x_channel, 1
    mean,  # [B, G]
    rstd,  # [B, G]
    weight,  # [C]
    bias,  # [C]
    out,  # as x
    n,
    C,
    G,
    x_batch,
    x_channel,
    out_batch,
    out_channel,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One grid axis for everything, because the other axes are limited to 65535.
    blocks = tl.cdiv(n, BLOCK)
    pid = tl.program_id(0)
    plane = pid // blocks
    b = (plane // C).to(tl.int64)
    c = plane % C
    group = b * G + c // (C // G)
    ACC: tl.constexpr = mean.dtype.element_ty
    m = tl.load(mean + group)
    scale = tl.load(rstd + group) * tl.load(weight + c).to(ACC)
    shift = tl.load(bias + c).to(ACC)

    i = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    source = x + b * x_batch + c.to(tl.int64) * x_channel
    target = out + b * out_batch + c.to(tl.int64) * out_channel
    v = (tl.load(source + i, mask=mask, other=0).to(ACC) - m) * scale + shift
    if SILU:
        v = v / (1 + tl.exp(-v))
    tl.store(target + i, v.to(out.dtype.element_ty), mask=mask)


def group_norm_silu(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool, out: Tensor
) -> None:
    """Launch the kernel; arguments as in :func:`tiledcore.ops.group_norm_silu`, already checked."""
    B, C, rows, W = x.shape
    n = rows * W
    if n > PLANE_LIMIT:
        raise ValueError(f"a band of {rows} by {W} exceeds the Triton kernel's {PLANE_LIMIT} elements a channel")
    if x.numel() == 0:
        return
    config: dict[str, Any] = CONFIGS[x.element_size()]
    grid = (B * C * triton.cdiv(n, config["BLOCK"]),)
    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        group_norm_silu_kernel[grid](
            *(x, mean, rstd, weight, bias, out),
            *(n, C, mean.shape[1], x.stride(0), x.stride(1), out.stride(0), out.stride(1)),
            SILU=silu,
            **config,
        )


def aot_configurations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, dict[str, Any]]]:
    """Yield (kernel, signature, constants, warps, options) of every variant that can be launched."""
    for element, size in _ELEMENTS.items():
        for silu in (True, False):
            constants: dict[str, Any] = {"SILU": silu, **CONFIGS[size]}
            warps = constants.pop("num_warps")
            exact = "fp64" if element == "fp64" else "fp32"
            pointers = {"x": element, "mean": exact, "rstd": exact, "weight": element, "bias": element, "out": element}
            signature = {name: f"*{pointee}" for name, pointee in pointers.items()}
            signature |= dict.fromkeys(["n", "C", "G"], "i32")
            # In a band of a large image, the stride between batch entries exceeds 2^31 elements.
            signature |= dict.fromkeys(["x_batch", "x_channel", "out_batch", "out_channel"], "i64")
            signature |= dict.fromkeys(constants, "constexpr")
            yield group_norm_silu_kernel, signature, constants, warps, {"divisible": ("x", "out")}

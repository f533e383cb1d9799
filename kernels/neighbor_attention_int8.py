"""Triton kernels of :func:`tiledcore.ops.neighbor_attention` with ``precision="int8"``.

After SageAttention (Zhang et al. 2024): scores come from products of 8-bit integers, at twice to four
times the rate of 16 bits on GPUs since Ampere. Keys have their mean over the canvas subtracted, per
batch entry and head, which takes out the channels with a large common offset that would use up the 8
bits; it moves all scores of a query by ``q @ mean``, and softmax does not see that. Keys then have one
scale a patch, queries one a row. Probabilities and values are multiplied in the inputs' 16-bit type.

The global tokens are few, often outliers, and may have queries of their own: their scores are taken in
16 bits, moved by the same ``q @ mean``, so that both kinds of scores stay comparable.

Error against float64, |result − exact| / |exact| over all values, measured on the interpreter for float16,
D = 64, windows of up to 384 keys and 5 global tokens, as in tests/test_neighbor_attention_triton.py:

    queries and keys normal, scores of deviation 1 (3)      1.0 % (2.0 %); in 16 bits 0.03 % (0.02 %)
    an offset of 20 in 5 of the 64 channels of all keys     0.3 % (1.2 %); mean not subtracted 1.7 % (6.3 %)
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import INTERPRETED
from .neighbor_attention import (
    LOG2_E,
    accumulate,
    aligned,
    inside_patch,
    load_rows,
    store_rows,
    strides_of,
    tokens_of_patch,
)
from .neighbor_config import (
    CAPABILITIES,
    DTYPES,
    HEAD_DIMS,
    SCALARS,
    Config,
    capability_of,
    configuration,
    signature_of,
    split,
    vector_of,
)
from .neighbor_patches import patch_lists


@triton.jit
def round_to_int8(x, scale):
    """To the nearest of -127..127 times the scale."""
    x = x / scale
    return (x + tl.where(x >= 0, 0.5, -0.5)).to(tl.int8)


@triton.jit(do_not_specialize=SCALARS)
def quantise_keys_kernel(
    k,  # [B, tokens, heads, D], strides below
    k_mean,  # [B, heads, D] float32
    k8,  # [B, tokens, heads, K0 + K1] int8, contiguous
    k_scales,  # [B, heads, cells] float32
    heads, H, W, cells_x, cells,
    k_b, k_t, k_h,
    D: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    cell = pid % cells
    head = (pid // cells % heads).to(tl.int64)
    b = (pid // (cells * heads)).to(tl.int64)
    k_b, k_t, k_h = k_b * VECTOR, k_t * VECTOR, k_h * VECTOR
    y = cell // cells_x * KY
    x = cell % cells_x * KX
    first = (y * W + x).to(tl.int64)
    valid = inside_patch(H - y, W - x, KY, KX)
    source = k + b * k_b + head * k_h + first * k_t
    tokens = tokens_of_patch(W, k_t, KY, KX)
    mean = k_mean + (b * heads + head) * D
    d0 = tl.arange(0, K0)
    mean0 = tl.load(mean + d0, mask=d0 < D, other=0.0)
    part0 = load_rows(source, tokens, valid, 0, K0, D, True).to(tl.float32) - mean0[None, :]
    part0 = tl.where(valid[:, None], part0, 0.0)
    largest = tl.max(tl.abs(part0))
    if K1 > 0:
        d1 = K0 + tl.arange(0, K1)
        mean1 = tl.load(mean + d1, mask=d1 < D, other=0.0)
        part1 = load_rows(source, tokens, valid, K0, K1, D, True).to(tl.float32) - mean1[None, :]
        part1 = tl.where(valid[:, None], part1, 0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(part1)))
    scale = tl.maximum(largest, 1e-30) / 127
    tl.store(k_scales + (b * heads + head) * cells + cell, scale)
    width: tl.constexpr = K0 + K1
    # A batch entry is H * W * heads * width bytes of k8, which can exceed 2^31.
    target = k8 + ((b * H * W + first) * heads + head) * width
    to = target + tokens_of_patch(W, heads * width, KY, KX)[:, None]
    tl.store(to + d0[None, :], round_to_int8(part0, scale), mask=valid[:, None])
    if K1 > 0:
        tl.store(to + (K0 + tl.arange(0, K1))[None, :], round_to_int8(part1, scale), mask=valid[:, None])


@triton.jit
def attend_int8(
    q0, q1, q_scale, k, v, k_tokens, v_tokens, valid, k_scale, acc0, acc1, top, total,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Let the queries see the keys at ``k + k_tokens``; the products of integers are exact."""
    k0 = load_rows(k, k_tokens, valid, 0, K0, K0 + K1, MASKED)
    s = tl.dot(q0, tl.trans(k0))
    v0 = load_rows(v, v_tokens, valid, 0, D0, D, MASKED).to(COMPUTE)
    v1 = v0
    if K1 > 0:
        k1 = load_rows(k, k_tokens, valid, K0, K1, K0 + K1, MASKED)
        s = tl.dot(q1, tl.trans(k1), s)
    if D1 > 0:
        v1 = load_rows(v, v_tokens, valid, D0, D1, D, MASKED).to(COMPUTE)
    s = s.to(tl.float32) * k_scale
    if MASKED:
        s = tl.where(valid[None, :], s, float("-inf"))
    return accumulate(s, q_scale, v0, v1, acc0, acc1, top, total, D1 > 0, "tf32")


@triton.jit(do_not_specialize=SCALARS)
def neighbor_attention_int8_kernel(
    q, v, global_q, global_k, global_v,  # [B, tokens, heads, D] each, strides below, D contiguous
    k8, k_scales, k_mean,  # as quantise_keys_kernel leaves them
    out,  # [B, tokens, heads, D], contiguous
    blocks, patches,  # see patch_lists, aligned
    heads, tokens, W, G, n_blocks, factor, cells_x, cells,
    q_b, k_b, v_b, gq_b, gk_b, gv_b,  # strides of a batch entry, in units of VECTOR elements; k is k8
    q_t, k_t, v_t, gq_t, gk_t, gv_t,  # of a token
    q_h, k_h, v_h, gq_h, gk_h, gv_h,  # of a head
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    QY: tl.constexpr, QX: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    UNMASKED: tl.constexpr, VECTOR: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = blocks + pid % n_blocks * 8
    head = (pid // n_blocks % heads).to(tl.int64)
    b = (pid // (n_blocks * heads)).to(tl.int64)
    # Strides in these units show the compiler that VECTOR elements are one load.
    q_b, q_t, q_h = q_b * VECTOR, q_t * VECTOR, q_h * VECTOR
    k_b, k_t, k_h = k_b * VECTOR, k_t * VECTOR, k_h * VECTOR
    v_b, v_t, v_h = v_b * VECTOR, v_t * VECTOR, v_h * VECTOR
    y = tl.load(block)
    x = tl.load(block + 1)
    mine = inside_patch(tl.load(block + 2), tl.load(block + 3), QY, QX)
    begin = tl.load(block + 4)
    whole = tl.load(block + 5)
    end = tl.load(block + 6)
    first = (y * W + x).to(tl.int64)

    M: tl.constexpr = QY * QX
    N: tl.constexpr = KY * KX
    acc0 = tl.zeros([M, D0], tl.float32)
    acc1 = tl.zeros([M, D1 if D1 > 0 else 1], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)

    q_start = q + b * q_b + head * q_h + first * q_t
    q_tokens = tokens_of_patch(W, q_t, QY, QX)
    part0 = load_rows(q_start, q_tokens, mine, 0, K0, D, True).to(tl.float32)
    largest = tl.max(tl.abs(part0), 1)
    if K1 > 0:
        part1 = load_rows(q_start, q_tokens, mine, K0, K1, D, True).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(part1), 1))
    q_scale = tl.maximum(largest, 1e-30) / 127
    mean = k_mean + (b * heads + head) * D
    d0 = tl.arange(0, K0)
    shift = tl.sum(part0 * tl.load(mean + d0, mask=d0 < D, other=0.0)[None, :], 1)
    if K1 > 0:
        d1 = K0 + tl.arange(0, K1)
        shift += tl.sum(part1 * tl.load(mean + d1, mask=d1 < D, other=0.0)[None, :], 1)
    q0 = round_to_int8(part0, q_scale[:, None])
    q1 = q0
    if K1 > 0:
        q1 = round_to_int8(part1, q_scale[:, None])
    q_scale = q_scale * factor

    k_start = k8 + b * k_b + head * k_h
    v_start = v + b * v_b + head * v_h
    scales = k_scales + (b * heads + head) * cells
    k_tokens = tokens_of_patch(W, k_t, KY, KX)
    v_tokens = tokens_of_patch(W, v_t, KY, KX)
    if UNMASKED:
        for i in range(begin, whole):
            origin = tl.load(patches + 2 * i)
            at = ((origin >> 16) * W + (origin & 0xFFFF)).to(tl.int64)
            k_scale = tl.load(scales + (origin >> 16) // KY * cells_x + (origin & 0xFFFF) // KX)
            acc0, acc1, top, total = attend_int8(
                q0, q1, q_scale, k_start + at * k_t, v_start + at * v_t, k_tokens, v_tokens, None, k_scale,
                acc0, acc1, top, total, D, D0, D1, K0, K1, False, COMPUTE,
            )  # fmt: skip
        begin = whole
    for i in range(begin, end):
        origin = tl.load(patches + 2 * i)
        extent = tl.load(patches + 2 * i + 1)
        at = ((origin >> 16) * W + (origin & 0xFFFF)).to(tl.int64)
        valid = inside_patch(extent >> 16, extent & 0xFFFF, KY, KX)
        k_scale = tl.load(scales + (origin >> 16) // KY * cells_x + (origin & 0xFFFF) // KX)
        acc0, acc1, top, total = attend_int8(
            q0, q1, q_scale, k_start + at * k_t, v_start + at * v_t, k_tokens, v_tokens, valid, k_scale,
            acc0, acc1, top, total, D, D0, D1, K0, K1, True, COMPUTE,
        )  # fmt: skip

    if G > 0:
        # What addresses and masks follow from is read again, so that they are not kept in registers so far.
        g_W = tl.load(block + 7)
        g_mine = inside_patch(tl.load(block + 2), tl.load(block + 3), QY, QX)
        gq_token, gk_token, gv_token = gq_t * VECTOR, gk_t * VECTOR, gv_t * VECTOR
        g_start = global_q + b * (gq_b * VECTOR) + head * (gq_h * VECTOR) + first * gq_token
        g_tokens = tokens_of_patch(g_W, gq_token, QY, QX)
        g0 = load_rows(g_start, g_tokens, g_mine, 0, D0, D, True).to(COMPUTE)
        g1 = load_rows(g_start, g_tokens, g_mine, D0, D1, D, True).to(COMPUTE) if D1 > 0 else g0
        factors = tl.full([M], 1.0, tl.float32) * factor
        n = tl.arange(0, N)
        for start in range(0, G, N):
            valid = start + n < G
            gk_start = global_k + b * (gk_b * VECTOR) + head * (gk_h * VECTOR) + tl.cast(start, tl.int64) * gk_token
            gv_start = global_v + b * (gv_b * VECTOR) + head * (gv_h * VECTOR) + tl.cast(start, tl.int64) * gv_token
            k0 = load_rows(gk_start, n * gk_token, valid, 0, D0, D, True).to(COMPUTE)
            s = tl.dot(g0, tl.trans(k0), input_precision=PRECISION)
            v0 = load_rows(gv_start, n * gv_token, valid, 0, D0, D, True).to(COMPUTE)
            v1 = v0
            if D1 > 0:
                k1 = load_rows(gk_start, n * gk_token, valid, D0, D1, D, True).to(COMPUTE)
                s = tl.dot(g1, tl.trans(k1), s, input_precision=PRECISION)
                v1 = load_rows(gv_start, n * gv_token, valid, D0, D1, D, True).to(COMPUTE)
            s = tl.where(valid[None, :], s - shift[:, None], float("-inf"))
            acc0, acc1, top, total = accumulate(s, factors, v0, v1, acc0, acc1, top, total, D1 > 0, PRECISION)

    o_W = tl.load(block + 7)
    o_mine = inside_patch(tl.load(block + 2), tl.load(block + 3), QY, QX)
    o_start = out + ((b * tokens + first) * heads + head) * D
    o_tokens = tokens_of_patch(o_W, heads * D, QY, QX)
    store_rows(o_start, o_tokens, o_mine, acc0, total, 0, D0, D)
    if D1 > 0:
        store_rows(o_start, o_tokens, o_mine, acc1, total, D0, D1, D)


def mean_key(k: Tensor) -> Tensor:
    """``[B, heads, D]`` float32: what all keys of a head have in common."""
    return k.mean(1, dtype=torch.float32)


def quantise_keys(k: Tensor, canvas: tuple[int, int], patch: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the mean key of each head, and round each patch of the canvas to int8.

    Returns:
        ``[B, H*W, heads, D padded]`` int8; scales ``[B, heads, cells]`` float32, cells of the canvas
        row-major; means ``[B, heads, D]`` float32.
    """
    B, N, heads, D = k.shape
    K0, K1 = split(D, 32)
    k_mean = mean_key(k)
    cells_y, cells_x = triton.cdiv(canvas[0], patch[0]), triton.cdiv(canvas[1], patch[1])
    k8 = k.new_empty((B, N, heads, K0 + K1), dtype=torch.int8)
    k_scales = k.new_empty((B, heads, cells_y * cells_x), dtype=torch.float32)
    quantise_keys_kernel[(cells_y * cells_x * heads * B,)](
        *(k, k_mean, k8, k_scales),
        *(heads, *canvas, cells_x, cells_y * cells_x),
        *strides_of((k,), vector_of(D), canvas[1], patch[0]),
        **_key_constants(D, patch),
        num_warps=4,
    )
    return k8, k_scales, k_mean


def neighbor_attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_q: Tensor | None,
    global_k: Tensor | None,
    global_v: Tensor | None,
    canvas: tuple[int, int],
    tile: tuple[int, int],
    halo: tuple[int, int],
    wrap: tuple[bool, bool],
    scale: float,
    config: Config | None = None,
) -> Tensor:
    """Launch the kernels; arguments as in :func:`tiledcore.ops.neighbor_attention`, already checked."""
    B, N, heads, D = q.shape
    config = config or configuration("int8", D, q.dtype, capability_of(q.device))
    vector = vector_of(D)
    G = 0 if global_k is None else global_k.shape[1]
    if scale < 0:  # the kernel takes the maximum before it scales
        q, global_q, scale = -q, None if global_q is None else -global_q, -scale
    q, k, v = (aligned(t, vector) for t in (q, k, v))
    gq, gk, gv = (
        t if own is None else aligned(own, vector)
        for own, t in zip((global_q, global_k, global_v), (q, k, v), strict=True)
    )
    out = q.new_empty((B, N, heads, D))
    blocks, patches = patch_lists(
        tuple(canvas), tuple(tile), tuple(halo), tuple(wrap), config.query_patch, config.key_patch, q.device, True
    )
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        k8, k_scales, k_mean = quantise_keys(k, canvas, config.key_patch)
        rows = max(config.query_patch[0], config.key_patch[0])
        cells_x = triton.cdiv(canvas[1], config.key_patch[1])
        neighbor_attention_int8_kernel[(len(blocks) * heads * B,)](
            *(q, v, gq, gk, gv, k8, k_scales, k_mean, out, blocks, patches),
            *(heads, N, canvas[1], G, len(blocks), scale * LOG2_E, cells_x, k_scales.shape[2]),
            *strides_of((q, k8, v, gq, gk, gv), vector, canvas[1], rows),
            **_constants(D, q.dtype, config),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def _key_constants(D: int, patch: tuple[int, int]) -> dict[str, Any]:
    K0, K1 = split(D, 32)
    return {"D": D, "K0": K0, "K1": K1, "KY": patch[0], "KX": patch[1], "VECTOR": vector_of(D)}


def _constants(D: int, dtype: torch.dtype, config: Config) -> dict[str, Any]:
    D0, D1 = split(D)
    # The interpreter multiplies bfloat16 wrongly.
    compute = tl.float16 if dtype == torch.float16 else tl.float32 if INTERPRETED else tl.bfloat16
    return {
        **_key_constants(D, config.key_patch),
        **{"D0": D0, "D1": D1, "QY": config.query_patch[0], "QX": config.query_patch[1]},
        **{"UNMASKED": config.unmasked, "COMPUTE": compute, "PRECISION": config.products},
    }


def aot_configurations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, dict[str, Any]]]:
    """Yield (kernel, signature, constants, warps, options) of every variant that can be launched."""
    for dtype, element in DTYPES.items():
        if dtype == torch.float32:
            continue
        for D in HEAD_DIMS:
            variants: dict[Config, list[int]] = {}
            for capability in CAPABILITIES:
                variants.setdefault(configuration("int8", D, dtype, capability), []).append(capability)
            for config, capabilities in variants.items():
                kernels = (
                    (quantise_keys_kernel, _key_constants(D, config.key_patch), 4),
                    (neighbor_attention_int8_kernel, _constants(D, dtype, config), config.warps),
                )
                for kernel, constants, warps in kernels:
                    signature, divisible = signature_of(kernel, element, constants)
                    options = {"num_stages": config.stages, "capabilities": capabilities, "divisible": divisible}
                    yield kernel, signature, constants, warps, options

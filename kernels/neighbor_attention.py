"""Triton kernel of :func:`tiledcore.ops.neighbor_attention`.

Each program computes one patch of queries of one tile and one head. It loops over the patches of keys in the tile's
window, then over the global tokens, with an online softmax in base 2 (Milakov & Gimelshein 2018; Dao et al. 2022).
Scores and sums are float32, and nothing of size queries × keys is stored. Tokens are read in place, by strides.

A window is cut into patches from its own corner, so a window that is a multiple of the patch has no masked keys. The
list has the complete patches first, because these need no masks.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import INTERPRETED
from .neighbor_attention_config import (
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
from .neighbor_attention_patches import patch_lists

OFFSET_LIMIT = 1 << 31  # elements within a patch
LOG2_E = 1 / math.log(2)


@triton.jit
def load_rows(start, tokens, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """``[tokens, WIDTH]``: channels of one head from FIRST on; 0 where masked and beyond channel D."""
    d = FIRST + tl.arange(0, WIDTH)
    at = start + tokens[:, None] + d[None, :]
    if MASKED:
        if FIRST + WIDTH > D:
            rows = tl.load(at, mask=valid[:, None] & (d < D)[None, :], other=0)
        else:
            rows = tl.load(at, mask=valid[:, None], other=0)
    elif FIRST + WIDTH > D:
        rows = tl.load(at, mask=(d < D)[None, :], other=0)
    else:
        rows = tl.load(at)
    return rows


@triton.jit
def accumulate(
    s, factor, v0, v1, acc0, acc1, top, total, SECOND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One step of the online softmax: ``s * factor[:, None]`` are scores in units of log 2."""
    best = tl.maximum(top, tl.max(s, 1) * factor)
    # A row that has not seen a key yet: -inf minus -inf would be NaN.
    safe = tl.where(best == float("-inf"), 0.0, best)
    p = tl.exp2(tl.fma(s, tl.broadcast_to(factor[:, None], s.shape), tl.broadcast_to(-safe[:, None], s.shape)))
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(p, 1)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    if SECOND:
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, best, total


@triton.jit
def attend(
    q0, q1, q_start, q_tokens, mine, factor, k, v, k_tokens, v_tokens, valid, acc0, acc1, top, total,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Attention of the queries to the valid keys at ``k + k_tokens``, with values at ``v + v_tokens``."""
    if CHUNK > 0:
        s = tl.zeros([mine.shape[0], k_tokens.shape[0]], tl.float32)
        for c in tl.static_range(0, D0 + D1, CHUNK):
            part = load_rows(q_start, q_tokens, mine, c, CHUNK, D, True)
            k0 = load_rows(k, k_tokens, valid, c, CHUNK, D, MASKED)
            s = tl.dot(part, tl.trans(k0), s, input_precision=PRECISION)
    else:
        k0 = load_rows(k, k_tokens, valid, 0, D0, D, MASKED).to(q0.dtype)
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            k1 = load_rows(k, k_tokens, valid, D0, D1, D, MASKED).to(q0.dtype)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    v0 = load_rows(v, v_tokens, valid, 0, D0, D, MASKED).to(q0.dtype)
    v1 = v0
    if D1 > 0:
        v1 = load_rows(v, v_tokens, valid, D0, D1, D, MASKED).to(q0.dtype)
    if MASKED:
        s = tl.where(valid[None, :], s, float("-inf"))
    return accumulate(s, factor, v0, v1, acc0, acc1, top, total, D1 > 0, PRECISION)


@triton.jit
def store_rows(start, tokens, valid, acc, total, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Divide by the softmax's sum and store; a row that saw no key becomes 0."""
    d = FIRST + tl.arange(0, WIDTH)
    rows = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    at = start + tokens[:, None] + d[None, :]
    tl.store(at, rows.to(start.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


@triton.jit
def tokens_of_patch(W, stride, PY: tl.constexpr, PX: tl.constexpr):
    """Offsets of a patch's tokens from its first one, in elements. 32 bits suffice: a patch is a few rows."""
    i = tl.arange(0, PY * PX)
    return (i // PX * W + i % PX) * stride


@triton.jit
def inside_patch(rows, columns, PY: tl.constexpr, PX: tl.constexpr):
    """Which tokens of a patch lie within its first rows and columns."""
    i = tl.arange(0, PY * PX)
    return (i // PX < rows) & (i % PX < columns)


@triton.jit(do_not_specialize=SCALARS)
def neighbor_attention_kernel(
    q, k, v, global_q, global_k, global_v,  # [B, tokens, heads, D] each, strides below, D contiguous
    out,  # [B, tokens, heads, D], contiguous
    blocks,  # [n_blocks, 8] int32, see patch_lists
    patches,  # [.., 2] int32
    k_patches, v_patches,  # descriptors of k and v as [B, H, W, heads, D], or None
    heads, tokens, W, G, n_blocks, factor,
    q_b, k_b, v_b, gq_b, gk_b, gv_b,  # strides of a batch entry, in units of VECTOR elements
    q_t, k_t, v_t, gq_t, gk_t, gv_t,  # of a token
    q_h, k_h, v_h, gq_h, gk_h, gv_h,  # of a head
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    QY: tl.constexpr, QX: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    UNMASKED: tl.constexpr, VECTOR: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    # Consecutive programs process the patches of one tile, so that their window stays in the L2 cache.
    block = blocks + pid % n_blocks * 8
    head = (pid // n_blocks % heads).to(tl.int64)
    b = (pid // (n_blocks * heads)).to(tl.int64)
    # Strides in these units show the compiler that VECTOR elements are one load. In 64 bits, because a stride
    # between batch entries or heads may pass 2^31 elements; that of a token may not (strides_of).
    q_b, q_t, q_h = tl.cast(q_b, tl.int64) * VECTOR, q_t * VECTOR, tl.cast(q_h, tl.int64) * VECTOR
    k_b, k_t, k_h = tl.cast(k_b, tl.int64) * VECTOR, k_t * VECTOR, tl.cast(k_h, tl.int64) * VECTOR
    v_b, v_t, v_h = tl.cast(v_b, tl.int64) * VECTOR, v_t * VECTOR, tl.cast(v_h, tl.int64) * VECTOR
    y = tl.load(block)
    x = tl.load(block + 1)
    mine = inside_patch(tl.load(block + 2), tl.load(block + 3), QY, QX)
    begin = tl.load(block + 4)
    whole = tl.load(block + 5)
    end = tl.load(block + 6)
    # 64 bits to the first token of a patch, 32 within it.
    first = (y * W + x).to(tl.int64)

    M: tl.constexpr = QY * QX
    N: tl.constexpr = KY * KX
    acc0 = tl.zeros([M, D0], tl.float32)
    acc1 = tl.zeros([M, D1 if D1 > 0 else 1], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    factors = tl.full([M], 1.0, tl.float32) * factor

    q_start = q + b * q_b + head * q_h + first * q_t
    q_tokens = tokens_of_patch(W, q_t, QY, QX)
    q0 = load_rows(q_start, q_tokens, mine, 0, D0, D, True).to(COMPUTE)
    q1 = load_rows(q_start, q_tokens, mine, D0, D1, D, True).to(COMPUTE) if D1 > 0 else q0
    k_start = k + b * k_b + head * k_h
    v_start = v + b * v_b + head * v_h
    k_tokens = tokens_of_patch(W, k_t, KY, KX)
    v_tokens = tokens_of_patch(W, v_t, KY, KX)
    if UNMASKED:
        for i in tl.range(begin, whole, disable_licm=CHUNK > 0):
            origin = tl.load(patches + 2 * i)
            if k_patches is None:
                at = ((origin >> 16) * W + (origin & 0xFFFF)).to(tl.int64)
                acc0, acc1, top, total = attend(
                    q0, q1, q_start, q_tokens, mine, factors,
                    k_start + at * k_t, v_start + at * v_t, k_tokens, v_tokens, None,
                    acc0, acc1, top, total, D, D0, D1, False, PRECISION, CHUNK,
                )  # fmt: skip
            else:
                place = [b.to(tl.int32), origin >> 16, origin & 0xFFFF, head.to(tl.int32), 0]
                k0 = k_patches.load(place).reshape(N, D0).to(COMPUTE)
                s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
                v0 = v_patches.load(place).reshape(N, D0).to(COMPUTE)
                acc0, acc1, top, total = accumulate(s, factors, v0, v0, acc0, acc1, top, total, False, PRECISION)
        begin = whole
    for i in tl.range(begin, end, disable_licm=CHUNK > 0):
        origin = tl.load(patches + 2 * i)
        extent = tl.load(patches + 2 * i + 1)
        at = ((origin >> 16) * W + (origin & 0xFFFF)).to(tl.int64)
        valid = inside_patch(extent >> 16, extent & 0xFFFF, KY, KX)
        acc0, acc1, top, total = attend(
            q0, q1, q_start, q_tokens, mine, factors,
            k_start + at * k_t, v_start + at * v_t, k_tokens, v_tokens, valid,
            acc0, acc1, top, total, D, D0, D1, True, PRECISION, CHUNK,
        )  # fmt: skip

    if G > 0:
        # Loaded again here, so that the values need not stay in registers during the loop above.
        g_W = tl.load(block + 7)
        g_mine = inside_patch(tl.load(block + 2), tl.load(block + 3), QY, QX)
        gq_token, gk_token, gv_token = gq_t * VECTOR, gk_t * VECTOR, gv_t * VECTOR
        g_start = global_q + (b * gq_b + head * gq_h) * VECTOR + first * gq_token  # b and head have 64 bits
        g_tokens = tokens_of_patch(g_W, gq_token, QY, QX)
        g0 = load_rows(g_start, g_tokens, g_mine, 0, D0, D, True).to(COMPUTE)
        g1 = load_rows(g_start, g_tokens, g_mine, D0, D1, D, True).to(COMPUTE) if D1 > 0 else g0
        gk_start = global_k + (b * gk_b + head * gk_h) * VECTOR
        gv_start = global_v + (b * gv_b + head * gv_h) * VECTOR
        n = tl.arange(0, N)
        for start in tl.range(0, G, N, disable_licm=CHUNK > 0):
            at = tl.cast(start, tl.int64)
            acc0, acc1, top, total = attend(
                g0, g1, g_start, g_tokens, g_mine, factors,
                gk_start + at * gk_token, gv_start + at * gv_token, n * gk_token, n * gv_token, start + n < G,
                acc0, acc1, top, total, D, D0, D1, True, PRECISION, CHUNK,
            )  # fmt: skip

    o_W = tl.load(block + 7)
    o_mine = inside_patch(tl.load(block + 2), tl.load(block + 3), QY, QX)
    o_start = out + ((b * tokens + first) * heads + head) * D
    o_tokens = tokens_of_patch(o_W, heads * D, QY, QX)
    store_rows(o_start, o_tokens, o_mine, acc0, total, 0, D0, D)
    if D1 > 0:
        store_rows(o_start, o_tokens, o_mine, acc1, total, D0, D1, D)


def aligned(t: Tensor, vector: int) -> Tensor:
    """The tensor, or a copy if 16-byte loads cannot read it; views of a projection are not copied."""
    odd = any(size > 1 and stride % vector for size, stride in zip(t.shape, t.stride()[:3], strict=False))
    return t.clone(memory_format=torch.contiguous_format) if vector > 1 and (odd or t.data_ptr() % 16) else t


def strides_of(tensors: tuple[Tensor, ...], vector: int, W: int, rows: int) -> list[int]:
    """All batch strides, all token strides, all head strides, in units of ``vector`` elements."""
    for t in tensors:
        if (rows * W + 256) * t.stride(1) >= OFFSET_LIMIT:
            raise ValueError(f"{rows} rows of {W} tokens of stride {t.stride(1)} exceed the Triton kernel's 32 bits")
    # The stride of a dimension of size 1 can be any number, and is never used.
    return [t.stride(dim) // vector if t.shape[dim] > 1 else 0 for dim in range(3) for t in tensors]


def _describe(t: Tensor, canvas: tuple[int, int], patch: tuple[int, int]) -> Any:
    """A descriptor of ``[B, H, W, heads, D]`` that reads one head of a patch; None if TMA cannot."""
    B, N, heads, D = t.shape
    token = t.stride(1) if N > 1 else heads * D
    head = t.stride(2) if heads > 1 else D
    b = t.stride(0) if B > 1 else N * token
    if 0 in (b, token, head) or t.data_ptr() % 16 or any(stride * t.itemsize % 16 for stride in (b, token, head)):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, [B, *canvas, heads, D], [b, canvas[1] * token, token, head, 1], [1, *patch, 1, D])


def neighbor_attention(
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
    """Launch the kernel; arguments as in :func:`tiledcore.ops.neighbor_attention`, already checked, scale at least 0.

    ``config`` replaces the table's, for tests and measurements.
    """
    B, N, heads, D = q.shape
    config = config or configuration(D, q.dtype, capability_of(q.device))
    vector = vector_of(D)
    G = 0 if global_k is None else global_k.shape[1]
    q, k, v = (aligned(t, vector) for t in (q, k, v))
    gq, gk, gv = (
        t if own is None else aligned(own, vector)
        for own, t in zip((global_q, global_k, global_v), (q, k, v), strict=True)
    )
    tensors = (q, k, v, gq, gk, gv)
    strides = strides_of(tensors, vector, canvas[1], max(config.query_patch[0], config.key_patch[0]))
    out = q.new_empty((B, N, heads, D))
    blocks, patches = patch_lists(
        tuple(canvas), tuple(tile), tuple(halo), tuple(wrap), config.query_patch, config.key_patch, q.device
    )
    described = [_describe(t, canvas, config.key_patch) for t in (k, v)] if config.descriptors else [None, None]
    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        neighbor_attention_kernel[(len(blocks) * heads * B,)](
            *tensors,
            out,
            blocks,
            patches,
            *(described if None not in described else [None, None]),
            *(heads, N, canvas[1], G, len(blocks), scale * LOG2_E),
            *strides,
            **_constants(D, q.dtype, config),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def _constants(D: int, dtype: torch.dtype, config: Config) -> dict[str, Any]:
    D0, D1 = split(D)
    # Triton's interpreter multiplies bfloat16 wrongly.
    compute = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16}
    return {
        **{"D": D, "D0": D0, "D1": D1, "UNMASKED": config.unmasked, "VECTOR": vector_of(D)},
        **{"QY": config.query_patch[0], "QX": config.query_patch[1]},
        **{"KY": config.key_patch[0], "KX": config.key_patch[1]},
        **{"COMPUTE": compute.get(dtype, tl.float32), "PRECISION": config.products},
        "CHUNK": config.chunk,
    }


def aot_configurations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, dict[str, Any]]]:
    """Yield (kernel, signature, constants, warps, options) of every variant that can be launched.

    The options are ``num_stages``, ``capabilities`` (where the variant runs; everywhere if absent) and
    ``divisible``: the arguments that are multiples of 16.
    """
    for dtype, element in DTYPES.items():
        for D in HEAD_DIMS:
            variants: dict[Config, list[int]] = {}
            for capability in CAPABILITIES:
                config = configuration(D, dtype, capability)
                variants.setdefault(config._replace(descriptors=False), []).append(capability)
                if config.descriptors:
                    variants.setdefault(config, []).append(capability)
            for config, capabilities in variants.items():
                constants = _constants(D, dtype, config)
                if not config.descriptors:
                    constants |= {"k_patches": None, "v_patches": None}
                signature, divisible = signature_of(neighbor_attention_kernel, element, constants)
                if config.descriptors:
                    box = f"tensordesc<{element}[1, {config.key_patch[0]}, {config.key_patch[1]}, 1, {D}]>"
                    signature |= {"k_patches": box, "v_patches": box}
                options = {"num_stages": config.stages, "capabilities": capabilities, "divisible": divisible}
                yield neighbor_attention_kernel, signature, constants, config.warps, options

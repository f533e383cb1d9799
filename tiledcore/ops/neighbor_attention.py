"""neighbor_attention: attention of each tile of a canvas to itself and a halo around it."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiledcore.ops import reference
from tiledcore.ops.checks import BLEND_DTYPES
from tiledcore.ops.dispatch import Impl, choose, define

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? global_q, Tensor? global_k, Tensor? global_v, SymInt[2] canvas, "
    "int[2] tile, int[2] halo, bool[2] wrap, float scale) -> Tensor"
)
# Bytes of windows that are gathered at a time: enough to fill a GPU, or to stay near a CPU's caches.
_CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 8 << 20}

TRITON_HEAD_DIM = 160  # the widest head that the Triton kernel takes

Pair = tuple[int, int]


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


define("neighbor_attention", _SCHEMA, _fake, ("reference", "native", "triton", "sdpa"))


@torch.library.impl("tiledcore::neighbor_attention_reference", ("cpu", "cuda"))
@torch.no_grad()
def _reference(*arguments: Any) -> Tensor:
    tensors, geometry = arguments[:6], arguments[6:]
    return reference.neighbor_attention(*tensors[:3], *geometry, *tensors[3:])


@torch.library.impl("tiledcore::neighbor_attention_triton", ("cpu", "cuda"))
@torch.no_grad()
def _triton(*arguments: Any) -> Tensor:
    from tiledcore.kernels.neighbor_attention import neighbor_attention as kernel

    return kernel(*arguments)


@torch.library.impl("tiledcore::neighbor_attention_sdpa", ("cpu", "cuda"))
@torch.no_grad()
def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_q: Tensor | None,
    global_k: Tensor | None,
    global_v: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """Gather each tile's queries and keys, and call torch's attention on batches of tiles of equal shape."""
    *axes, scale = geometry
    B, _, heads, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    G = 0 if global_k is None else global_k.shape[1]
    # With other queries for the global tokens, [q, global_q] against [k, 0] and [0, global_k] gives one exact softmax.
    # v is padded too, because torch's fused kernels want one head dimension.
    split = global_q is not None and G > 0
    budget = _CHUNK_BYTES.get(q.device.type, _CHUNK_BYTES["cpu"])
    for queries, window in _batches(*axes):
        per_tile = B * heads * D * (1 + split) * q.element_size() * 2 * (queries.shape[1] + window.shape[1] + G)
        step = max(1, budget // per_tile)
        for at, seen in zip(queries.split(step), window.split(step), strict=True):
            at, seen = at.to(q.device), seen.to(q.device)
            parts = [_take(q, at), _take(k, seen), _take(v, seen)]
            if split and global_q is not None:
                parts = [torch.cat([parts[0], _take(global_q, at)], -1), *(F.pad(part, (0, D)) for part in parts[1:])]
            if global_k is not None and global_v is not None and G:
                extra = [F.pad(global_k, (D, 0)), F.pad(global_v, (0, D))] if split else [global_k, global_v]
                extra = [e.repeat_interleave(len(at), 0) for e in extra]
                parts[1:] = [torch.cat([part, e], 1) for part, e in zip(parts[1:], extra, strict=True)]
            query, key, value = (part.transpose(1, 2) for part in parts)
            attended = F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
            out.index_copy_(1, at.flatten(), attended[..., :D].reshape(B, at.numel(), heads, D))
    return out


def _take(tokens: Tensor, at: Tensor) -> Tensor:
    """``[B, N, heads, D]`` at ``[tiles, n]`` to ``[B * tiles, n, heads, D]``."""
    # Not index_select, which on a CPU first copies the whole of a strided tensor: quadratic in the canvas.
    return tokens[:, at].flatten(0, 1)


def _batches(canvas: Pair, tile: Pair, halo: Pair, wrap: tuple[bool, bool]) -> Iterator[tuple[Tensor, Tensor]]:
    """Token indices of the tiles, ``[tiles, queries]``, and of their windows, ``[tiles, keys]``, by shape."""
    by_row, by_column = (_axis_groups(*axis) for axis in zip(canvas, tile, halo, wrap, strict=True))
    width = canvas[1]

    def tokens(rows: Tensor, columns: Tensor) -> Tensor:
        grid = rows[:, None, :, None] * width + columns[None, :, None, :]
        return grid.flatten(2).flatten(0, 1)

    for rows, row_window in by_row:
        for columns, column_window in by_column:
            yield tokens(rows, columns), tokens(row_window, column_window)


def _axis_groups(size: int, tile: int, halo: int, wrap: bool) -> list[tuple[Tensor, Tensor]]:
    """The tiles of one axis and their windows, grouped by both lengths: ``[tiles, extent]``, ``[tiles, window]``."""
    groups: dict[Pair, tuple[list[list[int]], list[list[int]]]] = {}
    for start in range(0, size, tile):
        extent = list(range(start, min(start + tile, size)))
        low, high = start - halo, extent[-1] + 1 + halo
        if not wrap:
            window = list(range(max(low, 0), min(high, size)))
        elif high - low >= size:  # reached from both sides, a position still counts once
            window = list(range(size))
        else:
            window = [position % size for position in range(low, high)]
        extents, windows = groups.setdefault((len(extent), len(window)), ([], []))
        extents.append(extent)
        windows.append(window)
    return [(torch.tensor(extents), torch.tensor(windows)) for extents, windows in groups.values()]


def _check_tokens(name: str, tensor: Tensor, like: Tensor | None = None, tokens: int | None = None) -> None:
    """A tensor ``[B, tokens, heads, D]``; of q's dtype, device, batch, heads and D, where ``like`` is q."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor [B, tokens, heads, D], got {type(tensor).__name__}")
    if tensor.dtype not in BLEND_DTYPES:
        raise TypeError(f"{name} must be of one of {BLEND_DTYPES}, got {tensor.dtype}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have the shape [B, tokens, heads, D], got {tuple(tensor.shape)}")
    if like is None:
        return
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must be of q's dtype {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but q is on {like.device}")
    B, _, heads, D = like.shape
    N = tensor.shape[1] if tokens is None else tokens
    if tensor.shape != (B, N, heads, D):
        count = "any" if tokens is None else N
        raise ValueError(f"{name} must be [B={B}, tokens={count}, heads={heads}, D={D}], got {tuple(tensor.shape)}")


def _check_pair(name: str, value: Pair, least: int) -> Pair:
    if (
        not isinstance(value, tuple | list)
        or len(value) != 2
        or any(isinstance(n, bool) or not isinstance(n, int | torch.SymInt) or n < least for n in value)
    ):
        raise ValueError(f"{name}={value!r} must be a (y, x) pair of ints of at least {least}")
    return value[0], value[1]


def neighbor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    canvas: tuple[int, int],
    tile: tuple[int, int],
    halo: tuple[int, int],
    wrap: tuple[bool, bool] = (False, False),
    global_q: Tensor | None = None,
    global_k: Tensor | None = None,
    global_v: Tensor | None = None,
    scale: float | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Attention of every token of a canvas to its own tile, a halo around that tile, and some global tokens.

    The canvas is cut into ``ceil(H / th)`` by ``ceil(W / tw)`` tiles; the last one of a row or column may be smaller. A
    query sees the keys of its tile and of ``halo`` tokens more on each side. An open border clips this window; on a
    wrapped axis it goes on at the other side, and a key counts once. Cost and memory are linear in the canvas. Every
    query also sees all global tokens, in the same softmax (online, Milakov and Gimelshein 2018; Dao 2022), in float32
    at least.

    Forward only: a backward pass through the result warns, and its inputs get no gradient.

    Args:
        q, k, v: ``[B, H*W, heads, D]``, tokens row-major; float16, bfloat16, float32 or float64, all of one dtype.
            Copied only if the last dimension is not contiguous. Triton takes D up to 160, tuned for 40, 64, 80, 96, 128
            and 160. float64 needs ``"sdpa"`` or ``"reference"``.
        canvas: ``(H, W)`` in tokens.
        tile: ``(th, tw)`` in tokens; larger than the canvas means one tile.
        halo: ``(hy, hx)`` in tokens.
        wrap: whether the canvas is a circle along (y, x).
        global_q: ``[B, H*W, heads, D]``, queries for the global keys where they differ (rotary positions); None means
            q.
        global_k, global_v: ``[B, G, heads, D]``, keys and values that every query sees; both or neither.
        scale: of the scores; None means ``D ** -0.5``.
        impl: ``"reference"``, ``"native"``, ``"triton"`` or ``"sdpa"``; None picks the fastest one available.

    Returns:
        ``[B, H*W, heads, D]`` of q's dtype, contiguous, without a gradient.

    Raises:
        TypeError: a tensor is not one, or is not of such a dtype.
        ValueError: a shape, size, device, scale or ``impl`` is not as above.
        RuntimeError: the named ``impl`` is unavailable here.
    """
    _check_tokens("q", q)
    canvas, tile, halo = (
        _check_pair(name, pair, least)
        for name, pair, least in (("canvas", canvas, 1), ("tile", tile, 1), ("halo", halo, 0))
    )
    if not isinstance(wrap, tuple | list) or len(wrap) != 2 or not all(isinstance(w, bool) for w in wrap):
        raise ValueError(f"wrap={wrap!r} must be a (y, x) pair of bools")
    B, N, heads, D = q.shape
    if canvas[0] * canvas[1] != N:
        raise ValueError(f"canvas={canvas} has {canvas[0] * canvas[1]} tokens, but q has {N}: {tuple(q.shape)}")
    if B < 1 or heads < 1 or D < 1:
        raise ValueError(f"q must be [B, tokens, heads, D] with no dimension 0, got {tuple(q.shape)}")
    _check_tokens("k", k, q, N)
    _check_tokens("v", v, q, N)
    if (global_k is None) != (global_v is None):
        missing, given = ("global_v", "global_k") if global_v is None else ("global_k", "global_v")
        raise ValueError(f"{missing}=None, but {given} was given: give both or neither")
    if global_k is not None and global_v is not None:
        _check_tokens("global_k", global_k, q)
        _check_tokens("global_v", global_v, q, global_k.shape[1])
    if global_q is not None:
        if global_k is None:
            raise ValueError("global_q was given without global_k and global_v, so it would do nothing")
        _check_tokens("global_q", global_q, q, N)
    if global_k is not None and global_k.shape[1] == 0:
        global_q = global_k = global_v = None
    scale = D**-0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    op = getattr(torch.ops.tiledcore, _op_name(_implementation(q, impl), q.device, q.dtype))
    tensors = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, global_q, global_k, global_v)]
    return op(*tensors, canvas, tile, halo, tuple(wrap), scale)


def _op_name(impl: Impl | None, device: torch.device, dtype: torch.dtype) -> str:
    return str(choose("neighbor_attention", impl, device, dtype)).removeprefix("tiledcore.")


# As torch.compiler.assume_constant_result, so that a compiled block has no graph break here, but without importing
# dynamo and Triton at once.
vars(_op_name)["_dynamo_marked_constant"] = True


def _implementation(q: Tensor, impl: Impl | None) -> Impl | None:
    """The implementation, where the dtype or the head dimension leaves only one."""
    if q.dtype == torch.float64 and impl in ("native", "triton"):
        raise TypeError(f"impl={impl!r} needs q of float16, bfloat16 or float32, got torch.float64")
    if impl is None and (q.dtype == torch.float64 or (q.is_cuda and q.shape[-1] > TRITON_HEAD_DIM)):
        return "sdpa"
    return impl

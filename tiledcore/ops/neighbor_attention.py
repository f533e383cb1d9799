"""neighbor_attention: attention of each tile of a canvas to itself and a halo around it.

``"sdpa"``, ``"flash"``, ``"cudnn"`` and ``"xformers"`` copy the windows of tiles, and a dense attention runs on the
copies. Global tokens are then a second attention, of all queries to them alone. Both give the logarithm of the
softmax's sum, by which their results are one exact softmax (Milakov and Gimelshein 2018).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from tiledcore import validate
from tiledcore.ops import reference
from tiledcore.ops.dispatch import FLOATS, Impl, check_size, check_tensor, choose, define, unavailable
from tiledcore.utils import remembered
from tiledcore.validate import Pair

TRITON_HEAD_DIM = 160  # the widest head that the Triton kernel takes

FASTEST: dict[tuple[int, int], dict[int, Impl]] = {}
"""(compute capability such as 90, D) -> from how many queries a tile -> the fastest. ``python -m bench tune`` measures
it on a card and writes the line above. Empty: nothing has been measured yet, and Triton is the default."""

aten = torch.ops.aten
CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 8 << 20}  # gathered at a time: fills a GPU, or stays near a CPU's caches


@remembered
def pieces(
    canvas: Pair, tile: Pair, halo: Pair, wrap: tuple[bool, bool], most: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """All tiles, in pieces of at most ``most`` queries and keys, or of one tile: queries, and their windows' keys.

    Both are tokens ``[tiles, n]`` that stay on the device: a CUDA graph can be captured from the second call on.
    """
    by_row, by_column = (_axis(*axis) for axis in zip(canvas, tile, halo, wrap, strict=True))
    found: list[tuple[Tensor, Tensor]] = []
    for rows, row_window in by_row:
        for columns, column_window in by_column:
            queries, keys = (
                (y[:, None, :, None] * canvas[1] + x[None, :, None, :]).flatten(2).flatten(0, 1).to(device)
                for y, x in ((rows, columns), (row_window, column_window))
            )
            step = max(1, most // (queries.shape[1] + keys.shape[1]))
            found += zip(queries.split(step), keys.split(step), strict=True)
    return found


def _axis(size: int, tile: int, halo: int, wrap: bool) -> list[tuple[Tensor, Tensor]]:
    """The tiles of one axis and their windows, grouped by both lengths: ``[tiles, extent]``, ``[tiles, window]``."""
    groups: dict[Pair, tuple[list[list[int]], list[list[int]]]] = {}
    for start in range(0, size, tile):
        end = min(start + tile, size)
        low, high = start - halo, end + halo
        if not wrap:
            low, high = max(low, 0), min(high, size)
        elif high - low >= size:  # reached from both sides, a position still counts once
            low, high = 0, size
        extents, windows = groups.setdefault((end - start, high - low), ([], []))
        extents.append(list(range(start, end)))
        windows.append([position % size for position in range(low, high)])
    return [(torch.tensor(extents), torch.tensor(windows)) for extents, windows in groups.values()]


def gathered(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_q: Tensor | None,
    global_k: Tensor | None,
    global_v: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """Neighbour attention; arguments as in :func:`tiledcore.ops.neighbor_attention`, already checked.

    ``attend``: attention ``(q, k, v, scale=scale)`` of ``[sequences, heads, n, D]``. It returns the result and, first
    among others, the logarithm of the softmax's sum, ``[sequences, heads, n]`` or with a last dimension of 1.
    """
    *axes, scale = geometry
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    budget = CHUNK_BYTES.get(q.device.type, CHUNK_BYTES["cpu"])
    for queries, keys in pieces(*(tuple(axis) for axis in axes), budget // (2 * q[:, :1].nbytes), q.device):
        # Not index_select, which on a CPU first copies the whole of a strided tensor: quadratic in the canvas.
        at, seen, tiles = queries.flatten(), keys.flatten(), len(queries)
        mine = q[:, at]
        part, logs = _within(attend, tiles, mine, k[:, seen], v[:, seen], scale)
        if global_k is not None and global_v is not None:
            other = mine if global_q is None else global_q[:, at]
            text, text_logs = _within(attend, 1, other, global_k, global_v, scale)
            # Not in half precision: a share close to 1 leaves the text a difference of roundings.
            share = (logs - text_logs).sigmoid().transpose(1, 2)[..., None]
            part = torch.lerp(text.to(share.dtype), part.to(share.dtype), share).to(q.dtype)
        out.index_copy_(1, at, part)
    return out


def _within(
    attend: Callable[..., Any], count: int, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention within each of ``count`` equal parts of ``[B, tokens, heads, D]``.

    Returns the result and the logarithm of the softmax's sum, ``[B, heads, tokens]``.
    """
    B, N, heads, D = q.shape
    parts = (t.reshape(B * count, t.shape[1] // count, heads, D).transpose(1, 2) for t in (q, k, v))
    out, logs, *_ = attend(*parts, scale=scale)
    logs = logs.reshape(B, count, heads, -1).transpose(1, 2).flatten(2)
    return out.transpose(1, 2).reshape(B, N, heads, D), logs


def _torchs_choice(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    """What F.scaled_dot_product_attention would choose; that function itself gives no logarithm."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    D, extra = q.shape[-1], -q.shape[-1] % 8  # these operators want a multiple of 8
    q, k, v = (F.pad(t, (0, extra)) if extra else t for t in (q, k, v))
    choice = torch._fused_sdp_choice(q, k, v, scale=scale)
    if choice == SDPBackend.FLASH_ATTENTION.value:
        out, logs, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    elif choice == SDPBackend.CUDNN_ATTENTION.value:
        out, logs, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    elif choice == SDPBackend.EFFICIENT_ATTENTION.value:
        out, logs, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    else:
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(exact) @ k.to(exact).transpose(-1, -2) * scale
        out, logs = (scores.softmax(-1) @ v.to(exact)).to(q.dtype), scores.logsumexp(-1)
    return out[..., :D], logs[..., : q.shape[2]]


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Lefaudeux et al. 2022."""
    from xformers.ops.fmha import memory_efficient_attention_forward_requires_grad as attention

    out, logs = attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale)
    return out.transpose(1, 2), logs[..., : q.shape[2]]  # some of its kernels pad them


GATHERED: dict[Impl, Callable[..., Tensor]] = {
    "sdpa": partial(gathered, _torchs_choice),
    # FA3 or FA4 after torch.nn.attention.activate_flash_attention_impl
    "flash": partial(gathered, aten._scaled_dot_product_flash_attention),
    "cudnn": partial(
        gathered, partial(aten._scaled_dot_product_cudnn_attention, attn_bias=None, compute_log_sumexp=True)
    ),
    "xformers": partial(gathered, _xformers),
}
IMPLS: tuple[Impl, ...] = ("reference", "native", "triton", *GATHERED)
define(
    "neighbor_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? global_q, Tensor? global_k, Tensor? global_v, SymInt[2] canvas, "
    "int[2] tile, int[2] halo, bool[2] wrap, float scale) -> Tensor",
    fake=lambda q, *_: q.new_empty(q.shape),
    reference=lambda q, k, v, *rest: reference.neighbor_attention(q, k, v, *rest[3:], *rest[:3]),
    **GATHERED,
)


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

    Returns:
        ``[B, H*W, heads, D]`` of q's dtype, contiguous.
    """
    dims = "[B, tokens, heads, D]"
    check_tensor("q", q, dims, FLOATS)
    B, N, heads, D = q.shape
    canvas, tile, halo = check_size("canvas", canvas), check_size("tile", tile), check_size("halo", halo, 0)
    wrap = validate.flags("wrap", wrap)
    if canvas[0] * canvas[1] != N:
        raise ValueError(f"canvas={canvas} has {canvas[0] * canvas[1]} tokens, but q has {N}: {tuple(q.shape)}")
    if B < 1 or heads < 1 or D < 1:
        raise ValueError(f"q must be [B, tokens, heads, D] with no dimension 0, got {tuple(q.shape)}")
    if (global_k is None) != (global_v is None) or (global_q is not None and global_k is None):
        raise ValueError("global_k, global_v: give both or neither; global_q needs them")
    for name, tensor in (("k", k), ("v", v), ("global_q", q if global_q is None else global_q)):
        check_tensor(name, tensor, dims, (q.dtype,), (B, N, heads, D), q)
    if global_k is not None:
        for name, text in (("global_k", global_k), ("global_v", global_v)):
            check_tensor(name, text, dims, (q.dtype,), (B, global_k.shape[1], heads, D), q)
        if global_k.shape[1] == 0:
            global_q = global_k = global_v = None
    op = getattr(torch.ops.tiledcore, _op_name(impl, q.device, q.dtype, D, tile[0] * tile[1]))
    tensors = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, global_q, global_k, global_v)]
    return op(*tensors, canvas, tile, halo, wrap, D**-0.5)


def _op_name(impl: Impl | None, device: torch.device, dtype: torch.dtype, D: int, queries: int) -> str:
    if impl is None and device.type == "cuda":
        named: Impl | None = "sdpa" if D > TRITON_HEAD_DIM else None
        if named is None and FASTEST and torch.cuda.is_available() and not torch.version.hip:
            major, minor = torch.cuda.get_device_capability(device)
            entry = FASTEST.get((10 * major + minor, D), {})
            named = next((entry[least] for least in sorted(entry, reverse=True) if least <= queries), None)
        if named is not None and unavailable("neighbor_attention", named, device, dtype) is None:
            impl = named
    return str(choose("neighbor_attention", impl, device, dtype)).removeprefix("tiledcore.")


# As torch.compiler.assume_constant_result, so that a compiled block has no graph break here, but without importing
# dynamo and Triton at once.
vars(_op_name)["_dynamo_marked_constant"] = True

"""neighbor_attention by gathering: the windows of tiles are copied, and a library's dense attention runs on the copies.

Global tokens are a second attention, of all queries to them alone. Both give the logarithm of the softmax's sum, by
which their results are one exact softmax (Milakov and Gimelshein 2018).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from tiledcore.ops.dispatch import Impl
from tiledcore.utils import remembered

aten = torch.ops.aten
CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 8 << 20}  # gathered at a time: fills a GPU, or stays near a CPU's caches

Pair = tuple[int, int]
Attend = Callable[..., Any]


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
    attend: Attend,
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


def _within(attend: Attend, count: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
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
"""By the name of the implementation."""

"""neighbor_attention by gathering: the windows of tiles are copied, and a library's dense attention runs on the copies.

Global tokens are a second attention, of all queries to them alone. Both give the logarithm of the softmax's sum, by
which their results are one exact softmax (Milakov and Gimelshein 2018).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from tiledcore.ops.dispatch import Impl
from tiledcore.utils import remembered

CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 8 << 20}  # gathered at a time: fills a GPU, or stays near a CPU's caches

Pair = tuple[int, int]
Lengths = Sequence[int]
Attend = Callable[[Tensor, Tensor, Tensor, Lengths, Lengths, float], tuple[Tensor, Tensor]]
"""Attention within each of some sequences that follow one another: q, k, v ``[B, tokens, heads, D]``, the sequences'
lengths in q and in k, the scale. Returns the result and the logarithm of the softmax's sum, ``[B, heads, tokens]``."""


class Piece(NamedTuple):
    """Some tiles one after the other: indices of their queries and of their windows' keys, and how many a tile has."""

    queries: Tensor
    keys: Tensor
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


@remembered
def pieces(
    canvas: Pair, tile: Pair, halo: Pair, wrap: tuple[bool, bool], most: int, packed: bool, device: torch.device
) -> list[Piece]:
    """All tiles, in pieces of at most ``most`` queries and keys, or of one tile.

    All tiles of a piece have the same lengths, except if it is ``packed``. Lists stay on the device, so that a CUDA
    graph can be captured from the second call on.
    """
    by_row, by_column = (_axis(*axis) for axis in zip(canvas, tile, halo, wrap, strict=True))
    found: list[list[tuple[Tensor, Tensor]]] = []
    size = most + 1
    for rows, row_window in by_row:
        for columns, column_window in by_column:
            queries, keys = _tokens(rows, columns, canvas[1]), _tokens(row_window, column_window, canvas[1])
            step = max(1, most // (queries.shape[1] + keys.shape[1]))
            for at, seen in zip(queries.split(step), keys.split(step), strict=True):
                size += at.numel() + seen.numel()
                if not packed or size > most:
                    found.append([])
                    size = at.numel() + seen.numel()
                found[-1].append((at, seen))
    made = []
    for parts in found:
        queries, keys = (torch.cat([part[i].flatten() for part in parts]).to(device) for i in (0, 1))
        lengths = [tuple(tiles.shape[1] for part in parts for tiles in [part[i]] * len(part[i])) for i in (0, 1)]
        made.append(Piece(queries, keys, *lengths))
    return made


def _tokens(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """``[tiles of the axis, n]`` rows and columns to ``[tiles, n]`` tokens."""
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)


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
    packed: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_q: Tensor | None,
    global_k: Tensor | None,
    global_v: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """Neighbour attention; arguments as in :func:`tiledcore.ops.neighbor_attention`, already checked."""
    *axes, scale = geometry
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    budget = CHUNK_BYTES.get(q.device.type, CHUNK_BYTES["cpu"])
    for piece in pieces(*(tuple(axis) for axis in axes), budget // (2 * q[:, :1].nbytes), packed, q.device):
        # Not index_select, which on a CPU first copies the whole of a strided tensor: quadratic in the canvas.
        at, seen = piece.queries, piece.keys
        mine = q[:, at]
        part, logs = attend(mine, k[:, seen], v[:, seen], piece.query_lengths, piece.key_lengths, scale)
        if global_k is not None and global_v is not None:
            other = mine if global_q is None else global_q[:, at]
            text, text_logs = attend(other, global_k, global_v, (len(at),), (global_k.shape[1],), scale)
            # Not in half precision: a share close to 1 leaves the text a difference of roundings.
            share = (logs - text_logs).sigmoid().transpose(1, 2)[..., None]
            part = torch.lerp(text.to(share.dtype), part.to(share.dtype), share).to(q.dtype)
        out.index_copy_(1, at, part)
    return out


def _sequences(op: Callable[..., Any]) -> Attend:
    """Attention of sequences of equal lengths, by an operator on ``[sequences, heads, n, D]``."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths, scale: float
    ) -> tuple[Tensor, Tensor]:
        B, N, heads, D = q.shape
        parts = (
            t.reshape(B * len(lengths), lengths[0], heads, D).transpose(1, 2)
            for t, lengths in ((q, q_lengths), (k, k_lengths), (v, k_lengths))
        )
        out, logs, *_ = op(*parts, scale=scale)
        logs = logs.reshape(B, len(q_lengths), heads, -1).transpose(1, 2).flatten(2)
        return out.transpose(1, 2).reshape(B, N, heads, D), logs

    return attend


def _torchs_choice(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    """What F.scaled_dot_product_attention would choose; that function itself gives no logarithm."""
    aten = torch.ops.aten
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


def _block_diagonal(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor]:
    """xformers (Lefaudeux et al. 2022): sequences of different lengths in one call, without padding."""
    from xformers.ops.fmha import memory_efficient_attention_forward_requires_grad as attention

    B, N, heads, _ = q.shape
    lengths = tuple(q_lengths) * B
    packed = (t.flatten(0, 1)[None] for t in (q, k, v))
    out, logs = attention(*packed, attn_bias=_mask(lengths, tuple(k_lengths) * B, q.device), scale=scale)
    if logs.shape[0] == len(lengths):  # [sequences, heads, n], with padding after the n
        logs = torch.cat([row[:, :n] for row, n in zip(logs, lengths, strict=True)], 1)
    return out.view_as(q), logs.reshape(heads, B, N).transpose(0, 1)


@remembered
def _mask(q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(q_lengths, k_lengths, device=device)


_aten = torch.ops.aten
GATHERED: dict[Impl, Callable[..., Tensor]] = {
    "sdpa": partial(gathered, _sequences(_torchs_choice), False),
    # FA3 or FA4 after torch.nn.attention.activate_flash_attention_impl
    "flash": partial(gathered, _sequences(_aten._scaled_dot_product_flash_attention), False),
    "cudnn": partial(
        gathered,
        _sequences(partial(_aten._scaled_dot_product_cudnn_attention, attn_bias=None, compute_log_sumexp=True)),
        False,
    ),
    "xformers": partial(gathered, _block_diagonal, True),
}
"""By the name of the implementation."""

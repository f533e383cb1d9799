"""Attention layers of autoencoders, computed for one band of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiledcore.vae.bands import Band, Conv, Layer, Reduction, Statistics


class KeysAndValues(Reduction):
    """The keys and values of all pixels, ``[B, N, inner]`` each."""

    def __init__(self, attention: Any, statistics: Statistics) -> None:
        self.attention, self.statistics = attention, statistics

    def start(self, pixels: int) -> None:
        self.pixels, self.filled = pixels, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        tokens = self.statistics.apply(rows, silu=False).flatten(2).transpose(1, 2)
        keys, values = self.attention.to_k(tokens), self.attention.to_v(tokens)
        if self.keys is None or self.values is None:
            self.keys, self.values = (t.new_empty(t.shape[0], self.pixels, t.shape[2]) for t in (keys, values))
        place = slice(self.filled, self.filled + tokens.shape[1])
        self.keys[:, place], self.values[:, place] = keys, values
        self.filled = place.stop


class Attention(Layer):
    """Self-attention of a VAE's middle block: queries of one band, keys of all rows."""

    def __init__(self, attention: Any) -> None:
        self.attention, self.statistics = attention, Statistics(attention.group_norm)
        self.memory = KeysAndValues(attention, self.statistics)
        self.reductions = [self.statistics, self.memory]

    def change(self, band: Band) -> None:
        attention, heads = self.attention, self.attention.heads
        assert self.memory.keys is not None and self.memory.values is not None
        rows = band.tensors.pop()
        tokens = self.statistics.apply(rows, silu=False).flatten(2).transpose(1, 2)
        q, k, v = (
            t.unflatten(2, (heads, -1)).transpose(1, 2)
            for t in (attention.to_q(tokens), self.memory.keys, self.memory.values)
        )
        if q.is_meta:  # where torch would count its fallback, which stores all scores
            attended = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        attended = attended.transpose(1, 2).flatten(2)
        out = attention.to_out[0](attended).transpose(1, 2).unflatten(2, rows.shape[2:])
        band.tensors.append(out + rows)


class Project(Layer):
    """Queries, keys and values of each pixel: ``3 * inner`` channels, in this order."""

    def __init__(self, attention: Any) -> None:
        self.projections = (attention.to_q, attention.to_k, attention.to_v)

    def change(self, band: Band) -> None:
        pixels = band.tensors[0].movedim(1, -1)
        band.tensors[0] = torch.cat([projection(pixels) for projection in self.projections], 3).movedim(-1, 1)


class Scales(Conv):
    """The input and its versions at several scales, concatenated along the channels.

    Args:
        projections: each a depthwise convolution ``proj_in`` of odd size and a 1x1 convolution ``proj_out``.
    """

    def __init__(self, projections: Sequence[Any]) -> None:
        super().__init__(max((one.proj_in for one in projections), key=lambda conv: conv.kernel_size[0]))
        self.projections = projections

    def _convolve(self, window: Tensor) -> Tensor:
        rows = window.shape[2] - self.kernel + 1
        found = [window.narrow(2, self.kernel // 2, rows)]
        for one in self.projections:
            size = one.proj_in.kernel_size[0]
            seen = window.narrow(2, (self.kernel - size) // 2, rows + size - 1)
            near = F.conv2d(seen, one.proj_in.weight, None, 1, (0, size // 2), 1, one.proj_in.groups)
            found.append(one.proj_out(near))
            del near
        return torch.cat(found, 1)


class LinearSums(Reduction):
    """Sums of ``value keyᵀ`` and of ``key`` over all pixels: float32 within a band, as in diffusers, then float64.

    The input is queries, keys and values. For images of a few pixels diffusers computes the same in another order.
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.sums: Tensor | None = None

    def start(self, pixels: int) -> None:
        self.sums = None

    def part(self, rows: Tensor, which: int) -> Tensor:
        """Queries (0), keys (1) or values (2) of a band, ``[B, heads, head_dim, pixels]``, float32."""
        part = rows.unflatten(1, (-1, 3, self.attention.attention_head_dim))[:, :, which].flatten(3)
        return (F.relu(part) if which < 2 else part).float()

    def update(self, rows: Tensor) -> None:
        key, value = self.part(rows, 1), self.part(rows, 2)
        sums = torch.cat([value @ key.transpose(-1, -2), key.sum(-1)[:, :, None]], 2).double()
        self.sums = sums if self.sums is None else self.sums.add_(sums)


class LinearAttention(Layer):
    """ReLU linear attention at several scales (EfficientViT: Cai et al. 2023) of queries, keys and values."""

    def __init__(self, attention: Any) -> None:
        self.attention, self.sums = attention, LinearSums(attention)
        self.reductions = [self.sums]

    def change(self, band: Band) -> None:
        attention, sums, rows = self.attention, self.sums, band.tensors[0]
        queries = sums.part(rows, 0)
        assert sums.sums is not None
        both = sums.sums.to(queries.dtype) @ queries
        attended = both[:, :, :-1].div_(both[:, :, -1:] + attention.eps).to(rows.dtype)
        del both
        attended = attended.flatten(1, 2).unflatten(2, rows.shape[2:])
        band.tensors[0] = attention.to_out(attended.movedim(1, -1)).movedim(-1, 1)

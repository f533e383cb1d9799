"""Attention between all pixels of an autoencoder's layer, a band of queries at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiledcore.vae.bands import Conv, Extent, Layer, Reduction, Statistics, Stream


class KeysAndValues(Reduction):
    """The keys and values of all pixels, ``[B, N, inner]`` each."""

    def __init__(self, attention: Any, statistics: Statistics) -> None:
        self.attention, self.statistics = attention, statistics

    def start(self, extent: Extent) -> None:
        self.pixels, self.filled = extent.height * extent.width, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        tokens = self.statistics.apply(rows, silu=False).flatten(2).transpose(1, 2)
        for name, projection in (("keys", self.attention.to_k), ("values", self.attention.to_v)):
            projected = projection(tokens)
            if getattr(self, name) is None:
                setattr(self, name, projected.new_empty(rows.shape[0], self.pixels, projected.shape[2]))
            getattr(self, name)[:, self.filled : self.filled + tokens.shape[1]] = projected
        self.filled += tokens.shape[1]

    def free(self) -> None:
        self.keys = self.values = None

    def elements(self, extent: Extent) -> int:
        return 2 * extent.batch * extent.height * extent.width * self.attention.to_k.out_features


class Attention(Layer):
    """Global self-attention of a VAE's middle block: the queries of a band against the keys of all rows.

    torch's attention keeps no scores (Rabe and Staats 2021, Dao et al. 2022), so a band of queries costs
    memory for itself alone.
    """

    def __init__(self, attention: Any) -> None:
        self.attention, self.statistics = attention, Statistics(attention.group_norm)
        self.memory = KeysAndValues(attention, self.statistics)
        self.reductions = [self.statistics, self.memory]

    def run(self, source: Stream) -> Stream:
        for band in source:
            band.tensors.append(self._attend(band.tensors.pop()))
            yield band

    def _attend(self, rows: Tensor) -> Tensor:
        attention, heads = self.attention, self.attention.heads
        assert self.memory.keys is not None and self.memory.values is not None
        tokens = self.statistics.apply(rows, silu=False).flatten(2).transpose(1, 2)
        q, k, v = (
            t.unflatten(2, (heads, -1)).transpose(1, 2)
            for t in (attention.to_q(tokens), self.memory.keys, self.memory.values)
        )
        # Where there is no data, torch would take its fallback that keeps the scores.
        attended = torch.empty_like(q) if q.is_meta else F.scaled_dot_product_attention(q, k, v)
        attended = attended.transpose(1, 2).flatten(2)
        out = attention.to_out[0](attended).transpose(1, 2).unflatten(2, rows.shape[2:])
        if attention.residual_connection:
            out = out + rows
        return out if attention.rescale_output_factor == 1 else out / attention.rescale_output_factor

    def flops(self, extent: Extent) -> float:
        pixels, inner = extent.height * extent.width, self.attention.to_q.out_features
        return extent.batch * pixels * (8.0 * inner * extent.channels[0] + 4.0 * inner * pixels)

    def work(self, extent: Extent, rows: int) -> int:
        return 5 * rows * extent.row()


# ----------------------------------------------------------------------------- linear attention


class Project(Layer):
    """Queries, keys and values of each pixel, ``3 * inner`` channels in this order."""

    def __init__(self, attention: Any) -> None:
        self.projections = (attention.to_q, attention.to_k, attention.to_v)

    def run(self, source: Stream) -> Stream:
        for band in source:
            pixels = band.tensors[0].movedim(1, -1)
            band.tensors[0] = torch.cat([projection(pixels) for projection in self.projections], 3).movedim(-1, 1)
            del pixels
            yield band

    def after(self, extent: Extent) -> Extent:
        return replace(extent, channels=(sum(p.out_features for p in self.projections), *extent.channels[1:]))

    def flops(self, extent: Extent) -> float:
        return 2.0 * extent.height * extent.row(0) * self.after(extent).channels[0]

    def work(self, extent: Extent, rows: int) -> int:
        return rows * (extent.row() + 2 * self.after(extent).row(0))


class Scales(Conv):
    """The input and, behind it along the channels, what an attention's projections make of a pixel's surroundings.

    Args:
        projections: of a depthwise convolution ``proj_in`` and a 1x1 one ``proj_out``; sizes may differ, all are odd.
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

    def after(self, extent: Extent) -> Extent:
        return replace(extent, channels=(extent.channels[0] * (1 + len(self.projections)), *extent.channels[1:]))

    def flops(self, extent: Extent) -> float:
        weights = sum(c.weight[0].numel() for one in self.projections for c in (one.proj_in, one.proj_out))
        return 2.0 * extent.height * extent.row(0) * weights

    def work(self, extent: Extent, rows: int) -> int:
        # The input or its window, one path through a depthwise convolution, all that is joined, and that joined.
        paths = 1 + 1 + 2 * len(self.projections) + 1
        return (rows + self.kernel - 1) * (paths * extent.row(0) + extent.row() - extent.row(0))


class LinearSums(Reduction):
    """Sums over all pixels of ``value keyᵀ`` and of ``key``, which are all that linear attention needs of them.

    A band's own are in float32, as diffusers has them; they are added up in float64. With no more pixels than a head
    has channels diffusers attends to each pixel instead; then these keys and values are kept.

    Args:
        attention: a ``SanaMultiscaleLinearAttention``.
        through: layers that make its queries, keys and values of the input.
    """

    def __init__(self, attention: Any, through: Sequence[Layer]) -> None:
        self.attention, self.through = attention, through
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.scores: Tensor | None = None

    def start(self, extent: Extent) -> None:
        self.free()
        self.linear = extent.height * extent.width > self.attention.attention_head_dim

    def part(self, rows: Tensor, which: int) -> Tensor:
        """Queries (0), keys (1) or values (2) of a band, ``[B, heads, head_dim, pixels]``."""
        part = rows.unflatten(1, (-1, 3, self.attention.attention_head_dim))[:, :, which].flatten(3)
        if which < 2:
            part = F.relu(part)
        return part.float() if self.linear else part

    def update(self, rows: Tensor) -> None:
        key, value = self.part(rows, 1), self.part(rows, 2)
        if not self.linear:
            self.keys, self.values = (
                new if old is None else torch.cat([old, new], 3)
                for old, new in ((self.keys, key), (self.values, value))
            )
            return
        scores = torch.cat([value @ key.transpose(-1, -2), key.sum(-1)[:, :, None]], 2).double()
        self.scores = scores if self.scores is None else self.scores.add_(scores)

    def free(self) -> None:
        self.keys = self.values = self.scores = None


class LinearAttention(Layer):
    """ReLU linear attention at several scales (EfficientViT: Cai et al. 2023; used in DC-AE: Chen et al. 2025).

    Its input are the queries, keys and values that ``sums`` went through, too.
    """

    def __init__(self, attention: Any, sums: LinearSums) -> None:
        self.attention, self.sums = attention, sums

    def run(self, source: Stream) -> Stream:
        for band in source:
            band.tensors[0] = self._attend(band.tensors[0])
            yield band

    def _attend(self, rows: Tensor) -> Tensor:
        attention, sums = self.attention, self.sums
        queries = sums.part(rows, 0)
        if sums.linear:
            assert sums.scores is not None
            both = sums.scores.to(queries.dtype) @ queries
            attended = both[:, :, :-1].div_(both[:, :, -1:] + attention.eps).to(rows.dtype)
            del both
        else:
            attended = attention.apply_quadratic_attention(queries, sums.keys, sums.values)
        attended = attended.flatten(1, 2).unflatten(2, rows.shape[2:])
        return attention.to_out(attended.movedim(1, -1)).movedim(-1, 1)

    def after(self, extent: Extent) -> Extent:
        return replace(extent, channels=(self.attention.to_out.out_features, *extent.channels[1:]))

    def flops(self, extent: Extent) -> float:
        inner = self.attention.to_out.in_features
        per_pixel = 2.0 * inner * (self.attention.to_out.out_features + 2 * self.attention.attention_head_dim)
        return extent.batch * extent.height * extent.width * per_pixel

    def work(self, extent: Extent, rows: int) -> int:
        # Queries and what is attended in float32: two thirds of the input's channels, of twice its size at most.
        return rows * (extent.row() + 2 * extent.row(0))

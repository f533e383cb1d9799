"""Decode an image by several ranks: each decodes a slab of rows.

A rank takes the rows beside its slab too, as many as the convolutions that follow can see, so that only the results of
reductions are exchanged: GroupNorm's sums, and the keys and values of the middle block's attention. The image equals
that of one process up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tiledcore.parallel.ranks import Ranks
from tiledcore.vae.attention import Attention, KeysAndValues
from tiledcore.vae.bands import Add, Band, Conv, Layer, Pointwise, Reduction, Save, Statistics, Stream
from tiledcore.vae.exact import joined_rows, plan, rows_of, run
from tiledcore.vae.program import program

Rows = tuple[int, int]  # first and last + 1


def divides(network: Any, height: int, ranks: int) -> bool:
    """Whether a decoder's input of ``height`` rows can be cut into slabs."""
    plain = all(
        type(layer) in (Save, Add, Pointwise, Attention) or (type(layer) is Conv and layer.stride == 1)
        for layer in program(network)
    )
    return plain and height >= ranks


def rows_needed(layers: Sequence[Layer], own: Rows, height: int) -> list[tuple[Rows, Rows]]:
    """Before each layer and after the last: the rows that a rank must have, and those of its slab among them.

    Args:
        layers: of a decoder.
        own: rows of the input that are the rank's slab.
        height: of the whole input.
    """
    scales = [1]
    for layer in layers:
        scales.append(scales[-1] * layer.upsample)
    beside, found = 0, []
    for i in range(len(layers), -1, -1):
        if i < len(layers) and isinstance(conv := layers[i], Conv):
            beside = -(-(beside + conv.kernel // 2) // conv.upsample)
        low, high = own[0] * scales[i], own[1] * scales[i]
        first = max(0, low - beside)
        found.append(((first, min(height * scales[i], high + beside)), (low - first, high - first)))
    return found[::-1]


class _Slab(Layer):
    """A layer on a slab: its output without the rows that nothing needs, or that saw the slab's border."""

    def __init__(self, layer: Layer, keep: Rows, reductions: Sequence[Reduction]) -> None:
        self.layer, self.keep, self.upsample, self.reductions = layer, keep, layer.upsample, reductions

    def run(self, source: Stream) -> Stream:
        at = 0
        for band in self.layer.run(source):
            rows = band.tensors[0].shape[2]
            low, high = max(self.keep[0] - at, 0), min(self.keep[1] - at, rows)
            at += rows
            if low < high:
                yield Band([tensor[:, :, low:high] for tensor in band.tensors], at >= self.keep[1])


class _Merged(Reduction):
    """A reduction over the slabs of all ranks, each of which adds its own rows."""

    def __init__(self, inner: Reduction, ranks: Ranks, own: Rows, pixels: int) -> None:
        self.inner, self.ranks, self.own, self.pixels = inner, ranks, own, pixels

    def start(self, pixels: int) -> None:
        self.at = 0
        self.inner.start(self.pixels)

    def update(self, rows: Tensor) -> None:
        low, high = max(self.own[0] - self.at, 0), min(self.own[1] - self.at, rows.shape[2])
        self.at += rows.shape[2]
        if low < high:
            self.inner.update(rows[:, :, low:high])

    def finish(self) -> None:
        inner = self.inner
        if isinstance(inner, Statistics):
            assert inner.total_mean is not None and inner.total_m2 is not None
            device = inner.total_mean.device
            told = self.ranks.all((inner.count, inner.total_mean.cpu(), inner.total_m2.cpu()))
            inner.start(0)
            for count, mean, m2 in told:
                inner.merge(count, mean.to(device), m2.to(device))
        elif isinstance(inner, KeysAndValues):
            assert inner.keys is not None and inner.values is not None
            inner.keys, inner.values = (torch.cat(self.ranks.share(t), 1) for t in (inner.keys, inner.values))
        inner.finish()


class Slabs:
    """Decodes of the same latents by all ranks. Arguments are those of :func:`tiledcore.vae.exact.rows_of`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def whole(self, network: Any, given: Tensor, band_px: int | None, budget: float | None) -> Iterator[Tensor]:
        """The decoded image ``[B, 3, H, W]`` in parts, on every rank."""
        if not divides(network, given.shape[2], self.ranks.size):
            return rows_of(network, given, band_px, budget)
        return iter(self.ranks.share(self._joined(network, given, band_px, budget)))

    def rows(self, network: Any, given: Tensor, band_px: int | None, budget: float | None) -> Iterator[Tensor]:
        """The decoded rows of the whole image on rank 0, top to bottom; on the others, which send theirs, none."""
        if not divides(network, given.shape[2], self.ranks.size):
            yield from rows_of(network, given, band_px, budget)
        elif self.ranks.leads:
            yield from self._slab(network, given, band_px, budget)
            for rank in range(1, self.ranks.size):
                yield from self.ranks.received(rank)
        else:
            self.ranks.send(self._joined(network, given, band_px, budget).cpu())

    def _own(self, height: int) -> Rows:
        """The rows of a decoder's input that are this rank's slab."""
        rank, size = self.ranks.rank, self.ranks.size
        return height * rank // size, height * (rank + 1) // size

    def _joined(self, network: Any, given: Tensor, band_px: int | None, budget: float | None) -> Tensor:
        first, last = self._own(given.shape[2])
        scale = math.prod(layer.upsample for layer in program(network))
        return joined_rows(self._slab(network, given, band_px, budget), (last - first) * scale)

    def _slab(self, network: Any, given: Tensor, band_px: int | None, budget: float | None) -> Iterator[Tensor]:
        """The rows of this rank's slab of the image, top to bottom."""
        height, width = given.shape[2:]
        own, layers = self._own(height), program(network)
        needed = rows_needed(layers, own, height)
        cut: list[Layer] = []
        for layer, (rows, mine), (after, _) in zip(layers, needed, needed[1:], strict=False):
            scale = (mine[1] - mine[0]) // (own[1] - own[0])
            pixels = (mine[1] - mine[0]) * width * scale
            merged = [_Merged(reduction, self.ranks, mine, pixels) for reduction in layer.reductions]
            keep = (after[0] - rows[0] * layer.upsample, after[1] - rows[0] * layer.upsample)
            cut.append(_Slab(layer, keep, merged))
        piece = given[:, :, needed[0][0][0] : needed[0][0][1]]
        return run(network, piece, plan(network, piece, band_px, budget), cut)

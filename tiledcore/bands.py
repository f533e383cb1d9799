"""Layers over a stream of row bands: each gives exactly the rows that it would give for the whole image.

A layer takes bands of consecutive rows from above and yields bands of its own output, top to bottom. A
convolution keeps the few input rows that its next output rows need too, so that no row is computed twice
and none is padded inside the image. Residual paths travel with their band, delayed as the convolutions
delay the main path. What depends on all rows (the statistics of a GroupNorm, the keys of an attention)
is a reduction: a pass over the layer's input that is done before its first output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiledcore import ops


@dataclass
class Band:
    """Consecutive rows ``[B, C, rows, W]``: the main path's, then those of the residuals that wait.

    Who receives a band empties it, so that a tensor is freed when its last reader is done with it.
    """

    tensors: list[Tensor]
    last: bool


Stream = Iterator[Band]


@dataclass(frozen=True)
class Extent:
    """The whole image between two layers: the channels of each path, height and width, and the batch."""

    batch: int
    channels: tuple[int, ...]
    height: int
    width: int

    def row(self, path: int | None = None) -> int:
        """Elements of one row, of one path or of all."""
        return self.batch * self.width * (sum(self.channels) if path is None else self.channels[path])


class Reduction:
    """A pass over the rows of a layer's input that must be complete before the layer's first output."""

    def start(self, extent: Extent) -> None: ...

    def update(self, rows: Tensor) -> None: ...

    def finish(self) -> None: ...

    def free(self) -> None:
        """Drop what is large, after the last pass through the layer."""

    def elements(self, extent: Extent) -> int:
        """What is kept until :meth:`free`, in elements of the activations' dtype."""
        return 0


class Statistics(Reduction):
    """Mean and variance of each group of channels, merged over bands (Chan, Golub and LeVeque 1979).

    A band's own are in float32, two passes in one by Welford; they are merged in float64.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm
        self.dtype = torch.float32
        self.mean = self.rstd = torch.empty(0)

    def start(self, extent: Extent) -> None:
        self.count = 0
        self.total_mean: Tensor | None = None
        self.total_m2: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        groups = self.norm.num_groups
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        variance, mean = torch.var_mean(wide.unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0)
        self.dtype = wide.dtype
        del wide
        n = rows.numel() // (rows.shape[0] * groups)
        mean, m2 = mean.double(), variance.double() * n
        if self.total_mean is None or self.total_m2 is None:
            self.count, self.total_mean, self.total_m2 = n, mean, m2
            return
        count = self.count + n
        delta = mean - self.total_mean
        self.total_m2 = self.total_m2 + m2 + delta.square() * (self.count * n / count)
        self.total_mean = self.total_mean + delta * (n / count)
        self.count = count

    def finish(self) -> None:
        assert self.total_mean is not None and self.total_m2 is not None
        self.mean = self.total_mean.to(self.dtype)
        self.rstd = (self.total_m2 / self.count + self.norm.eps).rsqrt().to(self.dtype)

    def apply(self, rows: Tensor, silu: bool, out: Tensor | None = None) -> Tensor:
        norm = self.norm
        return ops.group_norm_silu(rows, self.mean, self.rstd, norm.weight, norm.bias, silu=silu, out=out)


class Layer:
    """One step of a program; the base is the identity.

    Attributes:
        reductions: passes over this layer's input, each after the one before.
        upsample: output rows per input row, where there are more.
    """

    reductions: Sequence[Reduction] = ()
    upsample: int = 1

    def run(self, source: Stream) -> Stream:
        return source

    def after(self, extent: Extent) -> Extent:
        """The extent of the output."""
        return extent

    def flops(self, extent: Extent) -> float:
        """Of the whole image, a product and its sum counted as two."""
        return 0.0

    def held(self, extent: Extent) -> int:
        """Elements that stay here from one band to the next."""
        return 0

    def work(self, extent: Extent, rows: int) -> int:
        """Elements alive at once while ``rows`` input rows pass, input and output included: an upper bound."""
        after = self.after(extent)
        return rows * extent.row() + rows * self.upsample * after.row()


class Conv(Layer):
    """A convolution, with what comes before it written straight into its window of rows.

    Args:
        conv: zero-padded, without dilation.
        statistics: normalise the input first, ...
        silu: ... and apply SiLU to that.
        upsample: repeat each input pixel so many times along both axes first.
        pad: zeros (top, bottom, left, right) instead of the convolution's own.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        *,
        statistics: Statistics | None = None,
        silu: bool = True,
        upsample: int = 1,
        pad: tuple[int, int, int, int] | None = None,
        reduce: bool = True,
    ) -> None:
        self.conv, self.statistics, self.silu, self.upsample = conv, statistics, silu, upsample
        y, x = int(conv.padding[0]), int(conv.padding[1])
        self.pad = (y, y, x, x) if pad is None else pad
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        self.reductions = [statistics] if statistics is not None and reduce else []

    def run(self, source: Stream) -> Stream:
        held: Tensor | None = None
        waiting: list[Tensor | None] = []
        first = True
        for band in source:
            window = self._window(band.tensors, held, first, band.last)
            first, held = False, None
            rows = (window.shape[2] - self.kernel) // self.stride + 1
            if rows < 1:
                held = window
                waiting = [_join(old, new) for old, new in _pairs(waiting, band.tensors)]
                band.tensors.clear()
                del window
                continue
            out = self._convolve(window)
            rest = window[:, :, rows * self.stride :]
            held = None if band.last or rest.shape[2] == 0 else rest.clone()
            del window, rest
            result = Band([out], band.last)
            del out
            skips = _pairs(waiting, band.tensors)
            band.tensors.clear()
            waiting = []
            while skips:
                both = _join(*skips.pop(0))
                result.tensors.append(both[:, :, :rows])
                waiting.append(both[:, :, rows:].clone() if both.shape[2] > rows else None)
                del both
            yield result

    def _window(self, tensors: list[Tensor], held: Tensor | None, first: bool, last: bool) -> Tensor:
        """The held rows and the band's own, prepared for the convolution; takes the band's main path."""
        top, bottom, left, right = self.pad
        x = tensors.pop(0)
        plain = self.statistics is None and self.upsample == 1
        if self.kernel == 1 and plain:
            return x
        B, C, rows, W = x.shape
        rows, W = rows * self.upsample, W * self.upsample
        sides = (left, right) if left != right else (0, 0)
        before = (top if first else 0) + (0 if held is None else held.shape[2])
        total = before + rows + (bottom if last else 0)
        window = x.new_empty((B, C, total, sides[0] + W + sides[1]))
        if first:
            window[:, :, :top].zero_()
        if held is not None:
            window[:, :, before - held.shape[2] : before].copy_(held)
        if last:
            window[:, :, before + rows :].zero_()
        body = window[:, :, before : before + rows]
        if sides != (0, 0):
            body[..., : sides[0]].zero_()
            body[..., sides[0] + W :].zero_()
            body = body[..., sides[0] : sides[0] + W]
        if self.statistics is not None:
            self.statistics.apply(x, self.silu, out=body)
        elif self.upsample > 1:
            n = self.upsample
            body.unflatten(3, (-1, n)).unflatten(2, (-1, n)).copy_(x[:, :, :, None, :, None])
        else:
            body.copy_(x)
        return window

    def _convolve(self, window: Tensor) -> Tensor:
        conv, side = self.conv, self.pad[2] if self.pad[2] == self.pad[3] else 0
        return F.conv2d(window, conv.weight, conv.bias, conv.stride, (0, side), 1, conv.groups)

    def after(self, extent: Extent) -> Extent:
        top, bottom, left, right = self.pad
        height = (extent.height * self.upsample + top + bottom - self.kernel) // self.stride + 1
        width = (extent.width * self.upsample + left + right - self.conv.kernel_size[1]) // self.conv.stride[1] + 1
        return replace(extent, channels=(self.conv.out_channels, *extent.channels[1:]), height=height, width=width)

    def flops(self, extent: Extent) -> float:
        after = self.after(extent)
        return 2.0 * after.height * after.row(0) * self.conv.weight[0].numel()

    def held(self, extent: Extent) -> int:
        wide = replace(extent, width=extent.width * self.upsample)
        return (self.kernel - 1) * wide.row(0) + sum(extent.row(i) for i in range(1, len(extent.channels)))

    def work(self, extent: Extent, rows: int) -> int:
        after = self.after(extent)
        window = (rows * self.upsample + self.kernel - 1) * self.upsample * extent.row(0)
        out = (rows * self.upsample // self.stride + 1) * after.row(0)
        skips = (rows + 1) * (extent.row() - extent.row(0))
        return max(rows * extent.row(0) + window, window + out) + skips


def _pairs(waiting: list[Tensor | None], new: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
    return list(zip(waiting or [None] * len(new), new, strict=True))


def _join(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], 2)


class Save(Layer):
    """Start a residual: the main path goes on, and a copy of it waits for :class:`Add`.

    Args:
        shortcut: a 1x1 convolution on the path that waits; here where that makes it smaller.
        reductions: of the layer that comes next, here because its input is one path yet, and not two.
    """

    def __init__(self, shortcut: nn.Conv2d | None = None, reductions: Sequence[Reduction] = ()) -> None:
        self.shortcut, self.reductions = shortcut, reductions

    def run(self, source: Stream) -> Stream:
        for band in source:
            band.tensors.append(band.tensors[0] if self.shortcut is None else self.shortcut(band.tensors[0]))
            yield band

    def after(self, extent: Extent) -> Extent:
        channels = extent.channels[0] if self.shortcut is None else self.shortcut.out_channels
        return replace(extent, channels=(*extent.channels, channels))

    def flops(self, extent: Extent) -> float:
        return 0.0 if self.shortcut is None else 2.0 * extent.height * extent.row(0) * self.shortcut.out_channels


class Add(Layer):
    """End a residual: ``(main + shortcut(saved)) / scale``, written over the main path."""

    def __init__(self, shortcut: nn.Conv2d | None = None, scale: float = 1.0) -> None:
        self.shortcut, self.scale = shortcut, scale

    def run(self, source: Stream) -> Stream:
        for band in source:
            saved = band.tensors.pop()
            if self.shortcut is not None:
                saved = self.shortcut(saved)
            # A convolution's fresh output is all that ever comes here.
            band.tensors[-1].add_(saved)
            del saved
            if self.scale != 1.0:
                band.tensors[-1].div_(self.scale)
            yield band

    def after(self, extent: Extent) -> Extent:
        return replace(extent, channels=extent.channels[:-1])

    def flops(self, extent: Extent) -> float:
        return 0.0 if self.shortcut is None else 2.0 * extent.height * extent.row(1) * self.shortcut.out_channels


class Pointwise(Layer):
    """A function of each element of the main path alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def run(self, source: Stream) -> Stream:
        for band in source:
            band.tensors[0] = self.function(band.tensors[0])
            yield band


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


def split(source: Stream, rows: int) -> Stream:
    """Cut bands into pieces of at most so many rows."""
    for band in source:
        total = band.tensors[0].shape[2]
        starts = range(0, total, rows)
        for start in starts:
            piece = Band([t[:, :, start : start + rows] for t in band.tensors], band.last and start == starts[-1])
            if start == starts[-1]:
                band.tensors.clear()
            yield piece

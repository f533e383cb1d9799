"""Network layers that process an image in bands of rows, with the same result as for the whole image.

A layer takes bands of consecutive rows, top to bottom, and yields bands of its output. A convolution keeps the input
rows that its next band also needs, so no row is computed twice and only the border of the image is padded. A residual
travels with its band. What depends on all rows (GroupNorm's statistics, an attention's keys) is a reduction: a pass
over the layer's input before its first output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiledcore import ops


class UnsupportedError(TypeError):
    """A part of a network cannot be computed in bands."""


def unknown(module: Any) -> UnsupportedError:
    return UnsupportedError(f"{type(module).__name__} is not known to be computable in bands")


def known(module: Any, *kinds: type) -> Any:
    """The module, if its class is exactly one of these; else raises UnsupportedError."""
    if type(module) not in kinds:
        raise unknown(module)
    return module


@dataclass
class Band:
    """Consecutive rows ``[B, C, rows, W]``: first of the main path, then of each waiting residual.

    The receiver of a band empties it, so that each tensor is freed after its last use.
    """

    tensors: list[Tensor]
    last: bool


Stream = Iterator[Band]


class Reduction:
    """A pass over all rows of a layer's input (its main path), before the layer's first output."""

    def start(self, pixels: int) -> None:
        """Begin; the whole input has so many pixels."""

    def update(self, rows: Tensor) -> None: ...

    def finish(self) -> None: ...


class Statistics(Reduction):
    """GroupNorm's mean and variance: float32 per band, merged in float64 (Chan, Golub and LeVeque 1979)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm
        self.dtype = torch.float32
        self.mean = self.rstd = torch.empty(0)

    def start(self, pixels: int) -> None:
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
        self.merge(n, mean.double(), variance.double() * n)

    def merge(self, n: int, mean: Tensor, m2: Tensor) -> None:
        """Add ``n`` values by their mean and their sum of squared differences from it, float64."""
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
    """One layer. A subclass overrides :meth:`change` if each band is independent, else :meth:`run`.

    Attributes:
        reductions: passes over the input before the first output, in this order.
        upsample: output rows per input row, if more than 1.
    """

    reductions: Sequence[Reduction] = ()
    upsample: int = 1

    def run(self, source: Stream) -> Stream:
        for band in source:
            self.change(band)
            yield band

    def change(self, band: Band) -> None:
        """Replace the tensors of a band by the output."""


def convolution(conv: Any) -> nn.Conv2d:
    """The module, if :class:`Conv` can compute it; else raises UnsupportedError."""
    known(conv, nn.Conv2d)
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and set(conv.dilation) == {1}
    if not plain or conv.kernel_size[0] < conv.stride[0]:
        raise UnsupportedError(f"{conv} is dilated, not padded with zeros, or skips rows")
    return conv


class Conv(Layer):
    """A convolution, with the norm and SiLU or the upsampling just before it.

    If it changes the size of the image, waiting residuals follow by pixel shuffle or unshuffle.

    Args:
        conv: zero-padded, without dilation.
        statistics: normalise the input first.
        upsample: repeat each input pixel this often along both axes first.
        pad: zeros (top, bottom, left, right) instead of the convolution's own.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        *,
        statistics: Statistics | None = None,
        upsample: int = 1,
        pad: tuple[int, int, int, int] | None = None,
    ) -> None:
        self.conv, self.statistics, self.upsample = conv, statistics, upsample
        y, x = int(conv.padding[0]), int(conv.padding[1])
        self.pad = (y, y, x, x) if pad is None else pad
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        self.reductions = [] if statistics is None else [statistics]

    def run(self, source: Stream) -> Stream:
        held: Tensor | None = None
        waiting: list[Tensor | None] = []
        first = True
        stride = self.stride
        for band in source:
            window = self._window(band.tensors, held, first, band.last)
            first, held = False, None
            if self.upsample > 1:
                band.tensors[:] = [F.pixel_shuffle(t, self.upsample) for t in band.tensors]
            rows = (window.shape[2] - self.kernel) // stride + 1
            if rows < 1:
                held = window
                waiting = [_join(*pair) for pair in _pairs(waiting, band.tensors)]
                band.tensors.clear()
                del window
                continue
            out = self._convolve(window)
            rest = window[:, :, rows * stride :]
            held = None if band.last or rest.shape[2] == 0 else rest.clone()
            del window, rest
            result = Band([out], band.last)
            del out
            skips = _pairs(waiting, band.tensors)
            band.tensors.clear()
            waiting = []
            while skips:  # one at a time, so that each is freed before the next copy
                both = _join(*skips.pop(0))
                done = both[:, :, : rows * stride]
                result.tensors.append(F.pixel_unshuffle(done, stride) if stride > 1 else done)
                waiting.append(both[:, :, rows * stride :].clone() if both.shape[2] > rows * stride else None)
                del both, done
            yield result

    def _window(self, tensors: list[Tensor], held: Tensor | None, first: bool, last: bool) -> Tensor:
        """The held rows and the band's rows, ready for the convolution; removes the main path from ``tensors``."""
        top, bottom, left, right = self.pad
        x = tensors.pop(0)
        if self.kernel == 1 and self.statistics is None and self.upsample == 1:
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
            self.statistics.apply(x, silu=True, out=body)
        elif self.upsample > 1:
            n = self.upsample
            body.unflatten(3, (-1, n)).unflatten(2, (-1, n)).copy_(x[:, :, :, None, :, None])
        else:
            body.copy_(x)
        return window

    def _convolve(self, window: Tensor) -> Tensor:
        conv, side = self.conv, self.pad[2] if self.pad[2] == self.pad[3] else 0
        return F.conv2d(window, conv.weight, conv.bias, conv.stride, (0, side), 1, conv.groups)


def _pairs(waiting: Sequence[Tensor | None], new: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
    return list(zip(waiting or [None] * len(new), new, strict=True))


def _join(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], 2)


Shortcut = Callable[[Tensor], Tensor]
"""The operation on a residual, per pixel: a 1x1 convolution or something simpler."""


class Save(Layer):
    """Start a residual: a copy of the main path waits for :class:`Add`. ``shortcut`` is applied to the copy here."""

    def __init__(self, shortcut: Shortcut | None = None) -> None:
        self.shortcut = shortcut

    def change(self, band: Band) -> None:
        band.tensors.append(band.tensors[0] if self.shortcut is None else self.shortcut(band.tensors[0]))


class Add(Layer):
    """End a residual: ``main + shortcut(saved)``, in place of the main path."""

    def __init__(self, shortcut: Shortcut | None = None) -> None:
        self.shortcut = shortcut

    def change(self, band: Band) -> None:
        saved = band.tensors.pop()
        if self.shortcut is not None:
            saved = self.shortcut(saved)
        band.tensors[-1].add_(saved)  # in place is safe: this is the new output of a convolution


class Pointwise(Layer):
    """A function of each pixel of the main path."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def change(self, band: Band) -> None:
        band.tensors[0] = self.function(band.tensors[0])


def activation(module: Any) -> Layer:
    return Pointwise(known(module, nn.ReLU, nn.SiLU))


def split(source: Stream, rows: int) -> Stream:
    """Split bands into pieces of at most ``rows`` rows."""
    for band in source:
        starts = range(0, band.tensors[0].shape[2], rows)
        for start in starts:
            piece = Band([t[:, :, start : start + rows] for t in band.tensors], band.last and start == starts[-1])
            if start == starts[-1]:
                band.tensors.clear()
            yield piece

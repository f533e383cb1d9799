"""Network layers that process an image in bands of rows, with the same result as for the whole image.

A layer takes bands of consecutive rows, top to bottom, and yields bands of its output. A convolution keeps the input
rows that its next band also needs, so no row is computed twice and only the border of the image is padded. A residual
travels with its band. A layer that depends on all rows (GroupNorm's statistics, an attention's keys) takes a pass over
its input before its first output: a reduction.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiledcore import ops


class UnsupportedError(TypeError):
    """A part of a network cannot be computed in bands."""


def known(module: Any, *kinds: type, **attributes: Any) -> Any:
    """The module, if its class is exactly one of these and it has these attributes; else raises UnsupportedError."""
    name = type(module).__name__
    if type(module) not in kinds:
        raise UnsupportedError(f"{name} is not known to be computable in bands")
    for attribute, value in attributes.items():
        if (found := getattr(module, attribute)) != value:
            raise UnsupportedError(f"{name}.{attribute} is {found}; computable in bands is {value}")
    return module


@dataclass
class Band:
    """Consecutive rows ``[B, C, rows, W]``: of the main path, then of the residual if one waits.

    The receiver of a band empties it, so that each tensor is freed after its last use.
    """

    tensors: list[Tensor]
    last: bool


Stream = Iterator[Band]


class Layer:
    """One layer. A subclass overrides :meth:`change` if each band is independent, else :meth:`run`.

    One that ``reduces`` is a reduction too: before its first output, all rows of its input pass through
    :meth:`update`.
    """

    upsample: int = 1  # output rows per input row, if more than 1
    reduces: bool = False

    def run(self, source: Stream) -> Stream:
        for band in source:
            self.change(band)
            yield band

    def change(self, band: Band) -> None:
        """Replace the tensors of a band by the output."""

    def start(self, pixels: int) -> None:
        """Begin the reduction; the whole input has so many pixels."""

    def update(self, rows: Tensor) -> None:
        """Add rows of the main path."""

    def finish(self) -> None: ...


class Statistics(Layer):
    """GroupNorm's mean and variance for a later layer: float32 per band, merged in float64. Changes nothing."""

    reduces = True

    def __init__(self, norm: Any) -> None:
        self.norm = known(norm, nn.GroupNorm, affine=True)
        self.dtype = torch.promote_types(norm.weight.dtype, torch.float32)

    def start(self, pixels: int) -> None:
        self.sums: Any = 0  # float64 [3, B, groups]: the number of values, their sum, the sum of their squares

    def update(self, rows: Tensor) -> None:
        grouped = rows.to(self.dtype).unflatten(1, (self.norm.num_groups, -1))
        variance, mean = (one.double() for one in torch.var_mean(grouped, dim=(2, 3, 4), correction=0))
        sums = torch.stack([torch.ones_like(mean), mean, variance + mean.square()])
        self.sums = self.sums + sums * grouped[0, 0].numel()

    def finish(self) -> None:
        mean, squares = self.sums[1:] / self.sums[0]
        variance = (squares - mean.square()).clamp_(min=0)
        self.mean, self.rstd = mean.to(self.dtype), (variance + self.norm.eps).rsqrt().to(self.dtype)

    def apply(self, rows: Tensor, silu: bool, out: Tensor | None = None) -> Tensor:
        norm = self.norm
        return ops.group_norm_silu(rows, self.mean, self.rstd, norm.weight, norm.bias, silu=silu, out=out)


class Conv(Layer):
    """A convolution, with the norm and SiLU or the upsampling just before it.

    If it changes the size of the image, a waiting residual follows by pixel shuffle or unshuffle.

    Args:
        conv: zero-padded, without dilation.
        statistics: normalise the input and apply SiLU first.
        upsample: repeat each input pixel this often along both axes first.
        pad: zeros (top, bottom, left, right) instead of the convolution's own.
    """

    def __init__(
        self, conv: Any, statistics: Statistics | None = None, upsample: int = 1, pad: Sequence[int] | None = None
    ) -> None:
        self.conv, self.statistics, self.upsample = conv, statistics, upsample
        known(conv, nn.Conv2d, padding_mode="zeros", dilation=(1, 1))
        if isinstance(conv.padding, str) or conv.kernel_size[0] < conv.stride[0]:
            raise UnsupportedError(f"{conv} skips rows, or its padding is not in numbers")
        y, x = conv.padding
        self.pad = pad or (y, y, x, x)
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]

    def run(self, source: Stream) -> Stream:
        held = waiting = None  # input rows that the next band also needs; rows of the residual before their output
        for band in source:
            window = self._window(band.tensors.pop(0), held, band.last)
            rows = max(0, (window.shape[2] - self.kernel) // self.stride + 1)
            used = rows * self.stride
            held = None if band.last else window[:, :, used:].clone()
            result = Band([self._convolve(window)] if rows else [], band.last)
            del window
            if band.tensors:
                saved = band.tensors.pop()
                if self.upsample > 1:
                    saved = F.pixel_shuffle(saved, self.upsample)
                if waiting is not None and waiting.shape[2] > 0:
                    saved = torch.cat([waiting, saved], 2)
                waiting = saved[:, :, used:].clone()
                saved = saved[:, :, :used]
                result.tensors.append(F.pixel_unshuffle(saved, self.stride) if self.stride > 1 else saved)
                del saved
            if rows:
                yield result

    def _window(self, x: Tensor, held: Tensor | None, last: bool) -> Tensor:
        """The held rows (at the top of the image zeros) and the rows of ``x``, ready for the convolution."""
        if self.kernel == 1 and self.statistics is None and self.upsample == 1:
            return x
        top, bottom, left, right = self.pad
        if left == right:
            left = right = 0  # the convolution itself pads these
        n = self.upsample
        B, C, H, W = x.shape[0], x.shape[1], x.shape[2] * n, x.shape[3] * n
        before = top if held is None else held.shape[2]
        make = x.new_zeros if held is None or last or left or right else x.new_empty
        window = make(B, C, before + H + bottom * last, left + W + right)
        if held is not None:
            window[:, :, :before] = held
        body = window[:, :, before : before + H, left : left + W]
        if self.statistics is not None:
            self.statistics.apply(x, silu=True, out=body)
        else:
            body.unflatten(3, (-1, n)).unflatten(2, (-1, n)).copy_(x[:, :, :, None, :, None])
        return window

    def _convolve(self, window: Tensor) -> Tensor:
        conv, side = self.conv, self.pad[2] if self.pad[2] == self.pad[3] else 0
        return F.conv2d(window, conv.weight, conv.bias, conv.stride, (0, side), 1, conv.groups)


class Pointwise(Layer):
    """A function of each pixel of the main path."""

    def __init__(self, function: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.function = function

    def change(self, band: Band) -> None:
        band.tensors[0] = self.function(band.tensors[0])


class Save(Pointwise):
    """Start a residual: the function of the main path waits for :class:`Add`."""

    def change(self, band: Band) -> None:
        band.tensors.append(self.function(band.tensors[0]))


class Add(Pointwise):
    """End a residual: ``main + function(saved)``, in place of the main path, which is a convolution's new output."""

    def change(self, band: Band) -> None:
        band.tensors[0].add_(self.function(band.tensors.pop()))


def split(source: Stream, rows: int) -> Stream:
    """Split bands into pieces of at most ``rows`` rows."""
    for band in source:
        starts = range(0, band.tensors[0].shape[2], rows)
        for start in starts:
            piece = Band([t[:, :, start : start + rows] for t in band.tensors], band.last and start == starts[-1])
            if start == starts[-1]:
                band.tensors.clear()
            yield piece

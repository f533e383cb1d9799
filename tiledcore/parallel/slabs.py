"""Decode an image by several ranks, each on some of its rows.

:func:`divided` runs the autoencoder's own code: the bits of one process. :func:`slabs` runs its layers in bands of
bounded memory, where only the results of reductions are exchanged: equal to one process up to rounding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tiledcore.parallel.ranks import Ranks
from tiledcore.utils import replaced
from tiledcore.vae.bands import Add, Band, Conv, Layer, Pointwise, Save, Statistics, Stream
from tiledcore.vae.exact import joined, plan, rows_of, run
from tiledcore.vae.layers import Attention as BandAttention
from tiledcore.vae.layers import program

LEAST_PIXELS = 512 * 512  # a smaller image is decoded by every rank, because the exchange would take longer

Forward = Callable[..., Tensor]
Rows = tuple[int, int]  # first and last + 1


def bounds_of(ranks: Ranks, length: int) -> list[int]:
    """Where each rank's part of ``length`` rows or groups begins, and the end of the last one."""
    return [length * rank // ranks.size for rank in range(ranks.size + 1)]


def divides(network: Any, height: int, ranks: int) -> bool:
    """Whether a decoder's input of ``height`` rows can be cut into slabs."""
    plain = all(
        type(layer) in (Save, Add, Pointwise, Statistics, BandAttention) or (type(layer) is Conv and layer.stride == 1)
        for layer in program(network)
    )
    return plain and height >= ranks


@contextmanager
def divided(ranks: Ranks, decoder: Any, scale: int) -> Iterator[None]:
    """Inside the ``with`` block, the ranks divide the rows of what a decoder decodes, and each gets the whole image.

    ``scale``: image rows per row of the latents.
    """
    original = decoder.forward

    def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        height, width = sample.shape[2:]
        if height * width * scale**2 < LEAST_PIXELS or not divides(decoder, height, ranks.size):
            return original(sample, *args, **kwargs)
        with ExitStack() as stack:
            for module, changed in _on_own_rows(ranks, decoder, height):
                stack.enter_context(replaced(module, forward=changed))
            own = original(sample, *args, **kwargs)
        return torch.cat(ranks.share(own), 2)

    with replaced(decoder, forward=forward):
        yield


def _on_own_rows(ranks: Ranks, decoder: Any, height: int) -> Iterator[tuple[Any, Forward]]:
    """Each module whose result depends on more than one pixel, and the forward that computes it for this rank's rows.

    The first convolution gets the whole input of ``height`` rows, the others the rows beside their own. For GroupNorm
    each rank gets all rows of some groups. The attention of the middle block gets all rows; so do convolutions of one
    pixel in half precision, whose bits depend on the number of pixels.
    """
    bounds = bounds_of(ranks, height)
    low, high = bounds[ranks.rank : ranks.rank + 2]

    rooms: dict[str, Tensor] = {}

    def flat(name: str, like: Tensor, length: int) -> Tensor:
        """Memory that the next layer uses again: on a CPU, new pages of memory cost more time than a copy."""
        if name not in rooms or len(rooms[name]) < length:
            rooms[name] = like.new_empty(length)
        return rooms[name][:length]

    def joined(parts: Sequence[Tensor], own: Tensor) -> Tensor:
        """Parts one below the other, laid out as ``own``: the layout changes the bits of what follows."""
        batch, channels, _, width = parts[0].shape
        rows = sum(part.shape[2] for part in parts)
        room = flat("whole", own, batch * channels * rows * width)
        plain, last = room.view(batch, channels, rows, width), room.view(batch, rows, width, channels)
        return torch.cat(list(parts), 2, out=plain if own.is_contiguous() else last.permute(0, 3, 1, 2))

    def turned(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Each rank gives part i to rank i; returns what this one gets, of ``shapes``, by rank."""
        lengths = [part.numel() for part in parts], [math.prod(shape) for shape in shapes]
        given, got = (flat(name, parts[0], sum(n)) for name, n in zip(("given", "got"), lengths, strict=True))
        for room, part in zip(given.split(lengths[0]), parts, strict=True):
            room.view(part.shape).copy_(part)
        ranks.turn(given, got, *lengths)
        return [one.view(*shape) for one, shape in zip(got.split(lengths[1]), shapes, strict=True)]

    def on_all(module: Any, given_whole: bool = False) -> Forward:
        original = module.forward

        def forward(own: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            whole = original(own if given_whole else joined(ranks.share(own), own), *args, **kwargs)
            scale = whole.shape[2] // height
            rows = whole[:, :, scale * low : scale * high]
            return torch.empty_like(rows).copy_(rows)

        return forward

    def convolution(conv: nn.Conv2d) -> Forward:
        """Of stride 1, padded with zeros at the border of the image."""
        reach, rank = conv.kernel_size[0] // 2, ranks.rank

        def forward(own: Tensor) -> Tensor:
            beside = torch.cat([own[:, :, :reach], own[:, :, -reach:]], 2)
            edges, none = ranks.share(beside, [beside.shape] * ranks.size), torch.zeros_like(own[:, :, :reach])
            above = edges[rank - 1][:, :, reach:] if rank > 0 else none
            below = edges[rank + 1][:, :, :reach] if rank + 1 < ranks.size else none
            seen = joined([above, own, below], own)
            return F.conv2d(seen, conv.weight, conv.bias, 1, (0, int(conv.padding[1])), 1, conv.groups)

        return forward

    def norm(module: nn.GroupNorm) -> Forward:
        groups, each = bounds_of(ranks, module.num_groups), module.num_channels // module.num_groups
        channels = [each * (stop - start) for start, stop in pairwise(groups)]
        count, mine = channels[ranks.rank], slice(each * groups[ranks.rank], each * groups[ranks.rank + 1])

        def forward(own: Tensor) -> Tensor:
            scale = own.shape[2] // (high - low)
            heights = [scale * (stop - start) for start, stop in pairwise(bounds)]
            shapes = [(len(own), count, rows, own.shape[3]) for rows in heights]
            whole = joined(turned(own.split(channels, 1), shapes), own)
            if count:
                whole = F.group_norm(whole, count // each, module.weight[mine], module.bias[mine], module.eps)
            shapes = [(len(own), part, *own.shape[2:]) for part in channels]
            return torch.cat(turned(whole.split(heights, 2), shapes), 1, out=torch.empty_like(own))

        return forward

    attentions = [module for module in decoder.modules() if type(module) is Attention]
    within = {inner for attention in attentions for inner in attention.modules()}
    is_first = True
    for module in decoder.modules():
        if module in attentions:
            yield module, on_all(module)
        elif type(module) is nn.GroupNorm and module not in within:
            yield module, norm(module)
        elif type(module) is nn.Conv2d and module not in within:
            if not is_first and module.kernel_size[0] > 1:
                yield module, convolution(module)
            elif is_first or module.weight.element_size() <= 2:
                yield module, on_all(module, given_whole=is_first)
            is_first = False


def rows_needed(layers: Sequence[Layer], own: Rows, height: int) -> list[tuple[Rows, Rows]]:
    """Before each layer of a decoder and after the last: the rows that a rank must have, and its slab's among them.

    ``own`` are the rows of the slab in the input, which has ``height`` rows in all.
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
    """A layer on a slab: its output without the rows that nothing needs, or that saw the slab's border.

    A reduction is one over the slabs of all ranks, each of which adds its own rows.
    """

    def __init__(self, layer: Layer, keep: Rows, ranks: Ranks, own: Rows, pixels: int) -> None:
        self.layer, self.keep, self.upsample, self.reduces = layer, keep, layer.upsample, layer.reduces
        self.ranks, self.own, self.pixels = ranks, own, pixels

    def run(self, source: Stream) -> Stream:
        at = 0
        for band in self.layer.run(source):
            rows = band.tensors[0].shape[2]
            low, high = max(self.keep[0] - at, 0), min(self.keep[1] - at, rows)
            at += rows
            if low < high:
                yield Band([tensor[:, :, low:high] for tensor in band.tensors], at >= self.keep[1])

    def start(self, pixels: int) -> None:
        self.at = 0
        self.layer.start(self.pixels)

    def update(self, rows: Tensor) -> None:
        low, high = max(self.own[0] - self.at, 0), min(self.own[1] - self.at, rows.shape[2])
        self.at += rows.shape[2]
        if low < high:
            self.layer.update(rows[:, :, low:high])

    def finish(self) -> None:
        layer = self.layer
        if isinstance(layer, Statistics):
            layer.sums = sum(self.ranks.all(layer.sums.cpu())).to(layer.sums.device)
        elif isinstance(layer, BandAttention):
            layer.keys, layer.values = (torch.cat(self.ranks.share(t), 1) for t in (layer.keys, layer.values))
        layer.finish()


def slabs(
    ranks: Ranks, network: Any, given: Tensor, band_px: int | None, budget: float | None, to_first: bool = False
) -> Iterator[Tensor]:
    """:func:`tiledcore.vae.exact.rows_of` by all ranks, which have the same ``given``.

    Yields the whole image on every rank; with ``to_first`` only on rank 0, to which the others send their rows.
    """
    height, width = given.shape[2:]
    if not divides(network, height, ranks.size):
        yield from rows_of(network, given, band_px, budget)
        return
    own, layers = bounds_of(ranks, height)[ranks.rank : ranks.rank + 2], program(network)
    needed, scale = rows_needed(layers, (own[0], own[1]), height), 1
    cut: list[Layer] = []
    for layer, (rows, mine), (after, _) in zip(layers, needed, needed[1:], strict=False):
        keep = (after[0] - rows[0] * layer.upsample, after[1] - rows[0] * layer.upsample)
        cut.append(_Slab(layer, keep, ranks, mine, (mine[1] - mine[0]) * width * scale))
        scale *= layer.upsample
    piece = given[:, :, needed[0][0][0] : needed[0][0][1]]
    bands = run(network, piece, plan(network, piece, band_px, budget), cut)
    if not to_first:
        yield from ranks.share(joined(bands, (own[1] - own[0]) * scale))
    elif ranks.leads:
        yield from bands
        for rank in range(1, ranks.size):
            while (band := ranks.received(rank)) is not None:
                yield band
    else:
        for one in [*(band.cpu().clone() for band in bands), None]:  # all are there before rank 0 asks
            ranks.send(one)

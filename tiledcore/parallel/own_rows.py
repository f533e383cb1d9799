"""Decode an image by several ranks with the autoencoder's own code, each on some rows: the bits of one process.

A convolution gets the rows beside its own from the neighbours. For a GroupNorm each rank gets all rows of some groups,
and for the attention of the middle block all rows; all of them compute it, as it is at the size of the latents.
"""

from __future__ import annotations

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
from tiledcore.parallel.slabs import divides
from tiledcore.utils import replaced

LEAST_PIXELS = 512 * 512
"""A smaller image is decoded by every rank, because the exchange would take longer."""

Forward = Callable[..., Tensor]


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
            for module, changed in _Rows(ranks, height).changed(decoder).items():
                stack.enter_context(replaced(module, forward=changed))
            own = original(sample, *args, **kwargs)
        return torch.cat(ranks.share(own), 2)

    with replaced(decoder, forward=forward):
        yield


class _Rows:
    """The forward functions that replace those of the modules, so that each works on the rows of this rank.

    ``height``: rows of the latents.
    """

    def __init__(self, ranks: Ranks, height: int) -> None:
        self.ranks = ranks
        self.bounds = [height * rank // ranks.size for rank in range(ranks.size + 1)]
        self.rooms: dict[str, Tensor] = {}

    def _flat(self, name: str, like: Tensor, length: int) -> Tensor:
        """Memory that is used again in the next layer: on a CPU, new pages of memory cost more time than a copy."""
        room = self.rooms.get(name)
        if room is None or len(room) < length:
            room = self.rooms[name] = like.new_empty(length)
        return room[:length]

    def _room(self, like: Tensor, height: int, channels: int | None = None) -> Tensor:
        """Memory for ``height`` rows in the layout of ``like``, because the layout changes the bits of a GroupNorm."""
        batch, width, channels = len(like), like.shape[3], like.shape[1] if channels is None else channels
        room = self._flat("room", like, batch * channels * height * width)
        if like.is_contiguous():
            return room.view(batch, channels, height, width)
        return room.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _turned(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Each rank gives one part to each; returns what this one gets, of ``shapes``, by rank."""
        lengths = [math.prod(shape) for shape in shapes]
        given = self._flat("given", parts[0], sum(part.numel() for part in parts))
        for room, part in zip(given.split([part.numel() for part in parts]), parts, strict=True):
            room.view(part.shape).copy_(part)
        got = self._flat("got", given, sum(lengths))
        self.ranks.turn(given, [part.numel() for part in parts], got, lengths)
        return [one.view(tuple(shape)) for one, shape in zip(got.split(lengths), shapes, strict=True)]

    def changed(self, decoder: Any) -> dict[Any, Forward]:
        """The new forward of each module whose result depends on more than one pixel."""
        attentions = [module for module in decoder.modules() if type(module) is Attention]
        within = {id(inner) for attention in attentions for inner in attention.modules()}
        outer = [module for module in decoder.modules() if id(module) not in within]
        first, *convolutions = [module for module in outer if type(module) is nn.Conv2d]
        found = {module: self._attention(module) for module in attentions} | {first: self._first(first)}
        for conv in convolutions:
            found[conv] = self._convolution(conv) if conv.kernel_size[0] > 1 else self._product(conv)
        return found | {module: self._norm(module) for module in outer if type(module) is nn.GroupNorm}

    def _heights(self, own: Tensor) -> list[int]:
        """Rows of all ranks, where this one has the activation ``own``."""
        rank, bounds = self.ranks.rank, self.bounds
        scale = own.shape[2] // (bounds[rank + 1] - bounds[rank])
        return [scale * (stop - start) for start, stop in pairwise(bounds)]

    def _mine(self, own: Tensor) -> slice:
        """Where the activation ``own`` is in the whole one."""
        heights, rank = self._heights(own), self.ranks.rank
        return slice(sum(heights[:rank]), sum(heights[: rank + 1]))

    def _first(self, conv: nn.Conv2d) -> Forward:
        """The first convolution, of the whole input."""
        original = conv.forward

        def forward(whole: Tensor) -> Tensor:
            rank = self.ranks.rank
            return _cut(original(whole), slice(self.bounds[rank], self.bounds[rank + 1]))

        return forward

    def _convolution(self, conv: nn.Conv2d) -> Forward:
        """A convolution of stride 1, padded with zeros at the border of the image."""
        reach, rank = conv.kernel_size[0] // 2, self.ranks.rank

        def forward(own: Tensor) -> Tensor:
            edges = self.ranks.alike(torch.cat([own[:, :, :reach], own[:, :, -reach:]], 2))
            none = torch.zeros_like(edges[0][:, :, :reach])
            above = edges[rank - 1][:, :, reach:] if rank > 0 else none
            below = edges[rank + 1][:, :, :reach] if rank + 1 < self.ranks.size else none
            seen = torch.cat([above, own, below], 2, out=self._room(own, own.shape[2] + 2 * reach))
            return F.conv2d(seen, conv.weight, conv.bias, 1, (0, int(conv.padding[1])), 1, conv.groups)

        return forward

    def _product(self, conv: nn.Conv2d) -> Forward:
        """A convolution of one pixel. In half precision its bits depend on the number of pixels, so it gets all."""
        original = conv.forward

        def forward(own: Tensor) -> Tensor:
            if own.element_size() > 2:
                return original(own)
            rows = self._mine(own)
            whole = self._room(own, sum(self._heights(own)))
            whole[:, :, rows] = own
            return _cut(original(whole), rows)

        return forward

    def _norm(self, norm: nn.GroupNorm) -> Forward:
        """A GroupNorm: each rank gets all rows of its groups, and gives back those that are not its own."""
        size, rank = self.ranks.size, self.ranks.rank
        bounds = [norm.num_groups * one // size for one in range(size + 1)]
        groups = [stop - start for start, stop in pairwise(bounds)]
        each = norm.num_channels // norm.num_groups
        channels = [each * count for count in groups]
        mine = slice(each * bounds[rank], each * bounds[rank + 1])

        def forward(own: Tensor) -> Tensor:
            heights = self._heights(own)
            shapes = [(len(own), channels[rank], height, own.shape[3]) for height in heights]
            whole = self._room(own, sum(heights), channels[rank])
            torch.cat(self._turned(own.split(channels, 1), shapes), 2, out=whole)
            if groups[rank]:
                whole = F.group_norm(whole, groups[rank], norm.weight[mine], norm.bias[mine], norm.eps)
            shapes = [(len(own), count, *own.shape[2:]) for count in channels]
            return torch.cat(self._turned(whole.split(heights, 2), shapes), 1, out=torch.empty_like(own))

        return forward

    def _attention(self, attention: Attention) -> Forward:
        original = attention.forward

        def forward(own: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            whole = torch.cat(self.ranks.share(own), 2)
            return _cut(original(whole, *args, **kwargs), self._mine(own))

        return forward


def _cut(whole: Tensor, rows: slice) -> Tensor:
    """A copy of some rows, laid out as the whole."""
    return torch.empty_like(whole[:, :, rows]).copy_(whole[:, :, rows])

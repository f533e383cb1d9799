"""Plan a decode or encode in bands: how high the bands are, and which activations are kept between two passes.

Each reduction (a GroupNorm's statistics, an attention's keys) needs a pass over its layer's input before the layer's
first output. The next pass starts from kept activations, or from earlier ones and computes again. Shapes, FLOPs and
bytes are measured on tensors of torch's meta device, which have no data.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tiledcore.vae.bands import Band, Layer, Save, Stream, split
from tiledcore.vae.live_bytes import LiveBytes
from tiledcore.vae.program import program

BANDS = (512, 256, 128, 64)
"""Band heights in px to try if none is given."""


@dataclass(frozen=True)
class BandPlan:
    """How one image is decoded or encoded."""

    band_px: int
    """Rows of the image per band."""
    limits: tuple[int, ...]
    """Per layer: rows of a band at its input."""
    pixels: tuple[int, ...]
    """Per layer: pixels of its whole input."""
    keeps: dict[int, int]
    """Per layer with reductions: the layer whose input is kept for the passes after its first one."""
    shape: torch.Size
    """Of the result."""
    peak_bytes: int
    """Upper bound of the bytes alive at once on the device, without weights, the given tensor and the result."""
    recomputed: float
    """FLOPs, relative to one pass without recomputation."""


@dataclass(frozen=True)
class Place:
    """The whole image before one layer."""

    height: int
    pixels: int
    bytes: int
    """Of all paths."""
    reduced: int
    """Bytes of the results of the layer's reductions."""
    flops: int
    """Of the layer and its reductions."""


def choose(
    network: Any, shape: Sequence[int], dtype: torch.dtype, budget: float, band_px: int | None = None
) -> BandPlan:
    """The plan with the least recomputation within ``budget`` bytes; if none fits, the one with the lowest peak.

    Args:
        network: a supported encoder or decoder.
        shape: of its input, ``[B, C, H, W]``.
        dtype: of the activations.
        budget: bytes of device memory, without weights, input and result.
        band_px: rows of the image per band; None tries :data:`BANDS`.

    Raises:
        TypeError: (an UnsupportedError) ``network`` has parts that cannot be computed in bands.
    """
    search = Search(network, shape, dtype)
    found: list[BandPlan] = []
    for rows in BANDS if band_px is None else (band_px,):
        found += search.plans(rows)
        if found[-1].peak_bytes <= budget:
            break  # lower bands recompute no less
    fitting = [one for one in found if one.peak_bytes <= budget]
    return min(fitting, key=lambda one: one.recomputed) if fitting else min(found, key=lambda one: one.peak_bytes)


class Search:
    """All plans for one network and one input."""

    def __init__(self, network: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
        tensors = (*network.parameters(), *network.buffers())
        without_data = {id(t): torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors}
        self.layers = program(copy.deepcopy(network, without_data))
        self.input = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self.places, self.shape = trace(self.layers, self.input)
        # Activations can be kept before layers that only read them: those that wait, enlarge, or start a residual.
        reading = (i for i, one in enumerate(self.layers) if one.reductions or one.upsample > 1 or type(one) is Save)
        self.candidates = [i for i in reading if i > 0]

    def plans(self, band_px: int) -> Iterator[BandPlan]:
        """The plans for one band height, from the least memory to the least recomputation."""
        image = max(self.shape[2], self.input.shape[2])
        limits = tuple(max(1, round(band_px * place.height / image)) for place in self.places)
        pixels = tuple(place.pixels for place in self.places)
        work = self._work(limits)
        for most in sorted({0} | {self.places[i].bytes for i in self.candidates}):
            keeps, peak, flops = self._keep(most, work)
            recomputed = flops / sum(place.flops for place in self.places)
            yield BandPlan(band_px, limits, pixels, keeps, self.shape, peak, recomputed)

    def _keep(self, most: int, work: Sequence[int]) -> tuple[dict[int, int], int, int]:
        """Keep activations of up to ``most`` bytes; returns the plan's keeps, peak bytes and FLOPs."""
        places = self.places
        keeps: dict[int, int] = {}
        start = kept = peak = total = 0
        for i, layer in enumerate([*self.layers, None]):
            passes = 1 if layer is None else len(layer.reductions)
            for _ in range(passes):
                total += sum(place.flops for place in places[start:i])
                alive = max(work[start : i + 1]) + sum(place.reduced for place in places[start : i + 1])
                found = [k for k in self.candidates if start < k <= i and places[k].bytes <= most]
                if layer is not None and found:
                    keeps[i], former = found[-1], kept
                    start, kept = found[-1], places[found[-1]].bytes
                    alive += max(0, former - kept)
                peak = max(peak, kept + alive)
        return keeps, peak, total

    @torch.no_grad()
    def _work(self, limits: Sequence[int]) -> list[int]:
        """Per layer: the most bytes alive while it and its reductions get a band, rows that other layers hold included.

        Three bands are enough: from the second on, every layer holds rows, and the last band is the largest.
        """
        unit = max(1, self.input.shape[2] // self.shape[2])  # rows of the input per row of the result
        given = self.input[:, :, : -(-3 * limits[0] // unit) * unit]
        work = [0] * len(self.layers)

        def measured(source: Stream, i: int) -> Stream:
            for band in source:
                work[i] = max(work[i], live.reset())
                yield band

        with LiveBytes() as live:
            source = bands_of(given, limits[0], given.device, given.dtype)
            for i, layer in enumerate(self.layers):
                for reduction in layer.reductions:
                    reduction.start(self.places[i].pixels)
                source = measured(through([layer], limits[i : i + 1], _reduced(source, layer)), i)
            for band in source:
                band.tensors.clear()
        reduced = sum(place.reduced for place in self.places)
        return [peak - reduced for peak in work]


@torch.no_grad()
def trace(layers: Sequence[Layer], given: Tensor) -> tuple[list[Place], torch.Size]:
    """Pass a whole input through the layers as one band: the places before each layer, and the result's shape."""
    found = []
    band = Band([given], last=True)
    with LiveBytes() as live, FlopCounterMode(display=False) as counter:
        for layer in layers:
            main, flops, alive = band.tensors[0], counter.get_total_flops(), live.now
            height, pixels = main.shape[2], main.shape[2] * main.shape[3]
            size = sum({id(path): path.nbytes for path in band.tensors}.values())
            for reduction in layer.reductions:
                reduction.start(pixels)
                reduction.update(main)
                reduction.finish()
            del main
            reduced = live.now - alive
            (band,) = layer.run(iter([band]))
            found.append(Place(height, pixels, size, reduced, counter.get_total_flops() - flops))
    return found, band.tensors[0].shape


def bands_of(given: Tensor, rows: int, device: torch.device, dtype: torch.dtype) -> Stream:
    """Bands of a tensor ``[B, C, H, W]``, brought to the device one at a time."""
    for start in range(0, given.shape[2], rows):
        piece = given[:, :, start : start + rows].to(device, dtype)
        yield Band([piece.contiguous()], start + rows >= given.shape[2])
        del piece


def through(layers: Sequence[Layer], limits: Sequence[int], source: Stream) -> Stream:
    """Pass bands through layers."""
    for layer, rows in zip(layers, limits, strict=True):
        # Bands grow a little on their way; before a layer that multiplies rows they are split again.
        source = layer.run(split(source, rows) if layer.upsample > 1 else source)
    return source


def _reduced(source: Stream, layer: Layer) -> Stream:
    for band in source:
        for reduction in layer.reductions:
            reduction.update(band.tensors[0])
        yield band

"""Plan where a decode or encode in bands keeps its activations: on the device, on the host, or nowhere.

Each GroupNorm needs a pass over its whole input before its first output. The next pass starts from stored activations,
or computes them again. :class:`Search` finds the fastest choice within a budget by dynamic programming.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F

from tiledcore.vae.attention import KeysAndValues
from tiledcore.vae.bands import Extent, Layer

Kind = Literal["device", "host"]
Kinds = tuple[Kind | None, Kind | None]
BANDS = (512, 256, 128, 64)
"""Band heights in px to try if none is given."""
SLACK = 1.1
"""Estimated peaks are multiplied by this: counted peaks were up to 8 % above the estimate."""


@dataclass(frozen=True)
class BandPlan:
    """How one image is decoded or encoded."""

    band_px: int
    """Rows of the image per band."""
    stores: tuple[Kind | None, ...]
    """Per layer: where its input is kept, or None; the first is the given tensor."""
    peak_bytes: int
    """Estimated bytes alive at once on the device, without weights, the given tensor and the result."""
    seconds: float
    """A rough estimate, to compare plans."""
    recomputed: float
    """FLOPs, relative to one pass without recomputation."""


@dataclass(frozen=True)
class Machine:
    """Speeds for estimates: FLOP/s, bytes/s to the host (0: no host memory), seconds per layer and band."""

    flops: float
    link: float
    overhead: float = 2e-5


@lru_cache
def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure a CUDA device once, with a typical convolution and a copy to pinned memory; fixed values for a CPU."""
    if device.type != "cuda":
        return Machine(5e10, 0.0, 2e-4)
    x, weight = torch.randn(1, 128, 66, 2048, device=device, dtype=dtype), torch.randn(128, 128, 3, 3).to(device, dtype)
    host = torch.empty(x.shape, dtype=dtype, pin_memory=True)

    def seconds(run: Any) -> float:
        run()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            run()
        torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / 5

    with torch.no_grad():
        convolve = seconds(lambda: F.conv2d(x, weight, padding=(0, 1)))
        copy = seconds(lambda: host.copy_(x, non_blocking=True))
    return Machine(2.0 * 64 * 2048 * 128 * 128 * 9 / convolve, x.nbytes / copy)


def extents(layers: Sequence[Layer], shape: Sequence[int]) -> list[Extent]:
    """The extent before each layer and after the last, for an input ``[B, C, H, W]``."""
    found = [Extent(shape[0], (shape[1],), shape[2], shape[3])]
    for layer in layers:
        found.append(layer.after(found[-1]))
    return found


def limits(places: Sequence[Extent], band_px: int) -> list[int]:
    """Rows of a band at each of these places, for bands of ``band_px`` rows of the image."""
    image = max(place.height for place in places)
    return [max(1, round(band_px * place.height / image)) for place in places]


class Search:
    """All plans for one input and one band height.

    Args:
        layers: of the decoder or encoder.
        shape: of the input, ``[B, C, H, W]``.
        item: bytes per element of the activations.
        band_px: rows of the image worked on at once.
        machine: speeds.
    """

    def __init__(self, layers: Sequence[Layer], shape: Sequence[int], item: int, band_px: int, machine: Machine):
        self.layers, self.item, self.band_px, self.machine = layers, item, band_px, machine
        self.places = extents(layers, shape)
        self.limits = limits(self.places, band_px)
        self.end = len(layers)
        self.bands = math.ceil(max(place.height for place in self.places) / band_px)
        self.flops = [layer.flops(place) for layer, place in zip(layers, self.places, strict=False)]
        # FLOPs of the reductions' own layers: once per reduction in every plan.
        self.reduced = [sum(step.flops(at) for step, at in self._through(i)) for i in range(self.end)]
        # Activations can be stored before a reduction, and before a layer that makes them larger.
        self.nodes = [i for i, layer in enumerate(layers) if i > 0 and (layer.reductions or layer.upsample > 1)]

    def plan(self, budget: float) -> BandPlan | None:
        """The fastest plan within ``budget`` bytes, or None if nothing fits."""
        kinds: tuple[Kind, ...] = ("device", "host") if self.machine.link else ("device",)
        # (last stored layer, place) -> (seconds, peak, all stored layers and places)
        best: dict[tuple[int, Kind], tuple[float, int, tuple[tuple[int, Kind], ...]]] = {(0, "device"): (0.0, 0, ())}
        for j in [*self.nodes, self.end]:
            for kind in kinds if j < self.end else kinds[:1]:
                options = []
                for (i, before), (seconds, peak, chain) in best.items():
                    if i < j and (memory := self._memory(i, j, (before, kind))) <= budget:
                        link: tuple[tuple[int, Kind], ...] = (*chain, (j, kind))
                        options.append((seconds + self._seconds(i, j, (before, kind)), max(peak, memory), link))
                if options:
                    best[j, kind] = min(options)
        if (self.end, "device") not in best:
            return None
        seconds, peak, chain = best[self.end, "device"]
        kept = dict(chain[:-1])
        done = sum(sum(self.flops[i:end]) for i, j in pairwise((0, *kept, self.end)) for end in self._passes(i, j))
        recomputed = (done + sum(self.reduced)) / sum(self.flops)
        return BandPlan(self.band_px, tuple(kept.get(i) for i in range(self.end)), peak, seconds, recomputed)

    def least(self) -> int:
        """The smallest budget in bytes for which there is a plan, within 2 %."""
        high = 1 << 20
        while self.plan(high) is None:
            high *= 2
        low = high // 2
        while high > 1.02 * low:
            middle = (low + high) // 2
            low, high = (middle, high) if self.plan(middle) is None else (low, middle)
        return high

    def _through(self, i: int) -> Iterator[tuple[Layer, Extent]]:
        """The layers of the reductions of layer i, and the extent before each."""
        for reduction in self.layers[i].reductions:
            place = replace(self.places[i], channels=self.places[i].channels[:1])
            for step in reduction.through:
                yield step, place
                place = step.after(place)

    def _stored(self, i: int) -> int:
        place = self.places[i]
        return 0 if i == 0 else place.height * place.row() * self.item

    def _passes(self, i: int, j: int) -> list[int]:
        """Where each pass that starts at i ends, if the next stored activations are those at j."""
        found = [i] * max(0, len(self.layers[i].reductions) - 1) if i else [0] * len(self.layers[0].reductions)
        for b in range(i + 1, j):
            found += [b] * len(self.layers[b].reductions)
        return [*found, j]

    def _seconds(self, i: int, j: int, kinds: Kinds) -> float:
        total = sum(self.reduced[i + 1 : j + 1]) / self.machine.flops
        for end in self._passes(i, j):
            moved = self._stored(i) if kinds[0] == "host" else 0
            moved += self._stored(j) if end == j != i and kinds[1] == "host" else 0
            compute = sum(self.flops[i:end]) / self.machine.flops
            overhead = self.machine.overhead * self.bands * (end - i + 1)
            total += max(compute + overhead, moved / self.machine.link if moved else 0.0)
        return total

    def _memory(self, i: int, j: int, kinds: Kinds) -> int:
        """Upper bound of the peak in bytes between the activations stored at i and those at j."""
        work = self._work(i, j)
        before = self._stored(i) if kinds[0] == "device" else 0
        after = self._stored(j) if kinds[1] == "device" and j < self.end else 0
        for place, kind in ((i, kinds[0]), (j, kinds[1])):
            if kind == "host":  # bands that wait for their copy
                work += 3 * self.limits[place] * self.places[place].row() * self.item
        stretch = zip(self.layers[i : j + 1], self.places[i:], strict=False)
        keys = (r.elements(at) for layer, at in stretch for r in layer.reductions if isinstance(r, KeysAndValues))
        return max(before, after) + work + sum(keys) * self.item

    def _work(self, i: int, j: int) -> int:
        held, most, grown = 0, 0, 0
        for k in range(i, j):
            layer, place = self.layers[k], self.places[k]
            if layer.upsample > 1:
                grown = 0  # split again to the limit
            most = max(most, layer.work(place, min(self.limits[k] + grown, place.height)))
            held += layer.held(place)
            grown += layer.delay
        if j < self.end and self.layers[j].reductions:
            # Statistics in half precision use a float32 copy.
            place = self.places[j]
            wide = 3 if self.item == 2 else 1
            most = max(most, (self.limits[j] + grown) * (place.row() + (wide - 1) * place.row(0)))
            for step, at in self._through(j):
                most = max(most, step.work(at, min(self.limits[j] + grown, at.height)))
                held += step.held(at)
                grown += step.delay
        return (held + most) * self.item

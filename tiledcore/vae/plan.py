"""Where the activations of a decode or encode in bands are kept: on the device, on the host, or nowhere.

Each GroupNorm needs a pass over its whole input before its first output. What the next pass starts from is
kept somewhere, or computed again from what was kept before. The plan is the fastest choice that fits a
budget, found by dynamic programming over the layers. The peaks that it compares are estimates; the exact one can be
counted by running the same code on meta tensors, without data.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tiledcore.vae.bands import Extent, Layer
from tiledcore.vae.bands_attention import KeysAndValues

Kind = Literal["device", "host"]
BANDS = (512, 256, 128, 64)  # heights in px that are tried, where none is given
SLACK = 1.1
"""What estimated peaks are multiplied by: where the budget is tight, the count was found up to 8 % above the estimate,
otherwise up to 30 % below it (tests/test_vae.py has some of the cases)."""


@dataclass(frozen=True)
class Plan:
    """How one image is decoded or encoded.

    Attributes:
        band_px: rows of the image that are worked on at once.
        stores: for each layer, where its input is kept, or None; the first is the given tensor.
        peak_bytes: estimate of what is alive at once on the device, without weights, the given tensor and the
            finished image, times :data:`SLACK`.
        seconds: predicted; a guess to compare plans by, not a promise.
        recomputed: FLOPs over those of one pass without recomputation.
    """

    band_px: int
    stores: tuple[Kind | None, ...]
    peak_bytes: int
    seconds: float
    recomputed: float


@dataclass(frozen=True)
class Machine:
    """What predicted times rest on: FLOP/s of a convolution, and bytes/s to the host (0: there is none)."""

    flops: float
    link: float
    overhead: float = 2e-5  # seconds of one layer on one band, whatever its size


@lru_cache
def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure a device once: a convolution of the last level's kind, and a copy to pinned memory."""
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


def extents(layers: Sequence[Layer], given: Extent) -> list[Extent]:
    """The extent before each layer, and after the last."""
    found = [given]
    for layer in layers:
        found.append(layer.after(found[-1]))
    return found


def limits(places: Sequence[Extent], band_px: int) -> list[int]:
    """Rows of a band before each layer and after the last, for bands of so many px of the image."""
    image = max(place.height for place in places)
    return [max(1, round(band_px * place.height / image)) for place in places]


class _Costs:
    """Time and memory of every stretch between two kept activations, for one band height."""

    def __init__(self, layers: Sequence[Layer], given: Extent, item: int, band_px: int, machine: Machine) -> None:
        self.layers, self.item, self.machine = layers, item, machine
        self.places = extents(layers, given)
        self.limits = limits(self.places, band_px)
        self.flops = [layer.flops(place) for layer, place in zip(layers, self.places, strict=False)]
        # What a reduction's own layers do, once for each reduction whatever is kept.
        self.reduced = [sum(step.flops(at) for step, at in self._through(i)) for i in range(len(layers))]
        self.ends = len(layers)
        self.bands = math.ceil(max(place.height for place in self.places) / band_px)
        # A layer that widens its input is one whose input is the smaller thing to keep.
        self.nodes = [i for i, layer in enumerate(layers) if i > 0 and (layer.reductions or layer.upsample > 1)]
        self.kv = [
            (i, r.elements(place) * item)
            for i, (layer, place) in enumerate(zip(layers, self.places, strict=False))
            for r in layer.reductions
            if isinstance(r, KeysAndValues)
        ]

    def _through(self, i: int) -> Iterator[tuple[Layer, Extent]]:
        """The layers of the reductions of layer i, and what comes to each."""
        for reduction in self.layers[i].reductions:
            place = replace(self.places[i], channels=self.places[i].channels[:1])
            for step in reduction.through:
                yield step, place
                place = step.after(place)

    def stored(self, i: int) -> int:
        place = self.places[i]
        return 0 if i == 0 else place.height * place.row() * self.item

    def passes(self, i: int, j: int) -> list[int]:
        """Where each pass that starts at i ends, when the next thing kept is at j."""
        found = [i] * max(0, len(self.layers[i].reductions) - 1) if i else [0] * len(self.layers[0].reductions)
        for b in range(i + 1, j):
            found += [b] * len(self.layers[b].reductions)
        return [*found, j]

    def seconds(self, i: int, j: int, kinds: tuple[Kind | None, Kind | None]) -> float:
        total = sum(self.reduced[i + 1 : j + 1]) / self.machine.flops
        for end in self.passes(i, j):
            moved = (self.stored(i) if kinds[0] == "host" else 0) + (
                self.stored(j) if end == j != i and kinds[1] == "host" else 0
            )
            compute = sum(self.flops[i:end]) / self.machine.flops
            overhead = self.machine.overhead * self.bands * (end - i + 1)
            total += max(compute + overhead, moved / self.machine.link if moved else 0.0)
        return total

    def memory(self, i: int, j: int, kinds: tuple[Kind | None, Kind | None]) -> int:
        """An upper bound of the peak while everything from i up to j is done."""
        work = self._work(i, j)
        before = self.stored(i) if kinds[0] == "device" else 0
        after = self.stored(j) if kinds[1] == "device" and j < self.ends else 0
        # Bands wait for their copy on either side.
        for place, kind in ((i, kinds[0]), (j, kinds[1])):
            if kind == "host":
                work += 3 * self.limits[place] * self.places[place].row() * self.item
        keys = sum(size for place, size in self.kv if i <= place <= j)
        return max(before, after) + work + keys

    def _work(self, i: int, j: int) -> int:
        held, most, grown = 0, 0, 0
        for k in range(i, j):
            layer, place = self.layers[k], self.places[k]
            if layer.upsample > 1:
                grown = 0  # cut to the limit again
            most = max(most, layer.work(place, min(self.limits[k] + grown, place.height)))
            held += layer.held(place)
            grown += layer.delay
        if j < self.ends and self.layers[j].reductions:
            # Statistics of half precision are taken of a copy in float32.
            place = self.places[j]
            wide = 3 if self.item == 2 else 1
            most = max(most, (self.limits[j] + grown) * (place.row() + (wide - 1) * place.row(0)))
            for step, at in self._through(j):
                most = max(most, step.work(at, min(self.limits[j] + grown, at.height)))
                held += step.held(at)
                grown += step.delay
        return (held + most) * self.item


def choose(
    layers: Sequence[Layer], given: Extent, item: int, band_px: int, budget: float, machine: Machine
) -> tuple[tuple[Kind | None, ...], float, int] | None:
    """The fastest stores within a budget: (stores, seconds, bytes), or None where nothing fits."""
    costs = _Costs(layers, given, item, band_px, machine)
    kinds: tuple[Kind, ...] = ("device", "host") if machine.link else ("device",)
    best: dict[tuple[int, Kind], tuple[float, int, tuple[tuple[int, Kind], ...]]] = {(0, "device"): (0.0, 0, ())}
    for j in [*costs.nodes, costs.ends]:
        for kind in kinds if j < costs.ends else kinds[:1]:
            options = []
            for (i, before), (seconds, peak, chain) in best.items():
                if i >= j:
                    continue
                pair = (before, kind)
                memory = costs.memory(i, j, pair)
                if memory <= budget:
                    link: tuple[tuple[int, Kind], ...] = (*chain, (j, kind))
                    options.append((seconds + costs.seconds(i, j, pair), max(peak, memory), link))
            if options:
                best[j, kind] = min(options)
    if (costs.ends, "device") not in best:
        return None
    seconds, peak, chain = best[costs.ends, "device"]
    stores: list[Kind | None] = [None] * len(layers)
    for place, kind in chain[:-1]:
        stores[place] = kind
    return tuple(stores), seconds, peak


def least(layers: Sequence[Layer], given: Extent, item: int, band_px: int, machine: Machine) -> int:
    """The smallest budget that :func:`choose` finds a plan for, to 2 %, in bytes."""
    high = 1 << 20
    while choose(layers, given, item, band_px, high, machine) is None:
        high *= 2
    low = high // 2
    while high > 1.02 * low:
        middle = (low + high) // 2
        if choose(layers, given, item, band_px, middle, machine) is None:
            low = middle
        else:
            high = middle
    return high


def recomputed(layers: Sequence[Layer], given: Extent, stores: Sequence[Kind | None]) -> float:
    """FLOPs that a plan takes over those of each layer once."""
    costs = _Costs(layers, given, 1, 64, Machine(1.0, 0.0))
    kept = [0, *(i for i, kind in enumerate(stores) if kind), costs.ends]
    done = sum(sum(costs.flops[i:end]) for i, j in pairwise(kept) for end in costs.passes(i, j))
    return (done + sum(costs.reduced)) / sum(costs.flops)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive, views once; ``peak`` is the most.

    Args:
        device: only tensors of this type of device count; None counts all.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self._users: dict[int, tuple[int, int]] = {}  # storage -> (tensors that use it, bytes)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {id(a) for a in args if isinstance(a, torch.Tensor)}
        given_storages = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in given:
                self._count(tensor, given_storages)
        return result

    def _count(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._users:
            # A view of what was there before this began is nobody's news.
            if key in given or (self.device and tensor.device.type != self.device):
                return
            self._users[key] = (0, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        users, size = self._users[key]
        self._users[key] = (users + 1, size)
        weakref.finalize(tensor, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        users, size = self._users.pop(key)
        if users > 1:
            self._users[key] = (users - 1, size)
        else:
            self.live -= size

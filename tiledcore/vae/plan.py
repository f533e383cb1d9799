"""Plan a decode or encode in bands: its layers, how high the bands are, which activations are kept between passes.

Each reduction (a GroupNorm's statistics, an attention's keys) needs a pass over its layer's input before the layer's
first output. The next pass starts from kept activations, or from earlier ones and computes again. Shapes, FLOPs and
bytes are measured on tensors of torch's meta device, which have no data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_dc, vae
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tiledcore._diffusers import has_hooks
from tiledcore.vae import dc, kl
from tiledcore.vae.bands import Band, Layer, Save, Stream, UnsupportedError, known, split
from tiledcore.vae.live_bytes import LiveBytes

BANDS = (512, 256, 128, 64)  # heights in px to try if none is given
_LAYERS: dict[type, Callable[[Any], list[Layer]]] = {
    vae.Decoder: kl.decoder,
    vae.Encoder: kl.encoder,
    vae.DecoderTiny: kl.tiny,
    vae.EncoderTiny: kl.tiny,
    autoencoder_dc.Decoder: dc.decoder,
    autoencoder_dc.Encoder: dc.encoder,
}


def program(network: Any) -> list[Layer]:
    """The layers of ``vae.decoder`` or ``vae.encoder``; an UnsupportedError says why it cannot run in bands."""
    for name, module in network.named_modules():
        if name and has_hooks(module):
            raise UnsupportedError(f"{name} has a hook (sequential or group offload?), which bands would pass by")
    return _LAYERS[type(known(network, *_LAYERS))](network)


@dataclass(frozen=True)
class BandPlan:
    """How one image is decoded or encoded."""

    band_px: int  # rows of the image per band
    limits: tuple[int, ...]  # per layer: rows of a band at its input
    pixels: tuple[int, ...]  # per layer: pixels of its whole input
    keeps: dict[int, int]  # per layer that reduces: the layer whose input is kept for the passes after its own
    peak_bytes: int  # at most so many are alive at once on the device, without weights, the given tensor and the result
    recomputed: float  # FLOPs, relative to one pass without recomputation


@dataclass
class Place:
    """What one layer got and needed while bands went through it."""

    height: int = 0
    pixels: int = 0
    bytes: int = 0  # of its input, main path and residual
    reduced: int = 0  # bytes of the result of its reduction
    flops: int = 0  # of the layer and its reduction, if it made one band of each
    peak: int = 0  # most bytes alive until its next band was there, rows that other layers hold included


def choose(network: Any, shape: Sequence[int], budget: float, band_px: int | None = None) -> BandPlan:
    """The plan with the least recomputation within ``budget`` bytes; if none fits, the one with the lowest peak.

    ``shape`` is that of the network's input, ``[B, C, H, W]``; weights, input and result are not in the budget.
    ``band_px`` is rows of the image per band; None tries several.
    """
    tensors = (*network.parameters(), *network.buffers())
    without_data = {id(t): torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors}
    layers = [*program(copy.deepcopy(network, without_data)), Layer()]  # the last one stands for the result
    given = torch.empty(tuple(shape), dtype=tensors[0].dtype, device="meta")
    whole = measured(layers, given, [2**62] * len(layers))
    pixels, flops = tuple(place.pixels for place in whole), sum(place.flops for place in whole)
    height, unit = max(given.shape[2], whole[-1].height), max(1, given.shape[2] // whole[-1].height)
    # Activations can be kept before layers that only read them: those that wait, enlarge, or start a residual.
    reading = (i for i, one in enumerate(layers) if one.reduces or one.upsample > 1 or type(one) is Save)
    candidates = {i: whole[i].bytes for i in reading if i > 0}
    found: list[BandPlan] = []
    for rows in BANDS if band_px is None else (band_px,):
        limits = tuple(max(1, round(rows * place.height / height)) for place in whole)
        # Three bands are enough: from the second on, every layer holds rows, and the last band is the largest.
        part = given[:, :, : -(-3 * limits[0] // unit) * unit]
        work = [place.peak - sum(one.reduced for one in whole) for place in measured(layers, part, limits, pixels)]
        for most in sorted({0, *candidates.values()}):  # from the least memory to the least recomputation
            keeps, peak, total = keep(layers, whole, work, [i for i, size in candidates.items() if size <= most])
            found.append(BandPlan(rows, limits, pixels, keeps, peak, total / flops))
        if found[-1].peak_bytes <= budget:
            break  # lower bands recompute no less
    fitting = [one for one in found if one.peak_bytes <= budget]
    return min(fitting, key=lambda one: one.recomputed) if fitting else min(found, key=lambda one: one.peak_bytes)


def keep(
    layers: Sequence[Layer], whole: Sequence[Place], work: Sequence[int], candidates: Sequence[int]
) -> tuple[dict[int, int], int, int]:
    """Keep activations before the latest candidate at each pass; returns the plan's keeps, peak bytes and FLOPs."""
    keeps: dict[int, int] = {}
    start = kept = peak = total = 0
    for i, layer in enumerate(layers):
        result = i == len(layers) - 1
        if not layer.reduces and not result:
            continue
        total += sum(place.flops for place in whole[start:i])
        alive = max(work[start : i + 1]) + sum(place.reduced for place in whole[start : i + 1])
        found = [k for k in candidates if start < k <= i]
        if found and not result:
            keeps[i], former = found[-1], kept
            start, kept = found[-1], whole[found[-1]].bytes
            alive += max(0, former - kept)
        peak = max(peak, kept + alive)
    return keeps, peak, total


@torch.no_grad()
def measured(
    layers: Sequence[Layer], given: Tensor, limits: Sequence[int], pixels: Sequence[int] | None = None
) -> list[Place]:
    """What the layers need for a tensor in bands, which may be a part of an image whose layers get ``pixels``."""
    places = [Place() for _ in layers]

    def entering(source: Stream, i: int) -> Stream:
        place = places[i]
        for band in source:
            main, alive = band.tensors[0], live.now
            first, here = place.height == 0, main.shape[2] * main.shape[3]
            place.height += main.shape[2]
            place.pixels += here
            place.bytes += sum({id(path): path.nbytes for path in band.tensors}.values())
            place.flops -= counter.get_total_flops()
            if layers[i].reduces:
                if first:
                    layers[i].start(here if pixels is None else pixels[i])
                layers[i].update(main)
                if band.last:
                    layers[i].finish()
            del main
            place.reduced += live.now - alive
            yield band

    def leaving(source: Stream, place: Place) -> Stream:
        for band in source:
            place.flops += counter.get_total_flops()
            place.peak = max(place.peak, live.reset())
            yield band

    with LiveBytes(meta=True) as live, FlopCounterMode(display=False) as counter:
        source = bands_of(given, limits[0], given.device, given.dtype)
        for i, layer in enumerate(layers):
            source = leaving(through([layer], limits[i : i + 1], entering(source, i)), places[i])
        for band in source:
            band.tensors.clear()
    return places


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

"""Decode and encode images of any size exactly, in bands of rows.

The result equals ``vae.decode`` and ``vae.encode`` up to rounding: convolutions see the rows beside their band, and
GroupNorm and attention use the whole image.

Each reduction (a GroupNorm's statistics, an attention's keys) needs a pass over its layer's input before the layer's
first output. The next pass starts from kept activations, or from earlier ones and computes again. A plan says how high
the bands are and what is kept; its shapes, FLOPs and bytes are measured on torch's meta device, which has no data.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tiledcore.utils import replaced
from tiledcore.vae.bands import Band, Layer, Save, Stream, UnsupportedError, split
from tiledcore.vae.layers import program
from tiledcore.vae.live_bytes import LiveBytes

CPU_EXACT_PIXELS = 4096 * 4096  # there the middle block's attention is 3.5e13 FLOP; it grows with the square
BANDS = (512, 256, 128, 64)  # heights in px to try if none is given


def why_not_exact(vae: Any, pixels: int = 0) -> str | None:
    """Why an image of this size cannot go through an autoencoder in exact bands, or None if it can."""
    if type(vae) not in (AutoencoderKL, AutoencoderTiny, AutoencoderDC):
        return f"{type(vae).__name__} is none of AutoencoderKL, AutoencoderTiny and AutoencoderDC"
    try:
        program(vae.decoder)
        program(vae.encoder)
    except UnsupportedError as error:
        return str(error)
    attends = getattr(vae.config, "mid_block_add_attention", False)
    if attends and vae.device.type == "cpu" and pixels > CPU_EXACT_PIXELS:
        return "its attention between all pixels would take a CPU hours"
    return None


def joined(rows: Iterator[Tensor], height: int) -> Tensor:
    """An image of ``height`` rows; ``torch.cat`` would hold it twice."""
    image, top = torch.empty(0), 0
    for band in rows:
        image = image if top else band.new_empty(*band.shape[:2], height, band.shape[3])
        image[:, :, top : top + band.shape[2]] = band
        top += band.shape[2]
        del band
    return image


def rows_of(network: Any, given: Tensor, band_px: int | None = None, budget: float | None = None) -> Iterator[Tensor]:
    """The finished rows of the result, top to bottom; the whole image is never in memory.

    Args:
        network: a supported ``vae.decoder`` or ``vae.encoder``, in eval mode.
        given: its input ``[B, C, h, w]``; any device and floating dtype.
        band_px: rows of the image per band; None: as many as fit.
        budget: bytes of device memory, without weights and ``given``; None: most of the free memory.

    Yields:
        ``[B, C', rows, W]`` with the dtype and device of ``network``, without a gradient. The heights vary.

    Raises:
        TypeError: ``network`` is not supported.
        ValueError: nothing fits ``budget``; raised at the call.
    """
    return run(network, given, plan(network, given, band_px, budget))


@contextmanager
def exact_bands(
    vae: Any,
    larger_than: int = 0,
    band_px: int | None = None,
    budget: float | None = None,
    decode: Callable[..., Iterator[Tensor]] = rows_of,
    collect: Callable[[Iterator[Tensor], int], Tensor] = joined,
) -> Iterator[None]:
    """Inside the ``with`` block, ``vae.decode`` and ``vae.encode`` run in exact bands.

    Only the forward of encoder and decoder is replaced: slicing, offload and output classes are diffusers' own.

    Args:
        vae: a supported autoencoder.
        larger_than: images of up to this many pixels are not split.
        band_px, budget: see :func:`rows_of`.
        decode: stands in for :func:`rows_of` where several processes decode.
        collect: makes the image of the decoded rows and its height, or what stands for it.

    Raises:
        TypeError: ``vae`` is not supported.
    """

    def banded(network: Any, rows: Callable[..., Iterator[Tensor]], collect: Callable[..., Tensor]) -> Any:
        original, enlarged = network.forward, math.prod(layer.upsample for layer in program(network))

        def forward(sample: Tensor) -> Tensor:
            height, width = (side * enlarged for side in sample.shape[2:])
            if height * width <= larger_than:
                return original(sample)
            return collect(rows(network, sample, band_px, budget), height)

        return forward

    decoder = banded(vae.decoder, decode, collect)
    encoder = banded(vae.encoder, rows_of, lambda rows, _: torch.cat(list(rows), 2))  # latents are small
    with replaced(vae.decoder, forward=decoder), replaced(vae.encoder, forward=encoder):
        yield


@dataclass(frozen=True)
class BandPlan:
    """How one image is decoded or encoded."""

    band_px: int  # rows of the image per band
    limits: tuple[int, ...]  # per layer: rows of a band at its input
    pixels: tuple[int, ...]  # per layer: pixels of its whole input
    keeps: dict[int, int]  # per layer that reduces: the layer whose input is kept for the passes after its own
    peak_bytes: int  # at most so many are alive at once on the device, without weights, the given tensor and the result
    recomputed: float  # FLOPs, relative to one pass without recomputation


def plan(network: Any, given: Tensor, band_px: int | None = None, budget: float | None = None) -> BandPlan:
    """How to run ``vae.decoder`` or ``vae.encoder`` on a tensor. Arguments and errors as for :func:`rows_of`."""
    limit = _free_bytes(next(network.parameters()).device) if budget is None else budget
    chosen = choose(network, given.shape, limit, band_px)
    if chosen.peak_bytes > limit:
        raise ValueError(
            f"budget={limit:,} bytes do not hold an input of {tuple(given.shape)} in bands of {chosen.band_px} px; "
            f"{chosen.peak_bytes:,} would"
        )
    return chosen


def _free_bytes(device: torch.device) -> float:
    """Most of the memory that is free on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return 0.85 * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "cpu":
        return 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


@torch.no_grad()
def run(network: Any, given: Tensor, plan: BandPlan, changed: list[Layer] | None = None) -> Iterator[Tensor]:
    """All rows of the result, top to bottom; ``changed``: layers that stand in for the network's, and are used up."""
    layers, limits = changed or program(network), plan.limits
    weight = next(network.parameters())
    kept, start = _bands(given, limits[0]), 0  # the activations before this layer

    for i, layer in enumerate(layers):
        if not layer.reduces:
            continue
        place, stored = max(start, plan.keeps.get(i, 0)), list[Band]()
        moves = place > start  # this pass stores the activations that the next ones start from
        layer.start(plan.pixels[i])
        source = split(_read(kept, weight, consume=moves), limits[start])
        if moves:
            source = _stored(through(layers, limits, source, start, place), stored)
        for band in through(layers, limits, source, place, i):
            layer.update(band.tensors[0])
            band.tensors.clear()
        layer.finish()
        if moves:
            kept, start = stored, place
            layers[:place] = [Layer()] * place  # no pass goes through these again: frees their keys and values
    source = split(_read(kept, weight, consume=True), limits[start])
    for band in through(layers, limits, source, start, len(layers)):
        yield band.tensors.pop()


def _bands(given: Tensor, rows: int) -> list[Band]:
    """Bands of a tensor ``[B, C, H, W]``."""
    pieces = given.split(rows, 2)
    return [Band([piece], i == len(pieces)) for i, piece in enumerate(pieces, 1)]


def _read(bands: list[Band], like: Tensor, consume: bool) -> Stream:
    """Kept bands, on the device of ``like`` and in its dtype; with ``consume`` each is freed after it was read."""
    for band in bands:
        again = Band([tensor.to(like.device, like.dtype) for tensor in band.tensors], band.last)
        if consume:
            band.tensors.clear()
        yield again


def _stored(source: Stream, bands: list[Band]) -> Stream:
    for band in source:
        bands.append(Band(list(band.tensors), band.last))
        yield band


def through(layers: Sequence[Layer], limits: Sequence[int], source: Stream, start: int, end: int) -> Stream:
    """Pass bands through some of the layers."""
    for layer, rows in zip(layers[start:end], limits[start:end], strict=True):
        # Bands grow a little on their way; before a layer that multiplies rows they are split again.
        source = layer.run(split(source, rows) if layer.upsample > 1 else source)
    return source


@dataclass
class _Place:
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
    whole = _measured(layers, given, [2**62] * len(layers))
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
        work = [place.peak - sum(one.reduced for one in whole) for place in _measured(layers, part, limits, pixels)]
        for most in sorted({0, *candidates.values()}):  # from the least memory to the least recomputation
            keeps, peak, total = _keep(layers, whole, work, [i for i, size in candidates.items() if size <= most])
            found.append(BandPlan(rows, limits, pixels, keeps, peak, total / flops))
        if found[-1].peak_bytes <= budget:
            break  # lower bands recompute no less
    fitting = [one for one in found if one.peak_bytes <= budget]
    return min(fitting, key=lambda one: one.recomputed) if fitting else min(found, key=lambda one: one.peak_bytes)


def _keep(
    layers: Sequence[Layer], whole: Sequence[_Place], work: Sequence[int], candidates: Sequence[int]
) -> tuple[dict[int, int], int, int]:
    """Keep activations before the latest candidate at each pass; returns the plan's keeps, peak bytes and FLOPs."""
    keeps: dict[int, int] = {}
    start = kept = peak = total = 0
    for i in (i for i, layer in enumerate(layers) if layer.reduces or i == len(layers) - 1):
        total += sum(place.flops for place in whole[start:i])
        alive = max(work[start : i + 1]) + sum(place.reduced for place in whole[start : i + 1])
        former, latest = kept, max((k for k in candidates if start < k <= i), default=0)
        if latest and layers[i].reduces:
            keeps[i] = start = latest
            kept = whole[latest].bytes
        peak = max(peak, alive + max(former, kept))
    return keeps, peak, total


@torch.no_grad()
def _measured(
    layers: Sequence[Layer], given: Tensor, limits: Sequence[int], pixels: Sequence[int] | None = None
) -> list[_Place]:
    """What the layers need for a tensor in bands, which may be a part of an image whose layers get ``pixels``."""
    places = [_Place() for _ in layers]

    def entering(source: Stream, i: int) -> Stream:
        layer, place = layers[i], places[i]
        for band in source:
            main, alive = band.tensors[0], live.now
            first, here = place.height == 0, main.shape[2] * main.shape[3]
            place.height += main.shape[2]
            place.pixels += here
            place.bytes += sum({id(path): path.nbytes for path in band.tensors}.values())
            place.flops -= counter.get_total_flops()
            if layer.reduces:
                if first:
                    layer.start(here if pixels is None else pixels[i])
                layer.update(main)
                if band.last:
                    layer.finish()
            del main
            place.reduced += live.now - alive
            yield band

    def leaving(source: Stream, place: _Place) -> Stream:
        for band in source:
            place.flops += counter.get_total_flops()
            place.peak = max(place.peak, live.reset())
            yield band

    with LiveBytes(meta=True) as live, FlopCounterMode(display=False) as counter:
        source = _read(_bands(given, limits[0]), given, consume=True)
        for i, place in enumerate(places):
            source = leaving(through(layers, limits, entering(source, i), i, i + 1), place)
        for band in source:
            band.tensors.clear()
    return places

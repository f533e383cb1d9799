"""Decode and encode images of any size exactly, in bands of rows.

The result equals ``vae.decode`` and ``vae.encode`` up to rounding: convolutions see the rows beside their band, and
GroupNorm and attention use the whole image.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from torch import Tensor

from tiledcore.utils import replaced
from tiledcore.vae.bands import Band, Layer, Stream, UnsupportedError, split
from tiledcore.vae.plan import BandPlan, bands_of, choose, program, through

logger = logging.getLogger(__name__)

CPU_EXACT_PIXELS = 4096 * 4096  # there the middle block's attention is 3.5e13 FLOP; it grows with the square


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


Rows = Callable[[Any, Tensor, int | None, float | None], Iterator[Tensor]]
"""``(network, input, band_px, budget)`` -> the rows of its result, see :func:`rows_of`."""


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
    decode: Rows = rows_of,
    collect: Callable[[Iterator[Tensor], int], Tensor] = joined,
) -> Iterator[None]:
    """Inside the ``with`` block, ``vae.decode`` and ``vae.encode`` run in exact bands.

    Only the forward of encoder and decoder is replaced: slicing, offload and output classes are diffusers' own.

    Args:
        vae: a supported autoencoder.
        larger_than: images of up to this many pixels are not split.
        band_px, budget: see :func:`rows_of`.
        decode: runs the decoder; several processes have one of their own.
        collect: makes the image of the decoded rows and its height, or what stands for it.

    Raises:
        TypeError: ``vae`` is not supported.
    """

    def banded(network: Any, rows: Rows, collect: Callable[[Iterator[Tensor], int], Tensor]) -> Any:
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


def plan(network: Any, given: Tensor, band_px: int | None = None, budget: float | None = None) -> BandPlan:
    """How to run ``vae.decoder`` or ``vae.encoder`` on a tensor. Arguments and errors as for :func:`rows_of`."""
    weight = next(network.parameters())
    limit = _free_bytes(weight.device) if budget is None else budget
    chosen = choose(network, given.shape, limit, band_px)
    if chosen.peak_bytes > limit:
        raise ValueError(
            f"budget={limit:,} bytes do not hold an input of {tuple(given.shape)} in bands of {chosen.band_px} px; "
            f"{chosen.peak_bytes:,} would"
        )
    logger.debug("%s of %s: %s", type(network).__name__, tuple(given.shape), chosen)
    return chosen


def _free_bytes(device: torch.device) -> float:
    """Most of the memory that is free on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.85 * (free + cached)
    if device.type == "cpu":
        return 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


@torch.no_grad()
def run(network: Any, given: Tensor, plan: BandPlan, changed: list[Layer] | None = None) -> Iterator[Tensor]:
    """All rows of the result, top to bottom; ``changed``: layers that stand in for the network's, and are used up."""
    layers, limits = changed or program(network), plan.limits
    weight = next(network.parameters())
    kept: list[Band] | None = None
    start = 0

    def stream(end: int, consume: bool) -> Stream:
        if kept is None:
            source = bands_of(given, limits[0], weight.device, weight.dtype)
        else:
            source = split(_read(kept, consume), limits[start])
        return through(layers[start:end], limits[start:end], source)

    for i, layer in enumerate(layers):
        if not layer.reduces:
            continue
        place = plan.keeps.get(i, 0)
        moves = place > start  # this pass stores the activations that the next ones start from
        layer.start(plan.pixels[i])
        source, stored = stream(place if moves else i, consume=moves), list[Band]()
        if moves:
            source = through(layers[place:i], limits[place:i], _stored(source, stored))
        for band in source:
            layer.update(band.tensors[0])
            band.tensors.clear()
        layer.finish()
        if moves:
            kept, start = stored, place
            layers[:place] = [Layer()] * place  # no pass goes through these again: frees their keys and values
    for band in stream(len(layers), consume=True):
        yield band.tensors.pop()


def _stored(source: Stream, bands: list[Band]) -> Stream:
    for band in source:
        bands.append(Band(list(band.tensors), band.last))
        yield band


def _read(bands: list[Band], consume: bool) -> Stream:
    """Kept bands; with ``consume`` each is freed after it was read."""
    for band in bands:
        again = Band(list(band.tensors), band.last)
        if consume:
            band.tensors.clear()
        yield again

"""Decode and encode images of any size exactly, in bands of rows.

The result equals ``vae.decode`` and ``vae.encode`` up to rounding: convolutions see the rows beside their band, and
GroupNorm and attention use the whole image.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from tiledcore._diffusers import onload
from tiledcore.utils import replaced
from tiledcore.vae.bands import Band, Layer, Stream, split
from tiledcore.vae.plan import BandPlan, bands_of, choose, through
from tiledcore.vae.program import program, unsupported

logger = logging.getLogger(__name__)
T = TypeVar("T")

CPU_EXACT_PIXELS = 4096 * 4096
"""The cost of the middle block's attention grows with the square of the pixels: 3.5e13 FLOP at 4096x4096."""


def why_not_exact(vae: Any, pixels: int) -> str | None:
    """Why an image of this size cannot go through an autoencoder in exact bands, or None if it can."""
    if (reason := unsupported(vae)) is not None:
        return reason
    attends = getattr(vae.config, "mid_block_add_attention", False)
    if attends and vae.device.type == "cpu" and pixels > CPU_EXACT_PIXELS:
        return "its attention between all pixels would take a CPU hours"
    return None


Run = Callable[[Any, Tensor, int | None, float | None], T]  # ``(decoder, latents, band_px, budget)``


@torch.no_grad()
def decode_rows(
    vae: Any,
    latents: Tensor,
    band_px: int | None = None,
    budget: float | None = None,
    decode: Run[Iterator[Tensor]] | None = None,
) -> Iterator[Tensor]:
    """Decode an image and yield its finished rows, top to bottom; the whole image is never in memory.

    Args:
        vae: a supported autoencoder (see :func:`unsupported`), in eval mode.
        latents: ``[B, C, h, w]``, scaled and shifted as for ``vae.decode``; any device and floating dtype.
        band_px: rows of the image per band; None: as many as fit.
        budget: bytes of device memory, without weights and latents; None: most of the free memory.
        decode: how several processes run the decoder; None: there is one.

    Yields:
        ``[B, 3, rows, W]`` with the dtype and device of ``vae``, without a gradient. The heights vary.

    Raises:
        TypeError: ``vae`` is not supported.
        ValueError: nothing fits ``budget``; raised at the call.
    """
    onload(vae)
    latents = latents.to(vae.device, vae.dtype)
    if (beside := getattr(vae, "post_quant_conv", None)) is not None:
        latents = beside(latents)
    if decode is not None:
        return decode(vae.decoder, latents, band_px, budget)
    return run(vae.decoder, latents, plan(vae.decoder, latents, band_px, budget))


@contextmanager
def exact_bands(
    vae: Any,
    larger_than: int = 0,
    band_px: int | None = None,
    budget: float | None = None,
    decode: Run[Tensor] | None = None,
) -> Iterator[None]:
    """Inside the ``with`` block, ``vae.decode`` and ``vae.encode`` run in exact bands.

    Only the forward of encoder and decoder is replaced: slicing, offload and output classes are diffusers' own.

    Args:
        vae: a supported autoencoder.
        larger_than: images of up to this many pixels are not split.
        band_px: see :func:`decode_rows`.
        budget: see :func:`decode_rows`.
        decode: see :func:`decode_rows`.

    Raises:
        TypeError: ``vae`` is not supported.
    """

    def banded(network: Any, shared: Run[Tensor] | None = None) -> Any:
        original, enlarged = network.forward, math.prod(layer.upsample for layer in program(network))

        def forward(sample: Tensor) -> Tensor:
            if sample.shape[2] * sample.shape[3] * enlarged**2 <= larger_than:
                return original(sample)
            if shared is not None:
                return shared(network, sample, band_px, budget)
            chosen = plan(network, sample, band_px, budget)
            return joined_rows(run(network, sample, chosen), chosen.shape[2])

        return forward

    with replaced(vae.decoder, forward=banded(vae.decoder, decode)), replaced(vae.encoder, forward=banded(vae.encoder)):
        yield


def plan(network: Any, given: Tensor, band_px: int | None = None, budget: float | None = None) -> BandPlan:
    """How to run ``vae.decoder`` or ``vae.encoder`` on a tensor. Arguments and errors as for :func:`decode_rows`."""
    weight = next(network.parameters())
    limit = _free_bytes(weight.device) if budget is None else budget
    chosen = choose(network, given.shape, weight.dtype, limit, band_px)
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


def joined_rows(rows: Iterator[Tensor], height: int) -> Tensor:
    """Bands of an image as one tensor."""
    image: Tensor | None = None
    filled = 0
    for band in rows:
        if image is None:
            image = band.new_empty(*band.shape[:2], height, band.shape[3])
        image[:, :, filled : filled + band.shape[2]] = band
        filled += band.shape[2]
        del band
    assert image is not None and filled == height
    return image


@torch.no_grad()
def run(network: Any, given: Tensor, plan: BandPlan, changed: Sequence[Layer] | None = None) -> Iterator[Tensor]:
    """All rows of the result, top to bottom; ``changed``: layers that stand in for the network's."""
    layers, limits = changed or program(network), plan.limits
    weight = next(network.parameters())
    kept: deque[Band] | None = None
    start = 0

    def stream(end: int, consume: bool) -> Stream:
        if kept is None:
            source = bands_of(given, limits[0], weight.device, weight.dtype)
        else:
            source = _read(kept, limits[start], consume)
        return through(layers[start:end], limits[start:end], source)

    for i, layer in enumerate(layers):
        for reduction in layer.reductions:
            place = plan.keeps.get(i, 0)
            moves = place > start  # this pass stores the activations that the next ones start from
            reduction.start(plan.pixels[i])
            source, stored = stream(place if moves else i, consume=moves), deque[Band]()
            if moves:
                source = through(layers[place:i], limits[place:i], _keep(source, stored))
            for band in source:
                reduction.update(band.tensors[0])
                band.tensors.clear()
            reduction.finish()
            if moves:
                kept, start = stored, place
                _free(layers[:place])
    for band in stream(len(layers), consume=True):
        yield band.tensors.pop()
    _free(layers)


def _keep(source: Stream, bands: deque[Band]) -> Stream:
    for band in source:
        bands.append(Band(list(band.tensors), band.last))
        yield band


def _read(bands: deque[Band], rows: int, consume: bool) -> Stream:
    """Kept bands in pieces of at most ``rows`` rows; with ``consume`` each is freed after it was read."""
    for _ in range(len(bands)):
        band = bands.popleft()
        if not consume:
            bands.append(Band(list(band.tensors), band.last))
        yield from split(iter([band]), rows)


def _free(layers: Sequence[Layer]) -> None:
    for layer in layers:
        for reduction in layer.reductions:
            reduction.free()

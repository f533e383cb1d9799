"""Decode and encode images of any size exactly, in bands of rows.

The result equals ``vae.decode`` and ``vae.encode`` up to rounding: convolutions see the rows beside their band, and
GroupNorm and attention use the whole image.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from tiledcore import validate
from tiledcore._diffusers import onload
from tiledcore.utils import replaced
from tiledcore.vae import plan as vae_plan
from tiledcore.vae.bands import Conv, Layer, Reduction, Stream, split
from tiledcore.vae.live_bytes import LiveBytes
from tiledcore.vae.plan import BandPlan, Kind, Search, extents
from tiledcore.vae.program import program, unsupported
from tiledcore.vae.stores import Given, OnDevice, OnHost

logger = logging.getLogger(__name__)

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


def decode_rows(vae: Any, latents: Tensor, band_px: int | None = None, budget: float | None = None) -> Iterator[Tensor]:
    """Decode an image and yield its finished rows, top to bottom; the whole image is never in memory.

    Args:
        vae: a supported autoencoder (see :func:`unsupported`), in eval mode.
        latents: ``[B, C, h, w]``, scaled and shifted as for ``vae.decode``; any device and floating dtype.
        band_px: rows of the image per band; None: as many as fit.
        budget: bytes of device memory, without weights and latents; None: most of the free memory.

    Yields:
        ``[B, 3, rows, W]`` with the dtype and device of ``vae``, without a gradient. The heights vary.

    Raises:
        TypeError: ``latents`` is not a tensor of floats, or ``vae`` is not supported.
        ValueError: an argument is not valid, or nothing fits ``budget``; raised at the call.
    """
    return _start(vae, latents, "decode", band_px, budget)[0]


def decode(vae: Any, latents: Tensor, band_px: int | None = None, budget: float | None = None) -> Tensor:
    """``vae.decode(latents).sample`` in bands: ``[B, 3, H, W]``. Arguments and errors as for :func:`decode_rows`."""
    return _whole(*_start(vae, latents, "decode", band_px, budget), latents)


def encode(vae: Any, images: Tensor, band_px: int | None = None, budget: float | None = None) -> Any:
    """``vae.encode(images)`` in bands, with the same output class.

    Args:
        vae: as for :func:`decode_rows`; so are ``band_px``, ``budget`` and the errors.
        images: ``[B, 3, H, W]`` in [-1, 1], on any device.
    """
    moments = _whole(*_start(vae, images, "encode", band_px, budget), images)
    if type(vae) is AutoencoderTiny:
        return AutoencoderTinyOutput(latents=moments)
    if type(vae) is AutoencoderDC:
        return EncoderOutput(latent=moments)
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))


@contextmanager
def exact_bands(
    vae: Any, larger_than: int = 0, band_px: int | None = None, budget: float | None = None
) -> Iterator[None]:
    """Inside the ``with`` block, ``vae.decode`` and ``vae.encode`` run in exact bands.

    Only the forward of encoder and decoder is replaced: slicing, offload and output classes are diffusers' own.

    Args:
        vae: a supported autoencoder.
        larger_than: images of up to this many pixels are not split.
        band_px: see :func:`decode_rows`.
        budget: see :func:`decode_rows`.

    Raises:
        TypeError: ``vae`` is not supported.
    """
    program(vae, "decode")

    def replacement(direction: str, original: Any) -> Any:
        def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            height, width = sample.shape[2:]
            if direction == "decode":
                image = extents(program(vae, direction, whole=False), sample.shape)[-1]
                height, width = image.height, image.width
            if height * width <= larger_than or args or kwargs:
                return original(sample, *args, **kwargs)
            return _whole(*_start(vae, sample, direction, band_px, budget, whole=False), sample)

        return forward

    decode, encode = replacement("decode", vae.decoder.forward), replacement("encode", vae.encoder.forward)
    with replaced(vae.decoder, forward=decode), replaced(vae.encoder, forward=encode):
        yield


def plan(
    vae: Any,
    shape: Sequence[int],
    *,
    direction: str = "decode",
    band_px: int | None = None,
    budget: float | None = None,
    whole: bool = True,
) -> BandPlan:
    """The fastest way to decode or encode within a budget; allocates nothing.

    Args:
        vae: a supported autoencoder, also on the meta device.
        shape: of the latents ``[B, C, h, w]``, or of the images ``[B, 3, H, W]`` for ``"encode"``.
        direction: ``"decode"`` or ``"encode"``.
        band_px: rows of the image per band; None tries :data:`~tiledcore.vae.plan.BANDS`.
        budget: bytes of device memory, without weights, input and finished image; None: no limit.
        whole: include the convolution between the latents and the decoder or encoder.

    Raises:
        TypeError: (an UnsupportedError) ``vae`` has parts that cannot be computed in bands.
        ValueError: an argument is not valid, or nothing fits ``budget``; the message says what would.
    """
    layers = program(vae, direction, whole)
    _check(shape, layers, band_px, budget)
    weight = next(vae.parameters())
    machine, slack = vae_plan.machine(weight.device, weight.dtype), vae_plan.SLACK
    heights = vae_plan.BANDS if band_px is None else (band_px,)
    searches = [Search(layers, shape, weight.dtype.itemsize, rows, machine) for rows in heights]
    limit = float("inf") if budget is None else float(budget)
    found = [one for search in searches if (one := search.plan(limit / slack)) is not None]
    if not found:
        raise ValueError(
            f"budget={budget:,} bytes do not hold an input of {tuple(shape)} in bands of {heights[-1]} px; "
            f"{math.ceil(slack * searches[-1].least()):,} would"
        )
    best = min(found, key=lambda one: one.seconds)
    return replace(best, peak_bytes=math.floor(slack * best.peak_bytes))


def peak_bytes(
    vae: Any,
    shape: Sequence[int],
    band_px: int | None = None,
    *,
    direction: str = "decode",
    budget: float | None = None,
) -> int:
    """The counted peak of :func:`plan`'s choice in bytes; slow (minutes) for a large image in low bands.

    Workspaces inside cuDNN and oneDNN are not counted.
    """
    return counted(vae, shape, plan(vae, shape, direction=direction, band_px=band_px, budget=budget), direction)


def counted(vae: Any, shape: Sequence[int], chosen: BandPlan, direction: str = "decode") -> int:
    """The peak of a plan in bytes, by running it on meta tensors."""
    dtype, meta = next(vae.parameters()).dtype, torch.device("meta")
    with meta:  # nn.Module's own to(): diffusers' warns of casts that are meant
        shadow = torch.nn.Module.to(type(vae).from_config(vae.config), dtype).eval()
    given = Given(torch.empty(tuple(shape), dtype=dtype, device=meta), meta, dtype)
    with LiveBytes() as live:
        for rows in run(program(shadow, direction), given, chosen.stores, chosen.band_px):
            del rows
    return live.peak


def _check(shape: Sequence[int], layers: Sequence[Layer], band_px: int | None, budget: float | None) -> None:
    if band_px is not None:
        validate.integer("band_px", band_px, 1)
    if budget is not None and not budget > 0:
        raise ValueError(f"budget={budget!r} must be a positive number of bytes, or None")
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"the input's shape {tuple(shape)} must be [B, C, H, W], at least 1 each")
    channels = next(layer.conv.in_channels for layer in layers if isinstance(layer, Conv))
    if shape[1] != channels:
        raise ValueError(f"the input has {shape[1]} channels, but vae takes {channels}")
    for layer, place in zip(layers, extents(layers, shape), strict=False):
        if place.height % layer.divides or place.width % layer.divides:
            least = math.prod(layer.divides for layer in layers)
            raise ValueError(
                f"the input's height and width, {shape[2]} and {shape[3]}, must be multiples of {least} for this vae"
            )


def _free_bytes(device: torch.device) -> float:
    """Most of the memory that is free on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.85 * (free + cached)
    if device.type == "cpu":
        return 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def _start(
    vae: Any, given: Tensor, direction: str, band_px: int | None, budget: float | None, whole: bool = True
) -> tuple[Iterator[Tensor], list[Layer]]:
    """The rows of the output, and the layers that make them."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{'latents' if direction == 'decode' else 'images'} must be a tensor of floats, got {kind}")
    if whole:
        onload(vae)
    weight = next(vae.parameters())
    limit = _free_bytes(weight.device) if budget is None else budget
    chosen = plan(vae, given.shape, direction=direction, band_px=band_px, budget=limit, whole=whole)
    logger.debug("%s of %s: %s", direction, tuple(given.shape), chosen)
    layers = program(vae, direction, whole)
    return run(layers, Given(given, weight.device, weight.dtype), chosen.stores, chosen.band_px), layers


def _whole(rows: Iterator[Tensor], layers: Sequence[Layer], given: Tensor) -> Tensor:
    end = extents(layers, given.shape)[-1]
    image: Tensor | None = None
    filled = 0
    for band in rows:
        if image is None:
            image = band.new_empty(end.batch, end.channels[0], end.height, end.width)
        image[:, :, filled : filled + band.shape[2]] = band
        filled += band.shape[2]
        del band
    assert image is not None and filled == end.height
    return image


@torch.no_grad()
def run(layers: Sequence[Layer], given: Given, stores: Sequence[Kind | None], band_px: int) -> Iterator[Tensor]:
    """All rows of the last layer's output, top to bottom."""
    places = extents(layers, given.tensor.shape)
    limits = vae_plan.limits(places, band_px)
    store: Given | OnDevice | OnHost = given
    start = 0

    def stream(end: int, consume: bool) -> Stream:
        source = store.read(limits[start], consume)
        for layer, rows in zip(layers[start:end], limits[start:end], strict=True):
            # Bands grow a little on their way; before a layer that multiplies rows they are split again.
            source = layer.run(split(source, rows) if layer.upsample > 1 else source)
        return source

    for i, layer in enumerate(layers):
        kept: OnDevice | OnHost | None = None
        if stores[i] is not None:
            kept = (OnDevice if stores[i] == "device" else OnHost)(given.device, given.dtype)
        passes: Sequence[Reduction | None] = layer.reductions or [None] * (kept is not None)
        for reduction in passes:
            # The first pass that reaches this layer stores the activations that the next passes start from.
            writes = kept if kept is not None and store is not kept else None
            if reduction is not None:
                reduction.start(places[i])
            source = stream(i, consume=writes is not None)
            if writes is not None:
                source = _kept(source, writes)
            for step in reduction.through if reduction is not None else ():
                source = step.run(source)
            for band in source:
                if reduction is not None:
                    reduction.update(band.tensors[0])
                band.tensors.clear()
            if reduction is not None:
                reduction.finish()
            if writes is not None:
                store, start = writes, i
                _free(layers[:i])
    for band in stream(len(layers), consume=True):
        yield band.tensors.pop()
    _free(layers)


def _kept(source: Stream, writes: OnDevice | OnHost) -> Stream:
    for band in source:
        writes.append(band)
        yield band


def _free(layers: Sequence[Layer]) -> None:
    for layer in layers:
        for reduction in layer.reductions:
            reduction.free()

"""Exact decode and encode of images of any size, in row bands.

What comes out is what ``vae.decode`` and ``vae.encode`` would give with unlimited memory, to rounding:
convolutions see their true neighbours (:mod:`tiledcore.vae.bands`), GroupNorm's statistics are those of the
whole image, the middle block attends globally. :mod:`tiledcore.vae.plan` decides what is kept between the
passes that this takes, so that the peak stays within a budget.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from tiledcore.utils import replaced
from tiledcore.vae import plan as vae_plan
from tiledcore.vae.autoencoders import layers_of, unsupported
from tiledcore.vae.bands import Conv, Extent, Layer, Reduction, Stream, UnsupportedError, convolution, split
from tiledcore.vae.plan import Kind, Plan
from tiledcore.vae.stores import Given, OnDevice, OnHost

__all__ = [
    "Plan",
    "decode",
    "decode_rows",
    "encode",
    "exact_bands",
    "peak_bytes",
    "plan",
    "unsupported",
    "why_not_exact",
]

logger = logging.getLogger(__name__)

CPU_EXACT_PIXELS = 4096 * 4096
"""The middle block's attention grows with the square of the pixels: 3.5e13 FLOP for the embedded model at 4096x4096,
and 64 times that at 16384x8192."""


def why_not_exact(vae: Any, pixels: int) -> str | None:
    """Why an image of so many pixels does not go through an autoencoder in exact bands, or None where it does."""
    if (reason := unsupported(vae)) is not None:
        return reason
    attends = getattr(vae.config, "mid_block_add_attention", False)
    if attends and vae.device.type == "cpu" and pixels > CPU_EXACT_PIXELS:
        return "its attention between all pixels would take a CPU hours"
    return None


def _stream(layers: Sequence[Layer], limits: Sequence[int], source: Stream) -> Stream:
    for layer, rows in zip(layers, limits, strict=False):
        # Bands grow a little on their way down; what makes more rows of them gets no more than planned.
        source = layer.run(split(source, rows) if layer.upsample > 1 else source)
    return source


@torch.no_grad()
def _run(layers: Sequence[Layer], given: Given, stores: Sequence[Kind | None], band_px: int) -> Iterator[Tensor]:
    """All rows of a program's output, top to bottom."""
    B, C, H, W = given.tensor.shape
    places = vae_plan.extents(layers, Extent(B, (C,), H, W))
    limits = vae_plan.limits(places, band_px)
    store: Given | OnDevice | OnHost = given
    start = 0

    def stream(end: int, consume: bool) -> Stream:
        return _stream(layers[start:end], limits[start:end], store.read(limits[start], consume))

    for i, layer in enumerate(layers):
        kept: OnDevice | OnHost | None = None
        if stores[i] is not None:
            kept = (OnDevice if stores[i] == "device" else OnHost)(given.device, given.dtype)
        passes: Sequence[Reduction | None] = layer.reductions or [None] * (kept is not None)
        for reduction in passes:
            # The first pass to get here leaves behind what the next ones start from.
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


def _program(vae: Any, direction: str, whole: bool = True) -> list[Layer]:
    """Decoder with the convolution before it, or encoder with the one after it; without it if not ``whole``."""
    if direction not in ("decode", "encode"):
        raise ValueError(f"direction={direction!r} is not decode or encode")
    if (reason := unsupported(vae)) is not None:
        raise UnsupportedError(f"vae cannot {direction} in exact bands: {reason}")
    if direction == "decode":
        before = getattr(vae, "post_quant_conv", None) if whole else None
        return [*(Conv(convolution(c)) for c in (before,) if c is not None), *layers_of(vae.decoder)]
    after = getattr(vae, "quant_conv", None) if whole else None
    return [*layers_of(vae.encoder), *(Conv(convolution(c)) for c in (after,) if c is not None)]


def _check(shape: Sequence[int], layers: Sequence[Layer], band_px: int | None, budget: float | None) -> None:
    if band_px is not None and (isinstance(band_px, bool) or not isinstance(band_px, int) or band_px < 1):
        raise ValueError(f"band_px={band_px!r} must be an int of at least 1, or None")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget={budget!r} must be a positive number of bytes, or None")
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"the input's shape {tuple(shape)} must be [B, C, H, W], at least 1 each")
    channels = next(layer.conv.in_channels for layer in layers if isinstance(layer, Conv))
    if shape[1] != channels:
        raise ValueError(f"the input has {shape[1]} channels, but vae takes {channels}")
    extent = Extent(shape[0], (shape[1],), shape[2], shape[3])
    for layer, place in zip(layers, vae_plan.extents(layers, extent), strict=False):
        if place.height % layer.divides or place.width % layer.divides:
            least = math.prod(layer.divides for layer in layers)
            raise ValueError(
                f"the input's height and width, {shape[2]} and {shape[3]}, must be multiples of {least} for this vae"
            )


def plan(
    vae: Any,
    shape: Sequence[int],
    *,
    direction: str = "decode",
    band_px: int | None = None,
    budget: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    whole: bool = True,
) -> Plan:
    """How an image would be decoded or encoded within a budget; allocates nothing.

    Args:
        vae: a supported autoencoder, which may be on the meta device.
        shape: of the latents ``[B, C, h, w]``, or of the images ``[B, 3, H, W]`` for ``"encode"``.
        direction: ``"decode"`` or ``"encode"``.
        band_px: rows of the image worked on at once; None tries 512, 256, 128 and 64.
        budget: bytes of device memory, beside weights, the given tensor and the finished image; None means
            without limit.
        device: where it will run, if not where ``vae`` is; on ``"cuda"`` activations may go to the host.
        dtype: of the weights and activations, if not that of ``vae``.
        whole: with the 1x1 convolution between latents and decoder, or encoder and latents.

    Returns:
        The plan predicted to be the fastest. Its peak is estimated; :func:`peak_bytes` counts, which takes
        minutes for a large image in low bands.

    Raises:
        TypeError: (an UnsupportedError) ``vae`` has parts that cannot be computed in bands.
        ValueError: an argument is not as above, or nothing fits ``budget``; the message says what would.
    """
    layers = _program(vae, direction, whole)
    _check(shape, layers, band_px, budget)
    weight = next(vae.parameters())
    where, kind = torch.device(device or weight.device), dtype or weight.dtype
    given = Extent(shape[0], (shape[1],), shape[2], shape[3])
    machine = vae_plan.machine(where, kind)
    limit = float("inf") if budget is None else float(budget)
    found: list[Plan] = []
    for rows in vae_plan.BANDS if band_px is None else (band_px,):
        chosen = vae_plan.choose(layers, given, kind.itemsize, rows, limit / vae_plan.SLACK, machine)
        if chosen is not None:
            stores, seconds, estimate = chosen
            peak = math.floor(vae_plan.SLACK * estimate)
            found.append(Plan(rows, stores, peak, seconds, vae_plan.recomputed(layers, given, stores)))
    if not found:
        rows = band_px or vae_plan.BANDS[-1]
        need = math.ceil(vae_plan.SLACK * vae_plan.least(layers, given, kind.itemsize, rows, machine))
        raise ValueError(
            f"budget={budget:,} bytes do not hold an input of {tuple(shape)} in bands of {rows} px; {need:,} would"
        )
    return min(found, key=lambda one: one.seconds)


def _shadow(vae: Any, dtype: torch.dtype) -> Any:
    """The same autoencoder without data."""
    with torch.device("meta"):
        # Not diffusers' own to(), which warns of casts that are meant.
        return torch.nn.Module.to(type(vae).from_config(vae.config), dtype).eval()


def _count(
    layers: Sequence[Layer], shape: Sequence[int], dtype: torch.dtype, stores: Sequence[Kind | None], band_px: int
) -> int:
    """The peak of a plan, by running it on meta tensors."""
    given = Given(torch.empty(tuple(shape), dtype=dtype, device="meta"), torch.device("meta"), dtype)
    with vae_plan.LiveBytes() as live:
        for rows in _run(layers, given, stores, band_px):
            del rows
    return live.peak


def peak_bytes(
    vae: Any,
    shape: Sequence[int],
    band_px: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    direction: str = "decode",
    budget: float | None = None,
    device: torch.device | str | None = None,
) -> int:
    """The peak of :func:`decode_rows` or :func:`encode` in bytes, counted by running the plan without data.

    Without ``budget`` it is that of the fastest plan, which keeps all that a GroupNorm has to wait for. What
    a convolution's library takes for itself while it runs (cuDNN's workspace, oneDNN's layouts) is not in it.
    Arguments and errors are those of :func:`plan`; what the figure leaves out, too.
    """
    chosen = plan(vae, shape, direction=direction, band_px=band_px, budget=budget, device=device, dtype=dtype)
    kind = dtype or next(vae.parameters()).dtype
    return _count(_program(_shadow(vae, kind), direction), shape, kind, chosen.stores, chosen.band_px)


def _free_bytes(device: torch.device) -> float:
    """What may be used where nobody said how much: most of what is free on the device now."""
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
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{'latents' if direction == 'decode' else 'images'} must be a tensor of floats, got {kind}")
    hook: Any = getattr(vae, "_hf_hook", None)
    if whole and hasattr(hook, "pre_forward"):  # model offload: weights come to the device when they are called
        hook.pre_forward(vae)
    layers = _program(vae, direction, whole)
    weight = next(vae.parameters())
    limit = _free_bytes(weight.device) if budget is None else budget
    chosen = plan(vae, given.shape, direction=direction, band_px=band_px, budget=limit, whole=whole)
    logger.debug("%s of %s: %s", direction, tuple(given.shape), chosen)
    rows = _run(layers, Given(given, weight.device, weight.dtype), chosen.stores, chosen.band_px)
    return rows, layers


def decode_rows(vae: Any, latents: Tensor, band_px: int | None = None, budget: float | None = None) -> Iterator[Tensor]:
    """Decode an image and yield its finished rows, top to bottom, so that it never exists whole.

    Args:
        vae: a supported autoencoder (see :func:`unsupported`), in eval mode.
        latents: ``[B, C, h, w]`` as ``vae.decode`` takes them: scaling and shift are the pipeline's. They
            may be on another device and of another dtype than ``vae``.
        band_px: rows of the image that are worked on at once; None chooses by what fits.
        budget: bytes of device memory beside weights and latents; None means most of what is free now.

    Yields:
        ``[B, 3, rows, W]`` of the dtype and on the device of ``vae``, without a gradient; together exactly what
        ``vae.decode(latents)`` gives, to rounding. The heights vary.

    Raises:
        TypeError: ``latents`` is no tensor of floats, or ``vae`` is not supported.
        ValueError: an argument is not as above, or nothing fits ``budget``; raised at the call.
    """
    return _start(vae, latents, "decode", band_px, budget)[0]


def decode(vae: Any, latents: Tensor, band_px: int | None = None, budget: float | None = None) -> Tensor:
    """Decode an image in row bands: ``vae.decode(latents).sample``, to rounding, in bounded memory.

    Arguments and errors as for :func:`decode_rows`.

    Returns:
        ``[B, 3, H, W]`` of the dtype and on the device of ``vae``.
    """
    return _whole(*_start(vae, latents, "decode", band_px, budget), latents)


def encode(vae: Any, images: Tensor, band_px: int | None = None, budget: float | None = None) -> Any:
    """Encode images in row bands: ``vae.encode(images)``, to rounding, in bounded memory.

    Args:
        vae: as for :func:`decode_rows`.
        images: ``[B, 3, H, W]`` in [-1, 1], on any device.
        band_px: as for :func:`decode_rows`.
        budget: as for :func:`decode_rows`.

    Returns:
        What ``vae.encode`` returns: ``AutoencoderKLOutput`` with its ``latent_dist``, ``AutoencoderTinyOutput`` with
        its ``latents``, or ``EncoderOutput`` with its ``latent``.

    Raises:
        TypeError: ``images`` is no tensor of floats, or ``vae`` is not supported.
        ValueError: an argument is not as above, or nothing fits ``budget``.
    """
    moments = _whole(*_start(vae, images, "encode", band_px, budget), images)
    if type(vae) is AutoencoderTiny:
        return AutoencoderTinyOutput(latents=moments)
    if type(vae) is AutoencoderDC:
        return EncoderOutput(latent=moments)
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))


def _whole(rows: Iterator[Tensor], layers: Sequence[Layer], given: Tensor) -> Tensor:
    B, C, H, W = given.shape
    end = vae_plan.extents(layers, Extent(B, (C,), H, W))[-1]
    image: Tensor | None = None
    filled = 0
    for band in rows:
        if image is None:
            image = band.new_empty(B, end.channels[0], end.height, end.width)
        image[:, :, filled : filled + band.shape[2]] = band
        filled += band.shape[2]
        del band
    assert image is not None and filled == end.height
    return image


@contextmanager
def exact_bands(
    vae: Any, larger_than: int = 0, band_px: int | None = None, budget: float | None = None
) -> Iterator[None]:
    """Let ``vae.decode`` and ``vae.encode`` run in exact bands for the length of a ``with`` block.

    Only the encoder's and decoder's forward are replaced: slicing, offload, the convolutions beside them and
    the classes that are returned stay diffusers' own.

    Args:
        vae: a supported autoencoder.
        larger_than: images of up to so many pixels run as they are, bit for bit.
        band_px: as for :func:`decode_rows`.
        budget: as for :func:`decode_rows`.

    Raises:
        TypeError: ``vae`` is not supported.
    """
    for direction in ("decode", "encode"):
        _program(vae, direction)

    def replacement(direction: str, original: Any) -> Any:
        def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            height, width = sample.shape[2:]
            if direction == "decode":
                layers = _program(vae, direction, whole=False)
                image = vae_plan.extents(layers, Extent(1, (sample.shape[1],), height, width))[-1]
                height, width = image.height, image.width
            if height * width <= larger_than or args or kwargs:
                return original(sample, *args, **kwargs)
            return _whole(*_start(vae, sample, direction, band_px, budget, whole=False), sample)

        return forward

    decode, encode = replacement("decode", vae.decoder.forward), replacement("encode", vae.encoder.forward)
    with replaced(vae.decoder, forward=decode), replaced(vae.encoder, forward=encode):
        yield

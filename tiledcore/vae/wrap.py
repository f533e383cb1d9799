"""Decoding and encoding a canvas that is a torus, around any autoencoder.

An autoencoder's convolutions pad with zeros at the border of what they get, so that the ends of a wrapped axis would
not meet. So the canvas is continued at its ends by the rows and columns from its other side, as far as the convolutions
see, and what was added is cut off again: across the border the result is then one smooth image, exactly.

Attention and normalisation see the whole of what they get, hence the added strips twice. That shifts the statistics
of the whole image a little, by the same amount everywhere, and makes no seam; `python -m bench.worlds` measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from tiledcore.geometry import both
from tiledcore.utils import replaced

# Latent pixels, for autoencoders whose layers are not counted: more than any of Stable Diffusion's and FLUX' sees.
REACH = 24


@dataclass(frozen=True)
class Continuation:
    """How far a torus is continued past its borders, in latent pixels on each side: (y, x), 0 where it is open."""

    reach: tuple[int, int]
    factor: int
    """Image pixels per latent pixel."""

    def pad(self, canvas: Tensor, pixels: int = 1) -> Tensor:
        """``[..., H, W]`` continued; of lengths that are ``pixels`` times those in latent pixels."""
        for axis, reach in zip((-2, -1), self.reach, strict=True):
            if reach:
                size = canvas.shape[axis]
                places = torch.arange(-reach * pixels, size + reach * pixels, device=canvas.device) % size
                canvas = canvas.index_select(axis, places)
        return canvas

    def crop(self, canvas: Tensor, pixels: int = 1) -> Tensor:
        """What :meth:`pad` added, cut off; a view."""
        y, x = (reach * pixels for reach in self.reach)
        return canvas[..., y : canvas.shape[-2] - y, x : canvas.shape[-1] - x]

    def crop_rows(self, bands: Iterable[Tensor], height: int) -> Iterator[Tensor]:
        """:meth:`crop` of an image that comes in bands of rows ``[..., rows, W]``, top to bottom.

        Args:
            bands: of the continued image, in image pixels.
            height: of the image without the continuation.
        """
        y, x = (reach * self.factor for reach in self.reach)
        at = -y
        for band in bands:
            first, last = max(0, -at), min(band.shape[-2], height - at)
            at += band.shape[-2]
            if first < last:
                yield band[..., first:last, x : band.shape[-1] - x]


def continuation(vae: Any, wrap: bool | tuple[bool, bool], factor: int) -> Continuation:
    """What a torus needs to be decoded by this autoencoder; ``wrap`` is one bool or (along y, along x)."""
    y, x = both(wrap)
    reach = decoder_reach(vae)
    return Continuation((reach * y, reach * x), factor)


def decoder_reach(vae: Any) -> int:
    """Latent pixels on each side that one pixel of the decoder's convolutions sees."""
    if not isinstance(vae, AutoencoderKL):
        return REACH
    levels, layers = len(vae.config.block_out_channels), vae.config.layers_per_block
    # 3x3 convolutions: at the entrance, two in each of two residual blocks in the middle, then at each level two in
    # each of layers + 1 blocks, one after each upsampling, one at the exit. At level i each sees 2**-i latent pixels.
    seen = 1 + 4 + sum((2 * (layers + 1) + (i > 0)) / 2**i for i in range(levels)) + 1 / 2 ** (levels - 1)
    return -int(-seen // 1)


@contextmanager
def wrapped(vae: Any, wrap: bool | tuple[bool, bool], factor: int) -> Iterator[None]:
    """For the length of a ``with`` block, ``vae.decode`` and ``vae.encode`` take their canvas for a torus.

    Args:
        vae: any autoencoder whose ``decode`` returns a tuple or has a ``sample``; as it is at this time, so that
            whatever replaced its methods before is what runs.
        wrap: one bool, or (along y, along x); nothing changes where both are False.
        factor: image pixels per latent pixel.
    """
    around = continuation(vae, wrap, factor)
    if around.reach == (0, 0):
        yield
        return
    decode, encode = vae.decode, vae.encode

    def decode_torus(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = decode(around.pad(z), *args, **kwargs)
        if isinstance(output, tuple):
            return (around.crop(output[0], factor), *output[1:])
        return type(output)(sample=around.crop(output.sample, factor))

    def encode_torus(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = encode(around.pad(x, factor), *args, **kwargs)
        found = output[0]
        if isinstance(found, DiagonalGaussianDistribution):
            cut: Any = DiagonalGaussianDistribution(around.crop(found.parameters), found.deterministic)
        else:
            cut = around.crop(found)
        return (cut,) if isinstance(output, tuple) else type(output)(cut)

    with replaced(vae, decode=decode_torus, encode=encode_torus):
        yield

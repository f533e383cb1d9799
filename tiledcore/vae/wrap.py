"""Decode and encode a canvas that wraps around, with any autoencoder.

Convolutions pad the border with zeros, so the two ends of a wrapped axis would not fit. So the canvas is padded with
rows and columns from its other side, as far as the convolutions see, and the padding is cut off the result. The result
has no seam. Attention and normalisation also see the padding, which changes the tone of the whole image a little.
"""

import math
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

REACH = 24  # latent pixels, for unknown autoencoders: more than the reach of those of Stable Diffusion and FLUX


@dataclass(frozen=True)
class Continuation:
    """Padding of a wrapped canvas."""

    reach: tuple[int, int]  # latent pixels per side: (y, x), 0 on an axis that does not wrap
    factor: int  # image pixels per latent pixel

    def pad(self, canvas: Tensor, pixels: int = 1) -> Tensor:
        """Pad ``[..., H, W]``; ``pixels`` is pixels of ``canvas`` per latent pixel."""
        for axis, reach in zip((-2, -1), self.reach, strict=True):
            if reach:
                size = canvas.shape[axis]
                places = torch.arange(-reach * pixels, size + reach * pixels, device=canvas.device) % size
                canvas = canvas.index_select(axis, places)
        return canvas

    def crop(self, canvas: Tensor, pixels: int = 1) -> Tensor:
        """Undo :meth:`pad`; a view."""
        y, x = (reach * pixels for reach in self.reach)
        return canvas[..., y : canvas.shape[-2] - y, x : canvas.shape[-1] - x]

    def crop_rows(self, bands: Iterable[Tensor], height: int) -> Iterator[Tensor]:
        """:meth:`crop` for bands ``[..., rows, W]`` of an image, top to bottom; ``height`` is that of the result."""
        y, x = (reach * self.factor for reach in self.reach)
        at = -y
        for band in bands:
            first, last = max(0, -at), min(band.shape[-2], height - at)
            at += band.shape[-2]
            if first < last:
                yield band[..., first:last, x : band.shape[-1] - x]


def continuation(vae: Any, wrap: bool | tuple[bool, bool], factor: int) -> Continuation:
    """The padding that this autoencoder needs for a wrapped canvas; ``wrap`` is one bool or (y, x)."""
    y, x = both(wrap)
    reach = decoder_reach(vae)
    return Continuation((reach * y, reach * x), factor)


def decoder_reach(vae: Any) -> int:
    """Latent pixels on each side that affect one output pixel of the decoder."""
    if not isinstance(vae, AutoencoderKL):
        return REACH
    levels, layers = len(vae.config.block_out_channels), vae.config.layers_per_block
    # 3x3 convolutions: one at the start, two in each of two residual blocks in the middle, then per level two in each
    # of layers + 1 blocks, one after each upsampling, one at the end. At level i each sees 2**-i latent pixels.
    seen = 1 + 4 + sum((2 * (layers + 1) + (i > 0)) / 2**i for i in range(levels)) + 1 / 2 ** (levels - 1)
    return math.ceil(seen)


@contextmanager
def wrapped(vae: Any, around: Continuation) -> Iterator[None]:
    """Inside the ``with`` block, ``decode`` and ``encode`` of any VAE see their canvas continued by ``around``."""
    if around.reach == (0, 0):
        yield
        return
    original_decode, original_encode = vae.decode, vae.encode

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = original_decode(around.pad(z), *args, **kwargs)
        image = around.crop(output[0], around.factor)
        return (image, *output[1:]) if isinstance(output, tuple) else type(output)(sample=image)

    def encode(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = original_encode(around.pad(x, around.factor), *args, **kwargs)
        found = output[0]
        if isinstance(found, DiagonalGaussianDistribution):
            cut: Any = DiagonalGaussianDistribution(around.crop(found.parameters), found.deterministic)
        else:
            cut = around.crop(found)
        return (cut,) if isinstance(output, tuple) else type(output)(cut)

    with replaced(vae, decode=decode, encode=encode):
        yield

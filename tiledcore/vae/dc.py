"""The layers of Sana's autoencoder: diffusers' ``AutoencoderDC`` (DC-AE: Chen et al. 2025) as Sana sets it.

Only its linear attention needs the whole image. The other published ones, of ImageNet, belong to no pipeline.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaMultiscaleAttnProcessor2_0, SanaMultiscaleLinearAttention
from diffusers.models.autoencoders import autoencoder_dc as parts
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor, nn

from tiledcore.vae import bands
from tiledcore.vae.bands import Conv, Layer, known


def decoder(network: Any) -> list[Layer]:
    known(network, parts.Decoder, in_shortcut=True)
    layers = _shortened(network.conv_in)
    for block in reversed(network.up_blocks):
        for module in block:
            layers += _block(module)
    return [*layers, _norm(network.norm_out), bands.activation(network.conv_act), Conv(network.conv_out)]


def encoder(network: Any) -> list[Layer]:
    known(network, parts.Encoder, out_shortcut=True)
    layers: list[Layer] = [Conv(network.conv_in)]
    for block in network.down_blocks:
        for module in block:
            layers += _block(module)
    return [*layers, *_shortened(network.conv_out)]


def _shortened(conv: Any) -> list[Layer]:
    """The convolution next to the latents, and its shortcut."""
    more, fewer = conv.out_channels // conv.in_channels, conv.in_channels // conv.out_channels
    return [bands.Save(), Conv(conv), bands.Add(partial(_repeat, more) if more else partial(_mean, fewer))]


def _repeat(times: int, x: Tensor) -> Tensor:
    """A shortcut to more channels: each channel is repeated."""
    return x.repeat_interleave(times, 1)


def _mean(of: int, x: Tensor) -> Tensor:
    """A shortcut to fewer channels: the mean of each group of ``of`` channels."""
    return x.unflatten(1, (-1, of)).mean(2)


def _block(module: Any) -> list[Layer]:
    if type(module) is parts.ResBlock:
        layers = [Conv(module.conv1), bands.activation(module.nonlinearity), Conv(module.conv2), _norm(module.norm)]
        return [bands.Save(), *layers, bands.Add()]
    if type(module) is parts.EfficientViTBlock:
        return [*_attention(module.attn), *_feed_forward(module.conv_out)]
    if type(module) is parts.DCUpBlock2d:
        known(module, parts.DCUpBlock2d, interpolate=True, interpolation_mode="nearest", shortcut=True)
        # The residual is repeated here, before Conv enlarges it by pixel shuffle.
        return [bands.Save(partial(_repeat, module.repeats)), Conv(module.conv, upsample=2), bands.Add()]
    known(module, parts.DCDownBlock2d, downsample=False, shortcut=True)
    return [bands.Save(), Conv(module.conv), bands.Add(partial(_mean, module.group_size))]


def _norm(norm: Any) -> Layer:
    return bands.Pointwise(partial(_rms, known(norm, RMSNorm)))


def _rms(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm over the channels of each pixel, in place."""
    wide = torch.promote_types(x.dtype, torch.float32)
    size = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
    x.mul_(size.square_().div_(x.shape[1]).add_(norm.eps).rsqrt_())
    if norm.weight is not None:
        x.mul_(norm.weight[:, None, None])
    if norm.bias is not None:
        x.add_(norm.bias[:, None, None])
    return x


def _feed_forward(block: Any) -> list[Layer]:
    known(known(block, GLUMBConv).nonlinearity, nn.SiLU)
    silu, gate = bands.Pointwise(partial(F.silu, inplace=True)), bands.Pointwise(_gated)
    layers = [Conv(block.conv_inverted), silu, Conv(block.conv_depth), gate, Conv(block.conv_point)]
    if block.norm_type == "rms_norm":
        layers.append(_norm(block.norm))
    return [bands.Save(), *layers, bands.Add()] if block.residual_connection else layers


def _gated(x: Tensor) -> Tensor:
    """The first half of the channels times SiLU of the second half, in place."""
    value, gate = x.chunk(2, 1)
    return value.mul_(F.silu(gate, inplace=True))


def _attention(attention: Any) -> list[Layer]:
    known(attention, SanaMultiscaleLinearAttention, residual_connection=True)
    known(attention.processor, SanaMultiscaleAttnProcessor2_0)
    known(attention.nonlinearity, nn.ReLU)
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out):
        known(layer, nn.Linear)
    scales = [Scales(attention.to_qkv_multiscale)] if len(attention.to_qkv_multiscale) else []
    project = bands.Pointwise(partial(_projected, attention))
    return [bands.Save(), project, *scales, LinearAttention(attention), _norm(attention.norm_out), bands.Add()]


def _projected(attention: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of each pixel: ``3 * inner`` channels, in this order."""
    pixels = x.movedim(1, -1)
    return torch.cat([to(pixels) for to in (attention.to_q, attention.to_k, attention.to_v)], 3).movedim(-1, 1)


class Scales(Conv):
    """The input, and after it in the channels its version by each depthwise ``proj_in`` and 1x1 ``proj_out``."""

    def __init__(self, projections: Any) -> None:
        for conv in (conv for one in projections for conv in (one.proj_in, one.proj_out)):
            known(bands.convolution(conv), nn.Conv2d, bias=None, stride=(1, 1))
            if 2 * conv.padding[0] != conv.kernel_size[0] - 1:
                raise bands.UnsupportedError(f"{conv} of a linear attention changes the size")
        super().__init__(max((one.proj_in for one in projections), key=lambda conv: conv.kernel_size[0]))
        self.projections = projections

    def _convolve(self, window: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return x.narrow(2, self.kernel // 2, x.shape[2] - self.kernel + 1)

        return torch.cat([inner(window), *(one.proj_out(inner(one.proj_in(window))) for one in self.projections)], 1)


class LinearAttention(Layer):
    """ReLU linear attention at several scales (EfficientViT: Cai et al. 2023) of queries, keys and values.

    Sums of ``value keyᵀ`` and of ``key`` over all pixels are float32 within a band, as in diffusers, then float64. For
    images of a few pixels diffusers computes the same in another order.
    """

    reduces = True

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def start(self, pixels: int) -> None:
        self.sums = torch.zeros(())

    def _part(self, rows: Tensor, which: int) -> Tensor:
        """Queries (0), keys (1) or values (2) of a band, ``[B, heads, head_dim, pixels]``, float32."""
        part = rows.unflatten(1, (-1, 3, self.attention.attention_head_dim))[:, :, which].flatten(3)
        return (F.relu(part) if which < 2 else part).float()

    def update(self, rows: Tensor) -> None:
        key, value = self._part(rows, 1), self._part(rows, 2)
        sums = torch.cat([value @ key.transpose(-1, -2), key.sum(-1)[:, :, None]], 2).double()
        self.sums = sums if self.sums.ndim == 0 else self.sums.add_(sums)

    def change(self, band: bands.Band) -> None:
        attention, rows = self.attention, band.tensors[0]
        queries = self._part(rows, 0)
        both = self.sums.to(queries.dtype) @ queries
        attended = both[:, :, :-1].div_(both[:, :, -1:] + attention.eps).to(rows.dtype)
        del both
        attended = attended.flatten(1, 2).unflatten(2, rows.shape[2:])
        band.tensors[0] = attention.to_out(attended.movedim(1, -1)).movedim(-1, 1)

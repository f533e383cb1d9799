"""The layers of Sana's autoencoder: diffusers' ``AutoencoderDC`` (DC-AE: Chen et al. 2025) as Sana sets it.

Only its linear attention needs the whole image. The other published ones, of ImageNet, belong to no pipeline.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaMultiscaleAttnProcessor2_0, SanaMultiscaleLinearAttention
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d, EfficientViTBlock, ResBlock
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor, nn

from tiledcore.vae.attention import LinearAttention, Project, Scales
from tiledcore.vae.bands import (
    Add,
    Band,
    Conv,
    Layer,
    Pointwise,
    Save,
    UnsupportedError,
    activation,
    convolution,
    known,
    unknown,
)


def _repeat(times: int, x: Tensor) -> Tensor:
    """A shortcut to more channels: each channel is repeated."""
    return x.repeat_interleave(times, 1)


def _mean(of: int, x: Tensor) -> Tensor:
    """A shortcut to fewer channels: the mean of each group of ``of`` channels."""
    return x.unflatten(1, (-1, of)).mean(2)


class Gate(Layer):
    """The first half of the channels times SiLU of the second half, in place."""

    def change(self, band: Band) -> None:
        value, gate = band.tensors[0].chunk(2, 1)
        band.tensors[0] = value.mul_(F.silu(gate, inplace=True))


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


def decoder(network: Any) -> list[Layer]:
    layers = _shortened(convolution(network.conv_in), network.in_shortcut)
    for block in reversed(network.up_blocks):
        for module in block:
            layers += _block(module)
    return [*layers, _norm(network.norm_out), activation(network.conv_act), Conv(convolution(network.conv_out))]


def encoder(network: Any) -> list[Layer]:
    layers: list[Layer] = [Conv(convolution(network.conv_in))]
    for block in network.down_blocks:
        for module in block:
            layers += _block(module)
    return [*layers, *_shortened(convolution(network.conv_out), network.out_shortcut)]


def _norm(norm: Any) -> Layer:
    return Pointwise(partial(_rms, known(norm, RMSNorm)))


def _shortened(conv: nn.Conv2d, shortcut: bool) -> list[Layer]:
    """The convolution next to the latents."""
    if not shortcut:
        raise UnsupportedError("the convolution next to the latents has no shortcut")
    more, fewer = conv.out_channels // conv.in_channels, conv.in_channels // conv.out_channels
    return [Save(), Conv(conv), Add(partial(_repeat, more) if more else partial(_mean, fewer))]


def _block(module: Any) -> list[Layer]:
    if type(module) is ResBlock:
        layers = [Conv(convolution(module.conv1)), activation(module.nonlinearity), Conv(convolution(module.conv2))]
        return [Save(), *layers, _norm(module.norm), Add()]
    if type(module) is EfficientViTBlock:
        return [*_attention(module.attn), *_feed_forward(module.conv_out)]
    if type(module) is DCUpBlock2d:
        return _up(module)
    if type(module) is DCDownBlock2d:
        return _down(module)
    raise unknown(module)


def _up(block: Any) -> list[Layer]:
    if not block.interpolate or block.interpolation_mode != "nearest" or not block.shortcut:
        raise UnsupportedError("a DCUpBlock2d does not repeat pixels, or has no shortcut")
    # Repeated here, before Conv enlarges it by pixel shuffle.
    return [Save(partial(_repeat, block.repeats)), Conv(convolution(block.conv), upsample=2), Add()]


def _down(block: Any) -> list[Layer]:
    if block.downsample or not block.shortcut:
        raise UnsupportedError("a DCDownBlock2d has a pixel unshuffle beside its shortcut's, or no shortcut")
    return [Save(), Conv(convolution(block.conv)), Add(partial(_mean, block.group_size))]


def _attention(attention: Any) -> list[Layer]:
    known(attention, SanaMultiscaleLinearAttention)
    known(attention.processor, SanaMultiscaleAttnProcessor2_0)
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out):
        known(layer, nn.Linear)
    if type(attention.nonlinearity) is not nn.ReLU or not attention.residual_connection:
        raise UnsupportedError("a linear attention is without ReLU or its residual connection")
    scales = list(attention.to_qkv_multiscale)
    through: list[Layer] = [Project(attention)]
    if scales:
        for conv in (c for one in scales for c in (one.proj_in, one.proj_out)):
            if convolution(conv).bias is not None or conv.kernel_size[0] % 2 == 0 or conv.stride != (1, 1):
                raise UnsupportedError(f"{conv} of a linear attention is not one of odd size, stride 1 and no bias")
        through.append(Scales(scales))
    return [Save(), *through, LinearAttention(attention), _norm(attention.norm_out), Add()]


def _feed_forward(block: Any) -> list[Layer]:
    if type(block) is not GLUMBConv or type(block.nonlinearity) is not nn.SiLU:
        raise unknown(block)
    layers: list[Layer] = [
        Conv(convolution(block.conv_inverted)),
        Pointwise(partial(F.silu, inplace=True)),
        Conv(convolution(block.conv_depth)),
        Gate(),
        Conv(convolution(block.conv_point)),
    ]
    if block.norm_type == "rms_norm":
        layers.append(_norm(block.norm))
    return [Save(), *layers, Add()] if block.residual_connection else layers

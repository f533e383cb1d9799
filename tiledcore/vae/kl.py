"""The layers of diffusers' ``AutoencoderKL`` and ``AutoencoderTiny``, with their own modules and weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    AutoencoderTinyBlock,
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tiledcore.vae.attention import Attention
from tiledcore.vae.bands import (
    Add,
    Conv,
    Layer,
    Pointwise,
    Save,
    Statistics,
    UnsupportedError,
    activation,
    convolution,
    known,
    unknown,
)


def _statistics(norm: Any) -> Statistics:
    if type(norm) is not nn.GroupNorm or not norm.affine:
        raise unknown(norm)
    return Statistics(norm)


def decoder(decoder: Any) -> list[Layer]:
    layers: list[Layer] = [Conv(convolution(decoder.conv_in)), *_middle(decoder.mid_block)]
    for block in decoder.up_blocks:
        for resnet in known(block, UpDecoderBlock2D).resnets:
            layers += _resnet(resnet)
        for upsampler in block.upsamplers or ():
            known(upsampler, Upsample2D)
            transposed = upsampler.use_conv_transpose or not upsampler.interpolate
            if transposed or upsampler.norm is not None or not upsampler.use_conv or upsampler.name != "conv":
                raise unknown(upsampler)
            layers.append(Conv(convolution(upsampler.conv), upsample=2))
    return [*layers, *_output(decoder)]


def encoder(encoder: Any) -> list[Layer]:
    layers: list[Layer] = [Conv(convolution(encoder.conv_in))]
    for block in encoder.down_blocks:
        for resnet in known(block, DownEncoderBlock2D).resnets:
            layers += _resnet(resnet)
        for downsampler in block.downsamplers or ():
            plain = known(downsampler, Downsample2D).use_conv and downsampler.padding == 0
            if not plain or downsampler.norm is not None:
                raise unknown(downsampler)
            layers.append(Conv(convolution(downsampler.conv), pad=(0, 1, 0, 1)))
    return [*layers, *_middle(encoder.mid_block), *_output(encoder)]


def _output(network: Any) -> list[Layer]:
    known(network.conv_act, nn.SiLU)
    return [Conv(convolution(network.conv_out), statistics=_statistics(network.conv_norm_out))]


def _middle(block: Any) -> list[Layer]:
    layers = _resnet(known(block, UNetMidBlock2D).resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            layers += _attention(attention)
        layers += _resnet(resnet)
    return layers


def _attention(attention: Any) -> list[Layer]:
    known(attention, DiffusersAttention)
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        known(layer, nn.Linear)
    if any(getattr(attention, name) is not None for name in ("spatial_norm", "norm_q", "norm_k")):
        raise UnsupportedError("the middle block's attention has a norm of queries, of keys, or in space")
    if not attention.residual_connection or attention.rescale_output_factor != 1:
        raise UnsupportedError("the middle block's attention has no residual, or scales it")
    _statistics(attention.group_norm)
    return [Attention(attention)]


def _resnet(block: Any) -> list[Layer]:
    if type(block) is not ResnetBlock2D or type(block.nonlinearity) is not nn.SiLU:
        raise unknown(block)
    more = (block.time_emb_proj, block.upsample, block.downsample)
    if any(part is not None for part in more) or block.output_scale_factor != 1:
        raise UnsupportedError("a residual block has a time embedding, changes the size or scales its sum")
    if block.training and block.dropout.p > 0:
        raise UnsupportedError("a residual block drops out; call vae.eval()")
    shortcut = None if block.conv_shortcut is None else convolution(block.conv_shortcut)
    # The residual that waits takes the most memory, so the shortcut goes where it makes that smaller.
    early = shortcut is not None and shortcut.out_channels <= shortcut.in_channels
    return [
        Save(shortcut if early else None),
        Conv(convolution(block.conv1), statistics=_statistics(block.norm1)),
        Conv(convolution(block.conv2), statistics=_statistics(block.norm2)),
        Add(None if early else shortcut),
    ]


def tiny(network: Any) -> list[Layer]:
    decodes = type(network) is DecoderTiny
    layers: list[Layer] = [Pointwise(_to_decoder if decodes else _to_encoder)]
    upsample = 1
    for module in network.layers:
        if type(module) is nn.Upsample:
            if module.mode != "nearest" or module.scale_factor != 2:
                raise UnsupportedError(f"{module} does not repeat pixels")
            upsample = 2
        elif type(module) is nn.Conv2d:
            layers.append(Conv(convolution(module), upsample=upsample))
            upsample = 1
        elif type(module) is AutoencoderTinyBlock:
            skip = None if type(module.skip) is nn.Identity else convolution(module.skip)
            layers += [Save(skip), *(_step(step) for step in module.conv), Add(), Pointwise(module.fuse)]
        else:
            layers.append(_step(module))
    return [*layers, Pointwise(_from_decoder)] if decodes else layers


def _step(module: Any) -> Layer:
    return Conv(convolution(module)) if type(module) is nn.Conv2d else activation(module)


# The operations of DecoderTiny.forward and EncoderTiny.forward around their layers.
def _to_decoder(x: Tensor) -> Tensor:
    return torch.tanh(x / 3) * 3


def _from_decoder(x: Tensor) -> Tensor:
    return x.mul(2).sub(1)


def _to_encoder(x: Tensor) -> Tensor:
    return x.add(1).div(2)

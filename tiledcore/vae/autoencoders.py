"""diffusers' autoencoders as programs of :mod:`tiledcore.vae.bands`, built from their own modules and weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.autoencoders import autoencoder_dc as dc
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny, Encoder, EncoderTiny
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

from tiledcore.vae import autoencoder_dc
from tiledcore.vae.bands import (
    Add,
    Conv,
    Layer,
    Pointwise,
    Save,
    Statistics,
    UnsupportedError,
    convolution,
    unknown,
)
from tiledcore.vae.bands_attention import Attention


def unsupported(vae: Any) -> str | None:
    """Why an autoencoder cannot run in exact bands, or None where it can."""
    if type(vae) not in (AutoencoderKL, AutoencoderTiny, AutoencoderDC):
        return f"{type(vae).__name__} is none of AutoencoderKL, AutoencoderTiny and AutoencoderDC"
    try:
        layers_of(vae.decoder)
        layers_of(vae.encoder)
    except UnsupportedError as error:
        return str(error)
    return None


def layers_of(network: Any) -> list[Layer]:
    """The program of an encoder or decoder.

    Args:
        network: ``vae.encoder`` or ``vae.decoder`` of a supported autoencoder.

    Raises:
        UnsupportedError: a part of it is not known, or has hooks that bands would pass by.
    """
    for name, module in network.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks
        if name and (hooked or hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")):
            raise UnsupportedError(f"{name} has a hook (sequential or group offload?), which bands would pass by")
    kind = type(network)
    if kind is Decoder:
        return _decoder(network)
    if kind is Encoder:
        return _encoder(network)
    if kind in (DecoderTiny, EncoderTiny):
        return _tiny(network)
    if kind is dc.Decoder:
        return autoencoder_dc.decoder(network)
    if kind is dc.Encoder:
        return autoencoder_dc.encoder(network)
    raise unknown(network)


def _statistics(norm: Any) -> Statistics:
    if type(norm) is not nn.GroupNorm or not norm.affine:
        raise unknown(norm)
    return Statistics(norm)


def _decoder(decoder: Any) -> list[Layer]:
    layers: list[Layer] = [Conv(convolution(decoder.conv_in)), *_middle(decoder.mid_block)]
    for block in decoder.up_blocks:
        if type(block) is not UpDecoderBlock2D:
            raise unknown(block)
        for resnet in block.resnets:
            layers += _resnet(resnet)
        for upsampler in block.upsamplers or ():
            if type(upsampler) is not Upsample2D or upsampler.norm is not None or not upsampler.interpolate:
                raise unknown(upsampler)
            if upsampler.use_conv_transpose or not upsampler.use_conv or upsampler.name != "conv":
                raise unknown(upsampler)
            layers.append(Conv(convolution(upsampler.conv), upsample=2))
    return [*layers, *_output(decoder)]


def _encoder(encoder: Any) -> list[Layer]:
    layers: list[Layer] = [Conv(convolution(encoder.conv_in))]
    for block in encoder.down_blocks:
        if type(block) is not DownEncoderBlock2D:
            raise unknown(block)
        for resnet in block.resnets:
            layers += _resnet(resnet)
        for downsampler in block.downsamplers or ():
            if type(downsampler) is not Downsample2D or downsampler.norm is not None or not downsampler.use_conv:
                raise unknown(downsampler)
            pad = (0, 1, 0, 1) if downsampler.padding == 0 else None
            layers.append(Conv(convolution(downsampler.conv), pad=pad))
    return [*layers, *_middle(encoder.mid_block), *_output(encoder)]


def _output(network: Any) -> list[Layer]:
    if type(network.conv_act) is not nn.SiLU:
        raise unknown(network.conv_act)
    return [Conv(convolution(network.conv_out), statistics=_statistics(network.conv_norm_out))]


def _middle(block: Any) -> list[Layer]:
    if type(block) is not UNetMidBlock2D:
        raise unknown(block)
    layers = _resnet(block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            layers += _attention(attention)
        layers += _resnet(resnet)
    return layers


def _attention(attention: Any) -> list[Layer]:
    linear = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
    if type(attention) is not DiffusersAttention or any(type(layer) is not nn.Linear for layer in linear):
        raise unknown(attention)
    if any(getattr(attention, name) is not None for name in ("spatial_norm", "norm_q", "norm_k")):
        raise UnsupportedError("the middle block's attention has a norm of queries, of keys, or in space")
    _statistics(attention.group_norm)
    return [Attention(attention)]


def _resnet(block: Any) -> list[Layer]:
    if type(block) is not ResnetBlock2D or type(block.nonlinearity) is not nn.SiLU:
        raise unknown(block)
    if block.time_emb_proj is not None or block.upsample is not None or block.downsample is not None:
        raise UnsupportedError("a residual block has a time embedding or changes the size")
    if block.training and block.dropout.p > 0:
        raise UnsupportedError("a residual block drops out; call vae.eval()")
    first, second = _statistics(block.norm1), _statistics(block.norm2)
    shortcut = None if block.conv_shortcut is None else convolution(block.conv_shortcut)
    # The path that waits is the larger part of what is kept: the shortcut comes where it makes that smaller.
    early = shortcut is not None and shortcut.out_channels <= shortcut.in_channels
    return [
        Save(shortcut if early else None, [first]),
        Conv(convolution(block.conv1), statistics=first, reduce=False),
        Conv(convolution(block.conv2), statistics=second),
        Add(None if early else shortcut, float(block.output_scale_factor)),
    ]


def _tiny(network: Any) -> list[Layer]:
    decodes = type(network) is DecoderTiny
    layers: list[Layer] = [Pointwise(_to_decoder if decodes else _to_encoder)]
    upsample = 1
    for module in network.layers:
        if type(module) is nn.Upsample:
            factor = module.scale_factor
            if module.mode != "nearest" or not isinstance(factor, (int, float)) or factor != int(factor):
                raise UnsupportedError(f"{module} does not repeat pixels")
            upsample = int(factor)
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
    if type(module) is nn.Conv2d:
        return Conv(convolution(module))
    return autoencoder_dc.activation(module)


# What DecoderTiny and EncoderTiny do around their layers.
def _to_decoder(x: Tensor) -> Tensor:
    return torch.tanh(x / 3) * 3


def _from_decoder(x: Tensor) -> Tensor:
    return x.mul(2).sub(1)


def _to_encoder(x: Tensor) -> Tensor:
    return x.add(1).div(2)

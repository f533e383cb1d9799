"""The layers of diffusers' ``AutoencoderKL`` and ``AutoencoderTiny``, with their own modules and weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tiledcore.vae import bands
from tiledcore.vae.bands import Conv, Layer, known


def decoder(decoder: Any) -> list[Layer]:
    layers: list[Layer] = [Conv(decoder.conv_in), *_middle(decoder.mid_block)]
    for block in decoder.up_blocks:
        for resnet in known(block, blocks.UpDecoderBlock2D).resnets:
            layers += _resnet(resnet)
        for up in block.upsamplers or ():
            known(up, Upsample2D, use_conv=True, use_conv_transpose=False, interpolate=True, norm=None, name="conv")
            layers.append(Conv(up.conv, upsample=2))
    return [*layers, *_output(decoder)]


def encoder(encoder: Any) -> list[Layer]:
    layers: list[Layer] = [Conv(encoder.conv_in)]
    for block in encoder.down_blocks:
        for resnet in known(block, blocks.DownEncoderBlock2D).resnets:
            layers += _resnet(resnet)
        for down in block.downsamplers or ():
            known(down, Downsample2D, use_conv=True, padding=0, norm=None)
            layers.append(Conv(down.conv, pad=(0, 1, 0, 1)))
    return [*layers, *_middle(encoder.mid_block), *_output(encoder)]


def _output(network: Any) -> list[Layer]:
    known(network.conv_act, nn.SiLU)
    return _normalised(network.conv_norm_out, network.conv_out)


def _middle(block: Any) -> list[Layer]:
    layers = _resnet(known(block, blocks.UNetMidBlock2D).resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        layers += [] if attention is None else _attention(attention)
        layers += _resnet(resnet)
    return layers


def _resnet(block: Any) -> list[Layer]:
    known(block, ResnetBlock2D, time_emb_proj=None, upsample=None, downsample=None, output_scale_factor=1)
    known(block.nonlinearity, nn.SiLU)
    if block.training and block.dropout.p > 0:
        raise bands.UnsupportedError("a residual block drops out; call vae.eval()")
    save, add = bands.Save(), bands.Add()
    if (shortcut := block.conv_shortcut) is not None:
        # The residual that waits takes the most memory, so the shortcut goes where it makes that smaller.
        early = bands.convolution(shortcut).out_channels <= shortcut.in_channels
        (save if early else add).function = shortcut
    return [save, *_normalised(block.norm1, block.conv1), *_normalised(block.norm2, block.conv2), add]


def _normalised(norm: Any, conv: Any) -> list[Layer]:
    """A norm, SiLU and a convolution."""
    statistics = bands.Statistics(norm)
    return [statistics, Conv(conv, statistics)]


def _attention(attention: Any) -> list[Layer]:
    plain = {"spatial_norm": None, "norm_q": None, "norm_k": None}
    known(attention, attention_processor.Attention, residual_connection=True, rescale_output_factor=1, **plain)
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        known(layer, nn.Linear)
    statistics = bands.Statistics(attention.group_norm)
    return [statistics, Attention(attention, statistics)]


class Attention(Layer):
    """Self-attention of the middle block: queries of one band, keys and values ``[B, N, inner]`` of all pixels."""

    reduces = True

    def __init__(self, attention: Any, statistics: bands.Statistics) -> None:
        self.attention, self.statistics = attention, statistics
        self.keys = self.values = torch.empty(0)

    def start(self, pixels: int) -> None:
        self.pixels, self.filled = pixels, 0

    def update(self, rows: Tensor) -> None:
        tokens = self._tokens(rows)
        found = self.attention.to_k(tokens), self.attention.to_v(tokens)
        if self.filled == 0:
            self.keys, self.values = (t.new_empty(t.shape[0], self.pixels, t.shape[2]) for t in found)
        place = slice(self.filled, self.filled + tokens.shape[1])
        self.keys[:, place], self.values[:, place] = found
        self.filled = place.stop

    def _tokens(self, rows: Tensor) -> Tensor:
        return self.statistics.apply(rows, silu=False).flatten(2).transpose(1, 2)

    def change(self, band: bands.Band) -> None:
        attention, rows = self.attention, band.tensors[0]
        queries = attention.to_q(self._tokens(rows))
        q, k, v = (t.unflatten(2, (attention.heads, -1)).transpose(1, 2) for t in (queries, self.keys, self.values))
        if q.is_meta:  # where torch would count its fallback, which stores all scores
            attended = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        out = attention.to_out[0](attended.transpose(1, 2).flatten(2))
        band.tensors[0] = out.transpose(1, 2).unflatten(2, rows.shape[2:]) + rows


def tiny(network: Any) -> list[Layer]:
    layers: list[Layer] = []
    upsample = 1
    for module in network.layers:
        if type(module) is nn.Upsample:
            upsample = int(known(module, nn.Upsample, mode="nearest", scale_factor=2).scale_factor)
        elif type(module) is nn.Conv2d:
            layers.append(Conv(module, upsample=upsample))
            upsample = 1
        elif type(module) is blocks.AutoencoderTinyBlock:
            skip = module.skip if type(module.skip) is nn.Identity else bands.convolution(module.skip)
            main = [_step(step) for step in module.conv]
            layers += [bands.Save(skip), *main, bands.Add(), bands.Pointwise(module.fuse)]
        else:
            layers.append(_step(module))
    # What DecoderTiny.forward and EncoderTiny.forward do around their layers.
    if type(network) is DecoderTiny:
        return [bands.Pointwise(lambda x: torch.tanh(x / 3) * 3), *layers, bands.Pointwise(lambda x: x.mul(2).sub(1))]
    return [bands.Pointwise(lambda x: x.add(1).div(2)), *layers]


def _step(module: Any) -> Layer:
    return Conv(module) if type(module) is nn.Conv2d else bands.activation(module)

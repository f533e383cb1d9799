"""The layers of diffusers' autoencoders, with their own modules and weights.

``AutoencoderKL``, ``AutoencoderTiny``, and ``AutoencoderDC`` as Sana sets it (DC-AE: Chen et al. 2025). The other
published ones of DC-AE, of ImageNet, belong to no pipeline.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as attentions
from diffusers.models.autoencoders import autoencoder_dc as dc
from diffusers.models.autoencoders import vae
from diffusers.models.downsampling import Downsample2D
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.sana_transformer import GLUMBConv
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tiledcore._diffusers import has_hooks
from tiledcore.vae.bands import Add, Band, Conv, Layer, Pointwise, Save, Statistics, UnsupportedError, known


def program(network: Any) -> list[Layer]:
    """The layers of ``vae.decoder`` or ``vae.encoder``; an UnsupportedError says why it cannot run in bands."""
    for name, module in network.named_modules():
        if name and has_hooks(module):
            raise UnsupportedError(f"{name} has a hook (sequential or group offload?), which bands would pass by")
    return _layers(network)


def _layers(*modules: Any) -> list[Layer]:
    """The layers of modules that follow one another."""
    return [layer for one in modules for layer in _LAYERS[type(known(one, *_LAYERS, **_PLAIN.get(type(one), {})))](one)]


def _kl_output(network: Any) -> list[Layer]:
    known(network.conv_act, nn.SiLU)
    return _normalised(network.conv_norm_out, network.conv_out)


def _middle(block: Any) -> list[Layer]:
    rest = (module for pair in zip(block.attentions, block.resnets[1:], strict=True) for module in pair)
    return _layers(block.resnets[0], *(module for module in rest if module is not None))


def _resnet(block: Any) -> list[Layer]:
    known(block.nonlinearity, nn.SiLU)
    if block.training and block.dropout.p > 0:
        raise UnsupportedError("a residual block drops out; call vae.eval()")
    save, add = Save(), Add()
    if (shortcut := block.conv_shortcut) is not None:
        # The residual that waits takes the most memory, so the shortcut goes where it makes that smaller.
        early = known(shortcut, nn.Conv2d, **_POINTWISE).out_channels <= shortcut.in_channels
        (save if early else add).function = shortcut
    return [save, *_normalised(block.norm1, block.conv1), *_normalised(block.norm2, block.conv2), add]


def _normalised(norm: Any, conv: Any) -> list[Layer]:
    """A norm, SiLU and a convolution."""
    statistics = Statistics(norm)
    return [statistics, Conv(conv, statistics)]


def _attention(attention: Any) -> list[Layer]:
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        known(layer, nn.Linear)
    statistics = Statistics(attention.group_norm)
    return [statistics, Attention(attention, statistics)]


class Attention(Layer):
    """Self-attention of the middle block: queries of one band, keys and values ``[B, N, inner]`` of all pixels."""

    reduces = True

    def __init__(self, attention: Any, statistics: Statistics) -> None:
        self.attention, self.statistics = attention, statistics

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

    def change(self, band: Band) -> None:
        attention, rows = self.attention, band.tensors[0]
        queries = attention.to_q(self._tokens(rows))
        q, k, v = (t.unflatten(2, (attention.heads, -1)).transpose(1, 2) for t in (queries, self.keys, self.values))
        if q.is_meta:  # where torch would count its fallback, which stores all scores
            attended = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        out = attention.to_out[0](attended.transpose(1, 2).flatten(2))
        band.tensors[0] = out.transpose(1, 2).unflatten(2, rows.shape[2:]) + rows


def _tiny(network: Any) -> list[Layer]:
    layers: list[Layer] = []
    upsample = 1
    for module in network.layers:
        if type(module) is nn.Upsample:
            upsample = int(known(module, nn.Upsample, mode="nearest", scale_factor=2).scale_factor)
        elif upsample > 1:
            layers.append(Conv(module, upsample=upsample))
            upsample = 1
        else:
            layers += _layers(module)
    # What DecoderTiny.forward and EncoderTiny.forward do around their layers.
    if type(network) is vae.DecoderTiny:
        return [Pointwise(lambda x: torch.tanh(x / 3) * 3), *layers, Pointwise(lambda x: x.mul(2).sub(1))]
    return [Pointwise(lambda x: x.add(1).div(2)), *layers]


def _tiny_block(block: Any) -> list[Layer]:
    skip = block.skip if type(block.skip) is nn.Identity else known(block.skip, nn.Conv2d, **_POINTWISE)
    return [Save(skip), *_layers(*block.conv), Add(), Pointwise(block.fuse)]


def _shortened(conv: Any) -> list[Layer]:
    """The convolution next to the latents, and its shortcut."""
    more, fewer = conv.out_channels // conv.in_channels, conv.in_channels // conv.out_channels
    return [Save(), Conv(conv), Add(_repeated(more) if more else _mean(fewer))]


def _repeated(times: int) -> Callable[[Tensor], Tensor]:
    """A shortcut to more channels: each channel is repeated."""
    return lambda x: x.repeat_interleave(times, 1)


def _mean(of: int) -> Callable[[Tensor], Tensor]:
    """A shortcut to fewer channels: the mean of each group of ``of`` channels."""
    return lambda x: x.unflatten(1, (-1, of)).mean(2)


def _rms(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm over the channels of each pixel, in place."""
    wide = torch.promote_types(x.dtype, torch.float32)
    size = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
    x.mul_(size.square_().div_(x.shape[1]).add_(norm.eps).rsqrt_())
    return x.mul_(norm.weight[:, None, None]).add_(norm.bias[:, None, None])


def _feed_forward(block: Any) -> list[Layer]:
    known(block.nonlinearity, nn.SiLU)
    silu, gate = Pointwise(partial(F.silu, inplace=True)), Pointwise(_gated)
    first, depth, last = (Conv(conv) for conv in (block.conv_inverted, block.conv_depth, block.conv_point))
    return [Save(), first, silu, depth, gate, last, *_layers(block.norm), Add()]


def _gated(x: Tensor) -> Tensor:
    """The first half of the channels times SiLU of the second half, in place."""
    value, gate = x.chunk(2, 1)
    return value.mul_(F.silu(gate, inplace=True))


def _linear_attention(attention: Any) -> list[Layer]:
    known(attention.processor, attentions.SanaMultiscaleAttnProcessor2_0)
    known(attention.nonlinearity, nn.ReLU)
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out):
        known(layer, nn.Linear)
    scales = [Scales(attention.to_qkv_multiscale)] if len(attention.to_qkv_multiscale) else []
    project = Pointwise(partial(_projected, attention))
    return [Save(), project, *scales, LinearAttention(attention), *_layers(attention.norm_out), Add()]


def _projected(attention: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of each pixel: ``3 * inner`` channels, in this order."""
    pixels = x.movedim(1, -1)
    return torch.cat([to(pixels) for to in (attention.to_q, attention.to_k, attention.to_v)], 3).movedim(-1, 1)


class Scales(Conv):
    """The input, and after it in the channels its version by each depthwise ``proj_in`` and 1x1 ``proj_out``."""

    def __init__(self, projections: Any) -> None:
        for conv in (conv for one in projections for conv in (one.proj_in, one.proj_out)):
            same = tuple((side - 1) / 2 for side in conv.kernel_size)  # the padding that keeps the size
            known(conv, nn.Conv2d, bias=None, stride=(1, 1), dilation=(1, 1), padding=same, padding_mode="zeros")
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
        self.sums: Any = 0

    def _part(self, rows: Tensor, which: int) -> Tensor:
        """Queries (0), keys (1) or values (2) of a band, ``[B, heads, head_dim, pixels]``, float32."""
        part = rows.unflatten(1, (-1, 3, self.attention.attention_head_dim))[:, :, which].flatten(3)
        return (F.relu(part) if which < 2 else part).float()

    def update(self, rows: Tensor) -> None:
        key, value = self._part(rows, 1), self._part(rows, 2)
        self.sums = self.sums + torch.cat([value @ key.transpose(-1, -2), key.sum(-1)[:, :, None]], 2).double()

    def change(self, band: Band) -> None:
        attention, rows = self.attention, band.tensors[0]
        queries = self._part(rows, 0)
        both = self.sums.to(queries.dtype) @ queries
        attended = both[:, :, :-1].div_(both[:, :, -1:] + attention.eps).to(rows.dtype)
        del both
        attended = attended.flatten(1, 2).unflatten(2, rows.shape[2:])
        band.tensors[0] = attention.to_out(attended.movedim(1, -1)).movedim(-1, 1)


_POINTWISE: dict[str, Any] = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0)}
_PLAIN: dict[type, dict[str, Any]] = {  # the attributes without which a module computes something else
    Upsample2D: dict(use_conv=True, use_conv_transpose=False, interpolate=True, norm=None, name="conv"),
    Downsample2D: dict(use_conv=True, padding=0, norm=None),
    ResnetBlock2D: dict(time_emb_proj=None, upsample=None, downsample=None, output_scale_factor=1),
    attentions.Attention: dict(
        residual_connection=True, rescale_output_factor=1, spatial_norm=None, norm_q=None, norm_k=None
    ),
    dc.Decoder: dict(in_shortcut=True),
    dc.Encoder: dict(out_shortcut=True),
    dc.DCUpBlock2d: dict(interpolate=True, interpolation_mode="nearest", shortcut=True),
    dc.DCDownBlock2d: dict(downsample=False, shortcut=True),
    GLUMBConv: dict(norm_type="rms_norm", residual_connection=True),
    attentions.SanaMultiscaleLinearAttention: dict(residual_connection=True),
}
_LAYERS: dict[type, Callable[[Any], list[Layer]]] = {
    nn.Conv2d: lambda conv: [Conv(conv)],
    nn.ReLU: lambda relu: [Pointwise(relu)],
    nn.SiLU: lambda silu: [Pointwise(silu)],
    vae.Decoder: lambda kl: [*_layers(kl.conv_in, kl.mid_block, *kl.up_blocks), *_kl_output(kl)],
    vae.Encoder: lambda kl: [*_layers(kl.conv_in, *kl.down_blocks, kl.mid_block), *_kl_output(kl)],
    blocks.UpDecoderBlock2D: lambda block: _layers(*block.resnets, *(block.upsamplers or ())),
    blocks.DownEncoderBlock2D: lambda block: _layers(*block.resnets, *(block.downsamplers or ())),
    blocks.UNetMidBlock2D: _middle,
    Upsample2D: lambda up: [Conv(up.conv, upsample=2)],
    Downsample2D: lambda down: [Conv(down.conv, pad=(0, 1, 0, 1))],
    ResnetBlock2D: _resnet,
    attentions.Attention: _attention,
    vae.DecoderTiny: _tiny,
    vae.EncoderTiny: _tiny,
    blocks.AutoencoderTinyBlock: _tiny_block,
    nn.Sequential: lambda modules: _layers(*modules),
    dc.Decoder: lambda net: [
        *_shortened(net.conv_in),
        *_layers(*reversed(net.up_blocks), net.norm_out, net.conv_act, net.conv_out),
    ],
    dc.Encoder: lambda net: [*_layers(net.conv_in, *net.down_blocks), *_shortened(net.conv_out)],
    dc.ResBlock: lambda block: [Save(), *_layers(block.conv1, block.nonlinearity, block.conv2, block.norm), Add()],
    dc.EfficientViTBlock: lambda block: _layers(block.attn, block.conv_out),
    # The residual is repeated before Conv enlarges it by pixel shuffle.
    dc.DCUpBlock2d: lambda up: [Save(_repeated(up.repeats)), Conv(up.conv, upsample=2), Add()],
    dc.DCDownBlock2d: lambda down: [Save(), Conv(down.conv), Add(_mean(down.group_size))],
    GLUMBConv: _feed_forward,
    RMSNorm: lambda norm: [Pointwise(partial(_rms, norm))],
    attentions.SanaMultiscaleLinearAttention: _linear_attention,
}

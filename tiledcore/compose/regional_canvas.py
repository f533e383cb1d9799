"""Regions in canvas mode: each pixel's cross-attention uses the prompts that have a share in that pixel.

The network runs once over the whole canvas, with all prompts concatenated along the text tokens. Each cross-attention
layer splits them again and mixes the results by the shares at its resolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from tiledcore._diffusers import uncompiled
from tiledcore.canvas.attention import SELF
from tiledcore.geometry import Pair


class Shares:
    """The shares of the prompts at each level of a UNet, looked up by the number of image tokens."""

    def __init__(self) -> None:
        self.prompts = 1
        self._levels: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._key: Any = None

    def enter(self, weights: Tensor, levels: int, device: torch.device, dtype: torch.dtype) -> None:
        """Set the shares ``[P, H, W]`` of a canvas; each level has half the size of the one above, rounded up."""
        key = (id(weights), device, dtype)
        if key == self._key:
            return
        self._key, self.prompts, self._levels = key, len(weights), {}
        for level in range(levels):
            size: Pair = (-(-weights.shape[1] // 2**level), -(-weights.shape[2] // 2**level))
            pooled = F.interpolate(weights[None], size, mode="area")[0].flatten(1)
            at = [share.nonzero().flatten() for share in pooled]
            found = [(i.to(device), share[i].to(device, dtype)) for i, share in zip(at, pooled, strict=True)]
            self._levels[size[0] * size[1]] = found

    def level(self, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Per prompt: the indices of the tokens where it has a share, and the shares."""
        if tokens not in self._levels:
            raise ValueError(f"regions: a layer has {tokens} image tokens, which is no level of this canvas")
        return self._levels[tokens]


class RegionProcessor:
    """Cross-attention to several prompts: the layer's own processor runs once per prompt."""

    def __init__(self, inner: Any, shares: Shares) -> None:
        self.inner, self.shares = inner, shares

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("encoder_attention_mask: regions in canvas mode know no masked prompts; leave it out")
        out: Tensor | None = None
        texts = encoder_hidden_states.chunk(self.shares.prompts, 1)
        for text, (at, share) in zip(texts, self.shares.level(hidden_states.shape[1]), strict=True):
            if not len(at):
                continue
            part = self.inner(attn, hidden_states.index_select(1, at), text) * share[:, None]
            out = hidden_states.new_zeros(*hidden_states.shape[:2], part.shape[2]) if out is None else out
            out.index_add_(1, at, part)
        assert out is not None
        return out


class CanvasRegions:
    """Replaces the processors of a UNet's cross-attention layers, until :meth:`restore`.

    Raises:
        ValueError: the network is not a UNet.
        TypeError: a layer has a processor that cannot run on some of the pixels.
    """

    def __init__(self, network: Any) -> None:
        inner = uncompiled(network)
        if not isinstance(inner, UNet2DConditionModel):
            raise ValueError(
                f"regions with mode='canvas': {type(inner).__name__} joins text and image in one attention, which "
                "cannot be masked yet; use mode='tiles'"
            )
        self.shares, self._depth = Shares(), len(inner.config.block_out_channels)
        found = [(n, m) for n, m in inner.named_modules() if getattr(m, "is_cross_attention", False)]
        for name, layer in found:
            if type(layer.processor) not in SELF:
                raise TypeError(f"{name}: {type(layer.processor).__name__} cannot have regions; remove its adapter")
        self._former = [(layer, layer.processor) for _, layer in found]
        for layer, processor in self._former:
            layer.set_processor(RegionProcessor(processor, self.shares))

    def restore(self) -> None:
        for layer, processor in self._former:
            layer.set_processor(processor)

    def joined(self, prompts: list[dict[str, Any]], weights: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of forward with all prompts in them; a pooled text (SDXL) stays the global prompt's."""
        text = kwargs["encoder_hidden_states"]
        self.shares.enter(weights, self._depth, text.device, text.dtype)
        return {
            **kwargs,
            "encoder_hidden_states": torch.cat([{**kwargs, **p}["encoder_hidden_states"] for p in prompts], 1),
        }

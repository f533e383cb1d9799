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


class RegionProcessor:
    """Cross-attention to several prompts: the layer's own processor runs once per prompt."""

    def __init__(self, inner: Any, regions: CanvasRegions) -> None:
        self.inner, self.regions = inner, regions

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("encoder_attention_mask: regions in canvas mode know no masked prompts; leave it out")
        out: Tensor | None = None
        levels, tokens = self.regions.levels, hidden_states.shape[1]
        if tokens not in levels:
            raise ValueError(f"regions: a layer has {tokens} image tokens, which is no level of this canvas")
        for text, (at, share) in zip(encoder_hidden_states.chunk(len(levels[tokens]), 1), levels[tokens], strict=True):
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

    levels: dict[int, list[tuple[Tensor, Tensor]]]
    """By the number of image tokens of a level of the UNet, per prompt: the tokens where it has a share, the shares."""

    def __init__(self, network: Any) -> None:
        inner = uncompiled(network)
        if not isinstance(inner, UNet2DConditionModel):
            raise ValueError(
                f"regions with mode='canvas': {type(inner).__name__} joins text and image in one attention, which "
                "cannot be masked yet; use mode='tiles'"
            )
        self._depth = len(inner.config.block_out_channels)
        self._weights: Tensor | None = None
        found = [(n, m) for n, m in inner.named_modules() if getattr(m, "is_cross_attention", False)]
        for name, layer in found:
            if type(layer.processor) not in SELF:
                raise TypeError(f"{name}: {type(layer.processor).__name__} cannot have regions; remove its adapter")
        self._former = [(layer, layer.processor) for _, layer in found]
        for layer, processor in self._former:
            layer.set_processor(RegionProcessor(processor, self))

    def restore(self) -> None:
        for layer, processor in self._former:
            layer.set_processor(processor)

    def joined(self, prompts: list[dict[str, Any]], weights: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of forward with all prompts in them; a pooled text (SDXL) stays the global prompt's."""
        text = kwargs["encoder_hidden_states"]
        if self._weights is not weights:
            self._weights, self.levels = weights, {}
            for level in range(self._depth):  # each has half the size of the one above, rounded up
                size = (-(-weights.shape[1] // 2**level), -(-weights.shape[2] // 2**level))
                pooled = F.interpolate(weights[None], size, mode="area")[0].flatten(1)
                at = [share.nonzero().flatten() for share in pooled]
                found = [(i.to(text.device), share[i].to(text)) for i, share in zip(at, pooled, strict=True)]
                self.levels[size[0] * size[1]] = found
        texts = torch.cat([{**kwargs, **p}["encoder_hidden_states"] for p in prompts], 1)
        return {**kwargs, "encoder_hidden_states": texts}

"""The networks that can be tiled: how each one's forward maps to a canvas.

Every tile is an image of its own size whose positions start at 0, so no position is outside of what the network was
trained on. Where a pipeline passes positions (FLUX, Qwen-Image), the tile's replace the canvas'. Arguments that all
families share are in :mod:`tiledcore.tiles.conditioning`; where canvas and tiles are in the arguments, in
:mod:`tiledcore.tiles.layouts`. :data:`FAMILIES` are measured, predicted and known to canvas mode;
:mod:`tiledcore.tiles.more_families` has those for tile mode alone.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from tiledcore._diffusers import uncompiled
from tiledcore.tiles.family import Family as Family
from tiledcore.tiles.family import factor_of as factor_of
from tiledcore.tiles.layouts import IDS, SHAPES, pixart_tiles, z_image_canvas, z_image_tiles
from tiledcore.tiles.layouts import to_image as to_image
from tiledcore.tiles.layouts import to_tokens as to_tokens
from tiledcore.tiles.more_families import MORE, derived
from tiledcore.tiles.rare_families import RARE

FAMILIES: tuple[Family, ...] = (
    Family(
        diffusers.UNet2DConditionModel,
        sample="sample",
        canvas=lambda arguments: arguments["sample"],
        tiles=lambda tiles, arguments, pixels: {"sample": tiles},
        output=UNet2DConditionOutput,
        shifts=True,
    ),
    Family(diffusers.SD3Transformer2DModel, dynamic_shift=1.16),
    Family(
        diffusers.FluxTransformer2DModel,
        shifts=True,
        dynamic_shift=1.15,
        **IDS,
    ),
    Family(diffusers.PixArtTransformer2DModel, tiles=pixart_tiles),
    Family(diffusers.SanaTransformer2DModel),
    Family(
        diffusers.ZImageTransformer2DModel,
        patch=lambda network: network.config.all_patch_size[0],
        dynamic_shift=1.15,
        sample="x",
        timestep="t",
        clock=lambda timesteps: (1000 - timesteps) / 1000,
        canvas=z_image_canvas,
        tiles=z_image_tiles,
        prediction=lambda output, size: torch.stack(list(output)).squeeze(2),
        result=lambda prediction, sample: list(prediction.unsqueeze(2).unbind(0)),
    ),
    Family(
        diffusers.QwenImageTransformer2DModel,
        dynamic_shift=1.15,
        **SHAPES,
    ),
)


REFUSED = {
    "VisualClozePipeline": "its canvas is a table of several pictures, of which each must see the others",
    "VisualClozeGenerationPipeline": "its canvas is a table of several pictures, of which each must see the others",
    "QwenImageLayeredPipeline": "it makes pictures of 640x640 or 1024x1024 px only",
    "JoyImageEditPipeline": "it makes pictures of listed sizes near 1024x1024 px only",
}
"""Pipelines that cannot be tiled, by class name, and why."""


def network_of(pipe: Any) -> tuple[Any, Family]:
    """The network of a pipeline, compiled or not, and its family.

    Raises:
        TypeError: the pipeline has none, or cannot be tiled.
    """
    if (why := REFUSED.get(type(pipe).__name__)) is not None:
        raise TypeError(f"pipe={type(pipe).__name__}: cannot be tiled: {why}")
    networks = [getattr(pipe, name) for name in ("unet", "transformer") if getattr(pipe, name, None) is not None]
    for network in networks:
        inner = uncompiled(network)
        kind: Any = next(one for one in type(inner).__mro__ if "forward" in vars(one))  # not one of our subclasses
        factor_of(pipe)
        found = [
            family for family in (*RARE, *FAMILIES, *MORE) if isinstance(inner, family.model) and family.fits(inner)
        ]
        return network, found[0] if found else derived(kind)
    raise TypeError(f"pipe={type(pipe).__name__}: tiling needs a pipeline with a unet or a transformer; it has neither")

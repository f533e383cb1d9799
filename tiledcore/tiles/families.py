"""The networks that can be tiled: how each one's forward maps to a canvas.

Arguments that all families share are in :mod:`tiledcore.tiles.conditioning`; where canvas and tiles are in the
arguments, in :mod:`tiledcore.tiles.layouts`.
"""

from __future__ import annotations

import logging
from functools import cache
from inspect import signature
from typing import Any

import diffusers
from diffusers.models.controlnets.controlnet_xs import ControlNetXSOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from tiledcore._diffusers import uncompiled
from tiledcore.geometry import Pair
from tiledcore.tiles import layouts
from tiledcore.tiles.family import Arguments, Family, factor_of
from tiledcore.tiles.layouts import IDS, SHAPES, to_image, to_tokens

__all__ = ["FAMILIES", "Family", "check_size", "factor_of", "network_of", "to_image", "to_tokens"]

logger = logging.getLogger(__name__)


def _cogview_shift(tokens: int, steps: int, config: Any) -> float:
    root = (tokens / config.get("base_image_seq_len", 256)) ** 0.5
    return float(root * config.get("max_shift", 0.75) + config.get("base_shift", 0.25))


BRIA = IDS | {"patch": lambda network: 1, "clock": lambda timesteps: timesteps}  # tokens of one latent pixel
BACKWARDS: dict[str, Any] = {"clock": lambda timesteps: 1 - timesteps / 1000}
FRACTION: dict[str, Any] = {"clock": lambda timesteps: timesteps / 1000}

FAMILIES: tuple[Family, ...] = (
    Family(diffusers.UNet2DConditionModel, sample="sample", output=UNet2DConditionOutput, shifts=True),
    Family(diffusers.SD3Transformer2DModel, dynamic_shift=1.16),
    Family(diffusers.FluxTransformer2DModel, dynamic_shift=1.15, shifts=True, **IDS),
    Family(diffusers.PixArtTransformer2DModel, also=layouts.pixart),
    Family(diffusers.SanaTransformer2DModel),
    Family(
        diffusers.ZImageTransformer2DModel,
        patch=lambda network: network.config.all_patch_size[0],
        dynamic_shift=1.15,
        clock=lambda timesteps: (1000 - timesteps) / 1000,
        **layouts.LIST,
    ),
    Family(diffusers.QwenImageTransformer2DModel, dynamic_shift=1.15, **SHAPES),
)
"""Measured, predicted, and known to canvas mode."""

MORE: tuple[Family, ...] = (
    Family(
        diffusers.HunyuanImageTransformer2DModel,
        fits=lambda network: len(network.config.patch_size) == 3,  # the refiner's
        **layouts.FRAME,
    ),
    Family(diffusers.HunyuanImageTransformer2DModel),
    Family(
        diffusers.CosmosTransformer3DModel,
        clock=lambda timesteps: timesteps / (timesteps + 1000),
        also=layouts.cosmos,
        **layouts.FRAME,
    ),
    Family(
        diffusers.UNetControlNetXSModel, sample="sample", output=ControlNetXSOutput
    ),  # its hint is cut with the tile
    layouts.SideBySide(diffusers.DreamLiteUNetModel, dynamic_shift=1.16, output=UNet2DConditionOutput, **layouts.SIDES),
    layouts.Patches(diffusers.JoyImageEditPlusTransformer3DModel, **layouts.PATCHES),
    layouts.Row(diffusers.Ideogram4Transformer2DModel, **layouts.ROW),
    Family(diffusers.OmniGenTransformer2DModel, also=layouts.omnigen),
    layouts.GlmImage(diffusers.GlmImageTransformer2DModel, dynamic_shift=_cogview_shift, also=layouts.cogview),
    Family(
        diffusers.Flux2Transformer2DModel,
        dynamic_shift=lambda tokens, steps, config: compute_empirical_mu(tokens, steps),
        **IDS,
    ),
    Family(diffusers.ChromaTransformer2DModel, dynamic_shift=1.15, **IDS),
    Family(diffusers.LongCatImageTransformer2DModel, dynamic_shift=1.15, **IDS),
    Family(diffusers.OvisImageTransformer2DModel, dynamic_shift=1.15, **IDS),
    Family(diffusers.BriaTransformer2DModel, dynamic_shift=1.15, **BRIA),
    Family(diffusers.BriaFiboTransformer2DModel, dynamic_shift=1.15, **BRIA),
    Family(diffusers.BriaFibo2Transformer2DModel, dynamic_shift=1.15, **FRACTION),
    Family(diffusers.NucleusMoEImageTransformer2DModel, dynamic_shift=1.15, **SHAPES),
    Family(diffusers.QwenImage21Transformer2DModel, dynamic_shift=1.15, **layouts.QWEN21),
    Family(diffusers.Krea2Transformer2DModel, dynamic_shift=1.15, **layouts.KREA),
    Family(
        diffusers.AuraFlowTransformer2DModel,
        native=lambda pipe, network: getattr(network, "native_size", 1024 // factor_of(pipe)),
        **FRACTION,
    ),
    Family(diffusers.CogView3PlusTransformer2DModel, also=layouts.cogview),
    Family(diffusers.CogView4Transformer2DModel, dynamic_shift=_cogview_shift, also=layouts.cogview),
    Family(diffusers.HiDreamImageTransformer2DModel, timestep="timesteps"),
    Family(diffusers.HunyuanDiT2DModel, also=layouts.hunyuan),
    Family(diffusers.Lumina2Transformer2DModel, **BACKWARDS),
    Family(diffusers.LuminaNextDiT2DModel, also=layouts.lumina, **BACKWARDS),
    Family(diffusers.PRXTransformer2DModel, **FRACTION),
    Family(diffusers.Kandinsky5Transformer3DModel, **layouts.LAST),
)
"""For tile mode alone. A class derived from another one comes first, here before :data:`FAMILIES`."""

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
    name = type(pipe).__name__
    if name in REFUSED:
        raise TypeError(f"pipe={name}: cannot be tiled: {REFUSED[name]}")
    network = next((one for role in ("unet", "transformer") if (one := getattr(pipe, role, None)) is not None), None)
    if network is None:
        raise TypeError(f"pipe={name}: tiling needs a pipeline with a unet or a transformer; it has neither")
    factor_of(pipe)
    inner = uncompiled(network)
    for family in (*MORE, *FAMILIES):
        if isinstance(inner, family.model) and family.fits(inner):
            return network, family
    return network, derived(next(one for one in type(inner).__mro__ if "forward" in vars(one)))  # not our subclass


# ----------------------------------------------------------------------------- pipelines that choose another size

ROUNDED = 64  # px: pipelines may round a size by less than this
KEPT_BY = {
    "use_resolution_binning": "use_resolution_binning=False",
    "_auto_resize": "_auto_resize=False",
    "max_area": "max_area={area}",
}
"""Arguments of calls -> what keeps the size that was asked for."""
SET_BY = {
    "HiDreamImagePipeline": "pipe.default_sample_size={side}",
    "Kandinsky5T2IPipeline": "pipe.resolutions=[({width}, {height})]",
    "Kandinsky5I2IPipeline": "pipe.resolutions=[({width}, {height})]",
}
"""Pipelines -> what must be set on them before the call."""


def check_size(pipe: Any, given: dict[str, Any], made: Pair) -> None:
    """Compare ``height`` and ``width`` that the caller gave, by name in ``given``, with the canvas ``made``, both px.

    Raises:
        ValueError: they differ by more than a rounding, and the caller did not ask for that.
    """
    height, width = given.get("height"), given.get("width")
    if height is None or width is None or given.get("use_resolution_binning"):
        return
    if abs(height - made[0]) < ROUNDED and abs(width - made[1]) < ROUNDED:
        return
    name, takes = type(pipe).__name__, signature(type(pipe).__call__).parameters
    ways = [way for argument, way in KEPT_BY.items() if argument in takes]
    ways += [SET_BY[name]] if name in SET_BY else []
    area = height * width
    way = ", ".join(ways).format(area=area, side=round(area**0.5 / factor_of(pipe)), height=height, width=width)
    raise ValueError(
        f"height={height}, width={width}: {name} denoises an image of {made[1]}x{made[0]} px (width x height) instead; "
        + (f"give {way}" if way else "leave height and width out")
    )


# ----------------------------------------------------------------------------- a class that nobody has described

OWN = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "timestep", "guidance")
"""Arguments that mean the same in all networks: their sizes are not the canvas'."""


@cache
def derived(model: Any) -> Family:
    """The family of a class by the arguments of its forward; warns once.

    Raises:
        TypeError: forward has no canvas or no timestep.
    """
    names = list(signature(model.forward).parameters)
    sample = next((name for name in ("hidden_states", "sample") if name in names), None)
    timestep = next((name for name in ("timestep", "timesteps", "t") if name in names), None)
    if sample is None or timestep is None:
        raise TypeError(f"network={model.__name__}: its forward{tuple(names[1:])} has no canvas or no timestep")
    layout = IDS if "img_ids" in names else SHAPES if "img_shapes" in names else {}
    logger.warning("%s is not a known network: tiles are taken as images of their own size", model.__name__)
    return Derived(model, sample=sample, timestep=timestep, **layout)


class Derived(Family):
    """Checks that what forward takes and gives is what the names of its arguments say."""

    def tiles(self, tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
        """Refuses further arguments that have a tensor of the canvas' size."""
        changed = super().tiles(tiles, arguments, pixels)
        if "canvas_size" not in arguments:  # in the fused loop, whose pipelines are known
            return changed
        height, width = arguments["canvas_size"]
        counts = {height * width, (height // 2) * (width // 2)}  # latent pixels, tokens, and both behind the text
        text = arguments["encoder_hidden_states"].shape[1] if "encoder_hidden_states" in arguments else 0
        sizes = counts | {n + text for n in counts} | {n * side for n in (1, pixels) for side in (height, width)}
        for name, value in arguments.items():
            if name in changed or name in OWN or not isinstance(value, Tensor):
                continue
            if sizes & set(value.shape[1:-1] if value.ndim > 2 else value.shape[1:]) or "size" in name:
                raise ValueError(f"{name}: {tuple(value.shape)} has the canvas' size, and how to cut it is not known")
        return changed

    def prediction(self, output: Any, size: Pair) -> Tensor:
        found = super().prediction(output, size)
        if found.ndim != 4 or tuple(found.shape[2:]) != tuple(size):
            raise ValueError(f"{self.model.__name__}: gives {tuple(found.shape)} for a canvas of {size[0]}x{size[1]}")
        return found

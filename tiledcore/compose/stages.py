"""Staged generation: make a small image first, then enlarge and refine it in stages, so that it stays one image.

Tiles alone repeat the subject, because no tile sees the whole image. So the first stage makes one image of native
size. Each further stage enlarges it, adds noise, and denoises it in tiles, guided by the low frequencies of the smaller
image (``pull``). Progressive upscaling: DemoFusion (Du et al. 2024); here each stage is plain image-to-image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers import (
    AutoPipelineForImage2Image,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor

from tiledcore._diffusers import is_hinted
from tiledcore.compose.pictures import match_colour, size_px, to_tensor
from tiledcore.compose.regions import check_are_regions, check_regions, scale_regions
from tiledcore.compose.stage_plan import Stage, Staging, Upscaler, plan_stages, staging
from tiledcore.config import Execution, TilingConfig
from tiledcore.geometry import Pair, both
from tiledcore.tiles.families import network_of, to_image

STARTS_FROM_LATENTS = (UNet2DConditionModel, SD3Transformer2DModel, FluxTransformer2DModel)
"""Networks whose image-to-image pipelines in diffusers also take latents as the image."""


@dataclass(frozen=True)
class Cost:
    """The cost of one stage. A second-order scheduler evaluates twice as often as it has steps."""

    stage: Stage
    steps: int
    tiles: int
    canvases: float
    """Evaluations of the final canvas that cost the same: ``steps * area factor * area / final area``."""


def stage_tiling(stage: Stage, config: TilingConfig, native: Pair, factor: int, patch: int) -> TilingConfig:
    """The tiling of a stage: the caller's; but an image of ``native`` latent size is one tile unless it wraps."""
    height, width = stage.height // factor, stage.width // factor
    if stage.strength is None and not any(both(config.wrap)) and height * width <= 1.05 * native[0] * native[1]:
        return replace(config, mode="tiles", overlap=None, motion="still", tile=(height, width), halo=None)
    tile, wrap = config.tile_on((height, width), native), both(config.wrap)
    # A single tile on an axis that wraps would have a border there, so it is made smaller and several tiles meet.
    least = 8 * patch
    cut = tuple(
        max(least, min(t, n * 3 // 4) // least * least) if w and t >= n else t
        for t, n, w in zip(tile, (height, width), wrap, strict=True)
    )
    return config if cut == tile else replace(config, tile=cast(Pair, cut), overlap=None)


class StagePlan:
    """The stages of one image of ``size`` (height, width) px, and their cost.

    ``tiling`` is of the last stage, ``start`` the size of the image that the first stage enlarges, or None.
    """

    def __init__(self, pipe: Any, size: Pair, config: Staging, tiling: TilingConfig, start: Pair | None = None) -> None:
        network, family = network_of(pipe.pipe)
        self.native = both(family.native(pipe.pipe, network))
        self.factor, self.patch = int(pipe.vae_scale_factor), family.patch(network)
        self.config, self.tiling = config, tiling
        self.network = family.model
        native_px = (self.native[0] * self.factor, self.native[1] * self.factor)
        self.stages = plan_stages(size, native_px, self.factor * self.patch, config, start)

    def tilings(self) -> list[TilingConfig]:
        """The tiling of each stage. Only the last stage blends: later stages redraw the seams of earlier ones."""
        config = self.tiling.refining()
        moving = config
        if config.moving is not None and config.moving.blend_last:
            moving = replace(config, motion=replace(config.moving, blend_last=0), overlap=None)
        return [
            stage_tiling(s, config if s is self.stages[-1] else moving, self.native, self.factor, self.patch)
            for s in self.stages
        ]

    def costs(self, steps: int) -> list[Cost]:
        """The cost of each stage, for a call of ``steps`` steps.

        Raises:
            ValueError: a stage's strength leaves no step.
        """
        final = self.stages[-1].height * self.stages[-1].width
        costs = []
        for stage, tiling in zip(self.stages, self.tilings(), strict=True):
            grid = tiling.grid(stage.height // self.factor, stage.width // self.factor, self.native)
            count = steps if stage.strength is None else steps_left(self.network, steps, stage.strength)
            if count < 1:
                raise ValueError(f"stages: strength={stage.strength} leaves none of {steps} steps")
            area = tiling.area_factor(grid, count)
            share = stage.height * stage.width / final
            costs.append(Cost(stage, count, len(grid), count * area * share))
        return costs


def steps_left(network: type, steps: int, strength: float) -> int:
    """The steps that run on an image, as in diffusers' image-to-image pipelines; those of UNets round down."""
    kept = steps * strength
    return int(kept) if network is UNet2DConditionModel else steps - int(max(steps - kept, 0))


def plan_call(pipe: Any, call: dict[str, Any]) -> StagePlan:
    """The plan of a call of a :class:`~tiledcore.pipeline.TiledPipeline`; ``call`` has its arguments by name.

    Raises:
        ValueError: the stages do not lead to the size, or a strength leaves no step.
    """
    image = call.get("image")
    start = None if image is None else size_px(image, pipe.vae_scale_factor)
    config = staging(call["stages"]) or Staging()
    strength = call.get("strength")
    config = replace(
        config,
        pull=call.get("pull") or config.pull,
        strength=config.strength if strength is None else strength,
    )
    network, family = network_of(pipe.pipe)
    native = both(family.native(pipe.pipe, network))
    default = start or (native[0] * pipe.vae_scale_factor, native[1] * pipe.vae_scale_factor)
    size = (call.get("height") or default[0], call.get("width") or default[1])
    plan = StagePlan(pipe, size, config, call.get("tiling") or pipe.tiling, start)
    steps = call.get("num_inference_steps")
    plan.costs(
        signature(type(pipe.pipe).__call__).parameters["num_inference_steps"].default if steps is None else steps
    )
    return plan


def from_pictures(pipe: Any, arguments: dict[str, Any], options: Any, execution: Execution | None) -> Any:
    """Run a call of a TiledPipeline that has stages, ``keep_colour``, or both.

    ``arguments`` are those of the call by name, ``options`` is its :class:`~tiledcore.call.Options`.

    Raises:
        ValueError: names an argument that does not go with stages or ``keep_colour``.
    """
    for name in ("rows", "checkpoint"):
        if getattr(options, name):
            raise ValueError(f"{name}: not with stages or keep_colour; leave it out, or give stages=None")
    image, config = arguments.pop("image", None), staging(options.stages)
    texts = {"regions": options.regions, "prompt_for_tile": options.prompt_for_tile}
    if config is not None and not (options.prompt_for_tile is None or callable(options.prompt_for_tile)):
        raise ValueError("prompt_for_tile: each stage has its own tiles; give a function of a tile's box, not a list")
    if options.keep_colour and image is None:
        raise ValueError("keep_colour: needs an image whose colours to keep; give image= too")
    if options.keep_colour and arguments.get("output_type") == "latent":
        raise ValueError("keep_colour: works on pixels, and output_type='latent' has none")
    source = None if image is None else to_tensor(image)
    call = arguments | {"execution": execution, "preview": options.preview}
    if config is None:
        result = pipe(image=image, tiling=options.tiling, pull=options.pull, stages=None, **texts, **call)
    else:
        if image is not None and any(getattr(region, "seed", None) is not None for region in options.regions):
            raise ValueError("regions: a seed is of initial noise, and a call with image= has none; leave one out")
        _check_stages(pipe.pipe, config, arguments | {"image": image})
        given = {"image": source, "tiling": options.tiling, "stages": config, "pull": options.pull}
        rest = {name: value for name, value in call.items() if name not in ("height", "width", "strength")}
        plan = plan_call(pipe, arguments | given)
        check_are_regions(options.regions)
        check_regions(options.regions, plan.stages[-1].width, plan.stages[-1].height, both(plan.tiling.wrap))
        result = run(pipe, plan, rest | texts, source)
    if not options.keep_colour or source is None:
        return result
    images = match_colour(result[0], source)
    if isinstance(result, tuple):
        return (images, *result[1:])
    result.images = images
    return result


def _check_stages(pipe: Any, config: Staging, call: dict[str, Any]) -> None:
    """Check that the model has an image-to-image pipeline, and that this takes the arguments of the call."""
    for argument in ("latents", "mask_image", "sigmas", "timesteps"):
        if call.get(argument) is not None:
            raise ValueError(f"{argument}: not with stages; leave it out, or give stages=None")
    if config.upscale == "latent" and network_of(pipe)[1].model not in STARTS_FROM_LATENTS:
        raise ValueError(
            f"stages: upscale='latent' needs a pipeline that starts from latents (Stable Diffusion, SDXL, SD3, FLUX), "
            f"and {type(pipe).__name__} does not; give upscale='bicubic'"
        )
    name, known = type(pipe).__name__, signature(type(pipe).__call__).parameters
    if is_hinted(pipe):
        raise ValueError(f"stages: {name} is not refined in stages; give stages=None")
    if "image" in known:
        if call.get("image") is None:
            raise ValueError(f"stages: {name} starts from an image; give image= too")
        return
    try:
        sibling = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise ValueError(f"stages: {name} has no image-to-image pipeline in diffusers") from error
    takes = signature(type(sibling).__call__).parameters
    for argument in call:
        if argument in known and argument not in takes and argument not in ("height", "width", "image"):
            raise ValueError(f"stages: {type(sibling).__name__}, which refines them, has no {argument}; leave it out")


def run(pipe: Any, plan: StagePlan, call: dict[str, Any], image: Tensor | None = None) -> Any:
    """Make an image stage by stage; returns the result of the last stage's pipeline.

    ``call`` has the arguments without size, image, tiling, strength and pull; ``image`` is ``[B, 3, H, W]`` in 0..1
    that the first stage enlarges, if the plan has one.
    """
    return_dict, output_type = call.get("return_dict", True), call.get("output_type", "pil")
    call = {name: value for name, value in call.items() if name not in ("return_dict", "output_type")}
    latent, held, first = plan.config.upscale == "latent", False, image
    result: Any = None
    for stage, tiling in zip(plan.stages, plan.tilings(), strict=True):
        last, size = stage is plan.stages[-1], (stage.height, stage.width)
        latent_size = (stage.height // plan.factor, stage.width // plan.factor)
        kwargs = {**call, "tiling": tiling, "height": stage.height, "width": stage.width, "stages": None}
        kwargs |= texts_of_stage(call, size, (plan.stages[-1].height, plan.stages[-1].width), first is not None)
        if stage.strength is not None:
            assert image is not None, "a stage with a strength comes after a picture"
            larger = enlarge_latents(image, latent_size) if held else enlarge(image, size, plan.config.upscale)
            kwargs |= {"image": larger, "strength": stage.strength, "pull": plan.config.pull}
        kind = output_type if last else "latent" if latent else "pt"
        result = pipe(output_type=kind, **kwargs)
        if stage.strength is not None and plan.config.match and not latent and kind != "latent":
            assert first is not None
            result.images = match_colour(result.images, first, wrap=both(plan.tiling.wrap))
        if last:
            break
        held = latent
        image = _unpacked(pipe.pipe, result.images, *latent_size) if held else result.images.float().clamp(0, 1)
        first = image if first is None else first
    return result if return_dict else result.to_tuple()


def texts_of_stage(call: dict[str, Any], size: Pair, final: Pair, refines: bool) -> dict[str, Any]:
    """``regions`` and ``prompt_for_tile``, which are of the ``final`` size (height, width) px, for a stage of ``size``.

    A stage that ``refines`` starts from the picture before it: its regions have no noise of their own.
    """
    regions, prompt = scale_regions(call.get("regions") or (), final, size), call.get("prompt_for_tile")
    if refines:
        regions = [replace(region, seed=None) for region in regions]
    if prompt is None:
        return {"regions": regions}
    y, x = final[0] / size[0], final[1] / size[1]
    return {
        "regions": regions,
        "prompt_for_tile": lambda box: prompt(
            tuple(round(n * scale) for n, scale in zip(box, (x, y, x, y), strict=True))
        ),
    }


def enlarge(image: Tensor, size: Pair, upscale: Literal["bicubic", "latent"] | Upscaler) -> Tensor:
    """An image ``[B, 3, h, w]`` in 0..1 at another size (height, width), in 0..1: bicubic or by a function.

    Raises:
        ValueError: the function returned another shape.
    """
    if callable(upscale):
        enlarged = upscale(image, size)
        wanted = (*image.shape[:2], *size)
        if not isinstance(enlarged, Tensor) or enlarged.shape != wanted:
            got = tuple(enlarged.shape) if isinstance(enlarged, Tensor) else type(enlarged).__name__
            raise ValueError(f"stages: upscale must return a tensor of shape {wanted}, got {got}")
    else:
        enlarged = F.interpolate(image, size, mode="bicubic", antialias=True)
    return enlarged.clamp(0, 1)


def enlarge_latents(latents: Tensor, size: Pair) -> Tensor:
    """Latents ``[B, C, h, w]`` at another size (height, width): bicubic, with each channel's mean and variance.

    Interpolation alone lowers the variance, which removes contrast and detail.
    """
    source = latents.float()
    enlarged = F.interpolate(source, size, mode="bicubic", antialias=True)
    mean, spread = (function(source, dim=(2, 3), keepdim=True) for function in (torch.mean, torch.std))
    found = enlarged - enlarged.mean((2, 3), keepdim=True)
    scale = spread / found.std((2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (found * scale + mean).to(latents.dtype)


def _unpacked(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """The latents that a pipeline returned, as ``[B, C, height, width]``; they may be tokens."""
    network, family = network_of(pipe)
    if not family.packed:
        return latents
    patch = family.patch(network)
    return F.pixel_shuffle(to_image(latents, (height // patch, width // patch)), patch)

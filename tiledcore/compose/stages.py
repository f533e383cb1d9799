"""Staged generation: make a small image first, then enlarge and refine it in stages, so that it stays one image.

Tiles alone repeat the subject, because no tile sees the whole image. So the first stage makes one image of native
size. Each further stage enlarges it, adds noise, and denoises it in tiles, guided by the low frequencies of the smaller
image (``pull``). Progressive upscaling: DemoFusion (Du et al. 2024); here each stage is plain image-to-image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal

import torch.nn.functional as F
from diffusers import AutoPipelineForImage2Image, UNet2DConditionModel
from torch import Tensor

from tiledcore import validate
from tiledcore._diffusers import is_hinted
from tiledcore.compose.pictures import match_colour, size_px, to_tensor
from tiledcore.compose.regions import check_regions, scale_regions
from tiledcore.config import TilingConfig
from tiledcore.geometry import Pair, both
from tiledcore.schedulers.pull import Pull
from tiledcore.tiles.families import network_of


@dataclass(frozen=True)
class Stage:
    """One stage makes an image of ``width`` by ``height`` px.

    ``strength`` is the share of the steps that run on the enlarged image, above 0 up to 1; None, in the first stage
    only: generate from noise.
    """

    width: int
    height: int
    strength: float | None

    def __post_init__(self) -> None:
        validate.integer("stages: width", self.width, 1)
        validate.integer("stages: height", self.height, 1)
        if self.strength is not None and not (isinstance(self.strength, int | float) and 0 < self.strength <= 1):
            raise ValueError(f"stages: strength={self.strength!r} must be above 0 up to 1")


@dataclass(frozen=True)
class Staging:
    """How stages are planned and refined.

    Args:
        factor: largest enlargement per stage and side, above 1 up to 4.
        strength: of every stage but the first, above 0 up to 1.
        pull: toward the low frequencies of the smaller image; None: no pull.
        match: give each refined image the lowest frequencies of the first one (``match_colour``).
        sizes: the stages themselves; the last one has the size of the call.

    Raises:
        ValueError: names the argument, its value and what is valid.
    """

    factor: float = 2.0
    strength: float = 0.6
    pull: Pull | None = field(default_factory=Pull)
    match: bool = True
    sizes: tuple[Stage, ...] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.factor, int | float) and 1 < self.factor <= 4):
            raise ValueError(f"stages: factor={self.factor!r} must be above 1 and at most 4")
        Stage(1, 1, self.strength)  # checks the strength
        validate.choice("stages: match", self.match, (True, False))
        if not all(isinstance(stage, Stage) for stage in self.sizes or ()):
            raise ValueError(f"stages: sizes={self.sizes!r} must be Stages")


Stages = Literal["auto"] | Staging | Sequence[Stage] | None
"""What ``stages=`` takes: planned with defaults, planned as given, a list of stages, or no stages."""


def staging(stages: Stages) -> Staging | None:
    """``stages=`` as a :class:`Staging`; raises TypeError or ValueError for what is not of :data:`Stages`."""
    if stages is None or isinstance(stages, Staging):
        return stages
    if isinstance(stages, str) and stages == "auto":
        return Staging()
    if isinstance(stages, list | tuple) and all(isinstance(stage, Stage) for stage in stages):
        if not stages:
            raise ValueError("stages=[]: give at least one Stage, or None")
        return Staging(sizes=tuple(stages))
    raise TypeError(f"stages={stages!r}: must be None, 'auto', a Staging or a list of Stage")


def plan_stages(size: Pair, native: Pair, multiple: int, config: Staging, start: Pair | None = None) -> list[Stage]:
    """The stages from the ``native`` size, or from an image of size ``start``, to ``size``, all (height, width) in px.

    The first stage has the native area and the aspect ratio of ``size``, but no side below half of the native one.
    The others all enlarge by one ratio, and there are as few as ``config.factor`` allows. Every side is a multiple of
    ``multiple``. Raises ValueError where ``size`` is no multiple, or the given stages do not lead to it.
    """
    height, width = size
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise ValueError(f"size {width}x{height}: each side must be a multiple of {multiple} px")
    if config.sizes is not None:
        return _check_given(config.sizes, size, multiple, start)

    def rounded(side: float) -> int:
        return max(multiple, round(side / multiple) * multiple)

    begin = start
    if begin is None:
        area = math.sqrt(native[0] * native[1] / (height * width))
        scale = min(1.0, max(area, min(native) / 2 / min(size)))
        begin = (rounded(scale * height), rounded(scale * width))
    total = max(height / begin[0], width / begin[1])
    # The 0.02: rounding of the native size must not cost one more stage.
    count = max(0 if start is None else 1, math.ceil(math.log(total) / math.log(config.factor) - 0.02))
    h, w = begin if count else size  # equal to the native size up to rounding
    stages = [Stage(w, h, None)] if start is None else []
    for index in range(1, count + 1):
        # Each axis has its own ratio, because a given image may have another aspect ratio than the result.
        h, w = (rounded(a * (b / a) ** (index / count)) for a, b in zip(begin, size, strict=True))
        stages.append(Stage(w, h, config.strength))
    return stages


def _check_given(stages: Sequence[Stage], size: Pair, multiple: int, start: Pair | None) -> list[Stage]:
    made = f"{stages[-1].width}x{stages[-1].height}"
    if made != f"{size[1]}x{size[0]}":
        raise ValueError(f"stages: the last one is {made} px, but the call's size is {size[1]}x{size[0]}")
    for index, stage in enumerate(stages):
        name = f"stage {index + 1} of {stage.width}x{stage.height} px"
        if (stage.strength is None) != (index == 0 and start is None):
            raise ValueError(
                f"{name}: strength={stage.strength}: a first stage without image= takes None, and only that"
            )
        if stage.width % multiple or stage.height % multiple:
            raise ValueError(f"{name}: each side must be a multiple of {multiple} px")
        if index and (stage.width < stages[index - 1].width or stage.height < stages[index - 1].height):
            raise ValueError(f"{name}: is smaller than the stage before it")
    return list(stages)


@dataclass(frozen=True)
class Cost:
    """The cost of one stage. A second-order scheduler evaluates twice as often as it has steps."""

    stage: Stage
    steps: int
    tiles: int
    canvases: float  # Evaluations of the final canvas that cost the same: steps * area factor * area / final area


class StagePlan:
    """The stages of one image of ``size`` (height, width) px, and their cost.

    ``tiling`` is of the last stage, ``start`` the size of the image that the first stage enlarges, or None.
    """

    def __init__(self, pipe: Any, size: Pair, config: Staging, tiling: TilingConfig, start: Pair | None = None) -> None:
        network, family = network_of(pipe.pipe)
        self.native = both(family.native(pipe.pipe, network))
        self.factor, self.patch = int(pipe.vae_scale_factor), family.patch(network)
        self.config, self.tiling, self.network = config, tiling, family.model
        native_px = (self.native[0] * self.factor, self.native[1] * self.factor)
        self.stages = plan_stages(size, native_px, self.factor * self.patch, config, start)

    def tilings(self) -> list[TilingConfig]:
        """The tiling of each stage. Only the last stage blends: later stages redraw the seams of earlier ones."""
        config = moving = self.tiling.refining()
        if config.moving is not None and config.moving.blend_last:
            moving = replace(config, motion=replace(config.moving, blend_last=0), overlap=None)
        return [self._tiling(stage, config if stage is self.stages[-1] else moving) for stage in self.stages]

    def _tiling(self, stage: Stage, config: TilingConfig) -> TilingConfig:
        """The tiling of a stage: as given; but an image of the native latent size is one tile unless it wraps."""
        size, wrap = (stage.height // self.factor, stage.width // self.factor), both(config.wrap)
        if stage.strength is None and not any(wrap) and math.prod(size) <= 1.05 * math.prod(self.native):
            return replace(config, mode="tiles", overlap=None, motion="still", tile=size, halo=None)
        tile, least = config.tile_on(size, self.native), 8 * self.patch
        # A single tile on an axis that wraps would have a border there, so it is made smaller and several tiles meet.
        y, x = (
            max(least, min(t, n * 3 // 4) // least * least) if w and t >= n else t
            for t, n, w in zip(tile, size, wrap, strict=True)
        )
        return config if (y, x) == tile else replace(config, tile=(y, x), overlap=None)

    def costs(self, steps: int) -> list[Cost]:
        """The cost of each stage, for a call of ``steps`` steps; ValueError where a strength leaves none."""
        final = self.stages[-1].height * self.stages[-1].width
        costs = []
        for stage, tiling in zip(self.stages, self.tilings(), strict=True):
            grid = tiling.grid(stage.height // self.factor, stage.width // self.factor, self.native)
            count = steps if stage.strength is None else steps_left(self.network, steps, stage.strength)
            if count < 1:
                raise ValueError(f"stages: strength={stage.strength} leaves none of {steps} steps")
            share = stage.height * stage.width / final
            costs.append(Cost(stage, count, len(grid), count * tiling.area_factor(grid, count) * share))
        return costs


def steps_left(network: type, steps: int, strength: float) -> int:
    """The steps that run on an image, as in diffusers' image-to-image pipelines; those of UNets round down."""
    kept = steps * strength
    return int(kept) if network is UNet2DConditionModel else steps - int(max(steps - kept, 0))


def plan_call(pipe: Any, call: dict[str, Any]) -> StagePlan:
    """The plan of a call of a :class:`~tiledcore.TiledPipeline`, checked; ``call`` has its arguments by name."""
    image, steps = call.get("image"), call.get("num_inference_steps")
    start = None if image is None else size_px(image, pipe.vae_scale_factor)
    config = staging(call["stages"]) or Staging()
    strength = config.strength if call.get("strength") is None else call["strength"]
    config = replace(config, pull=call.get("pull") or config.pull, strength=strength)
    network, family = network_of(pipe.pipe)
    height, width = start or (pipe.vae_scale_factor * side for side in both(family.native(pipe.pipe, network)))
    size = (call.get("height") or height, call.get("width") or width)
    plan = StagePlan(pipe, size, config, call.get("tiling") or pipe.tiling, start)
    if steps is None:
        steps = signature(type(pipe.pipe).__call__).parameters["num_inference_steps"].default
    plan.costs(steps)
    return plan


def from_pictures(pipe: Any, arguments: dict[str, Any], options: Any) -> Any:
    """Run a call of a TiledPipeline that has stages, ``keep_colour``, or both; ``arguments`` are given by name."""
    for name in ("rows", "checkpoint"):
        if getattr(options, name):
            raise ValueError(f"{name}: not with stages or keep_colour; leave it out, or give stages=None")
    image, config = arguments.get("image"), staging(options.stages)
    if options.keep_colour and image is None:
        raise ValueError("keep_colour: needs an image whose colours to keep; give image= too")
    if options.keep_colour and arguments.get("output_type") == "latent":
        raise ValueError("keep_colour: works on pixels, and output_type='latent' has none")
    source = None if image is None else to_tensor(image)
    given = arguments | vars(options) | {"stages": config}
    del given["keep_colour"]
    if config is None:
        result = pipe(**given)
    else:
        if isinstance(options.prompt_for_tile, list | tuple):
            raise ValueError(
                "prompt_for_tile: each stage has its own tiles; give a function of a tile's box, not a list"
            )
        if image is not None and any(region.seed is not None for region in options.regions):
            raise ValueError("regions: a seed is of initial noise, and a call with image= has none; leave one out")
        _check_stages(pipe.pipe, arguments)
        plan = plan_call(pipe, given | {"image": source})
        check_regions(options.regions, plan.stages[-1].width, plan.stages[-1].height, both(plan.tiling.wrap))
        result = run(pipe, plan, given, source)
    return result if not options.keep_colour or source is None else _coloured(result, source)


def _coloured(result: Any, source: Tensor, wrap: tuple[bool, bool] = (False, False)) -> Any:
    """A pipeline's result, an object or a tuple, with :func:`match_colour` of its images."""
    images = match_colour(result[0], source, wrap=wrap)
    if isinstance(result, tuple):
        return (images, *result[1:])
    result.images = images
    return result


def _check_stages(pipe: Any, call: dict[str, Any]) -> None:
    """Check that the model has an image-to-image pipeline, and that this takes the arguments of the call."""
    for argument in ("latents", "mask_image", "sigmas", "timesteps"):
        if call.get(argument) is not None:
            raise ValueError(f"{argument}: not with stages; leave it out, or give stages=None")
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
    takes = {*signature(type(sibling).__call__).parameters, "height", "width"}
    for argument in call:
        if argument in known and argument not in takes:
            raise ValueError(f"stages: {type(sibling).__name__}, which refines them, has no {argument}; leave it out")


def run(pipe: Any, plan: StagePlan, call: dict[str, Any], image: Tensor | None = None) -> Any:
    """Make an image stage by stage, by the arguments of ``call``; returns the result of the last stage's pipeline.

    ``image``, ``[B, 3, H, W]`` in 0..1, is what the first stage enlarges, if the plan has one.
    """
    output_type, result = call.get("output_type", "pil"), None
    call = {name: value for name, value in call.items() if name not in ("image", "strength", "pull")}
    final, first, wrap = plan.stages[-1], image, both(plan.tiling.wrap)
    size, prompt = (final.height, final.width), call["prompt_for_tile"]
    for stage, tiling in zip(plan.stages, plan.tilings(), strict=True):
        if result is not None:
            image = result[0].float().clamp(0, 1)
            first = image if first is None else first
        kind = output_type if stage is final else "pt"
        more: dict[str, Any] = {"height": stage.height, "width": stage.width, "tiling": tiling, "output_type": kind}
        more |= {"stages": None, "regions": scale_regions(call["regions"], size, (stage.height, stage.width))}
        if prompt is not None:
            scales = 2 * (final.width / stage.width, final.height / stage.height)
            more["prompt_for_tile"] = lambda box, scales=scales: prompt(
                tuple(round(n * scale) for n, scale in zip(box, scales, strict=True))
            )
        if image is not None:
            enlarged = F.interpolate(image, (stage.height, stage.width), mode="bicubic", antialias=True).clamp(0, 1)
            more |= {"image": enlarged, "strength": stage.strength, "pull": plan.config.pull}
            more["regions"] = [replace(region, seed=None) for region in more["regions"]]  # it has no noise of its own
        result = pipe(**call | more)
        if first is not None and plan.config.match and kind != "latent":
            result = _coloured(result, first, wrap)
    return result

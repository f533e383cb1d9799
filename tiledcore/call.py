"""Call: one call of a TiledPipeline as an object, with arguments, size, image and tiling resolved."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

from tiledcore import validate
from tiledcore._diffusers import device_of, is_hinted, share_settings
from tiledcore.compose.pictures import resized, size_px
from tiledcore.compose.regional import Regional, drawn_latents
from tiledcore.compose.regions import Region, seed_noise
from tiledcore.compose.stages import Stages, steps_left
from tiledcore.compose.tile_prompts import PromptForTile, TilePrompts
from tiledcore.config import Execution, TilingConfig
from tiledcore.feature import Feature, Features
from tiledcore.geometry import Pair, both
from tiledcore.hook import NetworkHook, default_tiling, tiled, with_fade
from tiledcore.io.preview import Preview, Previewing
from tiledcore.io.stream import CPU_BUDGET, Rows, Streamed
from tiledcore.loop.checkpoint import Checkpoint, locked
from tiledcore.loop.engine import Engine
from tiledcore.loop.graph import CudaBackend, StepGraphs
from tiledcore.memory.planner import Budget, Plan, within
from tiledcore.parallel.ranks import Ranks, options_of, same_call, sharing
from tiledcore.parallel.slabs import divided, slabs
from tiledcore.schedulers.pull import Pull, Pulling
from tiledcore.tiles.fade import Fade
from tiledcore.tiles.families import factor_of, network_of
from tiledcore.utils import labelled, replaced
from tiledcore.vae.exact import exact_bands, rows_of, why_not_exact
from tiledcore.vae.wrap import continuation, wrapped

logger = logging.getLogger(__name__)

# Larger images are decoded and encoded in exact row bands; smaller ones by the autoencoder as it is. An untiled SDXL
# decoder needs 24 GiB of activations at 4096x4096.
EXACT_DECODE_PIXELS = 2048 * 2048
DEPRECATED = ("callback", "callback_steps")  # of Stable Diffusion, in its ``**kwargs``, where any name would pass


@dataclass(frozen=True)
class Options:
    """Arguments of a TiledPipeline call that the wrapped pipeline does not have; None: the pipeline's default."""

    tiling: TilingConfig | None
    execution: Execution
    regions: Sequence[Region]
    prompt_for_tile: PromptForTile | None
    rows: Rows | None
    checkpoint: Checkpoint | None
    pull: Pull | None
    stages: Stages
    keep_colour: bool
    preview: Preview | None

    @classmethod
    def of(cls, regions: Any, **others: Any) -> Self:
        """Check options; paths become a :class:`Checkpoint` and a :class:`Preview`, which check them."""
        for name, kind in {"checkpoint": Checkpoint, "preview": Preview}.items():
            if isinstance(others[name], str | PathLike):
                others[name] = kind(Path(others[name]))
        if isinstance(regions, Region):
            raise TypeError("regions: must be a list of tiledcore.Region, and is one alone")
        options = cls(regions=regions or (), **others)
        for i, region in enumerate(options.regions):
            if not isinstance(region, Region):
                raise TypeError(f"regions[{i}]={region!r}: must be a tiledcore.Region")
        per_tile, rows, pull = options.prompt_for_tile, options.rows, options.pull
        if not (per_tile is None or callable(per_tile) or isinstance(per_tile, list | tuple)):
            raise TypeError(f"prompt_for_tile={per_tile!r}: must be a function of a tile's box, or a list of prompts")
        if not (rows is None or callable(rows)):
            raise TypeError(f"rows={rows!r}: must be a function of an iterator of bands")
        if not (pull is None or isinstance(pull, Pull)):
            raise TypeError(f"pull={pull!r}: must be a tiledcore.Pull")
        if per_tile is not None and options.regions:
            raise ValueError("prompt_for_tile, regions: both say where prompts are; leave out one of them")
        if callable(per_tile) and options.checkpoint is not None:
            raise ValueError("checkpoint: cannot compare a function when it goes on; give prompt_for_tile as a list")
        return options


def bind(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, with checked sizes; positional ones are named by the signature of ``pipe``."""
    names = list(signature(type(pipe).__call__).parameters)[1:]
    if len(args) > len(names):
        raise TypeError(f"{type(pipe).__name__} takes {len(names)} positional arguments, and {len(args)} were given")
    named = dict(zip(names, args, strict=False))
    if twice := named.keys() & kwargs.keys():
        raise TypeError(f"{min(twice)}: given by position and by name")
    named |= kwargs
    for name in ("height", "width", "num_inference_steps"):
        if isinstance(value := named.get(name), np.integer):
            named[name] = int(value)
        elif value is not None:
            validate.integer(name, value, 1)
    if named.get("strength") is not None:
        validate.real("strength", named["strength"], 0, 1)
    return named


@dataclass(frozen=True)
class Call:
    """One resolved call; :meth:`run` makes the image."""

    pipe: Any  # That runs: the wrapped one, or its image-to-image or inpainting sibling on the same weights
    arguments: dict[str, Any]  # Of its call, by name
    tiling: TilingConfig
    execution: Execution
    options: Options
    size: Pair | None  # (height, width) of the image in px; None if the pipeline decides
    plan: Plan | None
    ranks: Ranks | None  # The processes that make the same call; None: only this one

    @classmethod
    def resolve(
        cls, pipe: Any, arguments: dict[str, Any], options: Options, budget: Budget | None, ranks: Ranks | None
    ) -> Self:
        """Resolve pipeline, image, size, tiling and plan of a call of ``pipe``; ``arguments`` are given by name."""
        tiling, execution = options.tiling or default_tiling(pipe), options.execution
        if ranks is not None:
            more = settings_in(tiling, options) | vars(execution) | {"pull": str(options.pull)}
            same_call(ranks, pipe, arguments, more)
            options = options_of(ranks, options)
        runs = sibling(pipe, arguments)
        takes = signature(type(runs).__call__).parameters
        if "use_resolution_binning" in takes:
            arguments.setdefault("use_resolution_binning", False)
        size = _with_size(runs, arguments)
        if unknown := [name for name in arguments if name not in (*takes, *DEPRECATED)] if "prompt" in takes else ():
            raise TypeError(f"{unknown[0]}: {type(runs).__name__} has no such argument; leave it out")
        if (image := arguments.get("image")) is not None:
            tiling = tiling.refining()
            _check_strength(runs, arguments)
        plan = None
        if budget is not None:
            # Canvas mode does not have all of these for every network.
            only_tiles = options.regions or options.prompt_for_tile is not None or is_hinted(runs)
            plan = budget.plan(runs, arguments, size, tiling if options.tiling or only_tiles else None, execution)
            tiling, execution = plan.tiling if image is None else plan.tiling.refining(), plan.execution
        tiling = with_fade(runs, tiling, fades=True)
        if any(region.seed is not None for region in options.regions):
            seeds = partial(seed_noise, regions=options.regions, pixels=factor_of(runs), wrap=both(tiling.wrap))
            arguments["latents"] = drawn_latents(runs, arguments, seeds)
        if options.pull is not None and arguments.get("image") is None:
            raise ValueError("pull: needs an image to pull to; give image= too")
        return cls(runs, arguments, tiling, execution, options, size, plan, ranks)

    def features(self, hook: NetworkHook) -> list[Feature | AbstractContextManager[Any]]:
        """The features of the call and the contexts around its VAE, in the order in which they are entered."""
        pipe, options, tiling = self.pipe, self.options, self.tiling
        network, family = network_of(pipe)
        unit, native = family.unit(network), both(family.native(pipe, network))
        vae, factor, wrap = getattr(pipe, "vae", None), factor_of(pipe), both(tiling.wrap)
        if vae is None and (options.rows is not None or options.preview is not None):
            raise ValueError("rows, preview: the pipeline has no vae to decode with; leave them out")
        found: list[Any] = [] if self.ranks is None else [sharing(self.ranks, hook)]
        if options.preview is not None:
            found.append(Previewing(options.preview, pipe, native, unit))
        if options.regions:
            found.append(Regional(hook, options.regions))
        if options.prompt_for_tile is not None:
            found.append(TilePrompts(hook, options.prompt_for_tile))
        if vae is not None:
            around = continuation(vae, wrap, factor)
            stream = Streamed(pipe, options.rows, around)
            found += [*bounded_vae(pipe, self.size, stream, self.plan, self.ranks), stream]
            found += [wrapped(vae, around), labelled(vae, "decode", "decode")]
        side = min(both(tiling.tile or native))
        if tiling.moving is not None and tiling.moving.fade != 0:
            width = tiling.moving.fade or max(1, min(native) * 3 // 16)
            found.append(Fade(min(width, side / 4) / unit, wrap, asked=tiling.moving.fade is not None))
        if options.pull is not None:
            found.append(Pulling(options.pull, pipe.scheduler, unit, wrap, side / 16))
        return found

    def run(self, wrapper: Any, graphs: StepGraphs, fused: bool) -> Any:
        """Make the image, and set ``wrapper.report``."""
        checkpoint = self.options.checkpoint
        if not fused and checkpoint is not None:
            raise ValueError("checkpoint: only the fused step can be resumed; leave out fused=False")
        if self.plan is not None:
            graphs.release()  # the plan counts the memory of one step, not of graphs of other sizes beside it
        call, settings = completed(self.pipe, self.arguments), settings_in(self.tiling, self.options)
        with (
            within(wrapper, self.pipe, self.plan),
            current_device(device_of(self.pipe)),
            nullcontext() if checkpoint is None else locked(checkpoint),
            tiled(self.pipe, self.tiling, self.execution, self.arguments) as hook,
            Features.entered(self.features(hook)) as features,
            Engine(self.pipe, call, settings, graphs, features, checkpoint, fused) as engine,
        ):
            hook.engine = engine
            if graphs.backend is None and device_of(self.pipe).type == "cuda":
                graphs.backend = CudaBackend()
            try:
                return self.pipe(**self.arguments)
            finally:
                wrapper.report = engine.report()
                wrapper.report.ranks = None if self.ranks is None else self.ranks.times


def settings_in(tiling: TilingConfig, options: Options) -> dict[str, Any]:
    """Regions and tiling as comparable values, by name."""
    asked = None if callable(options.prompt_for_tile) else options.prompt_for_tile
    named = {f"tiling.{name}": value for name, value in asdict(tiling).items()}
    return {"regions": [vars(region) for region in options.regions], "prompt_for_tile": asked} | named


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one, for captures, launches and timing; any other device needs nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def sibling(pipe: Any, arguments: dict[str, Any]) -> Any:
    """The pipeline that runs a call: with ``image``, the image-to-image or inpainting one on the same weights."""
    masked = arguments.get("mask_image") is not None
    if arguments.get("image") is None:
        if masked:
            raise ValueError("mask_image: needs an image to change; give image= too")
        return pipe
    found = pipe
    try:
        if masked and "mask_image" not in signature(type(pipe).__call__).parameters:
            found = AutoPipelineForInpainting.from_pipe(pipe)
        if "image" not in signature(type(found).__call__).parameters:
            found = AutoPipelineForImage2Image.from_pipe(found)
    except ValueError as error:
        name = "mask_image" if masked else "image"
        raise ValueError(f"{name}: diffusers has no pipeline for it that goes with {type(pipe).__name__}") from error
    if found is not pipe:
        share_settings(pipe, found)
    return found


def _with_size(pipe: Any, arguments: dict[str, Any]) -> Pair | None:
    """Resolve image and size of a call in ``arguments``; returns (height, width) in px, or None if not known.

    An image without ``height`` and ``width`` keeps its size, rounded down to a multiple of :func:`size_unit`.
    """
    image, takes = arguments.get("image"), signature(type(pipe).__call__).parameters
    height, width = arguments.get("height"), arguments.get("width")
    if image is not None:
        height, width = arguments.pop("height", None), arguments.pop("width", None)
        own = size_px(image, factor_of(pipe))
        if own is not None:
            unit = size_unit(pipe)
            height, width = height or max(unit, own[0] // unit * unit), width or max(unit, own[1] // unit * unit)
            arguments["image"] = resized(image, (height, width), factor_of(pipe))
        if "height" in takes:
            arguments.update(height=height, width=width)
    elif (height is None) != (width is None) and "height" in takes:  # some pipelines then ignore the other one
        network, family = network_of(pipe)
        tall, wide = (side * factor_of(pipe) for side in both(family.native(pipe, network)))
        height, width = height or takes["height"].default or tall, width or takes["width"].default or wide
        arguments.update(height=height, width=width)
    return None if height is None or width is None else (height, width)


def completed(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``pipe`` with the defaults of all others."""
    bound = signature(type(pipe).__call__).bind_partial(pipe, **arguments)
    bound.apply_defaults()
    return dict(bound.arguments)


def _check_strength(pipe: Any, arguments: dict[str, Any]) -> None:
    """ValueError where ``strength`` leaves no step: the networks would get empty batches."""
    call = completed(pipe, arguments)
    strength, steps = call.get("strength"), call.get("num_inference_steps")
    others = any(call.get(name) is not None for name in ("timesteps", "sigmas", "denoising_start"))
    if strength is None or steps is None or others:
        return
    if steps_left(network_of(pipe)[1].model, steps, strength) < 1:
        raise ValueError(f"strength={strength}: leaves none of num_inference_steps={steps}")


def size_unit(pipe: Any) -> int:
    """Both sides of an image must be multiples of this, px: VAE factor times token side."""
    network, family = network_of(pipe)
    return int(factor_of(pipe) * family.patch(network))


def bounded_vae(
    pipe: Any, size: Pair | None, stream: Streamed, plan: Plan | None = None, ranks: Ranks | None = None
) -> list[AbstractContextManager[Any]]:
    """Contexts in which the VAE runs in exact bands if the whole image would not fit; if bands cannot, in its tiles."""
    vae, pixels = pipe.vae, size[0] * size[1] if size else 0
    if getattr(vae, "use_tiling", True):  # the caller's choice, or another kind of autoencoder
        return []
    if (reason := why_not_exact(vae, pixels)) is not None:
        if pixels <= EXACT_DECODE_PIXELS:
            return []
        logger.warning("%d pixels: decoding in diffusers' tiles, which is approximate: %s", pixels, reason)
        return [replaced(vae, use_tiling=True)]
    streams, room = stream.rows is not None, None if plan is None else plan.vae_room
    larger_than = EXACT_DECODE_PIXELS
    if plan is not None and not streams:  # the plan knows whether the whole image fits
        larger_than = 2**63 if plan.vae_band is None else 0
    if streams and room is None and vae.device.type == "cpu":
        room = CPU_BUDGET
    decode = rows_of if ranks is None else partial(slabs, ranks, to_first=streams)
    bands = exact_bands(vae, larger_than, None, room, decode, stream.collect)
    return [bands] if ranks is None else [divided(ranks, vae.decoder, factor_of(pipe)), bands]

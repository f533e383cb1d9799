"""apply_tiling and remove_tiling: make all calls of a diffusers pipeline denoise in tiles."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache, wraps
from inspect import signature
from itertools import count
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from tiledcore._diffusers import context_of, is_hinted, named, stateful, uncompiled
from tiledcore.canvas import attention
from tiledcore.config import Execution, Motion, TilingConfig
from tiledcore.geometry import Pair, both
from tiledcore.loop.engine import Engine
from tiledcore.tiles.conditioning import ControlHook
from tiledcore.tiles.denoiser import TileDenoiser
from tiledcore.tiles.families import Family, Shift, check_size, factor_of, network_of
from tiledcore.utils import around_of, intercept, release, replaced

FOR_FAMILY = ("canvas_size", "references", "reference_images")  # told to the family, not to the network
STEPWISE = Motion(blend_first=0, blend_last=3, fade=0)  # how tiles move where nothing can fade

_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def default_tiling(pipe: Any) -> TilingConfig:
    """The tiling of a pipeline where the user gave none.

    Moving tiles where they were measured as good as a ramp over a quarter of a tile (``bench/modes.py``). Otherwise,
    and where tiles cannot have several sizes (ControlNet, adapter, partial tokens), a ramp over an eighth.

    Raises:
        TypeError: the pipeline has no network that can be tiled.
    """
    network, family = network_of(pipe)
    patch = family.patch(network)
    whole = patch == 1 or all(side % (8 * patch) == 0 for side in both(family.native(pipe, network)))
    return TilingConfig(motion="moving") if family.shifts and whole and not is_hinted(pipe) else TilingConfig()


def with_fade(pipe: Any, config: TilingConfig, fades: bool) -> TilingConfig:
    """The tiling with its fade decided: kept where the call and the scheduler can fade, else 0.

    Raises:
        ValueError: the user asked for a fade that cannot be done.
    """
    motion = config.moving
    if motion is None or (fades and not hasattr(pipe.scheduler, "precondition_outputs")):  # EDM's have these
        return config
    if motion.fade:
        why = "only a TiledPipeline fades" if not fades else f"{type(pipe.scheduler).__name__} cannot fade"
        raise ValueError(f"fade={motion.fade}: {why}; give fade=0")
    default = replace(motion, seed=0) == Motion()
    return replace(config, motion=replace(STEPWISE, seed=motion.seed) if default else replace(motion, fade=0))


class NetworkHook:
    """Around the calls of a network during one call of its pipeline: the canvas is evaluated in tiles."""

    engine: Engine | None = None  # What moves the canvas during a call of a :class:`~tiledcore.TiledPipeline`
    control: ControlHook | None = None  # Of the pipeline's ControlNet
    regions: Any = None  # Prompts of parts of the canvas, a :class:`~tiledcore.compose.regional.Regional`

    def __init__(self, denoiser: TileDenoiser, family: Family, network: Any, pipe: Any, given: dict[str, Any]) -> None:
        self.denoiser, self.family, self.network, self.pipe, self.given = denoiser, family, network, pipe, given

    def time(self, timestep: Any) -> Any:
        """The timestep without asking the device, where tiles move with it; otherwise as it is.

        Told by the scheduler, which counts its steps, or by where the timestep lies in the schedule.
        """
        denoiser, scheduler = self.denoiser, self.pipe.scheduler
        if denoiser.config.moving is None or denoiser.timesteps is None:
            return timestep
        place, schedule = getattr(scheduler, "step_index", None), getattr(scheduler, "timesteps", None)
        if place is None and isinstance(timestep, torch.Tensor) and isinstance(schedule, torch.Tensor):
            ahead, rest = divmod(timestep.data_ptr() - schedule.data_ptr(), schedule.itemsize)
            place = ahead if rest == 0 and 0 <= ahead < len(schedule) else None
        return timestep if place is None else denoiser.timesteps()[place]

    @cached_property
    def _stateful(self) -> list[Any]:
        """What the network keeps from step to step; each tile batch has its own."""
        found = stateful(self.network)
        if found and self.denoiser.config.moving is not None:
            raise ValueError("enable_cache: tiles that move see another part in each step; give motion='still'")
        return found

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        family, denoiser, engine = self.family, self.denoiser, self.engine
        arguments = named(self.network, args, kwargs)
        return_dict = arguments.pop("return_dict", True)
        sample, timestep = arguments[family.sample], arguments[family.timestep]
        if engine is not None and not engine.runs(timestep):
            engine = None
        canvas: Any = None if engine else family.canvas(arguments)
        batches = count()

        def forward(tiles: torch.Tensor, timestep: Any, **conditions: Any) -> tuple[torch.Tensor]:
            kept: list[Any] = []
            if tiles is canvas:  # one tile: the call as it came, so that no bit changes
                inputs = arguments | conditions
            else:
                whole = canvas if engine is None else engine.buffers.model_input
                if tiles.shape[2:] != whole.shape[2:]:
                    kept = self._stateful
                inputs = {**conditions, family.timestep: timestep}
                inputs |= family.tiles(tiles, inputs, denoiser.pixels)
            inputs = {name: inputs[name] for name in inputs if name not in FOR_FAMILY}
            with context_of(kept, f"{next(batches)} of {len(tiles)}"):
                output = call(return_dict=False, **inputs)
            output = output[0] if isinstance(output, tuple) else output  # Kandinsky 5 gives the tensor itself
            return (family.prediction(output, (tiles.shape[2], tiles.shape[3])),)

        conditions = {name: v for name, v in arguments.items() if name not in (family.sample, family.timestep)}
        conditions["regions"] = self.regions
        if engine is not None:
            engine.look(arguments, denoiser)
            prediction = engine.run_step(denoiser, forward, timestep, conditions)
        else:
            size, pixels = (canvas.shape[2], canvas.shape[3]), denoiser.pixels
            conditions |= self._for_family(size, sample)
            check_size(self.pipe, self.given, (size[0] * pixels, size[1] * pixels))
            if self.control is not None:
                conditions = self.control.take(conditions)
            if self.engine is not None:
                self.engine.denoiser, self.engine.canvas_size = denoiser, size
            predicted = denoiser(forward, canvas, timestep, time=self.time(timestep), **conditions)
            prediction = family.result(predicted, sample)
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def _for_family(self, size: Pair, sample: Any) -> dict[str, Any]:
        """What the family is told beside the network's arguments: the canvas' size, tokens of reference images."""
        told: dict[str, Any] = {"canvas_size": size}
        if isinstance(sample, list) and isinstance(sample[0], list):  # Z-Image Omni's
            told["reference_images"] = [one[:-1] for one in sample]
        elif self.family.packed and sample.shape[1] != size[0] * size[1]:
            told["references"] = sample[:, size[0] * size[1] :]
        if len(told) > 1 and self.denoiser.config.mode == "canvas":
            raise ValueError("reference images inside the sequence need mode='tiles'; canvas mode knows one image")
        return told


@contextmanager
def tiled(
    pipe: Any,
    config: TilingConfig,
    execution: Execution | None = None,
    given: dict[str, Any] | None = None,
    kind: Callable[..., TileDenoiser] = TileDenoiser,
) -> Iterator[NetworkHook]:
    """Inside a ``with`` block, the pipeline's network is evaluated in tiles. Raises as :func:`apply_tiling` does.

    ``given``: the arguments of its call, whose size is checked. ``kind`` makes the denoiser, from the arguments of
    :class:`TileDenoiser`.
    """
    network, family = network_of(pipe)
    execution, given = execution or Execution(), given or {}
    native, patch, unit = both(family.native(pipe, network)), family.patch(network), family.unit(network)
    # With a ControlNet or an adapter, tiles begin where all levels of the network have pixels.
    levels = len(getattr(uncompiled(network).config, "block_out_channels", (1,))) if is_hinted(pipe) else 1
    denoiser = kind(config, execution, native, factor_of(pipe), patch, unit, 2 ** (levels - 1))
    height, width = both(config.tile or native)
    denoiser.tiling(2 * height // unit, 2 * width // unit, 0)  # errors come at once, not in the first step
    times = lru_cache(maxsize=1)(lambda schedule: family.clock(torch.as_tensor(schedule).float()).tolist())
    denoiser.timesteps = lambda: times(pipe.scheduler.timesteps)  # asks the device once per schedule
    with ExitStack() as stack:
        if config.mode == "canvas":  # it replaces attention layers, which all threads see: one call at a time
            stack.enter_context(_locks.setdefault(uncompiled(network), RLock()))
            denoiser.attention = attention.install(network, config, execution, native)
            stack.callback(attention.remove, network)
        if family.dynamic_shift is not None and given.get("mu") is None:  # else it is the user's own
            tokens = _tokens_seen(config, native, patch)
            stack.enter_context(_limited_shift(pipe.scheduler, tokens, family.dynamic_shift))
        hook = NetworkHook(denoiser, family, network, pipe, given)
        around: list[tuple[Any, Any]] = [(network, hook)]
        if (other := getattr(pipe, "unconditional_transformer", None)) is not None:  # Ideogram 4's
            around.append((other, NetworkHook(denoiser, family, other, pipe, {})))
        if isinstance(controlnet := getattr(pipe, "controlnet", None), torch.nn.Module):
            if config.mode == "canvas" and set(network.modules()) & set(controlnet.modules()):  # Z-Image's
                raise ValueError("controlnet: shares layers with the network; use mode='tiles' in place of 'canvas'")
            hook.control = ControlHook(hook, controlnet)
            around.append((controlnet, hook.control))
        for owner, one in around:
            intercept(owner, one, this_thread=True)
            stack.callback(release, owner, one)
        yield hook


class TiledCalls:
    """Around the calls of a pipeline that :func:`apply_tiling` has tiled."""

    def __init__(self, pipe: Any, config: TilingConfig | None, execution: Execution | None) -> None:
        self.pipe, self.config, self.execution = pipe, config, execution

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if around_of(network_of(self.pipe)[0], NetworkHook) is not None:
            return call(*args, **kwargs)  # of a TiledPipeline, which tiles the call itself
        config = with_fade(self.pipe, self.config or default_tiling(self.pipe), fades=False)
        given = dict(signature(type(self.pipe).__call__).bind_partial(self.pipe, *args, **kwargs).arguments)
        given |= given.pop("kwargs", {})  # of a ModularPipeline
        with tiled(self.pipe, config, self.execution, given):
            return call(*args, **kwargs)


def apply_tiling(pipe: Any, config: TilingConfig | None = None, execution: Execution | None = None) -> Any:
    """Make a diffusers pipeline denoise in tiles; everything else of it stays as it is.

    Afterwards ``pipe(prompt, height=..., width=...)`` works at any size that its VAE factor allows. The scheduler steps
    once for the whole canvas, so callbacks, generators, LoRA, guidance and multistep schedulers work unchanged.
    Overlapping predictions are averaged (MultiDiffusion, Bar-Tal et al. 2023), weighted by a ramp. Network, scheduler,
    offload and compilation may change later: each call takes what is there.

    PixArt and Sana resize their image to a trained size unless called with ``use_resolution_binning=False``.

    Args:
        pipe: any pipeline whose ``unet`` or ``transformer`` is of a class in :mod:`tiledcore.tiles.families`.
        config: the tiling; a second call replaces the first one's. Default: :func:`default_tiling`.
        execution: how it is computed.

    Returns:
        ``pipe`` itself.

    Raises:
        TypeError: the pipeline has no such network, or is a :class:`~tiledcore.TiledPipeline`.
        ValueError: tile or overlap are not whole tokens of that network, or the tiling has a fade.
    """
    if type(pipe) is not pipe.__class__:
        raise TypeError("pipe: a TiledPipeline is tiled already; set its tiling, or give its .pipe")
    checked = with_fade(pipe, config or default_tiling(pipe), fades=False)
    with tiled(pipe, checked, execution):  # canvas mode refuses some layers
        pass
    remove_tiling(pipe)
    intercept(pipe, TiledCalls(pipe, config, execution))
    return pipe


def remove_tiling(pipe: Any) -> Any:
    """Undo :func:`apply_tiling`: results are bit-identical to before. Does nothing without tiling."""
    release(pipe, around_of(pipe, TiledCalls))
    return pipe


def _tokens_seen(config: TilingConfig, native: Pair, patch: int) -> int:
    """How many tokens a token of a large canvas attends to: its tile's, or its window's, up to a native picture's."""
    height, width = tile = config.tile_on((2 * native[0], 2 * native[1]), native)
    if config.mode == "canvas":
        halo = both(config.halo if config.halo is not None else (height // 2, width // 2))
        height, width = (max(t, min(t + 2 * h, n)) for t, h, n in zip(tile, halo, native, strict=True))
    return (height // patch) * (width // patch)


def _limited_shift(scheduler: Any, tokens: int, shift: Shift) -> Any:
    """A context that limits a scheduler's shift ``mu``, which pipelines compute from the canvas, to that of a tile."""
    original = scheduler.set_timesteps

    @wraps(original)  # pipelines look at its signature
    def set_timesteps(*args: Any, mu: float | None = None, **kwargs: Any) -> Any:
        if mu is not None:
            own = next((kwargs[name] for name in ("sigmas", "timesteps") if kwargs.get(name) is not None), None)
            steps = kwargs.get("num_inference_steps", args[0] if args else 0) if own is None else len(own)
            kwargs["mu"] = min(mu, shift(tokens, steps, scheduler.config))
        return original(*args, **kwargs)

    return replaced(scheduler, set_timesteps=set_timesteps)

"""Tiling put on a diffusers pipeline, and taken off again: the hook on its network, and what goes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, update_wrapper
from inspect import signature
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from tiledcore.canvas import attention
from tiledcore.compose.regional import Regional
from tiledcore.compose.regions import Region
from tiledcore.config import TilingConfig
from tiledcore.geometry import Pair, both
from tiledcore.loop.engine import Engine
from tiledcore.schedulers.noise_levels import scales_predictions
from tiledcore.tiles.denoiser import TileDenoiser
from tiledcore.tiles.families import Family, network_of, registry

HOOK = "tiledcore"


def default_tiling(pipe: Any, fades: bool = False) -> TilingConfig:
    """How a diffusers pipeline is tiled where nothing is asked for.

    Tiles that move in every step, an area factor near 1, for the families on which they are measured to be as good as
    a ramp over a quarter of a tile, within the noise of that (``bench/modes.py``): fading near their lines, and
    overlapping in the first two steps and the last; where nothing fades, overlapping in the last three. A ramp over an
    eighth for the others, and where tiles of several sizes do not do: with a ControlNet or an adapter, whose residuals
    have the resolution of the network's deepest blocks, and where an eighth of a tile is not made of whole tokens.

    Args:
        pipe: the pipeline.
        fades: whether its call can fade: that of a :class:`~tiledcore.TiledPipeline`.

    Raises:
        TypeError: the pipeline has no network that can be tiled.
    """
    network, family = network_of(pipe)
    hinted = any(getattr(pipe, name, None) is not None for name in ("controlnet", "adapter"))
    patch = family.patch(network)
    native = both(family.native(pipe, network))
    whole = patch == 1 or all(side % (8 * patch) == 0 for side in native)
    if not family.shifts or not whole or hinted:
        return TilingConfig()
    if not fades or scales_predictions(pipe.scheduler):
        return TilingConfig(shift=True, blend_steps=3)
    return TilingConfig(shift=True, blend_first=2, blend_steps=1, fade=max(1, min(native) * 3 // 16))


class TilingHook(ModelHook):
    """Replaces a network's forward by a :class:`~tiledcore.tiles.denoiser.TileDenoiser` around it.

    Args:
        denoiser: the tiling.
        family: how the forward maps to a canvas.
        scheduler: its shift is kept to that of a tile for as long as the hook is there.
        tokens: that a tile sees.
    """

    engine: Engine | None = None
    """What moves the canvas during a call of a :class:`TiledPipeline`."""
    regions: Regional | None = None
    """Prompts of parts of the canvas."""

    def __init__(self, denoiser: TileDenoiser, family: Family, scheduler: Any, tokens: int) -> None:
        super().__init__()
        self.denoiser, self.family, self.scheduler, self.tokens = denoiser, family, scheduler, tokens
        self._limited: Any = None

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        inner = getattr(module, "_orig_mod", module)
        self._parameters = signature(type(inner).forward)
        if self.family.dynamic_shift is not None:
            self._before = vars(self.scheduler).get("set_timesteps")
            self._limited = _limit_shift(self.scheduler, self.tokens, self.family.dynamic_shift)
        return module

    def deinitalize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        # Somebody else may have replaced the method since: then it is theirs.
        if self._limited is not None and vars(self.scheduler).get("set_timesteps") is self._limited:
            del self.scheduler.set_timesteps
            if self._before is not None:
                self.scheduler.set_timesteps = self._before
        return module

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        family = self.family
        arguments = dict(self._parameters.bind(module, *args, **kwargs).arguments)
        arguments.pop("self")
        return_dict = arguments.pop("return_dict", True)
        engine = self.engine
        if engine is not None and not engine.runs(arguments[family.timestep]):
            engine = None
        canvas = None if engine else family.canvas(arguments)

        def forward(tiles: torch.Tensor, timestep: Any, **conditions: Any) -> tuple[torch.Tensor]:
            if tiles is canvas:  # one tile: the call as it came, so that no bit changes
                inputs = arguments | conditions
            else:
                if getattr(module, "is_cache_enabled", False):
                    raise ValueError("enable_cache: its state would be shared by different tiles; call disable_cache()")
                inputs = {**conditions, family.timestep: timestep}
                inputs |= family.tiles(tiles, inputs, self.denoiser.pixels)
            output = self.fn_ref.original_forward(return_dict=False, **inputs)[0]
            return (family.prediction(output, (tiles.shape[2], tiles.shape[3])),)

        conditions = {name: v for name, v in arguments.items() if name not in (family.sample, family.timestep)}
        conditions["regions"] = self.regions
        if engine is not None:
            engine.look(arguments, family)
            prediction = engine.run_step(self.denoiser, forward, arguments[family.timestep], conditions)
        else:
            assert canvas is not None
            if self.engine is not None:
                self.engine.denoiser = self.engine.own.denoiser = self.denoiser
                self.engine.own.canvas_size = (canvas.shape[2], canvas.shape[3])
            prediction = family.result(self.denoiser(forward, canvas, arguments[family.timestep], **conditions))
        return family.output(sample=prediction) if return_dict else (prediction,)


def _limit_shift(scheduler: Any, tokens: int, max_shift: float) -> Any:
    """Keep a flow-matching scheduler's shift ``mu`` to what it is for one tile.

    Pipelines compute ``mu`` from the tokens of the whole canvas, by a line through the shortest and the
    longest sequence of the training (Esser et al. 2024, 5.3.2): the more pixels, the more noise hides
    the same content. A network that sees tiles sees a tile's pixels. And the line does not go on: FLUX
    at 4096x4096 would get ``mu`` 11.6, which puts all of 28 steps at noise levels above 0.999.

    A ``mu`` that the line does not have at any whole number of tokens is the caller's own
    (``StableDiffusion3Pipeline`` takes one), and stays.

    Returns:
        What now stands for ``scheduler.set_timesteps``.
    """
    original = scheduler.set_timesteps
    line = {
        "base_seq_len": scheduler.config.get("base_image_seq_len", 256),
        "max_seq_len": scheduler.config.get("max_image_seq_len", 4096),
        "base_shift": scheduler.config.get("base_shift", 0.5),
        "max_shift": scheduler.config.get("max_shift", max_shift),
    }
    # A partial, and not a closure: a deep copy of the scheduler then has a method of its own.
    limited = update_wrapper(partial(_set_timesteps, original, tokens, line), original)
    scheduler.set_timesteps = limited
    return limited


def _set_timesteps(
    original: Callable[..., Any], tokens: int, line: dict[str, Any], *args: Any, mu: float | None = None, **kwargs: Any
) -> Any:
    if mu is not None:
        slope = (line["max_shift"] - line["base_shift"]) / (line["max_seq_len"] - line["base_seq_len"])
        canvas = round(line["base_seq_len"] + (mu - line["base_shift"]) / slope) if slope else 0
        if canvas > tokens and calculate_shift(canvas, **line) == mu:
            mu = calculate_shift(tokens, **line)
        kwargs["mu"] = mu
    return original(*args, **kwargs)


def apply_tiling(pipe: Any, config: TilingConfig | None = None) -> Any:
    """Make a diffusers pipeline denoise in tiles; everything else of it stays as it is.

    Afterwards ``pipe(prompt, height=..., width=...)`` works at any size that its VAE factor allows. The
    scheduler still steps once for the whole canvas, so multistep schedulers, callbacks, generators, LoRA
    and guidance work unchanged. Overlapping predictions are averaged as in MultiDiffusion (Bar-Tal et
    al. 2023), by default with a ramp instead of equal weights.

    Two things of a pipeline depend on the image's size, and are the caller's here
    (:class:`TiledPipeline` does both):

    - PixArt and Sana make an image of a trained size and resize it, unless they are called with
      ``use_resolution_binning=False``.
    - A scheduler's dynamic shift (FLUX, SD3, Z-Image, Qwen-Image) is kept to that of one tile. This holds
      for the scheduler that the pipeline has now: set another one first, or call this again after.

    Args:
        pipe: any pipeline whose ``unet`` or ``transformer`` is of a class in :mod:`tiledcore.tiles.families`.
        config: the tiling; a second call replaces the first one's.

    Returns:
        ``pipe`` itself.

    Raises:
        TypeError: the pipeline has no such network.
        ValueError: the configuration's tile or overlap are not whole tokens of that network, or it has a fade.
    """
    network, family = network_of(pipe)
    config = config or default_tiling(pipe)
    if config.fade:
        raise ValueError(f"fade={config.fade}: only a TiledPipeline fades; call one, or give fade=0")
    native, patch = family.native(pipe, network), family.patch(network)
    # A canvas of two by two tiles: what is wrong with their size comes out here and not in the first step.
    tile = config.tile or native
    height, width = (tile, tile) if isinstance(tile, int) else tile
    denoiser = TileDenoiser(config, native, pipe.vae_scale_factor, patch, family.packed)
    denoiser.tiling(2 * height // denoiser.unit, 2 * width // denoiser.unit, 0)
    remove_tiling(pipe)
    if config.mode == "canvas":
        denoiser.attention = attention.install(
            network,
            tile=(height, width),
            halo=config.halo,
            wrap=config.wrap,
            native=native,
            guidance_batch=config.guidance_batch,
            impl=config.impl,
        )
    denoiser.timesteps = lambda: family.clock(torch.as_tensor(pipe.scheduler.timesteps).float()).tolist()
    hook = TilingHook(denoiser, family, pipe.scheduler, _tokens_seen(config, (height, width), both(native), patch))
    registry(network).register_hook(hook, HOOK)
    return pipe


def _tokens_seen(config: TilingConfig, tile: Pair, native: Pair, patch: int) -> int:
    """How many tokens a token attends to, which is what the noise has to hide: those of its tile, in canvas mode of its
    window, but no more than of a native picture where the tile itself is no larger."""
    height, width = tile
    if config.mode == "canvas":
        halo = both(config.halo if config.halo is not None else (height // 2, width // 2))
        height, width = (max(t, min(t + 2 * h, n)) for t, h, n in zip(tile, halo, native, strict=True))
    return (height // patch) * (width // patch)


def remove_tiling(pipe: Any) -> Any:
    """Undo :func:`apply_tiling`: results are bit-identical to before. Without tiling, does nothing."""
    network, _ = network_of(pipe)
    registry(network).remove_hook(HOOK, recurse=False)
    attention.remove(network)
    return pipe


@contextmanager
def tiled(pipe: Any, config: TilingConfig | None = None) -> Iterator[Any]:
    """``apply_tiling`` for the length of a ``with`` block; a tiling that was there before comes back."""
    before = registry(network_of(pipe)[0]).get_hook(HOOK)
    try:
        yield apply_tiling(pipe, config)
    finally:
        remove_tiling(pipe)
        if before is not None:
            apply_tiling(pipe, before.denoiser.config)


@contextmanager
def regional(pipe: Any, regions: Sequence[Region] | None) -> Iterator[Any]:
    """Give parts of the canvas prompts of their own, for the length of a ``with`` block.

    Args:
        pipe: a pipeline that :func:`apply_tiling` has tiled.
        regions: None or nothing in it: no change.

    Raises:
        ValueError: the pipeline is not tiled; at the first step also for regions that do not fit the canvas.
        TypeError: its prompts cannot be replaced.
    """
    if not regions:
        yield pipe
        return
    network, _ = network_of(pipe)
    hook = registry(network).get_hook(HOOK)
    if hook is None:
        raise ValueError("regions: the pipeline is not tiled; call apply_tiling first")
    with Regional(pipe, network, regions, canvas=hook.denoiser.config.mode == "canvas") as prompts:
        hook.regions = prompts
        try:
            yield pipe
        finally:
            hook.regions = None

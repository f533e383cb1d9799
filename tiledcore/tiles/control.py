"""ControlNets in tile mode: they run on each tile batch with its part of the hint, never on the whole canvas."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, Protocol

import torch

from tiledcore import ops
from tiledcore._diffusers import uncompiled
from tiledcore.tiles.conditioning import RESIDUALS, TileBatch, conditions, images_of, swap_major
from tiledcore.tiles.denoiser import TileDenoiser
from tiledcore.tiles.families import Family

LATER = (torch.zeros(1),)
"""What a pipeline gets and passes on for the residuals of the canvas, which nobody computes."""
TEXTS = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "added_cond_kwargs")
"""What depends on the prompt."""


class Tiled(Protocol):
    """What stands around the network."""

    denoiser: TileDenoiser
    family: Family

    def time(self, timestep: Any) -> Any:
        """The timestep as the host knows it."""


class ControlHook:
    """Around the calls of a pipeline's ControlNet, or several in one module, during one call of the pipeline.

    A call only keeps its arguments. The network's call that follows asks for the residuals of its tile batches: so the
    memory that a ControlNet takes is that of a tile batch, and it sees positions that it was trained on. A second
    guidance branch in a call of its own evaluates it again. In canvas mode, on one tile, and in guess mode, whose
    residuals the pipeline changes, it runs on the canvas as in diffusers.
    """

    def __init__(self, hook: Tiled, network: Any) -> None:
        self.hook, self.family = hook, hook.family
        self._network, self._parameters = network, signature(type(uncompiled(network)).forward)
        self._waiting: tuple[Callable[..., Any], dict[str, Any]] | None = None

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = dict(self._parameters.bind(self._network, *args, **kwargs).arguments)
        arguments.pop("self")
        denoiser, canvas = self.hook.denoiser, self.family.canvas(arguments)
        time = self.hook.time(arguments[self.family.timestep])
        tiling = denoiser.tiling(canvas.shape[2], canvas.shape[3], time)
        self._waiting = None
        if denoiser.config.mode == "canvas" or arguments.get("guess_mode") or len(tiling) == 1:
            return call(*args, **kwargs)
        self._waiting = (call, arguments)
        return LATER, LATER

    def take(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A network's arguments, in which residuals that wait are computed with each tile batch."""
        names = [name for name in RESIDUALS if arguments.get(name) is not None]
        if self._waiting is None or not names:
            return arguments
        call, given = self._waiting
        kept = {name: value for name, value in arguments.items() if name not in names}
        # Text that the pipeline gave to both: the network's may be that of a region or of a tile.
        texts = [name for name in TEXTS if given.get(name) is not None and given[name] is arguments.get(name)]

        def residuals(part: TileBatch, inputs: dict[str, Any]) -> dict[str, Any]:
            return self._residuals(call, given, names, part, {name: inputs[name] for name in texts})

        return kept | {"per_tile": (residuals,)}

    def _residuals(
        self,
        call: Callable[..., Any],
        given: dict[str, Any],
        names: list[str],
        part: TileBatch,
        texts: dict[str, Any],
    ) -> dict[str, Any]:
        """The residuals of some tiles, by the names that the network has for them; ``texts``: their prompts."""
        family = self.family
        canvas = family.canvas(given)
        if part.images != slice(None):
            given, canvas = images_of(given, part.images, len(canvas)), canvas[part.images]
        if canvas.shape[2:] != part.canvas or len(canvas) != part.batch:
            raise ValueError(
                f"controlnet: was given a canvas of {tuple(canvas.shape)}, and the network one of {part.batch} images "
                f"of {part.canvas}; they must be the same"
            )
        tiles = ops.gather_tiles(canvas, part.offsets, part.tile, impl=part.impl)
        tiles = swap_major(tiles, len(part.offsets), part.batch)
        inputs = conditions({name: value for name, value in given.items() if name != family.sample}, part) | texts
        result = call(**inputs | family.tiles(tiles, inputs, part.pixels))
        return dict(zip(names, result, strict=False)) if isinstance(result, tuple) else {names[0]: result}

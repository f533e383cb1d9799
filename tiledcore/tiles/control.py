"""ControlNets in tile mode: they run on each tile batch with its part of the hint, never on the whole canvas."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

from tiledcore._diffusers import uncompiled
from tiledcore.tiles.conditioning import RESIDUALS, TileBatch, conditions, images_of

LATER = (torch.zeros(1),)
"""What a pipeline gets and passes on for the residuals of the canvas, which nobody computes."""
TEXTS = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "added_cond_kwargs")
"""What depends on the prompt."""


class ControlHook:
    """Around the calls of a pipeline's ControlNet, or several in one module, during one call of the pipeline.

    A call only keeps its arguments. The network's call that follows asks for the residuals of its tile batches: so the
    memory that a ControlNet takes is that of a tile batch, and it sees positions that it was trained on. A second
    guidance branch in a call of its own evaluates it again. In canvas mode, on one tile, and in guess mode, whose
    residuals the pipeline changes, it runs on the canvas as in diffusers.
    """

    def __init__(self, hook: Any, network: Any) -> None:
        self.hook, self.family = hook, hook.family  # a NetworkHook
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
        call, waiting = self._waiting
        family, whole = self.family, self.family.canvas(waiting)
        # Text that the pipeline gave to both: the network's may be that of a region or of a tile.
        texts = [name for name in TEXTS if waiting.get(name) is not None and waiting[name] is arguments.get(name)]

        def residuals(part: TileBatch, inputs: dict[str, Any]) -> dict[str, Any]:
            given, canvas = waiting, whole
            if part.images != slice(None):
                given, canvas = images_of(given, part.images, len(canvas)), canvas[part.images]
            if canvas.shape[2:] != part.canvas or len(canvas) != part.batch:
                raise ValueError(
                    f"controlnet: was given a canvas of {tuple(canvas.shape)}, and the network one of {part.batch} "
                    f"images of {part.canvas}; they must be the same"
                )
            own = conditions({name: given[name] for name in given if name != family.sample}, part)
            own |= {name: inputs[name] for name in texts}
            result = call(**own | family.tiles(part.gather(canvas), own, part.pixels))
            return dict(zip(names, result, strict=False)) if isinstance(result, tuple) else {names[0]: result}

        return {name: arguments[name] for name in arguments if name not in names} | {"per_tile": (residuals,)}

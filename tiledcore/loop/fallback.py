"""The fallback loop: which calls need the pipeline's own loop or the scheduler's own step, and their features."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tiledcore._diffusers import FUSABLE, is_flux, places_of
from tiledcore.feature import Features, Start, Step
from tiledcore.geometry import Pair
from tiledcore.ops.fused_step import MAX_SLOTS
from tiledcore.schedulers.solver import LinearSolver, NotLinear, linear_solver
from tiledcore.tiles.denoiser import TileDenoiser
from tiledcore.tiles.families import network_of, to_image, to_tokens

# Arguments of a pipeline's call with which its loop does what the engine does not.
REFUSED = ("denoising_start", "denoising_end", "skip_guidance_layers", "ip_adapter_image", "ip_adapter_image_embeds")


def why_not(pipe: Any, call: dict[str, Any]) -> str | None:
    """Why the engine cannot run this call, or None where it can."""
    name = type(pipe).__name__
    if name not in FUSABLE:
        return f"{name} keeps its own loop"
    for argument in REFUSED:
        if call.get(argument) is not None:
            return f"{argument} changes the pipeline's loop"
    if (call.get("guidance_rescale") or 0.0) > 0 and (call.get("guidance_scale") or 0.0) > 1:  # else not guided
        return "guidance_rescale needs the spread of the whole prediction"
    if is_flux(pipe) and (call.get("true_cfg_scale") or 1.0) > 1 and call.get("negative_prompt") is not None:
        return "true_cfg_scale: FLUX evaluates the two branches in two calls"
    return None


def fusable(pipe: Any, scheduler: Any, timestep: float, eta: float) -> LinearSolver | NotLinear:
    """Coefficients of a call's steps for the fused step, or why the scheduler's own ``step`` must be called."""
    name = type(scheduler).__name__
    eta_too = "eta" in inspect.signature(scheduler.step).parameters and hasattr(pipe, "prepare_extra_step_kwargs")
    places = places_of(scheduler, timestep)
    if len(places) != 1:
        return NotLinear(f"{name}: timestep {timestep:g} is none, or several, of its timesteps")
    solver = linear_solver(scheduler, begin=places[0], **({"eta": eta} if eta_too else {}))
    if isinstance(solver, NotLinear):
        return NotLinear(f"{name}: {solver.reason}")
    if solver.slots > MAX_SLOTS:
        return NotLinear(f"{name}: needs {solver.slots} canvases of history, more than {MAX_SLOTS}")
    if any(solver.uses_noise) and is_flux(pipe):
        return NotLinear(f"{name}: draws noise in the shape of packed latents")
    return solver


class Fallback:
    """The steps of one call by the pipeline's own loop, with the call's features around them."""

    canvas_size: Pair = (0, 0)  # In canvas pixels; known once the network has been called
    denoiser: TileDenoiser | None = None  # Known at the same time

    def __init__(self, pipe: Any, features: Features) -> None:
        self.pipe, self.features = pipe, features
        self._packed = network_of(pipe)[1].packed
        self._steps = 0

    def before(self, prediction: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """What the scheduler's ``step`` is given for its prediction."""
        if self._steps == 0:
            scheduler = self.pipe.scheduler
            # A timestep that is there twice has one noise level.
            timesteps = scheduler.timesteps[places_of(scheduler, timestep)[0] :]
            self.features.begin(Start(scheduler, timesteps, self.canvas_size))
        if not self.features.active(self._steps):
            return prediction
        assert self.denoiser is not None and self.denoiser.placed is not None
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        step = Step(self._steps, self._canvas(sample), self.denoiser.placed)
        changed = self.features.after_prediction(step, self._canvas(prediction).to(dtype))
        return (to_tokens(changed) if self._packed else changed).to(prediction.dtype)

    def after(self, latents: Tensor) -> None:
        """The step is done."""
        self._steps += 1
        self.features.after_step(self._steps, self._canvas(latents))

    def _canvas(self, latents: Tensor) -> Tensor:
        return to_image(latents, self.canvas_size) if self._packed else latents

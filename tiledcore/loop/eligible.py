"""What the engine can run: which pipelines, which of their calls, and which schedulers' steps."""

from __future__ import annotations

import inspect
from typing import Any

from tiledcore._diffusers import FUSABLE, is_flux, places_of
from tiledcore.ops.fused_step import MAX_SLOTS
from tiledcore.schedulers.solver import LinearSolver, NotLinear, linear_solver

# Arguments of their calls that change the loop.
REFUSED = ("denoising_start", "denoising_end", "skip_guidance_layers", "ip_adapter_image", "ip_adapter_image_embeds")


def why_not(pipe: Any, call: dict[str, Any]) -> str | None:
    """Why the engine cannot run this call, or None where it can."""
    name = type(pipe).__name__
    if name not in FUSABLE:
        return f"{name} keeps its own loop"
    for argument in REFUSED:
        if call.get(argument) is not None:
            return f"{argument} changes the pipeline's loop"
    if (call.get("guidance_rescale") or 0.0) > 0:
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

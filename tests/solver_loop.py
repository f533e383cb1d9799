"""The denoising loop of a linear solver in plain torch: what the fused step is compared with."""

from collections.abc import Callable

import torch
from torch import Tensor

from tiledcore.schedulers.solver import LinearSolver, step


def run(
    solver: LinearSolver,
    sample: Tensor,
    model: Callable[[Tensor, Tensor], Tensor],
    noise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The whole loop in plain torch. The state is float32, or float64 for a float64 sample.

    Args:
        sample: the initial latents ``[B, C, H, W]`` (any shape), scaled as the pipeline scales them.
        model: takes the scaled input, of the sample's dtype, and the timestep, and gives the guided prediction.
        noise: takes the prediction and gives the noise, as :meth:`LinearSolver.noise`; needed if the solver uses noise.

    Returns:
        The final latents, of the sample's dtype.

    Raises:
        ValueError: the solver uses noise and ``noise`` is None.
    """
    if noise is None and any(solver.uses_noise):
        raise ValueError("noise=None, but this solver draws noise: pass a function such as LinearSolver.noise")
    first = sample.to(torch.promote_types(sample.dtype, torch.float32))
    state = [first] + [torch.zeros_like(first) for _ in range(solver.slots - 1)]
    for index, timestep in enumerate(solver.timesteps):
        scale = float(solver.input_scale[index])
        prediction = model((scale * state[0]).to(sample.dtype), timestep)
        drawn = noise(prediction) if noise is not None and solver.uses_noise[index] else None
        step(solver, index, state, prediction, drawn)
    return state[0].to(sample.dtype)

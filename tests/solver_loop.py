"""The denoising loop of a linear solver in plain torch: what the fused step is compared with."""

from collections.abc import Callable

import torch
from torch import Tensor

from tiledcore.ops import reference
from tiledcore.schedulers.solver import LinearSolver


def step(solver: LinearSolver, index: int, state: Tensor, prediction: Tensor, noise: Tensor | None) -> None:
    """One evaluation of ``state [S, B, C, H, W]``, in place."""
    corner, at, scratch = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([index]), torch.empty_like(prediction)
    table, scales = solver.table.to(state), solver.input_scale.to(state)
    reference.fused_step(prediction, corner, state, table, scales, at, scratch, noise=noise)


def writes(solver: LinearSolver, index: int) -> tuple[int, ...]:
    """The slots that an evaluation changes, ascending."""
    unit = torch.eye(solver.slots, solver.slots + 2).to(solver.table)
    return tuple((solver.table[index] != unit).any(dim=1).nonzero().flatten().tolist())


def run(
    solver: LinearSolver,
    sample: Tensor,
    model: Callable[[Tensor, Tensor], Tensor],
    noise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The whole loop in plain torch. The state is float32, or float64 for a float64 sample.

    Args:
        sample: the initial latents ``[B, C, H, W]``, scaled as the pipeline scales them.
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
    state = torch.zeros(solver.slots, *first.shape, dtype=first.dtype)
    state[0] = first
    for index, timestep in enumerate(solver.timesteps):
        scale = float(solver.input_scale[index])
        prediction = model((scale * state[0]).to(sample.dtype), timestep)
        drawn = noise(prediction) if noise is not None and solver.uses_noise[index] else None
        step(solver, index, state, prediction, drawn)
    return state[0].to(sample.dtype)

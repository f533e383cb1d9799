"""Turn a diffusers scheduler into a table of linear coefficients, so that one fused operation can replace its ``step``.

A step of most schedulers is linear in the sample, the prediction, the noise and what the scheduler remembers. The
coefficients are read off it (:mod:`tiledcore.schedulers.probe`), and the table is compared with the scheduler.
"""

from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from tiledcore.ops import reference
from tiledcore.schedulers.probe import NOISE, PREDICTION, Evaluation, Stepper, noise_dtype, record
from tiledcore.schedulers.probe import NotLinearError as NotLinearError
from tiledcore.utils import to_device

_LARGE = 1e6  # Amplitude at which clipping and thresholding show
_AGREEMENT = 1e-9  # Allowed relative error of the table in float64; rounding reaches 2e-15 (measured), clipping about 1
_CLIPPING = ("clip_sample", "clip_denoised", "thresholding")  # Settings that are not linear, for the error message


@dataclass(frozen=True)
class LinearSolver:
    """The coefficients of one scheduler over one list of timesteps.

    How they are used: :func:`tiledcore.ops.fused_step`. Slot 0 of the state is the sample (diffusers' ``latents``); the
    others are written before they are read.

    Attributes:
        slots: the number S, at least 1.
        table: ``[N, S, S + 2]``, float64 on the CPU until :meth:`to`.
        input_scale: ``[N + 1]``: the network sees ``input_scale[i] * z[0]`` at evaluation ``i``; the last one is 1.
        timesteps: ``[N]``, as the network gets them; on the CPU until :meth:`to`.
        uses_noise: whether each evaluation draws noise, even if its coefficient is 0.
        noise_dtype: the dtype of the noise; None: the prediction's.
    """

    slots: int
    table: Tensor
    input_scale: Tensor
    timesteps: Tensor
    uses_noise: tuple[bool, ...]
    noise_dtype: torch.dtype | None = None

    def __len__(self) -> int:
        """The number N of evaluations of the network."""
        return len(self.uses_noise)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "LinearSolver":
        """A copy on ``device`` with coefficients of ``dtype``; make it once, not per step."""
        table, input_scale = self.table.to(device, dtype), self.input_scale.to(device, dtype)
        return replace(self, table=table, input_scale=input_scale, timesteps=self.timesteps.to(device))

    def noise(self, generator: Any, like: Tensor) -> Tensor:
        """Draw one evaluation's noise as the scheduler would; ``like`` has the prediction's shape, dtype and device."""
        from diffusers.utils.torch_utils import randn_tensor

        one = generator[0] if isinstance(generator, list) else generator
        device = like.device if one is None else one.device
        noise = randn_tensor(
            like.shape, generator, device, like.dtype if self.noise_dtype is None else self.noise_dtype
        )
        return to_device(noise, like.device)


def linear_solver(scheduler: Any, *, begin: int = 0, **step_kwargs: Any) -> LinearSolver:
    """The coefficients of a scheduler after ``set_timesteps``. The scheduler is not changed.

    Args:
        scheduler: a diffusers scheduler, or an object with the same ``timesteps``, ``step`` and ``scale_model_input``.
        begin: index of the first timestep that is used; image-to-image starts after 0.
        **step_kwargs: what the pipeline passes to ``step`` besides its generator, such as ``eta``.

    Raises:
        NotLinearError: there are none; says why.
        ValueError: there are no timesteps, or the scheduler has already stepped.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, Tensor) or not len(timesteps):
        raise ValueError(f"{type(scheduler).__name__} has no timesteps: call set_timesteps first")
    if getattr(scheduler, "step_index", None) is not None:
        raise ValueError(f"{type(scheduler).__name__} is at step {scheduler.step_index}: call set_timesteps again")
    # A scheduler may raise anything on tensors that its authors did not think of.
    try:
        program = record(Stepper(scheduler, begin, step_kwargs))
        solver = _allocate(program, timesteps[begin:].cpu())
        _check(Stepper(scheduler, begin, step_kwargs), solver)
        if any(solver.uses_noise):
            solver = replace(solver, noise_dtype=noise_dtype(Stepper(scheduler, begin, step_kwargs)))
    except NotLinearError:
        raise
    except Exception as error:
        raise NotLinearError(f"its step cannot be read: {type(error).__name__}: {error}") from error
    return solver


def _allocate(program: list[Evaluation], timesteps: Tensor) -> LinearSolver:
    """Give the values that later evaluations need as few slots as possible."""
    where = {program[0].before: 0}  # Value -> slot
    steps = []
    for evaluation, needed in zip(program, _live(program), strict=True):
        stays = {value: slot for value, slot in where.items() if value in needed and slot}
        written = {0: evaluation.rows[evaluation.after]}
        free = (slot for slot in count(1) if slot not in stays.values())
        for value in sorted(needed - stays.keys()):
            slot = next(free)
            # If this evaluation's sample is needed later, it moves out of slot 0.
            written[slot] = evaluation.rows.get(value, {value: 1.0})
            stays[value] = slot
        steps.append((where, written))
        where = {**stays, evaluation.after: 0}

    S = 1 + max(slot for _, written in steps for slot in written)
    table = torch.eye(S, S + 2, dtype=torch.float64).repeat(len(program), 1, 1)
    for line, (place, written) in zip(table, steps, strict=True):
        column = {**place, PREDICTION: S, NOISE: S + 1}
        for slot, row in written.items():
            line[slot] = 0
            for source, coefficient in row.items():
                line[slot, column[source]] = coefficient
    input_scale = torch.tensor([evaluation.scale for evaluation in program] + [1.0], dtype=torch.float64)
    return LinearSolver(S, table, input_scale, timesteps, tuple(evaluation.drew for evaluation in program))


def _live(program: list[Evaluation]) -> list[set[int]]:
    """For each evaluation, the values besides the sample that are needed after it."""
    alive: list[set[int]] = [set()]
    for evaluation in reversed(program[1:]):
        out = alive[0] | {evaluation.after}
        sources = {s for value, row in evaluation.rows.items() if value in out for s in row if s >= 0}
        alive.insert(0, (sources | out - evaluation.rows.keys()) - {evaluation.before})
    return alive


def _check(stepper: Stepper, solver: LinearSolver) -> None:
    """Compare table and scheduler over random trajectories: u, a very large v, and u + v, each by its own size."""
    random = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        u, v = torch.randn(2, 2, 2, 3, 5, generator=random, dtype=torch.float64)
        return torch.cat([u, _LARGE * v, u + _LARGE * v])

    sample = draw()
    state = torch.full((solver.slots, *sample.shape), torch.nan, dtype=sample.dtype)
    state[0] = sample
    corner, table, scales = torch.zeros(1, 2, dtype=torch.int32), solver.table, solver.input_scale
    for index in range(len(solver)):
        prediction, noise = draw(), draw()
        after, own_input, _ = stepper(index, sample.clone(), prediction.clone(), noise.clone())
        scaled = float(scales[index]) * state[0]
        at, scratch = torch.tensor([index]), torch.empty_like(sample)
        reference.fused_step(prediction, corner, state, table, scales, at, scratch, noise=noise)
        largest = torch.stack([sample, prediction, noise, after]).abs().view(4, 3, -1).amax((0, 2))
        sample = after
        errors = torch.stack([scaled - own_input, state[0] - sample]).abs().view(2, 3, -1).amax(2) / largest
        error = float(errors.max())
        if not error <= _AGREEMENT:
            on = [name for name in _CLIPPING if getattr(stepper.scheduler, "config", {}).get(name)]
            cause = f"{', '.join(on)} is on" if on else "of no known cause"
            raise NotLinearError(f"evaluation {index} departs from its linear form by {error:.1e}: {cause}")

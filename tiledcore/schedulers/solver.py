"""Turn a diffusers scheduler into a table of linear coefficients, so that one fused operation can replace its ``step``.

A step of most schedulers is linear in the sample, the prediction, the noise and what the scheduler remembers. So it
runs on unit vectors, and its results are its coefficients; each tensor of the sample's shape that the scheduler holds
counts as its state. Then the table is compared with the scheduler.
"""

import copy
import inspect
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tiledcore.ops import reference
from tiledcore.utils import to_device

PREDICTION, NOISE = -1, -2  # Sources of a new value, beside the earlier values, which are numbered from 0

Row = dict[int, float]  # Source -> coefficient, of one value
_LARGE = 1e6  # Amplitude at which clipping and thresholding show
_AGREEMENT = 1e-9  # Allowed relative error of the table in float64; rounding reaches 2e-15 (measured), clipping about 1
_CLIPPING = ("clip_sample", "clip_denoised", "thresholding")  # Settings that are not linear, for the error message


class NotLinearError(Exception):
    """Why a scheduler has no table; its own ``step`` must be called."""


class _Exact(TorchFunctionMode):
    """While active, on this thread: float64 samples are not cast down, and drawn noise comes from ``source``."""

    _CASTS = (Tensor.to, Tensor.type, Tensor.float, Tensor.half, Tensor.bfloat16)

    def __init__(self, source: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.source, self.generator = source, generator
        self.drawn: list[torch.dtype] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.randn_like, torch.normal, Tensor.normal_):
            if func is not torch.randn or kwargs.get("generator") is not self.generator:
                raise NotLinearError("it draws noise from another generator than the caller's")
            shape = tuple(args) if isinstance(args[0], int) else tuple(args[0])
            if shape != self.source.shape:
                raise NotLinearError(f"it draws noise of another shape than the sample's: {shape}")
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            self.drawn.append(dtype)
            return self.source.to(torch.promote_types(dtype, self.source.dtype), copy=True)
        result = func(*args, **kwargs)
        # Scalars and tables have fewer dimensions and keep the scheduler's precision.
        if func in self._CASTS and args[0].dtype is torch.float64 and args[0].dim() >= self.source.dim():
            return args[0] if result.is_floating_point() else result
        return result


class Stepper:
    """A CPU copy of the scheduler, called as diffusers' pipelines call it."""

    def __init__(self, scheduler: Any, begin: int, step_kwargs: dict[str, Any]) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        vars(self.scheduler).update(tree_map_only(Tensor, Tensor.cpu, vars(self.scheduler)))
        if hasattr(self.scheduler, "set_begin_index"):
            # Else the first step is looked up by its timestep, which may not be unique.
            self.scheduler.set_begin_index(begin)
        self.timesteps: list[Tensor] = list(self.scheduler.timesteps[begin:])
        self.generator = torch.Generator()
        self.kwargs = dict(step_kwargs)
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            self.kwargs["generator"] = self.generator

    def exchange(self, new: dict[int, Tensor]) -> None:
        """Put other tensors in place of those with these ids, also in containers."""
        own = vars(self.scheduler)
        own.update(tree_map_only(Tensor, lambda tensor: new.get(id(tensor), tensor), own))

    def held(self, shape: torch.Size) -> list[Tensor]:
        """The tensors of this shape that the scheduler holds."""
        leaves = tree_leaves(vars(self.scheduler))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.shape == shape]

    def __call__(
        self, index: int, sample: Tensor, prediction: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, torch.dtype | None]:
        """One evaluation: the new sample, the network's input, and the dtype of the noise, if it drew any."""
        timestep = self.timesteps[index]
        with _Exact(noise, self.generator) as mode:
            scaled = sample.clone()
            if hasattr(self.scheduler, "scale_model_input"):
                scaled = self.scheduler.scale_model_input(scaled, timestep)
            result = self.scheduler.step(prediction, timestep, sample, return_dict=False, **self.kwargs)[0]
        if len(mode.drawn) > 1:
            raise NotLinearError(f"it draws noise {len(mode.drawn)} times in a step")
        if result.shape != sample.shape:
            raise NotLinearError(f"a step makes {tuple(result.shape)} of a {tuple(sample.shape)} sample")
        return result, scaled, mode.drawn[0] if mode.drawn else None


class Evaluation(NamedTuple):
    """One recorded step: which value is the sample before and after, and the rows of the values that it makes."""

    before: int
    after: int
    rows: dict[int, Row]
    scale: float
    drew: bool


def noise_dtype(stepper: Stepper) -> torch.dtype | None:
    """The dtype that a scheduler's noise always has, or None if it has the prediction's.

    A generator's numbers depend on it, and some schedulers draw float32 for half-precision samples.
    """
    one = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    drawn = {stepper(index, one.clone(), one.clone(), one)[2] for index in range(len(stepper.timesteps))} - {None}
    if len(drawn) > 1:
        raise NotLinearError("it draws noise of several dtypes")
    return next(iter(drawn - {torch.float16}), None)


def record(stepper: Stepper) -> list[Evaluation]:
    """Run the scheduler, each evaluation from new unit vectors. Every value gets a number."""
    program: list[Evaluation] = []
    held: list[tuple[Tensor, int]] = []  # the scheduler's tensors, and which value each is
    before, made = 0, 1
    for index in range(len(stepper.timesteps)):
        known = list(dict.fromkeys([before, *(value for _, value in held)]))
        # The last component is 0 in all inputs: what appears there was added by the step itself.
        size = len(known) + 3
        unit = torch.eye(size, dtype=torch.float64).reshape(size, 1, 1, 1, size)
        stepper.exchange({id(tensor): unit[known.index(value)].clone() for tensor, value in held})
        sample, scaled, drew = stepper(index, unit[0].clone(), unit[-3].clone(), unit[-2].clone())

        sources = [*known, PREDICTION, NOISE]
        scale = _row(scaled, sources)
        if scale.keys() - {before}:
            raise NotLinearError(f"at evaluation {index} the network's input is not a multiple of the sample")
        after, made = made, made + 1
        rows: dict[int, Row] = {}
        held = []
        for tensor in stepper.held(unit.shape[1:]):
            row = _row(tensor, sources)
            there = {value: {value: 1.0} for value in known} | rows
            value = next((value for value, other in there.items() if other == row), made)
            if value == made:
                made += 1
                rows[value] = row
            held.append((tensor, value))
        # The new sample is always a new value, because the pipeline may change it before the next evaluation.
        rows[after] = _row(sample, sources)
        program.append(Evaluation(before, after, rows, scale.get(before, 0.0), drew is not None))
        before = after
    return program


def _row(vector: Tensor, sources: list[int]) -> Row:
    """The non-zero components of a vector, by source."""
    *components, rest = vector.flatten().tolist()
    if not torch.isfinite(vector).all():
        raise NotLinearError("its coefficients are not finite")
    if rest:
        raise NotLinearError(f"a step adds {rest:.3g}, which is no part of the sample, the prediction or its noise")
    return {source: value for source, value in zip(sources, components, strict=True) if value}


@dataclass(frozen=True)
class LinearSolver:
    """The coefficients of one scheduler over one list of timesteps.

    How they are used: :func:`tiledcore.ops.fused_step`. Slot 0 of the state is the sample (diffusers' ``latents``); the
    others are written before they are read. Tensors are on the CPU until :meth:`to`.
    """

    slots: int  # The number S, at least 1
    table: Tensor  # ``[N, S, S + 2]``, float64 until :meth:`to`
    input_scale: (
        Tensor  # ``[N + 1]``: at evaluation ``i`` the network sees ``input_scale[i] * z[0]``; the last one is 1
    )
    timesteps: Tensor  # ``[N]``, as the network gets them
    uses_noise: tuple[bool, ...]  # Whether each evaluation draws noise, even if its coefficient is 0
    noise_dtype: torch.dtype | None = None  # None: the prediction's

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
        noise = randn_tensor(like.shape, generator, device, self.noise_dtype or like.dtype)
        return to_device(noise, like.device)


def linear_solver(scheduler: Any, *, begin: int = 0, **step_kwargs: Any) -> LinearSolver:
    """The coefficients of a diffusers scheduler after ``set_timesteps``. The scheduler is not changed.

    ``begin``: index of the first timestep that is used; image-to-image starts after 0. ``step_kwargs``: what the
    pipeline passes to ``step`` besides its generator, such as ``eta``.

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

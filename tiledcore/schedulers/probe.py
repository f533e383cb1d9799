"""Run a scheduler on unit vectors, and record how each step makes its output from its inputs.

Each tensor of the sample's shape that the scheduler holds counts as its state.
"""

import copy
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

PREDICTION, NOISE = -1, -2  # Sources of a new value, beside the earlier values, which are numbered from 0

Row = dict[int, float]  # Source -> coefficient, of one value


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

"""Schedulers of diffusers and settings to try, and how close a linear solver is to the scheduler's own loop."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from solver_loop import run
from torch import Tensor

from tiledcore.schedulers.solver import LinearSolver, linear_solver

STRENGTH = 0.6
SHAPE = (2, 4, 6, 6)
SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@dataclass(frozen=True)
class Case:
    """A scheduler, its settings, and what the pipeline passes to ``set_timesteps`` and ``step``."""

    name: str
    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    set_kwargs: Mapping[str, Any] = field(default_factory=dict)
    step_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def build(self, steps: int) -> Any:
        """The scheduler with its timesteps set.

        Raises:
            ImportError: diffusers needs a package for it that is not installed.
        """
        import diffusers

        scheduler = getattr(diffusers, self.scheduler).from_config(dict(self.config))
        scheduler.set_timesteps(steps, **self.set_kwargs)
        return scheduler


def _sd(name: str, scheduler: str, /, step: Mapping[str, Any] | None = None, **config: Any) -> Case:
    return Case(name, scheduler, {**SD, **config}, {}, step or {})


_2M, _2S, _UNIPC = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
_ZERO_SNR: dict[str, Any] = {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}

LINEAR = (
    _sd("DDIM", "DDIMScheduler", clip_sample=False),
    _sd("DDIM, eta 1", "DDIMScheduler", {"eta": 1.0}, clip_sample=False),
    _sd("DDIM, zero SNR, v", "DDIMScheduler", clip_sample=False, **_ZERO_SNR),
    _sd("DDIM, sample prediction", "DDIMScheduler", clip_sample=False, prediction_type="sample"),
    _sd("Euler", "EulerDiscreteScheduler"),
    _sd("Euler, Karras", "EulerDiscreteScheduler", use_karras_sigmas=True),
    _sd("Euler, zero SNR, v", "EulerDiscreteScheduler", **_ZERO_SNR),
    _sd("Euler ancestral", "EulerAncestralDiscreteScheduler"),
    Case("FlowMatch Euler, shift 3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    Case("FlowMatch Euler, dynamic", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"mu": 1.15}),
    Case("FlowMatch Euler, stochastic", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    Case("FlowMatch Heun, shift 3", "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    _sd("Heun", "HeunDiscreteScheduler"),
    _sd("Heun, Karras", "HeunDiscreteScheduler", use_karras_sigmas=True),
    _sd("KDPM2", "KDPM2DiscreteScheduler"),
    _sd("KDPM2 ancestral", "KDPM2AncestralDiscreteScheduler"),
    _sd("DPM++ 2M", _2M),
    _sd("DPM++ 2M, Karras", _2M, use_karras_sigmas=True),
    _sd("DPM++ 2M, v, final σ min", _2M, prediction_type="v_prediction", final_sigmas_type="sigma_min"),
    _sd("DPM++ 2M, no lower order", _2M, lower_order_final=False),
    _sd("DPM++ 2M, Heun, Euler last", _2M, solver_type="heun", euler_at_final=True),
    _sd("DPM++ 1", _2M, solver_order=1),
    _sd("DPM++ 3M", _2M, solver_order=3),
    _sd("DPM-Solver 2M", _2M, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    Case("DPM++ 2M, flow", _2M, FLOW),
    _sd("DPM++ 2M SDE", _2M, algorithm_type="sde-dpmsolver++"),
    _sd("DPM++ 2S", _2S, lower_order_final=True),
    _sd("DPM++ 2S, Karras", _2S, use_karras_sigmas=True, lower_order_final=True),
    _sd("DPM++ 3S", _2S, solver_order=3, lower_order_final=True),
    _sd("UniPC 2, bh2", _UNIPC),
    _sd("UniPC 2, bh1, final σ min", _UNIPC, solver_type="bh1", final_sigmas_type="sigma_min"),
    _sd("UniPC 1, bh2", _UNIPC, solver_order=1),
    _sd("UniPC 3, bh2", _UNIPC, solver_order=3),
    _sd("UniPC 3, bh1, final σ min", _UNIPC, solver_order=3, solver_type="bh1", final_sigmas_type="sigma_min"),
    _sd("UniPC 2, no corrector at 0", _UNIPC, disable_corrector=[0]),
    Case("UniPC 2, flow", _UNIPC, FLOW),
    _sd("DEIS 2", "DEISMultistepScheduler"),
    _sd("DEIS 3", "DEISMultistepScheduler", solver_order=3),
    _sd("LMS 4", "LMSDiscreteScheduler"),
    _sd("PNDM (PLMS)", "PNDMScheduler", skip_prk_steps=True),
    _sd("PNDM (PLMS), v", "PNDMScheduler", skip_prk_steps=True, prediction_type="v_prediction"),
    _sd("PNDM, Runge-Kutta start", "PNDMScheduler"),
    _sd("TCD, eta 0.3", "TCDScheduler", {"eta": 0.3}),
    _sd("TCD, eta 0", "TCDScheduler", {"eta": 0.0}),
    _sd("LCM", "LCMScheduler"),
    _sd("DDPM, fixed small", "DDPMScheduler", clip_sample=False),
    _sd("DDPM, fixed large", "DDPMScheduler", clip_sample=False, variance_type="fixed_large"),
    _sd("SA-Solver", "SASolverScheduler"),
    Case("EDM Euler", "EDMEulerScheduler"),
    Case("EDM DPM++ 2M", "EDMDPMSolverMultistepScheduler"),
    Case("IPNDM", "IPNDMScheduler"),
)
"""Schedulers that must be fused."""

FALLBACK = (
    _sd("DDIM, clip_sample", "DDIMScheduler", clip_sample=True),
    _sd("DDPM, clip_sample", "DDPMScheduler", clip_sample=True),
    _sd("DDPM, learned variance", "DDPMScheduler", clip_sample=False, variance_type="learned_range"),
    _sd("DDIM, thresholding", "DDIMScheduler", clip_sample=False, thresholding=True),
    _sd("DPM++ 2M, thresholding", _2M, thresholding=True),
    _sd("UniPC 2, thresholding", _UNIPC, thresholding=True),
    _sd("UniPC 2, bh1, final σ 0", _UNIPC, solver_type="bh1"),
    _sd("DDIM, zero SNR, epsilon", "DDIMScheduler", clip_sample=False, **{**_ZERO_SNR, "prediction_type": "epsilon"}),
    _sd("DPM++ SDE (torchsde)", "DPMSolverSDEScheduler"),
)
"""Schedulers that run their own ``step``."""


@dataclass(frozen=True)
class Result:
    """Latents after the loop, compared: largest difference ÷ largest latent.

    Attributes:
        solver: the table that ran.
        fp32: table against diffusers' loop, both in float32.
        fp64: the same in float64 throughout (see :func:`uncast`).
        rounding: the table in float32 against itself in float64.
        rounding_diffusers: diffusers' loop in float32 against itself in float64 throughout.
    """

    solver: LinearSolver
    fp32: float
    fp64: float
    rounding: float
    rounding_diffusers: float


def network(sample: Tensor, timestep: Tensor) -> Tensor:
    """A cheap nonlinear stand-in for a network: each output depends on its neighbourhood and on the timestep."""
    near = sample.roll(1, -1) - 0.5 * sample.roll(1, -2)
    return torch.tanh(0.7 * sample + 0.3 * near + torch.sin(0.01 * timestep.to(sample.dtype)))


def diffusers_loop(
    scheduler: Any, sample: Tensor, begin: int, generator: torch.Generator, step_kwargs: Mapping[str, Any]
) -> Tensor:
    """The loop of diffusers' pipelines. Only image-to-image sets the scheduler's begin index."""
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    kwargs = dict(step_kwargs)
    if "generator" in scheduler.step.__code__.co_varnames:
        kwargs["generator"] = generator
    for timestep in scheduler.timesteps[begin:]:
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(network(scaled, timestep), timestep, sample, return_dict=False, **kwargs)[0]
    return sample


@contextlib.contextmanager
def uncast() -> Iterator[None]:
    """Float64 throughout: ``Tensor.to(torch.float32)`` leaves samples as they are, and ``torch.randn`` gives float64.

    Its numbers are those of float32 whatever is asked for, because a generator gives others in float64.
    """
    cast: Callable[..., Tensor] = Tensor.to
    draw: Callable[..., Tensor] = torch.randn

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = cast(self, *args, **kwargs)
        lowered = self.dtype is torch.float64 and result.dtype is torch.float32 and self.dim() == len(SHAPE)
        return self if lowered else result

    def randn(*args: Any, **kwargs: Any) -> Tensor:
        return draw(*args, **{**kwargs, "dtype": torch.float32}).double()

    with patch.object(Tensor, "to", to), patch.object(torch, "randn", randn):
        yield


def start(scheduler: Any, steps: int, image_to_image: bool) -> tuple[int, Tensor]:
    """The first evaluation and the float64 latents there, as the pipelines prepare them."""
    scheduler, random = copy.deepcopy(scheduler), torch.Generator().manual_seed(1)
    noise = torch.randn(SHAPE, generator=random, dtype=torch.float64)
    if not image_to_image:
        return 0, noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    image = torch.randn(SHAPE, generator=random, dtype=torch.float64)
    begin = (steps - int(steps * STRENGTH)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    first = scheduler.timesteps[begin : begin + 1].repeat(SHAPE[0])
    if hasattr(scheduler, "scale_noise"):
        return begin, scheduler.scale_noise(image, first, noise)
    # IPNDM adds no noise of its own.
    return begin, scheduler.add_noise(image, noise, first) if hasattr(scheduler, "add_noise") else noise


def measure(case: Case, steps: int, image_to_image: bool) -> Result:
    """Run the table and diffusers' loop from the same latents and seed."""
    scheduler = case.build(steps)
    begin, latents = start(scheduler, steps, image_to_image)
    solver = linear_solver(scheduler, begin=begin, **case.step_kwargs)

    def ours(dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        table = solver.to("cpu", dtype)
        return run(table, latents.to(dtype), network, lambda prediction: table.noise(generator, prediction))

    def theirs(dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return diffusers_loop(copy.deepcopy(scheduler), latents.to(dtype), begin, generator, case.step_kwargs)

    def error(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / b.abs().max())

    ours32, theirs32 = ours(torch.float32), theirs(torch.float32)
    with uncast():
        ours64, theirs64 = ours(torch.float64), theirs(torch.float64)
    return Result(
        solver,
        fp32=error(ours32, theirs32),
        fp64=error(ours64, theirs64),
        rounding=error(ours32, ours64),
        rounding_diffusers=error(theirs32, theirs64),
    )

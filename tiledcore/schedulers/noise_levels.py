"""The noise level of a timestep, and how a prediction relates to the clean image."""

import math
from typing import Any

import torch
from torch import Tensor

from tiledcore._diffusers import stepless


def noise_level(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """``(α, σ)`` such that a canvas at this timestep is ``α x0 + σ ε``, for a clean image ``x0`` and noise ``ε``."""
    probe = stepless(scheduler)
    for name in ("add_noise", "scale_noise"):  # the class's own methods, without a wrapper on this object
        vars(probe).pop(name, None)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    at = timestep.detach().reshape(1).cpu()
    probe.timesteps = probe.timesteps.cpu()
    flow = hasattr(type(probe), "scale_noise")
    if not flow and not hasattr(probe, "add_noise"):
        raise ValueError(f"{type(scheduler).__name__} has no noising from which its noise levels could be read")
    noised = (lambda x, n: probe.scale_noise(x, at, n)) if flow else (lambda x, n: probe.add_noise(x, n, at))
    return float(noised(one, zero)), float(noised(zero, one))


def clean_and_noisy(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """``(b, a)`` such that the prediction for a canvas ``z`` is ``a z + b x0``, with the clean image ``x0``.

    Raises:
        ValueError: the timestep has no noise, or the scheduler's kind of prediction is not known.
    """
    if hasattr(scheduler, "precondition_outputs"):  # EDM, Karras et al. 2022
        raise ValueError(f"{type(scheduler).__name__} scales its predictions in a way of its own")
    alpha, sigma = noise_level(scheduler, timestep)
    if sigma <= 0:
        raise ValueError(f"timestep {float(timestep):g} of {type(scheduler).__name__} has no noise")
    flow = hasattr(type(scheduler), "scale_noise")
    kind = "flow_prediction" if flow else scheduler.config.get("prediction_type", "epsilon")
    norm = math.hypot(alpha, sigma)  # v is for a canvas of unit variance (Salimans and Ho 2022)
    kinds = {
        "epsilon": (-alpha / sigma, 1 / sigma),
        "flow_prediction": (-alpha / sigma - 1, 1 / sigma),
        "v_prediction": (-norm / sigma, alpha / (norm * sigma)),
        "sample": (1.0, 0.0),
    }
    if kind not in kinds:
        raise ValueError(f"prediction_type={kind!r} of {type(scheduler).__name__} is not known")
    return kinds[kind]

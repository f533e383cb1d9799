"""Pull: the first steps of a refinement keep the composition of the picture that it starts from. And noise levels.

The pull moves a prediction's low frequencies toward those of the coarse picture's latents ``x``, with a falling weight:

    m  +=  w · LowPass(m* − m),      m* = what a network would predict that knew x

With ``w = 1`` and a deterministic step it is the skip residual of DemoFusion (Du et al. 2024), on low frequencies only
as in ILVR (Choi et al. 2021), on the clean image as in DiffuseHigh (Kim et al. 2025).
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiledcore import validate
from tiledcore._diffusers import stepless
from tiledcore.feature import Feature
from tiledcore.geometry import Tiling
from tiledcore.utils import replaced


@dataclass(frozen=True)
class Pull:
    """How strongly, how long, and which frequencies are pulled.

    Args:
        weight: of the first step, 0 to 1; 1 takes the coarse picture's low frequencies alone.
        until: share of the steps, 0 to 1, over which the weight falls to 0: ``weight * (1 - x**4)``. A half cosine was
            measured to let go too early.
        sigma: of the Gaussian low-pass, in latent pixels. Default: a sixteenth of the tile's shorter side.

    Raises:
        ValueError: names the argument, its value and what is valid.
    """

    weight: float = 1.0
    until: float = 1.0
    sigma: float | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "until"):
            validate.real(f"pull {name}", getattr(self, name), 0, 1)
        if self.sigma is not None:
            validate.real("pull sigma", self.sigma, 1e-6)

    def weights(self, steps: int) -> list[float]:
        """The weight of each step."""
        last = self.until * steps
        return [self.weight * (1 - (i / last) ** 4) if i < last else 0.0 for i in range(steps)]


def low_pass_matrix(size: int, sigma: float, wrap: bool) -> Tensor:
    """The Gaussian low-pass of one axis as a matrix ``[size, size]``, float64: a row holds a pixel's weights, of sum 1.

    A wrapped axis is a circle; an open one is mirrored at its borders. Exact in float64.
    """
    reach = math.ceil(9 * sigma)
    kernel = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-reach, reach + 1)]
    offsets = torch.arange(-reach, reach + 1)
    where = torch.arange(size)[:, None] + offsets
    if wrap:
        where = where % size
    else:  # mirrored, each border pixel twice
        where = torch.minimum(where % (2 * size), 2 * size - 1 - where % (2 * size))
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, where, torch.tensor(kernel, dtype=torch.float64).expand(size, -1))
    return matrix / sum(kernel)


def low_pass(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``[..., H, W]`` through the matrices ``[H, H]`` and ``[W, W]`` of :func:`low_pass_matrix`."""
    return rows @ image @ columns.mT


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


class Pulling(Feature):
    """The pull of one image-to-image call; ``unit``: latent pixels per canvas pixel, ``sigma`` in latent pixels."""

    every_step = True

    def __init__(self, pull: Pull, scheduler: Any, unit: int, wrap: tuple[bool, bool], sigma: float) -> None:
        self.pull, self.scheduler, self.unit, self.wrap = pull, scheduler, unit, wrap
        self.sigma = sigma if pull.sigma is None else pull.sigma
        self._clean: Tensor | None = None  # [B, C, H, W]: the latents that the canvas is pulled to
        self._weights: list[float] = []

    def enter(self, stack: ExitStack) -> None:
        """Keep the latents to which the pipeline adds noise: the canvas is pulled to them."""
        name = "scale_noise" if hasattr(self.scheduler, "scale_noise") else "add_noise"
        own = getattr(self.scheduler, name)

        @wraps(own)
        def noised(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._clean is None:
                self._clean = sample.detach()
            return own(sample, *args, **kwargs)

        stack.enter_context(replaced(self.scheduler, **{name: noised}))

    def begin(self, scheduler: Any, timesteps: Tensor) -> None:
        if self._clean is None:
            raise ValueError("pull: this pipeline did not start from an image's latents")
        try:
            self._coefficients = [clean_and_noisy(scheduler, t) for t in timesteps]
        except ValueError as error:
            raise ValueError(f"pull: {error}") from error
        self._weights = self.pull.weights(len(timesteps))
        clean = self._clean.to(torch.promote_types(self._clean.dtype, torch.float32))
        if clean.ndim == 5:  # video-like latents of one frame (Qwen-Image)
            clean = clean.squeeze(1 if clean.shape[1] == 1 else 2)
        if self.unit > 1:  # in the order of channels of a packed token
            clean = F.pixel_unshuffle(clean, self.unit)
        # The filter of the tokens' grid: each of a token's pixels is one of `unit**2` interleaved images.
        self._filters = tuple(
            low_pass_matrix(size, self.sigma / self.unit, wrap).to(clean.device, clean.dtype)
            for size, wrap in zip(clean.shape[2:], self.wrap, strict=True)
        )
        self._clean = clean

    def active(self, index: int) -> bool:
        return index < len(self._weights) and self._weights[index] > 0

    def after_prediction(self, index: int, sample: Tensor, tiles: Tiling, prediction: Tensor) -> Tensor:
        assert self._clean is not None
        clean, noisy = self._coefficients[index]
        wanted = noisy * sample.to(self._clean.dtype) + clean * self._clean
        return prediction + low_pass(wanted - prediction, *self._filters).mul_(self._weights[index])

"""The low-frequency pull against scipy's filter, the schedulers' own clean images, and whole runs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from scipy.ndimage import gaussian_filter1d
from tilings import ONE, RAMP
from tiny import SCHEDULE, tiny_sd, tiny_sdxl
from tiny_transformers import build, call, tiny_flux, tiny_qwen, tiny_sd3, tiny_z_image
from torch import Tensor

from tiledcore import TiledPipeline
from tiledcore.schedulers.pull import Pull, clean_and_noisy, low_pass, low_pass_matrix

TINY = Pull(sigma=1e-3)  # a low-pass that lets everything through


@pytest.mark.parametrize("sigma", [0.4, 2.0, 11.0])
@pytest.mark.parametrize("wrap", [False, True])
def test_the_low_pass_is_scipys_gaussian(sigma: float, wrap: bool) -> None:
    image = torch.randn(3, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = image @ low_pass_matrix(21, sigma, wrap).mT
    theirs = gaussian_filter1d(image.numpy(), sigma, axis=1, mode="wrap" if wrap else "reflect", truncate=9)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-10, atol=1e-10)


def test_a_wrapped_axis_has_no_border() -> None:
    image = torch.randn(2, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    filters = low_pass_matrix(12, 3.0, False), low_pass_matrix(16, 3.0, True)
    rolled = low_pass(image.roll(5, 2), *filters)
    torch.testing.assert_close(rolled, low_pass(image, *filters).roll(5, 2))
    assert not torch.allclose(low_pass(image.roll(5, 1), *filters), low_pass(image, *filters).roll(5, 1))


SCHEDULERS: dict[str, Callable[[], Any]] = {
    **{
        f"{kind.__name__} {prediction}": lambda kind=kind, prediction=prediction: kind(
            **SCHEDULE, prediction_type=prediction
        )
        for kind in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler)
        for prediction in ("epsilon", "v_prediction")
    },
    "DDIM sample": lambda: DDIMScheduler(**SCHEDULE, prediction_type="sample", clip_sample=False),
    "zero terminal SNR": lambda: DDIMScheduler(
        **SCHEDULE, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "Heun": lambda: HeunDiscreteScheduler(**SCHEDULE),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow in DPM++": lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_wanted_prediction_is_of_the_wanted_clean_image(name: str) -> None:
    """What the scheduler itself takes for the clean image, given the prediction that the pull asks for."""
    scheduler = SCHEDULERS[name]()
    scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(5)
    z, clean = torch.randn(2, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    for index, timestep in enumerate(scheduler.timesteps):
        b, a = clean_and_noisy(scheduler, timestep)
        prediction = a * z + b * clean
        scheduler._step_index = index
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            found = z - scheduler.sigmas[index] * prediction
        elif isinstance(scheduler, DPMSolverMultistepScheduler):
            found = scheduler.convert_model_output(prediction, sample=z)
        elif isinstance(scheduler, HeunDiscreteScheduler):
            found = z - scheduler.sigmas[index] * prediction
        else:
            found = scheduler.step(prediction, timestep, z).pred_original_sample
        torch.testing.assert_close(found, clean, rtol=1e-3, atol=1e-3)


def refine(pipe: Any, pull: Pull | None, fused: bool = True, **kwargs: Any) -> tuple[Tensor, TiledPipeline]:
    wrapped = TiledPipeline.from_pipe(pipe, tiling=ONE, fused=fused)
    image = torch.rand(1, 3, 160, 256, generator=torch.Generator().manual_seed(1))
    arguments: dict[str, Any] = {"num_inference_steps": 4, "strength": 0.75, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return wrapped("a", image=image, generator=generator, pull=pull, **(arguments | kwargs)).images, wrapped


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


KINDS = {
    "DDIM": DDIMScheduler,
    "DPM++": DPMSolverMultistepScheduler,
    "Euler": EulerDiscreteScheduler,
    "UniPC": UniPCMultistepScheduler,
    "Heun": HeunDiscreteScheduler,
    "PNDM": PNDMScheduler,
    "ancestral": EulerAncestralDiscreteScheduler,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_pull_is_that_of_the_pipelines_own_loop(kind: str) -> None:
    pipe = quiet(tiny_sd())
    pipe.scheduler = KINDS[kind].from_config(pipe.scheduler.config)
    own, _ = refine(pipe, Pull(), fused=False)
    ours, wrapped = refine(pipe, Pull())
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
    assert wrapped.report is not None
    assert wrapped.report.fused == (kind != "PNDM")
    free, _ = refine(pipe, None)
    assert not torch.allclose(ours, free, atol=1e-2)
    assert not {"step", "add_noise", "scale_noise"} & vars(pipe.scheduler).keys()


def test_the_guided_prediction_is_pulled() -> None:
    kwargs = {"height": None, "width": None, "num_images_per_prompt": 2, "guidance_scale": 4.0}
    own, _ = refine(quiet(tiny_sdxl()), Pull(), fused=False, **kwargs)
    ours, wrapped = refine(quiet(tiny_sdxl()), Pull(), **kwargs)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
    assert wrapped.report is not None and wrapped.report.fused


def test_one_step_pulled_at_all_frequencies_is_the_image_itself() -> None:
    """Whatever the network says. The latents are those that an identity of a pipeline would keep."""
    pipe = quiet(tiny_sd())
    image = torch.rand(1, 3, 160, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = pipe.vae.encode(2 * image - 1).latent_dist
    latents = posterior.sample(torch.Generator().manual_seed(0)) * pipe.vae.config.scaling_factor
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    for fused in (False, True):
        result, _ = refine(pipe, TINY, fused, num_inference_steps=1, strength=1.0)
        torch.testing.assert_close(result, latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [tiny_flux, tiny_sd3, tiny_qwen, tiny_z_image])
def test_every_transformer_family_ends_where_it_is_pulled(make: Any) -> None:
    """Flow matching ends without noise: one pulled step gives the same latents whatever the noise was."""
    wrapped = TiledPipeline.from_pipe(build(make), tiling=RAMP)
    factor = wrapped.vae_scale_factor
    latents = torch.randn(1, 4, 24, 32, generator=torch.Generator().manual_seed(2))
    image = torch.rand(1, 3, 24 * factor, 32 * factor, generator=torch.Generator().manual_seed(1))
    encode = wrapped.vae.encode
    results = []
    for seed in (0, 1):
        more = {"image": image, "strength": 1.0, "num_inference_steps": 1, "pull": TINY}
        # The autoencoder's posterior has noise of its own: its mean instead.
        wrapped.vae.encode = lambda *a, **k: _Mode(encode(*a, **k))
        try:
            generator = torch.Generator().manual_seed(seed)
            results.append(call(wrapped, make, (24, 32), generator=generator, **more))
        finally:
            del wrapped.vae.encode
    assert results[0].numel() == latents.numel()
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)


class _Mode:
    """An encoder's output whose sample is its mean."""

    def __init__(self, output: Any) -> None:
        self.latent_dist = self
        self._mean = output.latent_dist.mode()

    def sample(self, generator: Any = None) -> Tensor:
        return self._mean

    mode = sample


def test_low_frequencies_stay_and_high_ones_are_free() -> None:
    pipe = quiet(tiny_sd())
    filters = [low_pass_matrix(n, 2.0, False).float() for n in (20, 32)]
    aim, _ = refine(pipe, TINY, num_inference_steps=1, strength=1.0)
    pulled, _ = refine(pipe, Pull(sigma=2.0))
    free, _ = refine(pipe, None)

    def off(latents: Tensor) -> float:
        return float(low_pass(latents - aim, *filters).square().mean().sqrt())

    assert off(pulled) < 0.5 * off(free)
    high = (pulled - low_pass(pulled, *filters)).std(), (aim - low_pass(aim, *filters)).std()
    assert abs(high[0] - high[1]) > 0.05 * high[1]


def test_weights_fall_to_zero() -> None:
    weights = Pull(weight=0.8, until=0.5).weights(8)
    assert weights[0] == 0.8 and weights[4:] == [0.0] * 4
    assert sorted(set(weights), reverse=True) == weights[:5]
    assert Pull(until=0).weights(3) == [0.0] * 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": 1.5}, "pull weight=1.5 must be a number from 0 to 1"),
        ({"until": -1}, "pull until=-1 must be a number from 0 to 1"),
        ({"sigma": 0}, "pull sigma=0 must be a number of at least 1e-06"),
        ({"sigma": math.nan}, "pull sigma=nan must be a number of at least 1e-06"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pull(**kwargs)


def test_a_pull_needs_an_image() -> None:
    wrapped = TiledPipeline.from_pipe(tiny_sd(), tiling=ONE)
    with pytest.raises(ValueError, match="pull: needs an image"):
        wrapped("a", height=160, width=256, pull=Pull())

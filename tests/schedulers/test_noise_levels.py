"""The scheduler's noise levels on tiny transformer pipelines: those of a tile, and one step for the whole canvas."""

import copy
import functools
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tilings import canvas_mode
from tiny_transformers import NATIVE, SHIFT, SHIFTED, build, call, canvas, tiles, tiny_flux, tiny_sd3

from tiledcore import apply_tiling, remove_tiling


def line(tokens: int) -> float:
    return calculate_shift(
        tokens, SHIFT["base_image_seq_len"], SHIFT["max_image_seq_len"], SHIFT["base_shift"], SHIFT["max_shift"]
    )


def mus(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The shifts that reach the scheduler from now on."""
    seen: list[float] = []
    original = type(pipe.scheduler).set_timesteps

    def spy(self: Any, *args: Any, mu: Any = None, **kwargs: Any) -> Any:
        seen.append(mu)
        return original(self, *args, mu=mu, **kwargs)

    # The pipelines look for ``sigmas`` among its parameters.
    monkeypatch.setattr(type(pipe.scheduler), "set_timesteps", functools.wraps(original)(spy))
    return seen


@pytest.mark.parametrize("make", SHIFTED)
def test_the_shift_is_that_of_a_tile(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build(make)
    seen = mus(pipe, monkeypatch)
    call(pipe, make, canvas(make), num_inference_steps=1)
    apply_tiling(pipe, tiles(make))
    for size in (canvas(make), (NATIVE, NATIVE), (8, NATIVE)):
        call(pipe, make, size, num_inference_steps=1)
    call(remove_tiling(pipe), make, canvas(make), num_inference_steps=1)
    whole = line(canvas(make)[0] * canvas(make)[1] // 4)
    assert whole > line(64)
    assert seen == [whole, line(64), line(64), line(32), whole]


def test_in_canvas_mode_the_shift_is_that_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build(tiny_flux)
    seen = mus(pipe, monkeypatch)
    for tile, halo in ((NATIVE // 2, NATIVE // 4), (NATIVE, None), (NATIVE // 2, 0), (None, 0)):
        apply_tiling(pipe, canvas_mode(tile=tile, halo=halo))
        call(pipe, tiny_flux, (2 * NATIVE, 2 * NATIVE), num_inference_steps=1)
    assert seen == [line(64), line(64), line(16), line(16)]  # a tile is half of the native size by default


def test_a_shift_of_the_callers_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build(tiny_sd3)
    seen = mus(pipe, monkeypatch)
    call(apply_tiling(pipe, tiles(tiny_sd3)), tiny_sd3, (22, 24), num_inference_steps=1, mu=3.0)
    assert seen == [3.0]


def test_between_calls_the_scheduler_is_its_own() -> None:
    pipe = apply_tiling(build(tiny_flux), tiles(tiny_flux))
    call(pipe, tiny_flux, canvas(tiny_flux), num_inference_steps=2)
    assert not {"set_timesteps", "step", "scale_model_input"} & vars(pipe.scheduler).keys()
    other = copy.deepcopy(pipe.scheduler)
    other.set_timesteps(5, mu=line(1000))
    assert len(pipe.scheduler.timesteps) == 2
    expected = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    expected.set_timesteps(5, mu=line(1000))
    assert torch.equal(other.timesteps, expected.timesteps)


MULTISTEP = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize(
    ("make", "scheduler"),
    [
        (tiny_sd3, UniPCMultistepScheduler(**MULTISTEP)),
        (tiny_sd3, FlowMatchHeunDiscreteScheduler(shift=3.0)),
        (tiny_flux, UniPCMultistepScheduler(**MULTISTEP)),
    ],
)
def test_the_scheduler_steps_once_for_the_canvas(make: Any, scheduler: Any) -> None:
    pipe = build(make)
    pipe.scheduler = scheduler
    steps: list[int] = []
    step = pipe.scheduler.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(args[0].numel())
        return step(*args, **kwargs)

    pipe.scheduler.step = counted
    result = call(apply_tiling(pipe, tiles(make)), make, canvas(make), num_inference_steps=4)
    assert torch.isfinite(result).all()
    assert steps == [result.numel()] * len(pipe.scheduler.timesteps)

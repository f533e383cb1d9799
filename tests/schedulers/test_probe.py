"""What is read off a scheduler, from schedulers made to be awkward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_cases import diffusers_loop, network
from solver_loop import run

from tiledcore.schedulers.solver import NotLinearError, linear_solver


class Scheduler:
    """A scheduler of N timesteps whose step is a function of (self, prediction, sample, generator)."""

    def __init__(self, update: Callable[..., torch.Tensor], steps: int = 4) -> None:
        self.update = update
        self.timesteps = torch.arange(steps)
        self.memory: Any = None

    def step(
        self,
        prediction: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor]:
        return (self.update(self, prediction, sample, generator),)


def noise_like(sample: torch.Tensor, generator: Any) -> torch.Tensor:
    return torch.randn(sample.shape, generator=generator, dtype=sample.dtype)


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (lambda s, m, x, g: x + m * m, "departs from its linear form"),
        (lambda s, m, x, g: x + m.abs(), "departs from its linear form"),
        (lambda s, m, x, g: x.clamp(-3, 3) + m, "departs from its linear form"),
        (lambda s, m, x, g: x + m - m.mean(), "no part of the sample"),
        (lambda s, m, x, g: x + m.flip(-1), "departs from its linear form"),
        (lambda s, m, x, g: x + m + 0.5, "adds 0.5, which is no part of the sample"),
        (lambda s, m, x, g: x / 0 + m, "not finite"),
        (lambda s, m, x, g: x + torch.randn_like(m), "another generator"),
        (lambda s, m, x, g: x + torch.randn(m.shape, dtype=m.dtype), "another generator"),
        (lambda s, m, x, g: x + torch.randn(1, 1, generator=g), "another shape"),
        (lambda s, m, x, g: x + noise_like(x, g) + noise_like(x, g), "noise 2 times"),
        (lambda s, m, x, g: (x + m).sum(-1), "a step makes"),
        (lambda s, m, x, g: x.unknown, "AttributeError"),
    ],
)
def test_awkward_schedulers_are_refused(update: Any, reason: str) -> None:
    with pytest.raises(NotLinearError, match=reason):
        linear_solver(Scheduler(update))


def test_an_input_that_is_not_a_multiple_of_the_sample_is_refused() -> None:
    class Mixed(Scheduler):
        def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
            return sample if self.memory is None else sample + self.memory

    def update(self: Any, m: torch.Tensor, x: torch.Tensor, g: Any) -> torch.Tensor:
        self.memory = m
        return x + m

    with pytest.raises(NotLinearError, match=r"^at evaluation 1 the network's input is not a multiple of the sample$"):
        linear_solver(Mixed(update))


def keep_in_dict(self: Any, m: torch.Tensor, x: torch.Tensor, g: Any) -> torch.Tensor:
    old = self.memory["m"][0] if self.memory else 0 * m
    self.memory = {"m": (m, "text"), "unused": x}
    return x + 2 * m - old


def add_in_place(self: Any, m: torch.Tensor, x: torch.Tensor, g: Any) -> torch.Tensor:
    self.memory = m.clone() if self.memory is None else self.memory.mul_(0.5).add_(m)
    return x + self.memory


def hold_the_result(self: Any, m: torch.Tensor, x: torch.Tensor, g: Any) -> torch.Tensor:
    self.memory = x + m if self.memory is None else 0.5 * self.memory + 0.5 * x + m
    return self.memory


@pytest.mark.parametrize(("update", "slots"), [(keep_in_dict, 2), (add_in_place, 2), (hold_the_result, 2)])
def test_memory_is_found_wherever_it_is(update: Any, slots: int) -> None:
    scheduler = Scheduler(update, steps=6)
    solver = linear_solver(scheduler)
    assert solver.slots == slots
    sample = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    expected = diffusers_loop(scheduler, sample, 0, torch.Generator(), {})
    torch.testing.assert_close(run(solver, sample, network), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(
    order=st.integers(1, 5),
    steps=st.integers(1, 9),
    begin=st.integers(0, 4),
    corrected=st.booleans(),
    noisy=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_multistep_method(order: int, steps: int, begin: int, corrected: bool, noisy: bool, seed: int) -> None:
    """Random coefficients at every step; history of predictions, or of samples that later predictions correct."""
    begin = min(begin, steps - 1)
    c = torch.randn(steps, order + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def update(self: Any, m: torch.Tensor, x: torch.Tensor, generator: Any) -> torch.Tensor:
        self.memory = self.memory or []
        w = c[begin + self.count]
        self.count += 1
        clean = w[0] * x + w[1] * m
        self.memory = [clean if corrected else m, *self.memory][:order]
        result = x + sum(weight * old for weight, old in zip(w[2:], self.memory, strict=False))
        return result + w[-1] * noise_like(m, generator) if noisy else result

    scheduler = Scheduler(update, steps)
    scheduler.count = 0  # type: ignore[attr-defined]
    solver = linear_solver(scheduler, begin=begin)
    assert len(solver) == steps - begin
    assert solver.uses_noise == (noisy,) * (steps - begin)
    # Of the history, the newest is made from what is there anyway; the last evaluations need less and less of it.
    assert solver.slots <= order
    ours, theirs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    sample = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    expected = diffusers_loop(scheduler, sample, begin, theirs, {})
    actual = run(solver, sample, network, lambda prediction: solver.noise(ours, prediction))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)

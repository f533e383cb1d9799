"""The coefficients against diffusers' own loops and against closed forms."""

import ast
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scheduler_cases import FALLBACK, LINEAR, Case, Result, diffusers_loop, measure, network
from solver_loop import run, step, writes

from tiledcore import utils
from tiledcore.schedulers import solver as solver_module
from tiledcore.schedulers.solver import LinearSolver, NotLinearError, linear_solver

# diffusers applies numpy functions to tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CASES = {case.name: case for case in LINEAR + FALLBACK}
FAMILIES = list({case.scheduler: case for case in reversed(LINEAR)}.values())
NUMERICAL = "LMSDiscreteScheduler"  # integrates numerically at every step


def named(cases: Any) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def solved(case: Case, steps: int, **kwargs: Any) -> LinearSolver:
    return linear_solver(build(case, steps), **{**case.step_kwargs, **kwargs})


def build(case: Case, steps: int) -> Any:
    try:
        return case.build(steps)
    except ImportError as error:
        pytest.skip(str(error).strip())


def check(result: Result) -> None:
    assert result.fp64 <= 1e-12
    assert result.rounding <= 1e-5
    # Where diffusers' own float32 loop is further than this from its float64 loop (Euler from the sigma of 4096 that
    # zero terminal SNR gives), no other way to compute the step can be close to it.
    assert result.fp32 <= max(1e-5, 2 * result.rounding_diffusers)


@pytest.mark.parametrize("image_to_image", [False, True], ids=["text", "image"])
@named(LINEAR)
def test_the_loop_of_diffusers_in_5_steps(case: Case, image_to_image: bool) -> None:
    build(case, 5)
    check(measure(case, 5, image_to_image))


@named([case for case in LINEAR if case.scheduler != NUMERICAL])
def test_the_loop_of_diffusers_in_20_steps_from_an_image(case: Case) -> None:
    check(measure(case, 20, True))


@pytest.mark.slow
@named([case for case in FAMILIES if case.scheduler != NUMERICAL])
def test_the_loop_of_diffusers_in_50_steps(case: Case) -> None:
    check(measure(case, 50, False))


REASONS = {
    "DDIM, clip_sample": "clip_sample is on",
    "DDPM, clip_sample": "clip_sample is on",
    "DDPM, learned variance": "cannot be read",
    "DDIM, thresholding": "thresholding is on",
    "DPM++ 2M, thresholding": "thresholding is on",
    "UniPC 2, thresholding": "thresholding is on",
    "UniPC 2, bh1, final σ 0": "not finite",
    "DDIM, zero SNR, epsilon": "not finite",
    "DPM++ SDE (torchsde)": "another generator",
}


@named(FALLBACK)
def test_what_is_not_linear_says_why(case: Case) -> None:
    scheduler = build(case, 10)
    with pytest.raises(NotLinearError, match=REASONS[case.name]):
        linear_solver(scheduler, **case.step_kwargs)


def test_ddim_has_the_coefficients_of_its_paper() -> None:
    scheduler = build(CASES["DDIM"], 10)
    solver = solved(CASES["DDIM"], 10)
    a = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    b = torch.cat([a[1:], scheduler.alphas_cumprod[:1].double() ** 0 if scheduler.config.set_alpha_to_one else a[:1]])
    expected = torch.stack([(b / a).sqrt(), (1 - b).sqrt() - (b * (1 - a) / a).sqrt(), 0 * a], dim=1)
    assert solver.slots == 1 and solver.uses_noise == (False,) * 10
    torch.testing.assert_close(solver.table[:, 0], expected, rtol=1e-5, atol=1e-6)
    assert solver.input_scale.tolist() == [1.0] * 11


def test_euler_folds_the_scaling_of_the_input_in() -> None:
    scheduler, solver = build(CASES["Euler"], 10), solved(CASES["Euler"], 10)
    sigma = scheduler.sigmas.double()
    torch.testing.assert_close(solver.input_scale[:-1], (sigma[:-1] ** 2 + 1) ** -0.5, rtol=1e-6, atol=0)
    assert solver.input_scale[-1] == 1
    expected = torch.stack([torch.ones(10).double(), sigma.diff(), torch.zeros(10).double()], dim=1)
    torch.testing.assert_close(solver.table[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_dpm_solver_2m_has_the_coefficients_of_its_paper() -> None:
    """DPM-Solver++ (Lu et al. 2022), algorithm 2, for sigmas of unit alpha (a flow has alpha = 1 - sigma)."""
    scheduler, solver = build(CASES["DPM++ 2M, flow"], 10), solved(CASES["DPM++ 2M, flow"], 10)
    sigma = scheduler.sigmas.double()
    alpha = 1 - sigma
    lam = (alpha / sigma).log()
    for i in range(2, 8):
        h, r = lam[i + 1] - lam[i], (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
        gain = -alpha[i + 1] * torch.expm1(-h)
        new, old = gain * (1 + 1 / (2 * r)), -gain / (2 * r)  # of the two predictions of the clean sample
        (ours,) = writes(solver, i)[1:]
        (theirs,) = writes(solver, i - 1)[1:]
        assert ours == theirs == 1 and solver.slots == 2
        # The prediction is the velocity: clean = z - sigma m.
        expected = [sigma[i + 1] / sigma[i] + new, old, -sigma[i] * new, 0.0]
        assert solver.table[i, 0].tolist() == pytest.approx([float(e) for e in expected], rel=1e-4, abs=1e-5)
        assert solver.table[i, 1].tolist() == pytest.approx([1.0, 0.0, -float(sigma[i]), 0.0], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "slots", "written"),
    [
        ("Euler ancestral", 1, 1),
        ("LCM", 1, 1),
        ("FlowMatch Heun, shift 3", 3, 3),
        ("Heun", 3, 3),
        ("KDPM2", 2, 2),
        ("DPM++ 3M", 3, 2),
        ("DPM++ 2S", 3, 3),
        ("DEIS 3", 3, 2),
        ("UniPC 2, bh2", 4, 3),  # the sample, its correction, and two clean predictions, one of them new
        ("IPNDM", 4, 2),
    ],
)
def test_slots_are_a_ring(name: str, slots: int, written: int) -> None:
    """History stays where it is: beside the sample, an evaluation writes what it made and nothing else."""
    solver = solved(CASES[name], 12)
    assert solver.slots == slots
    assert max(len(writes(solver, i)) for i in range(len(solver))) == written
    assert writes(solver, len(solver) - 1) == (0,)


@pytest.mark.parametrize("name", ["DPM++ 2M", "PNDM (PLMS)", "KDPM2 ancestral", "FlowMatch Euler, dynamic"])
def test_the_scheduler_is_left_as_it_was(name: str) -> None:
    scheduler = build(CASES[name], 6)
    before = {name: pickle.dumps(value) for name, value in vars(scheduler).items()}
    linear_solver(scheduler, begin=2)
    assert {name: pickle.dumps(value) for name, value in vars(scheduler).items()} == before


@pytest.mark.parametrize("name", ["Euler ancestral", "LCM", "DDPM, fixed small", "KDPM2 ancestral", "Euler"])
def test_the_generator_ends_in_the_state_that_diffusers_leaves(name: str) -> None:
    case, sample = CASES[name], torch.randn(2, 4, 3, 3)
    ours, theirs = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    solver = solved(case, 6)
    run(solver, sample, network, lambda prediction: solver.noise(ours, prediction))
    diffusers_loop(build(case, 6), sample, 0, theirs, case.step_kwargs)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_a_generator_for_each_image_of_the_batch() -> None:
    case, sample = CASES["Euler ancestral"], torch.randn(2, 4, 3, 3)
    seeds = [[torch.Generator().manual_seed(s) for s in (3, 4)] for _ in range(2)]
    solver = solved(case, 6)
    ours = run(solver, sample, network, lambda prediction: solver.noise(seeds[0], prediction))
    theirs = diffusers_loop(build(case, 6), sample, 0, seeds[1], case.step_kwargs)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Euler ancestral", None),
        ("DDPM, fixed small", None),
        ("TCD, eta 0.3", None),
        ("DPM++ 2M SDE", torch.float32),  # asks for float32
        ("FlowMatch Euler, stochastic", torch.float32),  # casts the sample first
    ],
)
def test_noise_for_half_precision_is_drawn_as_diffusers_draws_it(name: str, dtype: torch.dtype | None) -> None:
    case = CASES[name]
    solver = solved(case, 5)
    assert solver.noise_dtype == dtype
    sample = (torch.randn(2, 4, 6, 6) * float(getattr(build(case, 5), "init_noise_sigma", 1))).half()
    ours, theirs = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    mine = run(solver, sample, network, lambda prediction: solver.noise(ours, prediction))
    its = diffusers_loop(build(case, 5), sample, 0, theirs, case.step_kwargs)
    assert mine.dtype == torch.float16 and mine.isfinite().all()
    # Other noise would be off by about the noise itself.
    assert (mine.double() - its.double()).abs().max() < 0.02 * its.double().abs().max()


def test_a_prefix_of_the_table_is_the_table_of_a_prefix() -> None:
    scheduler, solver = build(CASES["UniPC 2, bh2"], 10), solved(CASES["UniPC 2, bh2"], 10).to("cpu", torch.float64)
    sample = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    state = torch.stack([sample] + [torch.full_like(sample, torch.nan)] * (solver.slots - 1))
    for index, timestep in enumerate(scheduler.timesteps[:6]):
        prediction = network(sample, timestep)
        sample = scheduler.step(prediction, timestep, sample, return_dict=False)[0]
        step(solver, index, state, prediction, None)
        torch.testing.assert_close(state[0], sample, rtol=1e-12, atol=1e-12)


def test_begin_is_a_row_of_the_whole_table_for_a_one_step_method() -> None:
    whole, rest = solved(CASES["Heun"], 8), solved(CASES["Heun"], 8, begin=6)
    assert torch.equal(whole.table[6:], rest.table)
    assert torch.equal(whole.input_scale[6:], rest.input_scale)
    assert torch.equal(whole.timesteps[6:], rest.timesteps)
    assert len(rest) == len(whole) - 6


def test_to_copies_the_coefficients_once() -> None:
    solver = solved(CASES["DPM++ 2M"], 5)
    device = solver.to("meta")
    assert device.table.dtype == device.input_scale.dtype == torch.float32
    assert device.table.device.type == device.timesteps.device.type == "meta"
    assert solver.table.dtype == torch.float64 and solver.table.device.type == "cpu"


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"no timesteps: call set_timesteps"):
        linear_solver(SimpleNamespace(timesteps=None))
    scheduler = build(CASES["Euler"], 5)
    sample = torch.zeros(1, 1, 1, 1)
    scheduler.scale_model_input(sample, scheduler.timesteps[0])
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler is at step 0: call set_timesteps again"):
        linear_solver(scheduler)

    solver = solved(CASES["Euler ancestral"], 5)
    with pytest.raises(ValueError, match=r"noise=None"):
        run(solver, sample, network)
    with pytest.raises(ValueError, match=r"table\[0\] has a coefficient for noise, but noise is None"):
        step(solver, 0, sample[None], sample, None)


def test_importing_it_needs_no_diffusers() -> None:
    for module in (solver_module, utils):
        assert module.__file__ is not None
        body = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
        imported = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in body if isinstance(node, ast.ImportFrom)}
        assert not {name for name in imported if name.split(".")[0] in ("diffusers", "transformers", "triton")}
        assert {name for name in imported if name.startswith("tiledcore")} <= {
            "tiledcore.ops",
            "tiledcore.utils",
        }


def test_the_stand_in_is_not_linear() -> None:
    x, t = torch.randn(1, 2, 4, 4), torch.tensor(500)
    assert (network(2 * x, t) - 2 * network(x, t)).abs().max() > 0.1

"""fused_step: all implementations agree with the float64 oracle, and the oracle with diffusers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from examples import examples
from grids import Grid, grids, product
from hypothesis import given
from hypothesis import strategies as st
from step_cases import problem
from tolerance import assert_close
from torch import Tensor

from tiledcore import ops
from tiledcore.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Interpreted, a block that juts out of the canvas divides 0 by 0 where nothing is stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
windows = st.sampled_from(ops.WINDOWS)
IMPLS: tuple[ops.Impl, ...] = ("reference", "native", "triton")


def runnable() -> list[ops.Impl]:
    return [impl for impl in IMPLS if ops.unavailable("fused_step", impl, DEVICE) is None]


def run(arguments: dict[str, Any], impl: ops.Impl | None, **more: Any) -> tuple[Tensor, Tensor]:
    """(new state, model input) without touching the arguments."""
    mine = arguments | {name: arguments[name].clone() for name in ("state", "model_input")}
    assert ops.fused_step(**mine, **more, impl=impl) is None
    return mine["state"], mine["model_input"]


def widened(arguments: dict[str, Any], change: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Any]:
    """The same arguments in float64, each value changed."""
    return {
        name: change(value.double()) if value is not None and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def assert_agrees(arguments: dict[str, Any], impl: ops.Impl, **more: Any) -> None:
    exact = run(widened(arguments), "reference", **more)
    plain = run(arguments, "reference", **more)
    # Sums cancel: what a value may be off by follows from the size of its terms, among which the
    # conditional half counts s times and the unconditional half s - 1 times.
    magnitude = widened(arguments, torch.abs)
    if magnitude["guidance_scale"] is not None:
        magnitude["tiles"] = magnitude["tiles"] * (2 * magnitude["guidance_scale"].max() + 1)
        magnitude["guidance_scale"] = torch.ones_like(magnitude["guidance_scale"])
    sizes = run(magnitude, "reference", **more)
    eps = torch.finfo(arguments["state"].dtype).eps
    for actual, true, simple, size in zip(run(arguments, impl, **more), exact, plain, sizes, strict=True):
        slack = 4 * eps * size.max()
        assert_close(actual, true, simple.double() + slack * (simple >= true).double().sub(0.5).sign())


# ----------------------------------------------------------------------------- the oracle


def test_ddim_step_by_diffusers() -> None:
    """A table written down from the DDIM paper, one tile, guidance: diffusers' own loop."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, beta_schedule="scaled_linear")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(5)
    after = [*scheduler.timesteps[1:].tolist(), -1]
    a, b = scheduler.alphas_cumprod[scheduler.timesteps], scheduler.alphas_cumprod[torch.tensor(after).clamp(min=0)]
    # x' = sqrt(b/a) x + (sqrt(1-b) - sqrt(b (1-a)/a)) ε; Song et al. 2021, equation 12 with σ = 0.
    table = torch.stack([(b / a).sqrt(), (1 - b).sqrt() - (b * (1 - a) / a).sqrt(), torch.zeros(5)], 1)[:, None]
    torch.manual_seed(0)
    sample = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    state, model_input = sample[None].clone(), torch.empty_like(sample)
    scale = torch.tensor([7.5], dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        halves = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        unconditional, conditional = halves.chunk(2)
        guided = unconditional + 7.5 * (conditional - unconditional)
        sample = scheduler.step(guided, t, sample).prev_sample
        reference.fused_step(
            *(halves, product([0], [0]), state, table, torch.ones(6).double(), torch.tensor([i]), model_input, scale)
        )
        torch.testing.assert_close(state[0], sample, rtol=1e-12, atol=1e-12)
        assert torch.equal(model_input, state[0])


# ----------------------------------------------------------------------------- implementations


@examples(6, 100)
@given(
    grid=grids(),
    window=windows,
    ramp=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    slots=st.integers(1, 4),
    halves=st.integers(1, 2),
    noise=st.booleans(),
    one_scale=st.booleans(),
    step=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_oracle(
    grid: Grid,
    window: ops.Window,
    ramp: int,
    dtype: torch.dtype,
    slots: int,
    halves: int,
    noise: bool,
    one_scale: bool,
    step: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    arguments = problem(grid, slots, halves, dtype, C=1)
    arguments["step"] += step - 1
    if not noise:
        arguments["noise"] = None
        arguments["table"][:, :, -1] = 0
    if halves == 2 and one_scale:
        arguments["guidance_scale"] = arguments["guidance_scale"][:1]
    for impl in runnable():
        assert_agrees(arguments, impl, window=window, ramp=ramp)


@pytest.mark.parametrize(
    "slots", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), 8]
)
def test_every_number_of_slots(slots: int) -> None:
    torch.manual_seed(slots)
    arguments = problem(((5, 70), (5, 40), product([0], [0, 30])), slots, 2)
    for impl in runnable():
        assert_agrees(arguments, impl)


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("start", [(0, 0), (2, 60)])
def test_whole_canvas_as_one_tile(halves: int, start: tuple[int, int]) -> None:
    """Canvas mode, also cut open elsewhere on a torus: a pure copy where the table asks for one."""
    grid = ((6, 70), (6, 70), torch.tensor([start], dtype=torch.int32))
    for dtype in (torch.float16, torch.float32):
        arguments = problem(grid, 2, halves, dtype, C=1)
        for impl in runnable():
            assert_agrees(arguments, impl)
    arguments = problem(grid, 1, 1, C=1)
    arguments["table"][:] = torch.tensor([0.0, 1.0, 0.0])
    wanted = arguments["tiles"].roll(start, (2, 3))
    for impl in runnable():
        assert torch.equal(run(arguments, impl)[0][0], wanted), impl


@examples(3, 50)
@given(grid=grids(), window=windows, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_table_of_the_prediction_alone_is_blend_tiles(grid: Grid, window: ops.Window, dtype: torch.dtype) -> None:
    arguments = problem(grid, 1, 1, dtype, C=1) | {"noise": None}
    arguments["table"][:] = torch.tensor([0.0, 1.0, 0.0])
    arguments["input_scale"][:] = 1
    for impl in runnable():
        state, model_input = run(arguments, impl, window=window)
        blended = ops.blend_tiles(arguments["tiles"], arguments["offsets"], grid[0], window=window, impl=impl)
        torch.testing.assert_close(state[0], blended, rtol=4 * torch.finfo(dtype).eps, atol=0)
        assert torch.equal(model_input, state[0])


def test_all_values_come_from_before() -> None:
    """Slots that swap and rotate: nothing is overwritten before it was read."""
    arguments = problem(((10, 12), (6, 7), product([0, 4], [0, 5])), 4, 1, C=1)
    before = arguments["state"].clone()
    arguments["table"].zero_()
    for s in range(4):
        arguments["table"][:, s, (s + 1) % 4] = 1
    arguments["input_scale"][2] = 0.5
    for impl in runnable():
        state, model_input = run(arguments, impl)
        assert torch.equal(state, before.roll(-1, 0)) and torch.equal(model_input, 0.5 * before[1]), impl


def test_counter_selects_the_row_and_stays() -> None:
    arguments = problem(((10, 12), (6, 7), product([0, 4], [0, 5])), 2, 2, C=1, n=3)
    results = []
    for i in (0, 2):
        for impl in runnable():
            arguments["step"].fill_(i)
            alone = arguments | {"step": torch.zeros_like(arguments["step"])}
            alone |= {"table": arguments["table"][i : i + 1], "input_scale": arguments["input_scale"][i : i + 2]}
            one, other = run(arguments, impl), run(alone, impl)
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]), impl
            assert int(arguments["step"]) == i
            results.append(one[0])
    assert not torch.equal(results[0], results[-1])


def test_zero_coefficients_leave_everything_out() -> None:
    """NaN in what has no coefficient, and in a slot whose row is the identity, goes nowhere."""
    arguments = problem(((6, 70), (6, 40), product([0], [0, 30])), 3, 2, C=1)
    row = [[0.5, 0, 0, 0.25, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]  # slot 1 stays, slot 2 is replaced
    arguments["table"][:] = torch.tensor(row)
    clean = {impl: run(arguments, impl) for impl in runnable()}
    arguments["state"][1:] = torch.nan
    arguments["noise"][:] = torch.nan
    for impl, (state, model_input) in clean.items():
        dirty = run(arguments, impl)
        assert torch.equal(dirty[0][[0, 2]], state[[0, 2]]) and torch.equal(dirty[1], model_input), impl
        assert dirty[0][1].isnan().all()
    arguments["table"][:] = torch.tensor([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]])
    arguments["tiles"][:] = torch.nan
    for impl in runnable():
        state, model_input = run(arguments, impl)
        assert torch.equal(state[0], arguments["state"][0]), impl
        assert torch.equal(model_input, arguments["input_scale"][2] * state[0])


@examples(2, 50)
@given(grid=grids(), window=windows, halves=st.integers(1, 2), data=st.data())
def test_order_of_tiles_does_not_matter(grid: Grid, window: ops.Window, halves: int, data: st.DataObject) -> None:
    _, _, offsets = grid
    arguments = problem(grid, 2, halves, C=1)
    order = data.draw(st.permutations(range(len(offsets))))
    tiles = arguments["tiles"].view(len(offsets), -1, *arguments["tiles"].shape[1:])[order].flatten(0, 1)
    other = arguments | {"tiles": tiles, "offsets": arguments["offsets"][order]}
    for impl in runnable():
        results = zip(run(arguments, impl, window=window), run(other, impl, window=window), strict=True)
        assert all(torch.equal(*pair) for pair in results), impl


@examples(2, 50)
@given(grid=grids(), window=st.sampled_from(["core", "ramp"]), ramp=st.integers(1, 3), halves=st.integers(1, 2))
def test_pixels_without_weight_are_not_read(grid: Grid, window: ops.Window, ramp: int, halves: int) -> None:
    (H, W), (h, w), offsets = grid
    weights_y = reference.axis_weights(offsets[:, 0].tolist(), h, H, window, ramp)
    weights_x = reference.axis_weights(offsets[:, 1].tolist(), w, W, window, ramp)
    weight = (weights_y[:, :, None] * weights_x[:, None, :]).to(DEVICE)
    arguments = problem(grid, 1, halves, C=1)
    nowhere = (weight == 0).repeat_interleave(2 * halves, 0)[:, None]
    poisoned = arguments | {"tiles": arguments["tiles"].masked_fill(nowhere, torch.nan)}
    for impl in runnable():
        clean = run(arguments, impl, window=window, ramp=ramp)
        assert torch.equal(run(poisoned, impl, window=window, ramp=ramp)[0], clean[0]), impl


def test_threads_do_not_change_the_result() -> None:
    arguments = problem(((96, 80), (32, 32), product([0, 32, 64], [0, 24, 48])), 3, 2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(arguments, None)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ----------------------------------------------------------------------------- torch


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: ops.Impl) -> None:
    if reason := ops.unavailable("fused_step", impl, DEVICE):
        pytest.skip(reason)
    op = getattr(torch.ops.tiledcore, f"fused_step_{impl}").default
    for halves in (1, 2):
        a = problem(((6, 12), (6, 7), product([0], [0, 5])), 2, halves, C=1)
        a["table"][:, :, -1] = 0
        names = ["tiles", "offsets", "state", "table", "input_scale", "step", "model_input", "guidance_scale"]
        inputs = [a[name] for name in names]
        if halves == 1:
            torch.library.opcheck(op, (*inputs, None, "mean", 3))
        else:
            strided = inputs[0].mT.contiguous().mT
            torch.library.opcheck(op, (strided, *inputs[1:], a["noise"], "ramp", 3))


def test_functionalization_keeps_the_mutations() -> None:
    """Through torch.compile's functional graph the state changes as it does without."""
    arguments = problem(((10, 12), (6, 7), product([0, 4], [0, 5])), 2, 2)

    def step(state: Tensor, model_input: Tensor) -> Tensor:
        mine = arguments | {"state": state, "model_input": model_input}
        ops.fused_step(**mine, impl="reference")
        ops.fused_step(**mine, impl="reference")
        return state.sum() + model_input.sum()

    eager, compiled = ([arguments[name].clone() for name in ("state", "model_input")] for _ in range(2))
    wanted = step(*eager)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = problem(((10, 12), (6, 7), product([0, 4], [0, 5])), 2, 2)
    with FakeTensorMode() as mode:
        fake = {name: None if value is None else mode.from_tensor(value) for name, value in arguments.items()}
        assert ops.fused_step(**fake) is None

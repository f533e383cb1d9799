"""Moving tiles that fade into the step before: where, into what, in every loop, and what it needs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from runs import assert_same, assert_same_after, generate, quiet
from tilings import FADING, MOVING, moving
from tiny import tiny_sd, tiny_sdxl
from tiny_transformers import build, call, tiny_flux, tiny_qwen, tiny_z_image
from torch import Tensor

from tiledcore import TiledPipeline, TilingConfig, apply_tiling
from tiledcore.geometry import TileGrid
from tiledcore.hook import default_tiling
from tiledcore.schedulers.noise_levels import clean_and_noisy
from tiledcore.tiles.fade import Fading, fade_coefficients, fade_weights


@given(st.integers(2, 80), st.floats(0.5, 12), st.booleans(), st.data())
def test_weights_are_of_the_distance_to_the_nearest_line(size: int, width: float, wrap: bool, data: Any) -> None:
    inner = data.draw(st.sets(st.integers(1, size - 1), max_size=4))
    starts = sorted(inner if wrap else {0, *inner})
    weights = fade_weights(size, starts, width, wrap).tolist()
    lines = [line + k * size for line in starts for k in (-1, 0, 1)] if wrap else sorted(inner)
    for y, weight in enumerate(weights):
        away = min((abs(y + 0.5 - line) for line in lines), default=float("inf"))
        assert weight == pytest.approx(min(1.0, max(0.0, (width - away) / max(width - 0.5, 0.5))))
        assert weight == 1 or away > 0.5 or width < 1


SCHEDULERS: dict[str, Any] = {
    "epsilon": lambda: DDIMScheduler(clip_sample=False),
    "v": lambda: DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "Euler": EulerDiscreteScheduler,
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def faded(name: str, wrap: bool = False) -> tuple[Fading, list[tuple[Tensor, Tensor, Tensor, Tensor]], Any]:
    """Four evaluations on unrelated canvases of two images and two branches: (canvas, prediction, faded, weights)."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(4)
    fading, found = Fading(3.0, (wrap, wrap)), []
    fading.start(fade_coefficients(scheduler, scheduler.timesteps))
    generator = torch.Generator().manual_seed(0)
    grid = TileGrid(40, 48, 16, wrap=(wrap, wrap))
    for index in range(4):
        tiles = grid.shifted(index, 0)
        canvas = torch.randn(2, 3, 40, 48, generator=generator)
        prediction = torch.randn(4, 3, 40, 48, generator=generator)
        axes = ((40, tiles.rows), (48, tiles.cols))
        y, x = (fade_weights(n, [start for start, _ in parts], 3.0, wrap) for n, parts in axes)
        weights = 1 - (1 - y[:, None]) * (1 - x)
        found.append((canvas, prediction, fading(index, prediction, canvas, tiles), weights))
    return fading, found, scheduler


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_prediction_gives_way_to_the_clean_image_of_the_one_before(name: str, wrap: bool) -> None:
    fading, found, scheduler = faded(name, wrap)
    before = None
    for index, (canvas, prediction, result, weights) in enumerate(found):
        clean, noisy = clean_and_noisy(scheduler, scheduler.timesteps[index])
        z = canvas.double().repeat(2, 1, 1, 1)
        own = (prediction.double() - noisy * z) / clean
        if before is not None and index >= 2:
            own = weights * before + (1 - weights) * own
        else:
            assert torch.equal(result, prediction)
        torch.testing.assert_close(result.double(), clean * own + noisy * z, rtol=1e-4, atol=1e-4)
        before = own
    assert fading.clean is not None and before is not None
    torch.testing.assert_close(fading.clean.double(), before, rtol=1e-3, atol=1e-3)
    changed, weights = (found[3][2] != found[3][1]).any(0).any(0), found[3][3]
    assert torch.equal(changed, weights > 0) and changed.any() and not changed.all()


def test_half_precision_stays_and_tiles_fade_where_their_cores_meet_once_they_have_moved() -> None:
    fading, found, _ = faded("epsilon")
    canvas, prediction, *_ = found[-1]
    tiles = TileGrid(40, 48, 16).shifted(2, 0)
    half = fading(3, prediction.bfloat16(), canvas, tiles)
    assert half.dtype == torch.bfloat16 and fading.clean is not None and fading.clean.dtype == torch.float32
    overlapping = TileGrid(40, 48, 16, 4)
    changed = (fading(3, prediction, canvas, overlapping) != prediction).any(0).any(0)
    y, x = (
        fade_weights(n, [c for c, _ in cores], 3.0, False) > 0
        for n, cores in ((40, overlapping.core_rows), (48, overlapping.core_cols))
    )
    assert torch.equal(changed, y[:, None] | x)
    assert torch.equal(fading(3, prediction, canvas, overlapping), prediction)  # they have not moved


KINDS = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
]


@pytest.mark.parametrize("scheduler", KINDS)
@pytest.mark.parametrize("wrap", [False, pytest.param((False, True), marks=pytest.mark.slow)])
def test_both_loops_fade_alike(scheduler: Any, wrap: Any) -> None:
    pipe = quiet(tiny_sd())
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    for blend_steps in (0, 1):
        tiling = moving(fade=3, blend_steps=blend_steps, wrap=wrap)
        assert_same(pipe, tiling)
        plain = moving(blend_steps=blend_steps, wrap=wrap)
        assert not torch.allclose(generate(pipe, True, tiling)[0], generate(pipe, True, plain)[0])


@pytest.mark.parametrize(
    "arguments", [{"guidance_scale": 1.0}, {"guidance_rescale": 0.7}, {"num_images_per_prompt": 2}]
)
def test_with_and_without_guidance(arguments: dict[str, Any]) -> None:
    pipe = quiet(tiny_sdxl())
    if "guidance_rescale" not in arguments:  # of which the two loops see different predictions
        assert_same(pipe, FADING, **arguments)
    one, other = (generate(pipe, True, tiling, **arguments)[0] for tiling in (FADING, MOVING))
    assert one.isfinite().all() and not torch.allclose(one, other)


@pytest.mark.parametrize("make", [tiny_flux, tiny_qwen, tiny_z_image])
def test_packed_tokens_and_predictions_of_another_sign(make: Any) -> None:
    """FLUX is fused; the others keep their own loop. A network that predicts nothing is never changed."""
    results = []
    for tiling in (FADING, MOVING):
        pipe = TiledPipeline.from_pipe(build(make), tiling=tiling)
        results.append(call(pipe, make, (32, 40), num_inference_steps=4))
        assert pipe.report is not None and pipe.report.fused == (make is tiny_flux)
    assert results[0].isfinite().all() and not torch.allclose(*results)


def test_the_second_half_fades_and_a_canvas_of_one_tile_does_not() -> None:
    pipe = quiet(tiny_sd())
    two_steps = [generate(pipe, True, tiling, num_inference_steps=1)[0] for tiling in (FADING, MOVING)]
    assert torch.equal(*two_steps)
    small = [generate(pipe, True, tiling, height=128, width=128)[0] for tiling in (FADING, MOVING)]
    assert torch.equal(*small)


def test_a_wide_fade_is_cut_to_a_quarter_of_a_tile() -> None:
    pipe = quiet(tiny_sd())
    quarter, more = (moving(fade=fade) for fade in (4, 100))
    assert torch.equal(generate(pipe, True, quarter)[0], generate(pipe, True, more)[0])


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_a_run_that_is_broken_off_goes_on_to_the_same_bits(evaluation: int, tmp_path: Path) -> None:
    assert_same_after(evaluation, tiny_sdxl, tmp_path, tiling=FADING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fade": 2}, "fade=2: only with shift=True"),
        ({"fade": -1, "shift": True}, "fade=-1: must be an int of at least 0"),
        ({"fade": 1.5, "shift": True}, "fade=1.5: must be an int of at least 0"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TilingConfig(**arguments)


def test_only_a_tiled_pipeline_fades() -> None:
    with pytest.raises(ValueError, match="fade=3: only a TiledPipeline fades"):
        apply_tiling(tiny_sd(), FADING)


def test_a_scheduler_that_scales_its_predictions_is_refused_and_gets_another_default() -> None:
    pipe = quiet(tiny_sd())
    assert default_tiling(pipe, fades=True).fade > 0
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="fade: EDMEulerScheduler scales its predictions"):
        generate(pipe, True, FADING)
    assert default_tiling(pipe, fades=True) == default_tiling(pipe)

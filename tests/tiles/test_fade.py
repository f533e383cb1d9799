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

from tiledcore import Motion, TiledPipeline, TilingConfig, apply_tiling
from tiledcore.feature import Features
from tiledcore.geometry import TileGrid
from tiledcore.hook import STEPWISE, default_tiling, with_fade
from tiledcore.schedulers.pull import clean_and_noisy
from tiledcore.tiles.fade import Fade, fade_weights


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


def faded(name: str, wrap: bool = False) -> tuple[Fade, list[tuple[Tensor, Tensor, Tensor, Tensor]], Any]:
    """Four evaluations on unrelated canvases of two images: (canvas, prediction, faded, weights)."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(4)
    fade, found = Fade(3.0, (wrap, wrap)), []
    fade.begin(scheduler, scheduler.timesteps)
    generator = torch.Generator().manual_seed(0)
    grid = TileGrid(40, 48, 16, wrap=(wrap, wrap))
    for index in range(4):
        tiles = grid.shifted(index, 0)
        canvas, prediction = torch.randn(2, 2, 3, 40, 48, generator=generator)
        axes = ((40, tiles.rows), (48, tiles.cols))
        y, x = (fade_weights(n, [start for start, _ in parts], 3.0, wrap) for n, parts in axes)
        weights = 1 - (1 - y[:, None]) * (1 - x)
        result = Features([fade]).after_prediction(index, canvas, tiles, prediction)
        found.append((canvas, prediction, result, weights))
    return fade, found, scheduler


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_prediction_gives_way_to_the_clean_image_of_the_one_before(name: str, wrap: bool) -> None:
    fade, found, scheduler = faded(name, wrap)
    before = None
    for index, (canvas, prediction, result, weights) in enumerate(found):
        clean, noisy = clean_and_noisy(scheduler, scheduler.timesteps[index])
        z = canvas.double()
        own = (prediction.double() - noisy * z) / clean
        if before is not None and index >= 2:
            own = weights * before + (1 - weights) * own
        else:
            assert torch.equal(result, prediction)
        torch.testing.assert_close(result.double(), clean * own + noisy * z, rtol=1e-4, atol=1e-4)
        before = own
    assert before is not None
    torch.testing.assert_close(fade.tensors()["clean"].double(), before, rtol=1e-3, atol=1e-3)
    changed, weights = (found[3][2] != found[3][1]).any(0).any(0), found[3][3]
    assert torch.equal(changed, weights > 0) and changed.any() and not changed.all()


def test_tiles_fade_where_their_cores_meet_once_they_have_moved() -> None:
    fade, found, _ = faded("epsilon")
    canvas, prediction, *_ = found[-1]
    overlapping = TileGrid(40, 48, 16, 4)
    changed = (fade.after_prediction(3, canvas, overlapping, prediction) != prediction).any(0).any(0)
    y, x = (
        fade_weights(n, [c for c, _ in cores], 3.0, False) > 0
        for n, cores in ((40, overlapping.cores[0]), (48, overlapping.cores[1]))
    )
    assert torch.equal(changed, y[:, None] | x)
    # They have not moved.
    assert torch.equal(fade.after_prediction(3, canvas, overlapping, prediction), prediction)


@pytest.mark.parametrize("fused", [False, True])
def test_a_network_of_half_precision_fades_in_float32(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    after, seen = Fade.after_prediction, []

    def spy(self: Fade, *args: Any) -> Tensor:
        prediction, result = args[-1], after(self, *args)
        seen.append((len(prediction), prediction.dtype, result.dtype, self.tensors()["clean"].dtype))
        return result

    monkeypatch.setattr(Fade, "after_prediction", spy)
    latents, report = generate(quiet(tiny_sd().to(torch.bfloat16)), fused, FADING)
    assert latents.dtype == torch.bfloat16 and report is not None and report.fused == fused
    # Once a step, after guidance: of the two branches one prediction is left.
    assert seen == [(1, torch.float32, torch.float32, torch.float32)] * 3


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
    for blend_last in (0, 1):
        tiling = moving(fade=3, blend_last=blend_last, wrap=wrap)
        assert_same(pipe, tiling)
        plain = moving(blend_last=blend_last, wrap=wrap)
        assert not torch.allclose(generate(pipe, True, tiling)[0], generate(pipe, True, plain)[0])


@pytest.mark.parametrize("arguments", [{"guidance_scale": 1.0}, {"num_images_per_prompt": 2}])
def test_with_and_without_guidance(arguments: dict[str, Any]) -> None:
    pipe = quiet(tiny_sdxl())
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
    for arguments in ({"num_inference_steps": 1}, {"height": 128, "width": 128}):
        fading, moves = (generate(pipe, True, tiling, **arguments)[0] for tiling in (FADING, MOVING))
        # Guidance comes before the step where a fade looks at the prediction, and in the step elsewhere: rounding.
        torch.testing.assert_close(fading, moves, rtol=1e-5, atol=1e-5)


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
        ({"fade": -1}, "fade=-1 must be an int of at least 0"),
        ({"fade": 1.5}, "fade=1.5 must be an int of at least 0"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Motion(**arguments)


def test_only_a_tiled_pipeline_fades() -> None:
    with pytest.raises(ValueError, match="fade=3: only a TiledPipeline fades"):
        apply_tiling(tiny_sd(), FADING)


def test_a_scheduler_that_scales_its_predictions_is_refused_and_gets_another_default() -> None:
    pipe = quiet(tiny_sd())
    default = default_tiling(pipe)
    assert with_fade(pipe, default, fades=True) == default
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="fade=3: EDMEulerScheduler cannot fade; give fade=0"):
        generate(pipe, True, FADING)
    assert with_fade(pipe, default, fades=True) == TilingConfig(motion=STEPWISE)

"""Predicted peaks against what torch's own profiler saw of the allocator, and against the known figures of SDXL."""

import json
from typing import Any

import pytest
import torch
from allocator import allocated
from tilings import CANVAS, FADING, still
from tiny import tiny_sdxl

from tiledcore import Execution, TiledPipeline, TilingConfig
from tiledcore.cli.main import main
from tiledcore.memory.architectures import architecture
from tiledcore.memory.planner import SAFETY, DoesNotFit, Planner
from tiledcore.memory.prediction import Predictor, attention_pairs, parse_bytes
from tiledcore.vae.live_bytes import LiveBytes

GIB = 2**30
WAYS = {"tiles": still(overlap=4), "canvas": CANVAS, "fading": FADING}


def embedded() -> Any:
    return TiledPipeline.from_pretrained().pipe


@pytest.mark.parametrize(
    ("make", "way", "output"),
    [
        (tiny_sdxl, "tiles", "latent"),
        (tiny_sdxl, "canvas", "latent"),
        (tiny_sdxl, "fading", "latent"),
        (tiny_sdxl, "tiles", "pt"),
        (embedded, "tiles", "latent"),
        (embedded, "canvas", "pt"),
    ],
)
def test_a_prediction_is_within_a_tenth_of_what_was_allocated(make: Any, way: str, output: str) -> None:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pairs = Execution(tile_batch=2)
    wrapped = TiledPipeline.from_pipe(pipe, tiling=WAYS[way], execution=pairs, memory_budget="8GiB")
    call: dict[str, Any] = {"height": 320, "width": 384, "num_inference_steps": 1, "output_type": output}
    real = allocated(wrapped, call)
    assert wrapped.report is not None and wrapped.report.plan is not None
    phases = wrapped.report.plan.phases
    predicted = max(phase.peak for phase in phases if output == "pt" or phase.name != "decode")
    assert real == pytest.approx(predicted, rel=0.1)
    assert wrapped.report.measured_bytes == pytest.approx(predicted, rel=0.1)


def test_live_bytes_count_each_storage_once_and_until_it_is_freed() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a[10:].view(2, 495)
        c = a + 1
        assert (live.now, live.peak) == (8000, 8000)
        del a, c
        assert live.now == 4000
        del b
        assert live.now == 0 and live.reset() == 8000 and live.peak == 0


def test_pairs_of_neighbour_attention_are_those_of_every_query() -> None:
    from tiledcore.ops.reference import _window

    axes = ((13, 5, 3, True), (9, 4, 6, False))
    counted = [sum(len(_window(p, *axis)) for p in range(axis[0])) for axis in axes]
    canvas, tile, halo, wrap = zip(*axes, strict=True)
    assert attention_pairs(canvas, tile, halo, wrap) == counted[0] * counted[1]


def test_the_sdxl_network_over_a_whole_canvas() -> None:
    """Weights of 2.57e9 parameters, and a whole 4096x4096 image in under 10 GiB without an N² buffer."""
    predictor = Predictor(architecture("sdxl"), "cuda")
    assert predictor.weights("unet") == pytest.approx(2 * 2.567e9, rel=0.001)
    both = predictor.evaluation((512, 512), TilingConfig(mode="canvas"), Execution(), 1, 2)
    assert 9 * GIB < both.peak + predictor.weights("unet") < 10 * GIB
    # The common count for one 1024x1024 evaluation, without attention's two products, is 2.99e12 multiply-adds.
    one = predictor.evaluation((128, 128), TilingConfig(), Execution(), 1, 1)
    assert one.flops == pytest.approx(2 * 2.99e12, rel=0.25) and one.tiles == 1


@pytest.mark.parametrize(("side", "budget"), [(4096, 16 * GIB), pytest.param(8192, 24 * GIB, marks=pytest.mark.slow)])
def test_sdxl_fits_in_every_phase(side: int, budget: int) -> None:
    found = Planner(Predictor(architecture("sdxl"), "cuda"), budget).plan((side, side), TilingConfig(mode="canvas"))
    assert [phase.name for phase in found.phases] == ["text encoders", "network", "decode"]
    assert all(phase.peak * SAFETY <= budget for phase in found.phases)


def test_a_smaller_budget_takes_smaller_batches_and_then_is_refused() -> None:
    predictor = Predictor(architecture("earth", torch.float32), "cpu")
    wide = Planner(predictor, 8 * GIB).plan((384, 384), TilingConfig())
    assert wide.execution.tile_batch == 4 and wide.vae_band is None
    lean = Planner(predictor, int(wide.phases[1].peak * SAFETY) - 1).plan((384, 384), TilingConfig())
    assert lean.execution.tile_batch < 4 and lean.vae_band is not None and lean.fits
    with pytest.raises(DoesNotFit, match=r"What would fit: budget [0-9]+MiB$") as refused:
        Planner(predictor, 2**20).plan((384, 384), TilingConfig())
    assert not refused.value.leanest.fits


def test_a_transformer_runs_in_canvas_mode_where_it_fits_and_a_unet_in_moving_tiles() -> None:
    unet, transformer = (Predictor(architecture(name, torch.float32), "cpu") for name in ("earth", "earth-flux"))
    assert Planner(unet, 8 * GIB).plan((1024, 1024)).tiling == TilingConfig(motion="moving")
    found = Planner(transformer, 8 * GIB).plan((1024, 1024))
    assert found.tiling == TilingConfig(mode="canvas")
    tight = Planner(transformer, int(found.phases[1].peak * SAFETY) - 1)
    assert tight.plan((1024, 1024), execution=Execution(guidance_batch=False)).tiling.mode in ("tiles", "canvas")


def test_offload_only_where_everything_at_once_does_not_fit() -> None:
    predictor = Predictor(architecture("earth", torch.float32), "cuda")
    everything = Planner(predictor, 8 * GIB).plan((256, 256))
    assert not everything.offload
    less = Planner(predictor, 8 * GIB, offload=True).plan((256, 256))
    assert all(a.peak < b.peak for a, b in zip(less.phases, everything.phases, strict=True))


@pytest.mark.parametrize("value", ["24B", "24GiB", "24 gib", 24, "1.5kb"])
def test_sizes_in_bytes(value: int | str) -> None:
    expected = {"24B": 24, "24GiB": 24 * GIB, "24 gib": 24 * GIB, 24: 24, "1.5kb": 1500}
    assert parse_bytes(value) == expected[value]


@pytest.mark.parametrize(
    "value", ["", "much", "-1GiB", 0, "24 GiB of it", True, "24", "9" * 400 + "GiB", 10**400, "2048TiB", "5ib"]
)
def test_what_is_no_size_is_refused(value: int | str) -> None:
    with pytest.raises(ValueError, match="budget="):
        parse_bytes(value)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "earth", "--size", "512x256", "--budget", "2GiB", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["needs"] <= 2 * GIB and found["size"] == [512, 256]
    assert main(["plan", "--model", "earth", "--size", "512x500", "--budget", "2GiB"]) == 2
    assert "--size 512x500: each side must be a multiple of 8 px, such as 512x496 or 512x504" in capsys.readouterr().err
    assert main(["plan", "--model", "nowhere", "--size", "512x512", "--budget", "2GiB"]) == 2
    assert "must be one of sd15, sdxl, sd3, flux" in capsys.readouterr().err

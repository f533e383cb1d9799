"""The engine gives what the pipeline's own loop gives, for every pipeline, scheduler and way that it takes over."""

import logging
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from runs import Double, assert_same, generate, quiet
from tilings import CANVAS, MOVING, ONE, moving, still
from tiny import tiny_sd, tiny_sdxl
from tiny_transformers import NATIVE, build, call, tiny_flux, tiny_pixart_sigma, tiny_sd3
from torch import Tensor

from tiledcore import TiledPipeline, TilingConfig

WAYS = {"tiles": ONE, "moving": MOVING, "canvas": CANVAS}


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_every_kind_of_scheduler(scheduler: Any) -> None:
    pipe = quiet(tiny_sd())
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    assert_same(pipe)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_every_way_over_the_canvas(make: Any, way: str) -> None:
    report = assert_same(quiet(make()), WAYS[way])
    assert report.evaluations == 4


@pytest.mark.parametrize(
    "kwargs",
    [
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.5, "guidance_scale": 1.0},
        {"num_images_per_prompt": 2, "negative_prompt": "a dog"},
        {"eta": 0.5},
        {"height": 128, "width": 128},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_arguments_of_the_call(kwargs: dict[str, Any]) -> None:
    assert_same(quiet(tiny_sd()), **kwargs)


def test_guidance_rescale_is_the_pipelines_own() -> None:
    pipe, size = quiet(tiny_sdxl()), {"height": 128, "width": 128, "num_inference_steps": 4}
    rescaled, plain = (generate(pipe, True, **size, guidance_rescale=value) for value in (0.7, 0.0))
    generator = torch.Generator().manual_seed(0)
    own = pipe("a cat", generator=generator, output_type="latent", guidance_scale=5.0, guidance_rescale=0.7, **size)
    assert torch.equal(rescaled[0], own.images)
    assert not torch.allclose(rescaled[0], plain[0], atol=1e-2)
    assert rescaled[1].reason == "guidance_rescale needs the spread of the whole prediction" and plain[1].fused
    tiled, _ = generate(pipe, True, guidance_rescale=0.7)
    assert not torch.allclose(tiled, generate(pipe, True)[0], atol=1e-2)


def test_image_to_image_starts_inside_the_table() -> None:
    image = torch.rand(1, 3, 160, 256, generator=torch.Generator().manual_seed(1))
    plain: dict[str, Any] = {"image": image, "strength": 0.6, "height": None, "width": None}
    report = assert_same(quiet(tiny_sd()), num_inference_steps=5, **plain)
    assert report.evaluations == 3


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_transformers(make: Any) -> None:
    results = []
    for fused in (False, True):
        wrapped = TiledPipeline.from_pipe(build(make), tiling=still(tile=NATIVE, overlap=4), fused=fused)
        results.append(call(wrapped, make, (24, 32)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert wrapped.report is not None and wrapped.report.fused


def test_callbacks_see_and_change_every_step() -> None:
    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    pipe = quiet(tiny_sd())
    for fused in (False, True):

        def callback(_: Any, step: int, timestep: Any, tensors: dict[str, Any], fused: bool = fused) -> dict[str, Any]:
            seen[fused].append(tensors["latents"].clone())
            return {"latents": 0.5 * tensors["latents"]} if step == 1 else tensors

        result, _ = generate(pipe, fused, callback_on_step_end=callback)
        seen[fused].append(result)
    assert len(seen[True]) == 5
    for ours, own in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


def test_what_is_not_linear_goes_through_the_schedulers_own_step(caplog: pytest.LogCaptureFixture) -> None:
    pipe = quiet(tiny_sd())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True, clip_sample_range=0.5)
    own, _ = generate(pipe, False)
    with caplog.at_level(logging.WARNING, logger="tiledcore"):
        ours, report = generate(pipe, True)
    assert torch.equal(ours, own)
    assert report is not None and not report.fused and "clip_sample" in (report.reason or "")
    assert len([r for r in caplog.records if "own step is used" in r.message]) == 1


def test_other_pipelines_keep_their_loop() -> None:
    wrapped = TiledPipeline.from_pipe(build(tiny_pixart_sigma), tiling=still(tile=NATIVE, overlap=4))
    call(wrapped, tiny_pixart_sigma, (24, 32))
    assert wrapped.report is not None and not wrapped.report.fused
    assert wrapped.report.reason == "PixArtSigmaPipeline keeps its own loop"


def test_the_scheduler_is_left_as_it_was() -> None:
    pipe = quiet(tiny_sd())
    before = dict(vars(pipe.scheduler))
    generate(pipe, True)
    assert vars(pipe.scheduler).keys() >= before.keys()
    assert not {"step", "scale_model_input"} & vars(pipe.scheduler).keys()


@pytest.mark.parametrize("tiling", [ONE, moving(tile=(10, 16), wrap=True)], ids=["fixed grid", "grid that moves"])
def test_a_replayed_graph_gives_the_same_bits(tiling: TilingConfig) -> None:
    """The double replays the body of one step for all others, on the buffers' contents alone."""
    pipe = quiet(tiny_sdxl())
    expected = [generate(pipe, True, tiling, guidance_scale=scale)[0] for scale in (5.0, 2.0)]
    wrapped = TiledPipeline.from_pipe(pipe, tiling=tiling, cuda_graph=True)
    wrapped._graphs.backend = Double()
    replays = []
    for scale, latents in zip((5.0, 2.0), expected, strict=True):
        generator = torch.Generator().manual_seed(0)
        arguments: dict[str, Any] = {"height": 160, "width": 256, "num_inference_steps": 4, "guidance_scale": scale}
        result = wrapped("a cat", generator=generator, output_type="latent", **arguments).images
        assert torch.equal(result, latents)
        assert wrapped.report is not None
        replays.append(wrapped.report.graph.replays)
    assert replays == [3, 4]  # one eager step, then the graph; the second image has it from the start


def test_graph_refusals_reach_the_report() -> None:
    wrapped = TiledPipeline.from_pipe(quiet(tiny_sd()), tiling=WAYS["moving"])
    wrapped._graphs.backend = Double()
    wrapped("a cat", height=160, width=256, num_inference_steps=2, output_type="latent")
    assert wrapped.report is not None and wrapped.report.graph.eager == 2
    assert wrapped.report.graph.reason == "the tiles of a step have several sizes, or differ from step to step"

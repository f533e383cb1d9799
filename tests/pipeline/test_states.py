"""A pipeline is tiled or it is not: whatever offload, compilation, caches, copies and threads do to it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig
from tilings import RAMP
from tiny import tiny_sd

from tiledcore import Execution, TiledPipeline, TilingConfig, apply_tiling, remove_tiling


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, **kwargs: Any) -> torch.Tensor:
    kwargs = {"height": 160, "width": 192, "num_inference_steps": 2, "output_type": "latent"} | kwargs
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **kwargs).images


@pytest.fixture
def pipe() -> Any:
    return quiet(tiny_sd())


@pytest.fixture(scope="module")
def results() -> tuple[torch.Tensor, torch.Tensor]:
    """What a call gives untiled and tiled."""
    pipe = quiet(tiny_sd())
    plain = run(pipe)
    tiled = run(apply_tiling(pipe, RAMP))
    assert not torch.allclose(plain, tiled, atol=1e-3)
    return plain, tiled


def test_offload_before_and_after(pipe: Any, results: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain, tiled = results
    apply_tiling(pipe, RAMP)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # accelerate puts its hooks back after each call
        assert torch.equal(run(pipe), tiled)
    remove_tiling(pipe)
    for _ in range(2):
        assert torch.equal(run(pipe), plain)
    apply_tiling(pipe, RAMP)
    assert torch.equal(run(pipe), tiled)
    pipe.remove_all_hooks()
    assert torch.equal(run(pipe), tiled)
    assert torch.equal(run(remove_tiling(pipe)), plain)


def test_a_network_compiled_after_tiling(pipe: Any, results: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain, tiled = results
    apply_tiling(pipe, RAMP)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    try:
        torch.testing.assert_close(run(pipe), tiled, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run(remove_tiling(pipe)), plain, rtol=1e-4, atol=1e-4)
    finally:
        torch._dynamo.reset()


def test_a_cache_that_comes_and_goes(pipe: Any, results: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain, tiled = results
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        tensor_format="BCHW",
        current_timestep_callback=lambda: 500,
        is_guidance_distilled=True,
    )
    from diffusers.hooks import apply_faster_cache
    from diffusers.hooks.faster_cache import _FASTER_CACHE_BLOCK_HOOK, _FASTER_CACHE_DENOISER_HOOK

    apply_tiling(pipe, RAMP)
    apply_faster_cache(pipe.unet, config)
    registry = pipe.unet._diffusers_hook
    for name in (_FASTER_CACHE_DENOISER_HOOK, _FASTER_CACHE_BLOCK_HOOK):
        registry.remove_hook(name, recurse=True)
    assert torch.equal(run(pipe), tiled)
    assert torch.equal(run(remove_tiling(pipe)), plain)


def test_another_network_is_tiled_too(pipe: Any, results: tuple[torch.Tensor, torch.Tensor]) -> None:
    apply_tiling(pipe, RAMP)
    pipe.unet = tiny_sd().unet
    assert torch.equal(run(pipe), results[1])


def test_a_deep_copy_is_its_own(pipe: Any, results: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain, tiled = results
    apply_tiling(pipe, RAMP)
    other = copy.deepcopy(pipe)
    before = pipe.scheduler.timesteps.clone()
    assert torch.equal(run(other, num_inference_steps=2), tiled)
    assert torch.equal(pipe.scheduler.timesteps, before) and other.scheduler is not pipe.scheduler
    assert torch.equal(run(remove_tiling(pipe)), plain)
    assert torch.equal(run(other), tiled)


@pytest.mark.parametrize("mode", ["tiles", "canvas"])
def test_two_threads_share_a_network(mode: Any, results: tuple[torch.Tensor, torch.Tensor]) -> None:
    one = quiet(tiny_sd())
    two = quiet(
        type(one)(**{**one.components, "scheduler": copy.deepcopy(one.scheduler)}, requires_safety_checker=False)
    )
    config = TilingConfig(mode=mode, tile=16)
    expected = run(TiledPipeline(one, config))
    plain = run(two)
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(index: int, pipe: Any) -> None:
        found[index] = [run(pipe) for _ in range(3)]

    threads = [threading.Thread(target=work, args=each) for each in ((0, TiledPipeline(one, config)), (1, two))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found[0]) == len(found[1]) == 3
    assert all(torch.equal(latents, expected) for latents in found[0])
    assert all(torch.allclose(latents, plain, atol=1e-5) for latents in found[1])


def test_execution_changes_no_picture(pipe: Any, results: tuple[torch.Tensor, torch.Tensor]) -> None:
    found = run(apply_tiling(pipe, RAMP, Execution(tile_batch=1)))
    torch.testing.assert_close(found, results[1], rtol=1e-4, atol=1e-4)


def test_a_tiled_pipeline_is_not_tiled_again() -> None:
    with pytest.raises(TypeError, match="a TiledPipeline is tiled already"):
        apply_tiling(TiledPipeline(tiny_sd()), RAMP)
    with pytest.raises(TypeError, match="a TiledPipeline is tiled already"):
        TiledPipeline(TiledPipeline(tiny_sd()))

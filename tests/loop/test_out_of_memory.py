"""Out of memory in an evaluation lowers what is evaluated at a time, and the step goes on as if it always had."""

import logging
from typing import Any

import pytest
import torch
from tilings import CANVAS, RAMP
from tiny import tiny_sdxl

from tiledcore import Execution, TiledPipeline, TilingConfig

ONE_BRANCH = Execution(guidance_batch=False)


def generate(
    tiling: TilingConfig,
    execution: Execution | None = None,
    most: int | None = None,
    calls: int = 0,
    fused: bool = True,
) -> Any:
    """Latents and report of a pipeline whose network holds ``most`` images, from its evaluation ``calls`` on."""
    pipe = tiny_sdxl()
    pipe.set_progress_bar_config(disable=True)
    done = 0

    def limit(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal done
        done += 1
        sample = args[0] if args else kwargs["sample"]
        if most is not None and done > calls and len(sample) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    pipe.unet.conv_in.register_forward_pre_hook(lambda m, args: limit(m, args, {}))
    wrapped = TiledPipeline.from_pipe(pipe, tiling=tiling, execution=execution, fused=fused)
    latents = wrapped(
        "a cat",
        height=192,
        width=256,
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    return latents, wrapped.report


@pytest.mark.parametrize("calls", [0, 5])
@pytest.mark.parametrize("fused", [True, False])
def test_tile_batches_are_halved(fused: bool, calls: int, caplog: pytest.LogCaptureFixture) -> None:
    expected, _ = generate(RAMP, Execution(tile_batch=1), fused=fused)
    with caplog.at_level(logging.WARNING, logger="tiledcore"):
        latents, report = generate(RAMP, Execution(tile_batch=4), most=2, calls=calls, fused=fused)
    # The same tiles in other batches: a convolution may round otherwise.
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-4)
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert len(said) == 2 and "tile_batch 4 -> 2" in said[0] and "tile_batch 2 -> 1" in said[1]
    assert report.reductions == ("tile_batch 4 -> 2", "tile_batch 2 -> 1") and report.fused == fused


def test_from_the_start_it_is_bit_for_bit_the_smaller_batch() -> None:
    expected, report = generate(RAMP, Execution(tile_batch=2))
    assert report.reductions == ()
    latents, _ = generate(RAMP, Execution(tile_batch=4), most=4)
    assert torch.equal(latents, expected)


def test_canvas_mode_splits_guidance() -> None:
    expected, _ = generate(CANVAS, ONE_BRANCH)
    latents, report = generate(CANVAS, most=1)
    assert torch.equal(latents, expected)
    assert report.reductions == ("guidance branches one after the other",)


def test_when_nothing_is_left_to_lower_it_is_raised() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        generate(RAMP, Execution(tile_batch=4), most=0)

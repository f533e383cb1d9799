"""Calls of tiny pipelines that several tests make: fused or not, broken off and resumed, with graphs or without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tilings import ONE, RAMP
from torch import Tensor

from tiledcore import Execution, TiledPipeline, TilingConfig
from tiledcore.loop.engine import Report
from tiledcore.loop.graph import Body
from tiledcore.tiles.denoiser import TileDenoiser


def quiet(pipe: Any) -> Any:
    """The same pipeline without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ----------------------------------------------------------------------------- fused and unfused


def generate(pipe: Any, fused: bool, tiling: TilingConfig = ONE, **kwargs: Any) -> tuple[Tensor, Report | None]:
    """Latents of four steps on 20x32 latent pixels, and the report."""
    wrapped = TiledPipeline.from_pipe(pipe, tiling=tiling, fused=fused)
    arguments: dict[str, Any] = {"height": 160, "width": 256, "num_inference_steps": 4, "guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(0)
    latents = wrapped("a cat", generator=generator, output_type="latent", **(arguments | kwargs)).images
    return latents, wrapped.report


def assert_same(pipe: Any, tiling: TilingConfig = ONE, **kwargs: Any) -> Report:
    """The fused loop gives the latents of the pipeline's own loop."""
    own, _ = generate(pipe, False, tiling, **kwargs)
    ours, report = generate(pipe, True, tiling, **kwargs)
    # The engine keeps the canvas in float32, where diffusers rounds between its many operations.
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
    assert report is not None and report.fused and report.reason is None
    return report


# ----------------------------------------------------------------------------- broken off and resumed

CALL: dict[str, Any] = {"height": 128, "width": 200, "num_inference_steps": 4, "output_type": "latent"}


class Killed(BaseException):
    """Ends a call as a killed process would: nothing catches it."""


def resumable(
    pipe: Any,
    tiling: TilingConfig = RAMP,
    execution: Execution | None = None,
    seed: int = 0,
    prompt: str = "a cat",
    **kwargs: Any,
) -> Any:
    """Latents and report of the call that the tests of checkpoints break off."""
    wrapped = TiledPipeline.from_pipe(quiet(pipe), tiling=tiling, execution=execution)
    generator = torch.Generator().manual_seed(seed)
    images = wrapped(prompt, **{"generator": generator, **CALL, **kwargs}).images
    return images, wrapped.report


def killed_at(evaluation: int, patch: pytest.MonkeyPatch) -> None:
    """While ``patch`` lasts, the given evaluation, counted from 0, raises :class:`Killed`."""
    evaluate, count = TileDenoiser.evaluate, iter(range(1000))

    def dying(self: TileDenoiser, *args: Any, **kwargs: Any) -> Any:
        if next(count) == evaluation:
            raise Killed
        return evaluate(self, *args, **kwargs)

    patch.setattr(TileDenoiser, "evaluate", dying)


def broken_off(evaluation: int, make: Any, **kwargs: Any) -> None:
    """A call of the pipeline that ``make`` builds, killed at the given evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        killed_at(evaluation, patch)
        with pytest.raises(Killed):
            resumable(make(), **kwargs)


def assert_same_after(evaluation: int, make: Any, folder: Path, **kwargs: Any) -> None:
    """Killed at the given evaluation and resumed, a call gives the bits of one that was not killed."""
    whole, report = resumable(make(), **kwargs)
    assert isinstance(whole, Tensor)
    broken_off(evaluation, make, checkpoint=folder, **kwargs)
    resumed, again = resumable(make(), checkpoint=folder, **kwargs)
    assert torch.equal(resumed, whole)
    assert again.resumed == evaluation
    assert again.evaluations == report.evaluations - evaluation


# ----------------------------------------------------------------------------- with graphs


class Double:
    """Stands in for CUDA graphs: capture records a body without running it, replay runs the recorded one."""

    broken: str | None = None

    def __init__(self, eager: float = 1.0, replay: float = 0.5, free: int = 1 << 40, fails: bool = False) -> None:
        self.times = {False: eager, True: replay}
        self.free, self.fails, self.replays = free, fails, set[Body]()

    def capture(self, body: Body) -> Body:
        if self.fails:
            self.broken = "the step cannot be captured: operation not permitted when stream is capturing"
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay() -> None:
            body()

        self.replays.add(replay)
        return replay

    def seconds(self, body: Body) -> float:
        body()
        return self.times[body in self.replays]

    def free_bytes(self) -> int:
        return self.free

"""Several processes make the bits of one, exchange what was counted, and end together."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image
from processes import on_ranks
from runs import quiet
from tilings import CANVAS, FADING, moving, still
from tiny import tiny_sd
from tiny_transformers import build, tiny_flux, tiny_sd3
from torch import Tensor

from tiledcore import Execution, Pull, Region, TiledPipeline, TilingConfig
from tiledcore.loop.checkpoint import FILE
from tiledcore.parallel.ranks import LostRankError, owners
from tiledcore.tiles.denoiser import TileDenoiser

RAMP = still(overlap=4)
REGIONS = [Region("a dog", box=(0, 0, 128, 192), feather=16, seed=3)]
PICTURE = Image.linear_gradient("L").convert("RGB").resize((256, 192))


def flux() -> Any:
    return build(tiny_flux)


def sd3() -> Any:
    return build(tiny_sd3)


def ancestral() -> Any:
    pipe = tiny_sd()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def run(make: Callable[[], Any], tiling: TilingConfig | None, seed: int | None = 0, **kwargs: Any) -> tuple[Any, Any]:
    """Images and report of three steps on 24x32 latent pixels."""
    options = {name: kwargs.pop(name) for name in ("execution", "fused", "parallel") if name in kwargs}
    pipe = TiledPipeline(quiet(make()), tiling, **options)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    call = {"height": 192, "width": 256, "num_inference_steps": 3, "output_type": "latent", "generator": generator}
    return pipe("a cat", **call | kwargs).images, pipe.report


def same(counts: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    expected = run(*args, **kwargs)[0]
    for count in counts:
        for result in on_ranks(count, lambda rank: run(*args, **kwargs)[0]):
            assert isinstance(result, Tensor) and torch.equal(result, expected), result


@pytest.mark.parametrize(
    ("make", "tiling", "more"),
    [
        (tiny_sd, FADING, {"regions": REGIONS}),
        (flux, moving(fade=3), {}),
        (sd3, still(overlap=4, wrap=True), {}),
        (tiny_sd, RAMP, {"execution": Execution(tile_batch=8, guidance_batch=False)}),
    ],
)
def test_the_bits_are_those_of_one_process(make: Any, tiling: TilingConfig, more: dict[str, Any]) -> None:
    same((3,), make, tiling, **more)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2,), (4,)])
@pytest.mark.parametrize(
    ("make", "tiling", "more"),
    [
        (tiny_sd, None, {"num_inference_steps": 5}),
        (ancestral, RAMP, {}),
        (tiny_sd, CANVAS, {}),
        (tiny_sd, still(32), {}),
        (tiny_sd, FADING, {"fused": False, "num_images_per_prompt": 2}),
        (tiny_sd, FADING, {"image": PICTURE, "strength": 0.9, "pull": Pull()}),
        (tiny_sd, still(overlap=4, wrap=(False, True)), {"regions": REGIONS}),
        (flux, None, {"num_inference_steps": 5}),
        (sd3, RAMP, {"regions": [Region("a dog", box=(0, 0, 128, 192))]}),
    ],
)
def test_every_feature_makes_the_bits_of_one_process(
    make: Any, tiling: TilingConfig | None, more: dict[str, Any], counts: tuple[int, ...]
) -> None:
    same(counts, make, tiling, **more)


def test_random_numbers_are_those_of_rank_0() -> None:
    expected = run(ancestral, RAMP, seed=0)[0]
    for result in on_ranks(2, lambda rank: run(ancestral, RAMP, seed=rank)[0]):
        assert torch.equal(result, expected)

    def own(rank: int) -> Any:
        torch.manual_seed(5 + rank)
        return run(ancestral, RAMP, seed=None)[0]

    first, second = on_ranks(2, own)
    assert torch.equal(first, second) and torch.equal(first, own(0))


def test_traffic_is_what_was_counted() -> None:
    """Each rank gets each prediction of the others once: two branches of 6 tiles, 4 on rank 0 and 2 on rank 1."""
    reports = [report.ranks for _, report in on_ranks(3, lambda rank: run(tiny_sd, RAMP))]
    tile_bytes = 2 * 4 * 16 * 16 * 4
    assert [report.bytes_per_step for report in reports] == [2 * tile_bytes, 4 * tile_bytes, 6 * tile_bytes]
    assert all(len(report.busy) == 3 and report.evaluations == 3 for report in reports)
    partition = [report.ranks for _, report in on_ranks(2, lambda rank: run(tiny_sd, moving()))]
    canvas = 2 * 4 * 24 * 32 * 4  # per step, both branches: what one rank has not evaluated, the other has
    assert sum(report.received for report in partition) == 3 * canvas


def test_costly_batches_are_dealt_first() -> None:
    assert owners([1, 8, 4, 4, 3], 2) == [1, 0, 1, 1, 0]
    assert owners([2, 2], 4) == [0, 1]
    costs = [float(7 * i % 11) for i in range(40)]
    dealt = owners(costs, 7)
    loads = [sum(cost for cost, owner in zip(costs, dealt, strict=True) if owner == rank) for rank in range(7)]
    assert max(loads) <= 4 / 3 * math.ceil(sum(costs) / 7)


def test_different_calls_are_refused() -> None:
    for error in on_ranks(2, lambda rank: run(tiny_sd, still(overlap=4 + rank))):
        assert isinstance(error, ValueError)
        assert "the same call, and tiling.overlap is 5 on rank 1, 4 on rank 0" in str(error)
    for error in on_ranks(2, lambda rank: run(lambda: tiny_sd(rank), RAMP)):
        assert isinstance(error, ValueError) and "weights of vae is" in str(error) and "on rank 1" in str(error)


@pytest.mark.slow
def test_different_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(rank: int) -> Any:
        monkeypatch.setattr(diffusers, "__version__", f"0.3{rank}")
        return run(tiny_sd, RAMP)

    for error in on_ranks(2, other):
        assert isinstance(error, ValueError) and "diffusers is '0.31' on rank 1, '0.30' on rank 0" in str(error)


def test_parallel_false_is_one_process() -> None:
    def alone(rank: int) -> Any:
        return run(tiny_sd, RAMP, seed=rank, parallel=False)

    for rank, (images, report) in enumerate(on_ranks(2, alone)):
        assert report.ranks is None and torch.equal(images, run(tiny_sd, RAMP, seed=rank)[0])
    with pytest.raises(ValueError, match=r"parallel='yes' must be one of auto, False"):
        run(tiny_sd, RAMP, parallel="yes")


def test_one_rank_out_of_memory_lowers_the_batch_of_all() -> None:
    def small(rank: int) -> Any:
        def limit(module: Any, args: Any) -> None:
            if rank == 1 and len(args[0]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")

        pipe = tiny_sd()
        pipe.unet.conv_in.register_forward_pre_hook(limit)
        return run(lambda: pipe, still(overlap=8), width=384, execution=Execution(tile_batch=4))

    expected = run(tiny_sd, still(overlap=8), width=384, execution=Execution(tile_batch=2))[0]
    for images, report in on_ranks(3, small):
        assert report.reductions == ("tile_batch 4 -> 2",) and torch.equal(images, expected)


# ----------------------------------------------------------------------------- a rank that dies


def dies_at(evaluation: int, which: int, make: Callable[[], Any]) -> Callable[[int], Any]:
    """A run with a checkpoint in which one rank kills itself."""

    def work(rank: int) -> Any:
        evaluate, count = TileDenoiser.evaluate, iter(range(100))

        def dying(self: TileDenoiser, *args: Any, **kwargs: Any) -> Any:
            if next(count) == evaluation and rank == which:
                os.kill(os.getpid(), signal.SIGKILL)
            return evaluate(self, *args, **kwargs)

        TileDenoiser.evaluate = dying  # type: ignore[method-assign]  # this process is a fork of the test's
        return run(make, FADING, num_inference_steps=4, checkpoint="run")

    return work


@pytest.mark.parametrize(
    ("which", "counts", "make"),
    [
        (1, (3, 2), tiny_sd),
        pytest.param(0, (4, 1), tiny_sd, marks=pytest.mark.slow),
        pytest.param(3, (4, 2), flux, marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_ends_the_run_and_others_go_on(
    which: int, counts: tuple[int, int], make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for rank, error in enumerate(on_ranks(counts[0], dies_at(2, which, make))):
        if rank == which:
            assert error is None
        else:
            assert isinstance(error, LostRankError) and "processes ended, or did not answer in time" in str(error)
    assert os.listdir("run") == [FILE]
    expected = run(make, FADING, num_inference_steps=4)[0]
    again = on_ranks(counts[1], lambda rank: run(make, FADING, num_inference_steps=4, checkpoint="run"))
    for images, report in again:
        assert report.resumed == 2 and torch.equal(images, expected)
    assert os.listdir("run") == [FILE]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    """Previews, checkpoints, rows."""

    def work(rank: int) -> Any:
        folder = tmp_path / str(rank)
        folder.mkdir()
        heights: list[int] = []
        more = {"rows": lambda bands: heights.extend(len(band) for band in bands), "output_type": "pil"}
        run(tiny_sd, RAMP, preview=folder / "now.png", checkpoint=folder / "run", **more)
        return sum(heights), sorted(os.listdir(folder))

    assert on_ranks(2, work) == [(192, ["now.png", "run"]), (0, [])]


@pytest.mark.slow
def test_stages_and_pictures() -> None:
    def work(rank: int) -> Any:
        return run(tiny_sd, None, height=256, width=256, stages="auto", output_type="pil", num_inference_steps=4)[0]

    expected = work(0)[0].tobytes()
    assert [images[0].tobytes() for images in on_ranks(3, work)] == [expected] * 3

"""Forecasts are what the ranks do: the same dealing, the same bytes."""

from __future__ import annotations

import json

import pytest
import torch
from processes import on_ranks
from runs import quiet
from tilings import moving
from tiny import tiny_sd

from bench.ranks import table
from tiledcore import Execution, TiledPipeline, TilingConfig
from tiledcore.cli.main import main
from tiledcore.parallel.forecast import forecast
from tiledcore.tiles.denoiser import TileDenoiser

TILING, STEPS = moving(blend_last=1, overlap=4), 4


def received(rank: int) -> int:
    pipe = TiledPipeline(quiet(tiny_sd()), TILING)
    call = {"height": 192, "width": 256, "num_inference_steps": STEPS, "output_type": "latent"}
    pipe("a cat", generator=torch.Generator().manual_seed(0), **call)
    assert pipe.report is not None
    return int(pipe.report.ranks.received)


def test_bytes_are_those_of_a_run() -> None:
    found = forecast(TileDenoiser(TILING, Execution(), 16, 8), (24, 32), 2, 4, 4, ranks=3, steps=STEPS)
    assert sum(on_ranks(3, received)) / 3 / STEPS == pytest.approx(found.received, abs=1)
    assert sum(found.shares) == pytest.approx(1) and 1 < found.speedup <= 3 and found.area_factor > 1


def test_more_ranks_than_batches_gain_nothing() -> None:
    def speedup(tile_batch: int, ranks: int) -> float:
        denoiser = TileDenoiser(TilingConfig(tile=16, overlap=0), Execution(tile_batch=tile_batch), 16, 8)
        return forecast(denoiser, (64, 64), 2, 4, 4, ranks).speedup

    denoiser = TileDenoiser(TilingConfig(tile=16, overlap=0), Execution(4), 16, 8)
    line = str(forecast(denoiser, (64, 64), 2, 4, 4, 8))
    assert "4 of them work in a step, the others wait" in line and "Execution(guidance_batch=False)" in line
    assert speedup(4, 4) == speedup(4, 8) == 4 and speedup(2, 8) == 8


def test_the_table_has_a_line_for_each_row() -> None:
    assert table([{"ranks": 2, "loop": 1.25, "received": 2**20, "waiting": 0.02}]).splitlines() == [
        "| ranks | loop | received | waiting |",
        "|---|---|---|---|",
        "| 2 | 1.25 | 1.00 MiB | 2% |",
    ]


@pytest.mark.slow
def test_plan_says_how_many_gpus_share(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "--model", "earth", "--size", "512x512", "--budget", "8GiB", "--device", "cpu", "--gpus", "2"]
    assert main(line) == 0
    assert "2 GPUs: the network 1." in capsys.readouterr().out
    assert main([*line, "--json"]) == 0
    gpus = json.loads(capsys.readouterr().out)["gpus"]
    assert gpus["ranks"] == 2 and len(gpus["shares"]) == 2 and gpus["received"] > 0

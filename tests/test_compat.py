"""The table of pipelines: a part of its classes here, all of them in the slow tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from diffusers import Flux2Pipeline
from zoo_calls import embeds

from bench import compat
from tiledcore import TilingConfig, apply_tiling
from tiledcore.tiles.families import network_of

SOME = ("Flux2", "Chroma", "FluxKontext", "Lumina2", "CogView4", "HiDreamImage", "HunyuanDiT", "Kandinsky5T2I", "Krea2")
UNKNOWN = "ErnieImagePipeline"
CLASSES = {cls.__name__: cls for cls in zoo.classes()}


def sound(row: compat.Row) -> bool:
    """A class that was built works, or is refused in one line that says why."""
    return not row.wrong and (not row.found or row.found["removed"] == "yes")


@pytest.mark.parametrize("name", [*(f"{name}Pipeline" for name in SOME), UNKNOWN])
def test_families_of_tile_mode(name: str) -> None:
    row = compat.check(CLASSES[name])
    assert sound(row), row
    assert row.found["one tile"] == row.found["2x2 tiles"] == row.found["default"] == "yes"


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_class(name: str) -> None:
    row = compat.check(CLASSES[name])
    assert sound(row), row
    assert f"| {name} |" in compat.PAGE.read_text() or f"- {name}: " in compat.PAGE.read_text()


def test_the_shift_of_flux_2_is_that_of_a_tile() -> None:
    pipe = zoo.build(Flux2Pipeline)
    found = []
    for size, tiled in (((16, 16), False), ((48, 64), False), ((48, 64), True)):
        pipe = apply_tiling(pipe, TilingConfig(tile=16)) if tiled else pipe
        zoo.run(pipe, Flux2Pipeline, size, image=None)
        found.append(pipe.scheduler.timesteps.clone())
    tile, canvas, tiles = found
    assert torch.equal(tiles, tile) and not torch.equal(canvas, tile)


def test_a_network_that_nobody_described(caplog: pytest.LogCaptureFixture) -> None:
    pipe: Any = zoo.build(CLASSES[UNKNOWN])
    network, family = network_of(pipe)
    assert family.model is type(network)
    size = {"target_size": embeds(0, 1, 2)}
    tiles = embeds(0, 1, 16, 8, 8)
    with pytest.raises(ValueError, match=r"target_size.*how to cut it is not known"):
        family.tiles(tiles, {**size, "canvas_size": (16, 16)}, 16)
    with pytest.raises(ValueError, match=r"gives.*for a canvas of 8x8"):
        family.prediction(embeds(0, 1, 16, 4, 8), (8, 8))
    with pytest.raises(ValueError, match="is neither an image"):
        family.canvas({family.sample: embeds(0, 1, 64, 16)})


def test_the_page_is_there() -> None:
    assert Path(compat.PAGE).read_text().startswith("# Compatibility")

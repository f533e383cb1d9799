"""The table of pipelines: a part of its classes here, all of them in the slow tests."""

from pathlib import Path
from typing import Any

import pytest
import zoo
from diffusers import Flux2Pipeline

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


def test_the_shift_of_flux_2_is_that_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = zoo.build(Flux2Pipeline)
    seen: list[float] = []
    own = pipe.scheduler.set_timesteps
    monkeypatch.setattr(
        pipe.scheduler, "set_timesteps", lambda *args, mu, **kw: seen.append(mu) or own(*args, mu=mu, **kw)
    )
    zoo.run(pipe, Flux2Pipeline, (16, 16))
    zoo.run(apply_tiling(pipe, TilingConfig(tile=16)), Flux2Pipeline, (48, 64))
    assert seen[1] == seen[0]


def test_a_network_that_nobody_described(caplog: pytest.LogCaptureFixture) -> None:
    pipe: Any = zoo.build(CLASSES[UNKNOWN])
    network, family = network_of(pipe)
    assert family.model is type(network)
    size = {"target_size": zoo.embeds(0, 1, 2)}
    tiles = zoo.embeds(0, 1, 16, 8, 8)
    with pytest.raises(ValueError, match=r"target_size.*how to cut it is not known"):
        family.tiles(tiles, {**size, "canvas_size": (16, 16)}, 16)
    with pytest.raises(ValueError, match=r"gives.*for a canvas of 8x8"):
        family.prediction(zoo.embeds(0, 1, 16, 4, 8), (8, 8))
    with pytest.raises(ValueError, match="is no image"):
        family.canvas({family.sample: zoo.embeds(0, 1, 64, 16)})


def test_the_page_is_there() -> None:
    assert Path(compat.PAGE).read_text().startswith("# Compatibility")

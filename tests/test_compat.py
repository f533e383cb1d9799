"""The table of pipelines: a part of its classes here, all of them in the slow tests."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import zoo
from diffusers import Flux2Pipeline
from tiny_controls import encode_locally, hint
from zoo_calls import embeds
from zoo_more import PICTURE

from bench import compat
from tiledcore import Execution, TilingConfig, apply_tiling
from tiledcore.tiles import families
from tiledcore.tiles.families import network_of

SOME = ("Flux2", "Chroma", "FluxKontext", "Lumina2", "CogView4", "HiDreamImage", "HunyuanDiT", "Kandinsky5T2I", "Krea2")
RARE = ("DreamLite", "Ideogram4", "OmniGen", "GlmImage", "ZImageOmni")
UNKNOWN = "ErnieImagePipeline"
CLASSES = {cls.__name__: cls for cls in zoo.classes()}


def sound(row: compat.Row) -> bool:
    """A class that was built works, or is refused in one line that says why."""
    return not row.wrong and (not row.found or row.found["removed"] == "yes")


@pytest.mark.parametrize("name", [*(f"{name}Pipeline" for name in (*SOME, *RARE)), UNKNOWN])
def test_families_of_tile_mode(name: str) -> None:
    row = compat.check(CLASSES[name])
    assert sound(row), row
    assert row.found["one tile"] == row.found["2x2 tiles"] == row.found["default"] == "yes"


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_class(name: str) -> None:
    row = compat.check(CLASSES[name])
    assert sound(row), row
    assert f"{name} |" in (page := compat.PAGE.read_text()) or re.search(rf"^- .*\b{name}\b", page, re.MULTILINE)


@pytest.mark.parametrize("name", families.REFUSED)
def test_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=f"pipe={name}: cannot be tiled: its? "):
        network_of(object.__new__(getattr(diffusers, name)))


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


def test_references_of_omnigen_and_its_masks() -> None:
    """An image in the text: each tile's row has it at the same place, and the mask is that of a tile."""
    pipe = zoo.build(cls := CLASSES["OmniGenPipeline"])
    more = {"prompt": "<img><|image_1|></img> a coast", "input_images": [PICTURE]}
    image = compat.seen(pipe, lambda: zoo.run(pipe, cls, (16, 16), **more))[0]
    apply_tiling(pipe, TilingConfig(tile=16, overlap=0), Execution(1))
    tile = compat.seen(pipe, lambda: zoo.run(pipe, cls, (32, 32), **more))[0]
    for name in ("attention_mask", "position_ids", "input_image_sizes"):
        one, other = image[name], tile[name]
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_both_networks_of_ideogram_see_tiles() -> None:
    pipe = zoo.build(CLASSES["Ideogram4Pipeline"])
    seen = []
    pipe.unconditional_transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    zoo.run(apply_tiling(pipe, TilingConfig(tile=16, overlap=0), Execution(1)), type(pipe), (32, 32), steps=2)
    assert {given["hidden_states"].shape[1] for given in seen} == {8 * 8} and len(seen) == 2 * 4


def test_reference_keys_of_glm_image_are_refused() -> None:
    pipe = zoo.build(CLASSES["GlmImagePipeline"])
    caches = [SimpleNamespace(mode="write")]
    with pytest.raises(ValueError, match="image: GLM-Image keeps keys of reference images"):
        network_of(pipe)[1].canvas({"hidden_states": embeds(0, 1, 4, 32, 32), "kv_caches": caches})


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("FluxKontextPipeline", "_auto_resize=False, max_area=65536"),
        ("HiDreamImagePipeline", "pipe.default_sample_size=32"),
        ("Kandinsky5T2IPipeline", "pipe.resolutions=[(256, 256)]"),
        ("PixArtAlphaPipeline", "use_resolution_binning=False"),
    ],
)
def test_a_size_that_is_not_the_one_asked_for(name: str, way: str) -> None:
    pipe = zoo.build(CLASSES[name])
    call = zoo.arguments(CLASSES[name], pipe, (16, 16)) | {"height": 256, "width": 256}
    for argument in ("_auto_resize", "max_area", "use_resolution_binning"):
        call.pop(argument, None)
    pipe.resolutions = [(128, 128)]
    if name.startswith("FluxKontext"):
        call |= {"max_area": 128 * 128, "_auto_resize": False}
    with pytest.raises(ValueError, match=rf"height=256, width=256: {name} .* instead; give {re.escape(way)}"):
        apply_tiling(pipe, TilingConfig(tile=16))(**call)


def test_the_hint_of_hunyuan_dit_is_that_of_each_quadrant() -> None:
    colours, cls = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], CLASSES["HunyuanDiTControlNetPipeline"]
    pipe = zoo.build(cls)
    encode_locally(pipe)
    for parameter in pipe.controlnet.controlnet_blocks.parameters():
        parameter.data *= 100
    apply_tiling(pipe, TilingConfig(tile=16, overlap=0), Execution(tile_batch=3))
    made, *alone = (
        zoo.run(pipe, cls, (32, 32), steps=1, control_image=hint(256, 256, some))
        for some in (colours, *([one] for one in colours))
    )
    for i, one in enumerate(alone):
        y, x = (16 * n for n in divmod(i, 2))
        part = (..., slice(y, y + 16), slice(x, x + 16))
        torch.testing.assert_close(made[part], one[part], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(made[part], alone[i - 1][part], atol=1e-3)

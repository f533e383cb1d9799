"""Sets of images whose edges fit."""

from random import Random
from typing import Any

import pytest
import torch
from tilings import RAMP, still
from tiny import tiny_sd, tiny_sdxl
from tiny_transformers import tiny_flux

from tiledcore import Execution, Motion, TiledPipeline, TilingConfig
from tiledcore.compose.connected import (
    SHARED,
    Beside,
    CanvasGraph,
    ConnectedDenoiser,
    Joint,
    _shared_statistics,
    connected,
)
from tiledcore.geometry import TileGrid
from tiledcore.tiles.denoiser import TileDenoiser

SELF = [Joint("x", (0,), (0,)), Joint("y", (0,), (0,))]
RING = [Joint("x", (0,), (1,)), Joint("x", (1,), (0,))]
MANY = [Joint("x", (0, 1), (0, 1))]


def test_an_image_joined_to_itself_is_continued_as_a_torus() -> None:
    graph = CanvasGraph(1, SELF)
    canvas = torch.randn(2, 3, 8, 10)  # both guidance branches
    padded = Beside((3, 4), 1, graph.partners(None)).pad(canvas)
    assert torch.equal(padded, torch.nn.functional.pad(canvas, (4, 4, 3, 3), mode="circular"))


def test_a_ring_of_two_sees_the_other_image_on_both_sides() -> None:
    graph = CanvasGraph(2, RING)
    canvases = torch.randn(4, 3, 6, 8)
    padded = Beside((5, 2), 1, graph.partners(Random(0))).pad(canvases)
    assert padded.shape == (4, 3, 6, 12)  # y has no joints
    for image, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        expected = torch.cat([canvases[other][..., -2:], canvases[image], canvases[other][..., :2]], -1)
        assert torch.equal(padded[image], expected)


def test_over_the_steps_a_side_sees_every_partner() -> None:
    graph = CanvasGraph(2, MANY)
    seen = {tuple(map(tuple, graph.partners(Random(step))["x"])) for step in range(256)}
    assert len(seen) == 16


def test_sides_of_a_group_share_their_strip_and_nothing_else_changes() -> None:
    graph = CanvasGraph(2, MANY)
    canvases = torch.randn(4, 3, 8, 24)
    shared = graph.share(canvases, SHARED, Random(1))
    for branch in (0, 2):
        a, b = shared[branch], shared[branch + 1]
        assert torch.equal(a[..., :SHARED], b[..., :SHARED])
        assert torch.equal(a[..., -SHARED:], b[..., -SHARED:])
        assert any(torch.equal(a[..., :SHARED], c[..., :SHARED]) for c in canvases[branch : branch + 2])
    inner = (..., slice(SHARED, -SHARED))
    assert torch.equal(shared[inner], canvases[inner])
    assert torch.equal(CanvasGraph(2, RING).share(canvases, SHARED, Random(1)), canvases)


def windowed(sample: torch.Tensor, timestep: Any, **kwargs: Any) -> tuple[torch.Tensor]:
    return (torch.nn.functional.avg_pool2d(sample, 5, 1, 2, count_include_pad=False),)


def test_edges_are_predicted_in_the_sight_of_the_neighbour() -> None:
    """Against the same prediction of the two images as one torus."""
    denoiser = ConnectedDenoiser(CanvasGraph(2, RING), (0, 4), still(tile=(8, 24)), Execution(), 8, 8)
    canvases = torch.randn(2, 3, 8, 16)
    out = denoiser(windowed, canvases, 10)
    around = torch.cat([canvases[0], canvases[1]], -1)[None]
    whole = windowed(torch.nn.functional.pad(around, (2, 2, 0, 0), mode="circular"), 10)[0][..., 2:-2]
    expected = torch.stack(whole[0].split(16, -1))
    for edge in ((..., slice(0, 2)), (..., slice(-2, None))):
        torch.testing.assert_close(out[edge], expected[edge])


def test_shared_statistics_are_those_of_the_images_side_by_side() -> None:
    norm = torch.nn.GroupNorm(2, 4)
    torch.nn.init.normal_(norm.weight)
    images = torch.randn(3, 4, 5, 6) * torch.tensor([1.0, 2, 3]).view(3, 1, 1, 1)
    expected = torch.stack(norm(torch.cat(list(images), -1)[None])[0].split(6, -1))
    with _shared_statistics(torch.nn.Sequential(norm)):
        torch.testing.assert_close(norm(images), expected)
    assert not torch.allclose(norm(images), expected, atol=1e-2)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_flux])
def test_images_of_a_group_end_in_the_same_strip(make: Any) -> None:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    wrapped = TiledPipeline.from_pipe(pipe, tiling=RAMP)
    options: dict[str, Any] = {"height": 128, "width": 192, "num_inference_steps": 2}
    latents = torch.stack(connected(wrapped, ["a cat", "ice"], MANY, output_type="latent", **options))
    if latents.ndim == 3:  # FLUX: tokens of 2x2 latent pixels, row by row; three of them are shared
        latents = latents.unflatten(1, (8, 12)).permute(0, 3, 1, 2)
    width = SHARED if make is not tiny_flux else 3
    torch.testing.assert_close(latents[0][..., :width], latents[1][..., :width], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents[0][..., -width:], latents[1][..., -width:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents[0], latents[1], atol=1e-2)
    images = connected(wrapped, ["a cat", "ice"], MANY, output_type="pil", **options)
    assert [image.size for image in images] == [(192, 128)] * 2
    assert "decode" not in vars(pipe.vae)


@pytest.mark.parametrize(("motion", "blended"), [("moving", [1, 2, 3]), (Motion(2, 1, fade=0), [0, 1, 3])])
def test_moving_tiles_blend_the_steps_that_motion_says(
    motion: Any, blended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, found = TileDenoiser.place, []

    def spy(self: TileDenoiser, *args: Any) -> bool:
        result = place(self, *args)
        found.append(self.placed)
        return result

    monkeypatch.setattr(TileDenoiser, "place", spy)
    tiling = TilingConfig(tile=16, overlap=4, motion=motion)
    connected(tiny_sd(), ["a"], SELF, height=192, width=256, num_inference_steps=4, tiling=tiling)
    assert [i for i, tiles in enumerate(found) if isinstance(tiles, TileGrid)] == blended


@pytest.mark.parametrize(
    ("images", "joints", "message"),
    [
        (0, RING, "images=0"),
        (2, [], "joints: must be at least one"),
        (2, [Joint("z", (0,), (1,))], "axis='z': must be x or y"),  # type: ignore[arg-type]
        (2, [Joint("x", (0,), (2,))], "numbered from 0 to 1"),
        (2, [Joint("x", (), (1,))], "needs images on both sides"),
        (2, [Joint("x", (0,), (1,))], r"along x, before has images \[0\]"),
        (2, [*RING, Joint("x", (0,), (0,))], r"along x, before has images \[0, 0, 1\]"),
    ],
)
def test_bad_joints_are_named(images: int, joints: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CanvasGraph(images, joints)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context=0: must be a multiple of 1 from 1 to 8"),
        ({"context": 9}, "context=9"),
        ({"tiling": TilingConfig(wrap=True)}, "connected images need mode='tiles', no wrap"),
        ({"tiling": TilingConfig(mode="canvas")}, "mode='canvas'"),
        ({"latents": torch.zeros(1)}, "latents"),
    ],
)
def test_bad_calls_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        connected(tiny_sd(), ["a"], SELF, **{"height": 64, "width": 128, **arguments})

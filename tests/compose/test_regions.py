"""Regions as they are described: shares of a canvas, noise, scene files, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiledcore import Region
from tiledcore.compose.regions import check_regions, coverage, load_scene, region_weights, seed_noise

OPEN = (False, False)


@st.composite
def scenes(draw: Any) -> tuple[list[Region], tuple[int, int]]:
    height, width = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    regions = []
    for _ in range(draw(st.integers(1, 3))):
        left, top = draw(st.integers(0, 8 * width - 1)), draw(st.integers(0, 8 * height - 1))
        box = (left, top, draw(st.integers(left + 1, 8 * width)), draw(st.integers(top + 1, 8 * height)))
        feather = draw(st.integers(0, 8 * min(height, width)))
        regions.append(Region("x", box=box, feather=feather, weight=draw(st.sampled_from([0.3, 1.0, 4.0]))))
    return regions, (height, width)


@settings(max_examples=60, deadline=None)
@given(scene=scenes(), wrap=st.tuples(st.booleans(), st.booleans()))
def test_shares_sum_to_one_and_none_is_negative(scene: Any, wrap: tuple[bool, bool]) -> None:
    regions, size = scene
    check_regions(regions, 8 * size[1], 8 * size[0], wrap)
    weights = region_weights(regions, size, 8, wrap)
    assert weights.shape == (1 + len(regions), *size)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(0), torch.ones(size))


def test_one_region_rules_inside_and_nowhere_else() -> None:
    weights = region_weights([Region("x", box=(16, 8, 48, 32), feather=0)], (6, 8), 8, OPEN)
    inside = torch.zeros(6, 8)
    inside[1:4, 2:6] = 1
    assert torch.equal(weights[1], inside)
    assert torch.equal(weights[0], 1 - inside)


def test_a_box_between_latent_pixels_has_its_part_of_them() -> None:
    cover = coverage(Region("x", box=(4, 0, 18, 16), feather=0), (2, 4), 8, OPEN)
    torch.testing.assert_close(cover, torch.tensor([[0.5, 1, 0.25, 0]]).expand(2, 4))


def test_the_feather_is_a_ramp_of_its_width_around_the_border() -> None:
    cover = coverage(Region("x", box=(0, 0, 80, 160), feather=48), (20, 20), 8, OPEN)
    row = cover[10]
    torch.testing.assert_close(row[7:13], (torch.arange(6, 0, -1) - 0.5) / 6)
    assert torch.equal(row[:7], torch.ones(7)) and torch.equal(row[13:], torch.zeros(7))
    assert torch.equal(cover[0], cover[10])  # none at the canvas' own border


def test_weights_share_an_overlap_in_proportion_and_below_one_mix_with_the_global_prompt() -> None:
    whole = (0, 0, 32, 32)
    weights = region_weights([Region("a", box=whole, weight=3.0), Region("b", box=whole)], (4, 4), 8, OPEN)
    torch.testing.assert_close(weights[:, 0, 0], torch.tensor([0.0, 0.75, 0.25]))
    weights = region_weights([Region("a", box=whole, weight=0.25)], (4, 4), 8, OPEN)
    torch.testing.assert_close(weights[:, 0, 0], torch.tensor([0.75, 0.25]))


def test_a_box_goes_round_a_wrapped_axis() -> None:
    region = Region("x", box=(48, 0, 80, 32), feather=16)
    cover = coverage(region, (4, 8), 8, (False, True))
    straight = coverage(Region("x", box=(16, 0, 48, 32), feather=16), (4, 8), 8, (False, True))
    torch.testing.assert_close(cover, straight.roll(4, 1))
    with pytest.raises(ValueError, match=r"regions\[0\].box=\(48, 0, 80, 32\): does not lie inside .* 64x32 px"):
        check_regions([region], 64, 32, OPEN)


@pytest.mark.parametrize("kind", ["pil", "bool", "uint8", "float", "tensor", "bf16"])
def test_masks_of_any_kind_are_their_box(kind: str) -> None:
    inside = np.zeros((64, 96), dtype=bool)
    inside[8:40, 24:64] = True
    made = {
        "pil": lambda: Image.fromarray(inside.astype(np.uint8) * 255),
        "bool": lambda: inside,
        "uint8": lambda: inside.astype(np.uint8) * 255,
        "float": lambda: inside.astype(float),
        "tensor": lambda: torch.from_numpy(inside),
        "bf16": lambda: torch.from_numpy(inside).bfloat16(),
    }
    region = Region("x", mask=made[kind](), feather=24)
    box = Region("x", box=(24, 8, 64, 40), feather=24)
    assert region.bounds() == box.box
    torch.testing.assert_close(coverage(region, (8, 12), 8, OPEN), coverage(box, (8, 12), 8, OPEN))


def test_a_regions_noise_moves_with_its_box() -> None:
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def drawn(x: int, y: int, seed: int = 5) -> torch.Tensor:
        return seed_noise(noise, [Region("x", box=(x, y, x + 32, y + 24), seed=seed)], 8, (False, True))

    here, there = drawn(8, 16), drawn(64, 88)
    assert torch.equal(here[:, :, 2:5, 1:5], there[:, :, 11:14, 8:12])
    assert not torch.equal(here[:, :, 2:5, 1:5], drawn(8, 16, seed=6)[:, :, 2:5, 1:5])
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[2:5, 1:5] = False
    assert torch.equal(here[:, :, outside], noise[:, :, outside])
    assert not torch.equal(here[:, :, ~outside], noise[:, :, ~outside])
    wrapped = seed_noise(noise, [Region("x", box=(112, 16, 144, 40), seed=5)], 8, (False, True))
    assert torch.equal(wrapped.roll(-13, 3)[:, :, 2:5, 1:5], here[:, :, 2:5, 1:5])


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "prompt=' '"),
        ({"prompt": 3}, "prompt=3"),
        ({"box": None}, "box, mask: neither is given"),
        ({"mask": np.ones((4, 4))}, "box, mask: both are given"),
        ({"box": (0, 0, 8)}, r"box=\(0, 0, 8\)"),
        ({"box": (8, 0, 8, 8)}, "left < right"),
        ({"box": (0, 0, 8.5, 8)}, "ints"),
        ({"weight": 0}, "weight=0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"weight": "1"}, "weight='1'"),
        ({"feather": -1}, "feather=-1"),
        ({"feather": 1.5}, "feather=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Region(**{"prompt": "x", "box": (0, 0, 8, 8), **arguments})


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"box": (0, 0, 65, 32)}, r"regions\[0\].box=\(0, 0, 65, 32\): does not lie inside the canvas of 64x32 px"),
        ({"box": (0, -8, 8, 8)}, "does not lie inside"),
        ({"box": (64, 0, 72, 8)}, "does not lie inside"),
        ({"mask": np.zeros((32, 64), dtype=bool)}, r"regions\[0\].mask: is empty"),
        ({"mask": np.ones((64, 32))}, "mask: is 32x64 px, and must be as the canvas of 64x32 px"),
        ({"mask": np.full((32, 64), 2.0)}, "values must lie from 0 to 1"),
        ({"mask": np.full((32, 64), np.nan)}, "values must lie from 0 to 1"),
        ({"mask": np.ones((32, 64, 3))}, r"mask: has shape \(32, 64, 3\)"),
        ({"box": (0, 0, 8, 8), "feather": 33}, "feather=33: at most the shorter side"),
    ],
)
def test_regions_that_do_not_fit_the_canvas_are_named(region: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_regions([Region("x", **region)], 64, 32, OPEN)


def test_a_scene_file_is_the_regions(tmp_path: Path) -> None:
    mask = np.zeros((32, 64), dtype=np.uint8)
    mask[8:16] = 255
    Image.fromarray(mask).save(tmp_path / "lake.png")
    scene = tmp_path / "scene.toml"
    scene.write_text(
        '[[region]]\nprompt = "a lake"\nmask = "lake.png"\nfeather = 8\n\n'
        '[[region]]\nprompt = "ice"\nbox = [0, 0, 64, 16]\nweight = 2\nseed = 3\n'
    )
    lake, ice = load_scene(scene, 64, 32, OPEN)
    assert lake.bounds() == (0, 8, 64, 16) and lake.feather == 8
    assert lake.describe() == {
        "prompt": "a lake",
        "mask": str(tmp_path / "lake.png"),
        "weight": 1.0,
        "feather": 8,
    }
    assert ice.describe() == {"prompt": "ice", "box": (0, 0, 64, 16), "weight": 2, "feather": 32, "seed": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[region]\n", "is not TOML"),
        ("", r"holds no \[\[region\]\] table"),
        ("region = 3", r"holds no \[\[region\]\] table"),
        ('style = "x"\n[[region]]\nprompt = "a"\nbox = [0, 0, 8, 8]', "unknown key 'style'"),
        ('[[region]]\nprompt = "a"\nboks = [0, 0, 8, 8]', "region 1: unknown key 'boks': must be one of prompt, box"),
        ("[[region]]\nbox = [0, 0, 8, 8]", "region 1: prompt=None: must be a text"),
        ('[[region]]\nprompt = "a"\nbox = [0, 0, "8", 8]', r"region 1: box=\[0, 0, '8', 8\]"),
        ('[[region]]\nprompt = "a"\nbox = [0, 0, 8, 8]\nweight = "much"', "region 1: weight='much'"),
        ('[[region]]\nprompt = "a"\nmask = "none.png"', "none.png: cannot be read: No such file"),
        ('[[region]]\nprompt = "a"\nmask = "scene.toml"', "cannot be read: not an image"),
        ('[[region]]\nprompt = "a"\nmask = 3', "region 1: mask=3: must be the name of an image file"),
    ],
)
def test_a_bad_scene_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    scene = tmp_path / "scene.toml"
    scene.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_scene(scene, 64, 32, OPEN)
    assert "\n" not in str(error.value)
    assert str(scene) in str(error.value)


def test_a_scene_that_does_not_fit_names_the_file_and_the_region(tmp_path: Path) -> None:
    scene = tmp_path / "scene.toml"
    scene.write_text('[[region]]\nprompt = "a"\nbox = [0, 0, 8, 8]\n\n[[region]]\nprompt = "b"\nbox = [0, 0, 80, 8]\n')
    with pytest.raises(ValueError, match=r"scene.toml: region 2: box=\(0, 0, 80, 8\): does not lie inside"):
        load_scene(scene, 64, 32, OPEN)

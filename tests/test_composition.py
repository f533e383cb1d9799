"""The tables of staged generation and of regions, on pictures whose composition is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from bench import regions, stages, tables

NATIVE, SIZE = 256, 1024


def picture(seed: int, side: int) -> NDArray[np.float64]:
    """``[side, side, 3]`` in 0..1: a smooth Gaussian field, all channels alike."""
    noise = np.fft.rfft2(np.random.default_rng(seed).standard_normal((side, side)))
    k = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    k[0, 0] = np.inf
    field = np.fft.irfft2(noise * k**-1.5, (side, side))
    return np.repeat((0.5 + 0.1 * field / field.std()).clip(0, 1)[..., None], 3, axis=2)


def test_the_native_composition_a_patchwork_and_copies_are_told_apart() -> None:
    native = picture(0, NATIVE)
    whole = stages.enlarged(native, SIZE)
    detailed = (whole + 0.02 * np.random.default_rng(1).standard_normal(whole.shape)).clip(0, 1)
    places = [[picture(10 + 4 * i + j, NATIVE) for j in range(4)] for i in range(4)]
    patchwork = np.concatenate([np.concatenate(row, 1) for row in places])
    copies = np.tile(native, (4, 4, 1))
    kept, patches, copied = (
        stages.judge(image, native, [[256, 512, 768]] * 2, 8) for image in (detailed, patchwork, copies)
    )
    low = [found["power"] / found["power_native"] for found in (kept, patches, copied)]
    assert low[0] == pytest.approx(1, abs=0.02) and max(low[1:]) < 0.5
    assert kept["layout"] > 30 > 20 > patches["layout"]
    alike = [found["alike"] / found["alike_native"] for found in (kept, patches, copied)]
    assert alike[0] == pytest.approx(1, abs=0.02) and min(alike[1:]) > 1.3
    excess = [found["repetition"] - found["chance"] for found in (kept, patches, copied)]
    assert max(excess[:2]) < 0.2 and copied["repetition"] == pytest.approx(1) and excess[2] > 0.4


def test_a_row_is_the_mean_over_images_and_its_spread() -> None:
    common = {"power_native": 2.0, "layout": 20.0, "seam": 0.9, "alike_native": 0.4}
    found = [
        common | {"power": 1.0, "repetition": 0.5, "chance": 0.2, "alike": 0.4},
        common | {"power": 3.0, "repetition": 0.3, "chance": 0.2, "alike": 0.8, "seam": 1.1},
    ]
    row = stages.row("stages", found, 1.35)
    assert (row["low"], row["low_least"], row["low_most"]) == (1.0, 0.5, 1.5)
    assert row["repetition"] == pytest.approx(0.4) and row["repetition_sd"] == pytest.approx(0.02**0.5)
    assert row["excess"] == pytest.approx(0.2) and row["excess_error"] == pytest.approx(0.1)
    assert row["alike"] == pytest.approx(0.6) and row["alike_ratio"] == pytest.approx(1.5)
    text = (
        "| stages | 1.35 | 1.00 | 0.50, 1.50 | 0.60 ± 0.28 | 1.50 "
        "| 0.40 ± 0.14 | 0.20 ± 0.00 | +0.200 ± 0.100 | 20.0 | 1.10 |"
    )
    assert stages.table([row]).splitlines()[-1] == text
    assert (
        stages.table([stages.row("native, enlarged", found, None)])
        .splitlines()[-1]
        .startswith("| native, enlarged | – |")
    )
    about = {"size": 1024, "blend_steps": 0, "prompts": ["a", "b"], "seeds": 1, "call": {"num_inference_steps": 10}}
    data = {"machine": {"device": "a CPU", "torch": "2.13"}, "about": about, "rows": [row]}
    written = tables.TABLES["stages"][1](data)
    assert (
        written.startswith("a CPU, torch 2.13; earth-flux, 1024², 10 steps, none blended, 2 images a way\n")
        and text in written
    )


def test_one_image_has_no_spread() -> None:
    found = {"power": 1.0, "power_native": 1.0, "repetition": 0.5, "chance": 0.2, "layout": 20.0, "seam": 1.0}
    found |= {"alike": 0.3, "alike_native": 0.3}
    assert "| 0.30 | 1.00 | 0.50 | 0.20 | +0.300 | 20.0 |" in stages.table([stages.row("stages", [found], 1.0)])


def styles(size: int, seed: int) -> list[NDArray[np.float64]]:
    """An image for each prompt of bench/regions.py, each of its own tone and roughness."""
    found = []
    for i in range(len(regions.PROMPTS)):
        field = picture(seed + i, size)[..., :1] - 0.5
        noise = np.random.default_rng(seed + 10 + i).standard_normal((size, size, 1))
        found.append(np.repeat(0.2 + 0.15 * i + 0.3 * field + 0.003 * 3**i * noise, 3, axis=2))
    return found


def test_regions_obey_where_they_look_like_their_own_prompt() -> None:
    alone, scene = styles(512, 0), regions.cross_fade(styles(512, 50), 32)
    rows = regions.obedience([scene], [regions.mosaic(alone)], 32)
    assert [row["prompt"] for row in rows] == list(regions.PROMPTS) and all(row["obeys"] for row in rows)
    rows = regions.obedience([scene], [regions.mosaic([*alone[:2], *alone[:1:-1]])], 32)
    assert [row["obeys"] for row in rows] == [True, True, False, False]
    data = {"parts": rows, "borders": {"within": 1.1, "beyond": 0.9, "cross_fade": 1.2}, "moved": {"own seed": 0.9}}
    assert regions.table(data).count("DOES NOT OBEY") == 2


def test_a_mosaic_has_each_image_where_the_scene_has_its_prompt() -> None:
    images = [np.full((4, 4, 1), float(i)) for i in range(4)]
    assert regions.mosaic(images)[..., 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert images[0].max() == 0
    assert np.array_equal(regions.cross_fade(images, 1), regions.mosaic(images))


def test_a_hard_border_is_within_the_feather_and_a_line_beside_it_beyond() -> None:
    scene = regions.cross_fade(styles(512, 0), 64)
    soft = regions.borders(scene, 64, 1)
    hard = regions.borders(regions.cross_fade(styles(512, 0), 1), 64, 1)
    assert soft["beyond"] < 1 and soft["within"] < 1.2 < 5 < hard["within"] and hard["beyond"] < 1
    scene[256 + 48 :] += 0.2
    assert regions.borders(scene, 64, 1)["beyond"] > 2

"""Where the tiles of a way meet, and how ways are compared."""

from pathlib import Path

import numpy as np
import pytest
from tilings import canvas_mode, moving, still

from bench import modes, study
from tiledcore import TilingConfig


def lines(config: TilingConfig, steps: int = 8) -> list[set[int]]:
    return [set(axis) for axis in modes.meeting_lines(config, 1024, steps)]


def test_lines_are_those_of_the_last_step_that_moves_and_of_the_blended_ones() -> None:
    plain = lines(still(32, overlap=4))
    assert lines(still(32, overlap=0)) == [{256, 512, 768}] * 2
    assert lines(canvas_mode(32)) == [{256, 512, 768}] * 2
    assert lines(still(32, overlap=8))[0] >= {192, 256, 384}
    assert lines(still(32)) == plain
    blended = lines(moving(32, blend_last=2))
    assert blended[0] > plain[0] and blended[1] > plain[1]
    # With fewer steps left, the last step that moves is another one.
    assert lines(moving(32, blend_last=1)) != blended != lines(moving(32))
    assert all(line % 8 == 0 and 0 < line < 1024 for axis in blended for line in axis)


def test_every_way_is_a_tiling() -> None:
    for name, way in modes.ways(32).items():
        assert all(lines(way)), name


def test_a_way_is_compared_with_the_ramp_on_the_images_that_both_have() -> None:
    figures = {"seam_mean": 1.0, "low_frequency_kept": 0.9, "patches": 0.1}
    worse = {"seam_mean": 1.1, "low_frequency_kept": 1.2, "patches": 0.1}
    found = modes.against_ramp({("a", 0): worse, ("b", 0): figures}, {("a", 0): figures})
    assert found == {key: [pytest.approx(value), None] for key, value in
                     (("seam_mean", 0.1), ("low_frequency_kept", 0.1), ("patches", 0.0))}  # fmt: skip
    ramp = {("a", 0): figures, ("b", 0): figures}
    found = modes.against_ramp({("a", 0): worse, ("b", 0): {k: v + 0.3 for k, v in figures.items()}}, ramp)
    assert found["seam_mean"] == [pytest.approx(0.2), pytest.approx(0.1)]
    assert modes.verdict([{"name": "way", "against_ramp": found}])[0].startswith("- way: seam +0.2000 ± 0.1000, low")
    assert modes.against_ramp({("c", 0): worse}, ramp) == {}


def test_images_are_kept_and_figures_are_means_but_for_the_worst_seam(tmp_path: Path) -> None:
    made = []

    def make() -> list[np.ndarray]:
        made.append(1)
        return [np.full((8, 8, 3), 0.2)] * 2

    for _ in range(2):
        assert study.kept(tmp_path / "folder" / "a.png", make) == pytest.approx(np.full((16, 8, 3), 0.2))
    assert len(made) == 1
    found = study.mean([{"seam_worst_over_limit": 1.0, "patches": 0.1}, {"seam_worst_over_limit": 1.2, "patches": 0.3}])
    assert found == {"seam_worst_over_limit": 1.2, "patches": pytest.approx(0.2)}


def test_columns_without_any_figure_are_left_out() -> None:
    rows = [{"name": "a", "x": 1.234, "y": None}, {"name": "b", "z": float("nan")}, {"name": "c", "x": 2.0}]
    text = study.table(rows, {"x": "X", "y": "Y", "z": "Z"}, {"x": 1})
    assert text.splitlines() == [
        "| way | X | Z |",
        "|---|---|---|",
        "| a | 1.2 | – |",
        "| b | – | – |",
        "| c | 2.0 | – |",
    ]

"""Where the tiles of a way meet, and how ways are compared."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tilings import canvas_mode, moving, still
from tiny import tiny_sd

from bench import modes
from tiledcore import TiledPipeline, TilingConfig


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


def test_lines_of_other_methods_are_where_their_windows_start_and_end() -> None:
    found = {name: modes.lines_of(way, None, 768, 8)[0] for name, way in modes.ways().items() if way.method}
    assert found["MultiDiffusion, stride 1/2"] == [128, 256, 384, 512, 640]
    assert found["SpotDiffusion"] == [256, 512]
    assert found["ScaleDiff"] == [128, 256, 384, 512, 640]


def test_a_way_is_compared_with_the_default_on_the_images_that_both_have() -> None:
    figures = {"seam_mean": 1.0, "low_frequency_kept": 0.9, "patches": 0.1, "likeness": 0.3}
    worse = figures | {"seam_mean": 1.1, "low_frequency_kept": 1.2}
    found = modes.against({("a", 0): worse, ("b", 0): figures}, {("a", 0): figures})
    assert {key: pytest.approx(mean) for key, (mean, _) in found.items()} == {
        "seam_mean": 0.1, "low_frequency_kept": 0.1, "patches": 0, "likeness": 0
    }  # fmt: skip
    assert all(error is None for _, error in found.values())
    default = {("a", 0): figures, ("b", 0): figures}
    found = modes.against({("a", 0): worse, ("b", 0): worse | {"seam_mean": 1.12, "patches": 0.08}}, default)
    assert found["seam_mean"] == [pytest.approx(0.11), pytest.approx(0.01)]
    # Of the two that differ by more than two errors, only one can be worse; patches differ by one error.
    assert modes.verdict([{"name": "way", "against": found}]) == [
        "- way: worse in seam (+0.1100 ± 0.0100), low (+0.1000 ± 0.0000)"
    ]
    assert modes.verdict([{"name": "way", "against": {"patches": [-0.3, 0.1]}}]) == [
        "- way: better in patches (-0.3000 ± 0.1000)"
    ]
    assert modes.verdict([{"name": "way", "against": {"patches": [0.1, None]}}]) == ["- way: no difference"]
    assert modes.against({("c", 0): worse}, default) == {}
    # An image without distant tiles has no likeness.
    nothing = {image: figures | {"likeness": float("nan")} for image in default}
    assert modes.verdict([{"name": "way", "against": modes.against(nothing, nothing)}]) == ["- way: no difference"]


@pytest.mark.slow
def test_every_way_makes_an_image_and_counts_its_work(tmp_path: Path) -> None:
    """At twice the native size, in two steps: the rows without overlap evaluate each pixel once in each step."""
    pipe = TiledPipeline.from_pretrained("earth")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0}
    work = {}
    for name in ("tiles, no overlap", "canvas, native windows", "SpotDiffusion", "ScaleDiff"):
        path, way = tmp_path / f"{name}.png", modes.ways()[name]
        image = modes.made(path, way, pipe, "desert", 512, 0, call)
        assert image.shape == (512, 512, 3) and image.std() > 0.01
        work[name] = json.loads(path.with_suffix(".json").read_text())["work"]
    assert work == {"tiles, no overlap": 1, "canvas, native windows": 1, "SpotDiffusion": 1, "ScaleDiff": 0.75}


def test_images_are_kept_and_figures_are_means_but_for_the_worst_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def generate(*_: object) -> np.ndarray:
        made.append(1)
        return np.full((8, 8, 3), 0.2)

    monkeypatch.setattr(modes, "generate", generate)
    pipe = SimpleNamespace(pipe=tiny_sd())
    for _ in range(2):
        path, call = tmp_path / "folder" / "a.png", {"num_inference_steps": 2}
        image = modes.made(path, modes.Way(), pipe, "desert", 64, 0, call)
        assert image == pytest.approx(np.full((8, 8, 3), 0.2)) and path.with_suffix(".json").exists()
    assert len(made) == 1
    found = modes.mean([{"seam_worst_over_limit": 1.0, "patches": 0.1}, {"seam_worst_over_limit": 1.2, "patches": 0.3}])
    assert found == {"seam_worst_over_limit": 1.2, "patches": pytest.approx(0.2)}


def test_columns_without_any_figure_are_left_out() -> None:
    rows = [{"name": "a", "seconds": 1.234, "work": None}, {"name": "b", "patches": float("nan")}]
    assert modes.table(rows).splitlines() == [
        "| way | s | patches |",
        "|---|---|---|",
        "| a | 1.2 | – |",
        "| b | – | – |",
    ]

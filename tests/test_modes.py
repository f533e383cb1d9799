"""Where the tiles of a way meet, and what is made of a way's images."""

from dataclasses import replace

import numpy as np
import pytest

from bench import modes
from tiledcore import TiledPipeline, TilingConfig


def test_lines_are_those_of_the_last_step_that_moves_and_of_the_blended_ones() -> None:
    pipe = TiledPipeline.from_pretrained("earth")
    moving = TilingConfig(tile=32, shift=True)

    def lines(config: TilingConfig, steps: int = 8) -> list[set[int]]:
        return [set(axis) for axis in modes.meeting_lines(pipe, config, 1024, steps)]

    assert (
        lines(TilingConfig(tile=32, overlap=0)) == lines(TilingConfig(tile=32, mode="canvas")) == [{256, 512, 768}] * 2
    )
    assert lines(TilingConfig(tile=32, overlap=8))[0] >= {192, 256, 384}
    assert lines(TilingConfig(tile=32)) == lines(TilingConfig(tile=32, overlap=4))
    plain = lines(TilingConfig(tile=32, overlap=4))
    blended = lines(replace(moving, blend_steps=2))
    assert blended[0] > plain[0] and blended[1] > plain[1]
    # With fewer steps to go, the last step that moves is another one.
    assert lines(replace(moving, blend_steps=1)) != blended != lines(moving)
    assert all(line % 8 == 0 and 0 < line < 1024 for axis in blended for line in axis)


def test_a_way_is_compared_with_the_ramp_on_the_images_that_both_have() -> None:
    ramp = {("a", 0): {"seam_mean": 1.0, "low_frequency_kept": 0.9, "patches": 0.1}}
    way = {("a", 0): {"seam_mean": 1.1, "low_frequency_kept": 1.2, "patches": 0.1}, ("b", 0): ramp["a", 0]}
    others = {"a": np.array([1.0] * 20 + [0.5] * 20), "b": np.ones(40)}
    found = modes.against_ramp(way, ramp, others)
    assert found["seam_mean"] == [pytest.approx(0.1), None]
    # With samples of twice the power both are below 1, and the way is nearer to it by 0.15.
    assert found["low_frequency_kept"] == [pytest.approx(0.1), None, pytest.approx(-0.15), pytest.approx(0.1)]
    two = modes.against_ramp(
        {**way, ("b", 0): {k: v + 0.3 for k, v in ramp["a", 0].items()}}, {**ramp, ("b", 0): ramp["a", 0]}, others
    )
    assert two["seam_mean"] == [pytest.approx(0.2), pytest.approx(0.1)]

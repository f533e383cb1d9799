"""TileDenoiser and TilingConfig, with functions in place of the network."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tilings import moving, still

from tiledcore.config import Execution, Motion, TilingConfig
from tiledcore.tiles.denoiser import TileDenoiser


def denoiser_of(config: TilingConfig, native: int = 8, tile_batch: int = 4) -> TileDenoiser:
    """A denoiser of a model with a VAE factor of 8."""
    return TileDenoiser(config, Execution(tile_batch=tile_batch), native, pixels=8)


def pointwise(sample: torch.Tensor, timestep: Any, **kwargs: Any) -> tuple[torch.Tensor]:
    return (2 * sample + 1,)


def windowed(sample: torch.Tensor, timestep: Any, **kwargs: Any) -> tuple[torch.Tensor]:
    """Depends on where in the tile a pixel is, as a network with padding does."""
    return (torch.nn.functional.avg_pool2d(sample, 5, 1, 2),)


@settings(max_examples=40)
@given(
    height=st.integers(5, 40),
    width=st.integers(5, 40),
    tile=st.integers(3, 16),
    share=st.floats(0, 0.99),
    window=st.sampled_from(["ramp", "core", "mean", "gaussian"]),
    wrap=st.tuples(st.booleans(), st.booleans()),
    moves=st.booleans(),
    batch=st.integers(1, 2),
)
def test_a_pointwise_network_is_evaluated_exactly(
    height: int,
    width: int,
    tile: int,
    share: float,
    window: Any,
    wrap: tuple[bool, bool],
    moves: bool,
    batch: int,
) -> None:
    more = {"window": window, "wrap": wrap}
    config = moving(tile, **more) if moves else still(tile, int(share * tile), **more)
    canvas = torch.randn(batch, 3, height, width)
    out = denoiser_of(config, tile)(pointwise, canvas, 10)
    torch.testing.assert_close(out, 2 * canvas + 1, rtol=1e-5, atol=1e-5)


def test_a_prediction_outlives_the_next_one() -> None:
    """Schedulers such as PNDM keep the predictions of earlier steps as they get them."""
    for config in (moving(8), still(8)):
        denoiser, canvas = denoiser_of(config), torch.randn(1, 3, 21, 30)
        first = denoiser(pointwise, canvas, 10)
        denoiser(pointwise, canvas + 1, 20)
        torch.testing.assert_close(first, 2 * canvas + 1)


def test_neither_tile_batch_nor_the_order_of_tiles_changes_a_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    canvas = torch.randn(2, 4, 50, 37)

    def run(tile_batch: int) -> torch.Tensor:
        return denoiser_of(still(overlap=6), 16, tile_batch)(windowed, canvas, 10)

    expected = run(1)
    for tile_batch in (2, 5, 1000):
        assert torch.equal(run(tile_batch), expected)
    from tiledcore.geometry import Tiling

    ordered = Tiling.groups.func  # type: ignore[attr-defined]
    backwards = property(lambda self: {size: places[::-1] for size, places in ordered(self).items()})
    monkeypatch.setattr(Tiling, "groups", backwards)
    assert torch.equal(run(3), expected)


def test_motion_follows_the_timestep_only() -> None:
    denoiser = denoiser_of(moving(tile=8, seed=3))
    first = denoiser.tiling(32, 32, torch.tensor(981))
    assert denoiser.tiling(32, 32, torch.tensor([981, 981])) == first
    assert denoiser.tiling(32, 32, 981.0) == first
    assert denoiser.tiling(32, 32, 961) != first
    other = denoiser_of(moving(tile=8, seed=4))
    assert other.tiling(32, 32, 981) != first


def test_per_image_arguments_are_repeated_branch_major() -> None:
    seen: list[dict[str, Any]] = []

    def spy(sample: torch.Tensor, timestep: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        seen.append({"sample": sample, "timestep": timestep, **kwargs})
        return (sample,)

    text = torch.arange(2.0).view(2, 1, 1)
    image_embeds = [torch.arange(2.0).view(2, 1)]
    canvas = torch.stack([torch.zeros(4, 8, 16), torch.ones(4, 8, 16)])
    denoiser_of(still(tile=8, overlap=0), tile_batch=2)(
        spy,
        canvas,
        torch.tensor([7, 7]),
        encoder_hidden_states=text,
        cross_attention_kwargs={"scale": torch.ones(2)},
        added_cond_kwargs={"image_embeds": image_embeds},
    )
    (call,) = seen
    rows = call["sample"][:, 0, 0, 0]
    assert rows.tolist() == [0, 0, 1, 1]
    assert call["encoder_hidden_states"].flatten().tolist() == rows.tolist()
    assert call["added_cond_kwargs"]["image_embeds"][0].flatten().tolist() == rows.tolist()
    assert call["timestep"].tolist() == [7] * 4
    assert call["cross_attention_kwargs"]["scale"].shape == (2,)


def test_time_ids_are_the_tile_as_a_crop_of_the_canvas() -> None:
    seen: list[torch.Tensor] = []

    def spy(sample: torch.Tensor, timestep: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        seen.append(kwargs["added_cond_kwargs"]["time_ids"])
        return (sample,)

    ids = torch.tensor([[128.0, 256, 5, 7, 128, 256], [128, 256, 0, 0, 128, 256]])
    denoiser = denoiser_of(still(tile=(8, 16), overlap=0), tile_batch=1)
    denoiser(spy, torch.zeros(2, 4, 16, 32), 1, added_cond_kwargs={"time_ids": ids})
    assert [s[0].tolist() for s in seen] == [
        [128, 256, 5, 7, 64, 128],
        [128, 256, 5, 7 + 128, 64, 128],
        [128, 256, 5 + 64, 7, 64, 128],
        [128, 256, 5 + 64, 7 + 128, 64, 128],
    ]
    assert seen[3][1].tolist() == [128, 256, 64, 128, 64, 128]
    # The refiner's fifth column is an aesthetic score, which no crop changes.
    seen.clear()
    denoiser(spy, torch.zeros(2, 4, 16, 32), 1, added_cond_kwargs={"time_ids": ids[:, :5]})
    assert seen[3][0].tolist() == [128, 256, 5 + 64, 7 + 128, 128]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (TilingConfig, {"window": "hann"}, "window='hann' must be one of"),
        (TilingConfig, {"ramp": 0}, "ramp=0 must be an int of at least 1"),
        (TilingConfig, {"motion": "shift"}, "motion='shift' must be one of still, moving"),
        (
            TilingConfig,
            {"motion": Motion(blend_first=0, blend_last=0), "overlap": 4},
            "overlap=4: tiles that always move",
        ),
        (TilingConfig, {"tile": 0}, "tile=0 must be"),
        (TilingConfig, {"tile": 16, "overlap": 16}, r"overlap=\(16, 16\) must be smaller than tile"),
        (TilingConfig, {"overlap": 1.5}, "overlap=1.5 must be a number from 0 to 0.99"),
        (TilingConfig, {"overlap": -0.5}, "overlap=-0.5 must be a number from 0 to 0.99"),
        (TilingConfig, {"mode": "canvas", "motion": "moving"}, "mode='canvas' has neither"),
        (TilingConfig, {"halo": 2}, "halo=2: only for mode='canvas'"),
        (Execution, {"tile_batch": 0}, "tile_batch=0 must be an int of at least 1"),
        (Execution, {"guidance_batch": 1}, "guidance_batch=1 must be one of True, False"),
        (Execution, {"impl": "cuda"}, "impl='cuda' must be one of"),
    ],
)
def test_bad_settings_are_named(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_a_fraction_is_one_of_the_tile() -> None:
    assert still(tile=(16, 24), overlap=0.25).grid(48, 48, native=8).overlap == (4, 6)
    assert still(tile=20, overlap=0.25).grid(48, 48, native=8, unit=2).overlap == (2, 2)  # whole tokens of 2x2
    assert TilingConfig(overlap=0.25).grid(48, 48, native=8).overlap == (2, 2)


def test_tokens_that_are_not_the_canvas_are_refused() -> None:
    denoiser = denoiser_of(still(tile=8))
    with pytest.raises(ValueError, match="5 tokens for a canvas of"):
        denoiser(pointwise, torch.zeros(1, 4, 16, 16), 1, controlnet_block_samples=torch.ones(1, 5, 8))

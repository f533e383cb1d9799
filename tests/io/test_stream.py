"""Rows that leave the decoder are the image that the pipeline would have returned."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tilings import RAMP, still
from tiny import tiny_sd, tiny_sdxl
from tiny_transformers import ALL, NATIVE, build, call

import tiledcore.call
from tiledcore import TiledPipeline
from tiledcore.memory.architectures import architecture
from tiledcore.memory.planner import Planner
from tiledcore.memory.prediction import Predictor

SD = {"height": 128, "width": 200, "num_inference_steps": 2}


class Collected:
    """A consumer of rows."""

    def __init__(self) -> None:
        self.bands: list[NDArray[np.uint8]] = []

    def __call__(self, bands: Iterator[NDArray[np.uint8]]) -> None:
        self.bands.extend(bands)

    def image(self) -> NDArray[np.uint8]:
        return np.concatenate(self.bands)


def wrap(pipe: Any) -> TiledPipeline:
    pipe.set_progress_bar_config(disable=True)
    return TiledPipeline.from_pipe(pipe, tiling=RAMP)


def run(pipe: Any, **kwargs: Any) -> Any:
    return wrap(pipe)("a cat", generator=torch.Generator().manual_seed(0), **{**SD, **kwargs})


@pytest.mark.parametrize("make", ALL)
def test_rows_of_transformers(make: Any) -> None:
    rows = Collected()
    wrapped = TiledPipeline.from_pipe(build(make), tiling=still(tile=NATIVE, overlap=4))
    (image,) = call(wrapped, make, (24, 32), output_type="pil")
    call(wrapped, make, (24, 32), output_type="pil", rows=rows)
    assert np.array_equal(rows.image(), np.asarray(image))


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("start", [None, Image.effect_noise((200, 128), 60).convert("RGB")], ids=["text", "image"])
def test_rows_of_unets(make: Any, start: Image.Image | None) -> None:
    rows, pipe = Collected(), make()
    call: dict[str, Any] = {} if start is None else {"image": start, "strength": 0.9}
    (image,) = run(pipe, **call).images
    result = run(pipe, **call, rows=rows)
    assert np.array_equal(rows.image(), np.asarray(image))
    assert result.images[0].size == (1, 1)


def test_rows_of_a_torus() -> None:
    rows, pipe = Collected(), tiny_sd()
    tiling = still(overlap=4, wrap=(False, True))
    (image,) = run(pipe, tiling=tiling).images
    run(pipe, tiling=tiling, rows=rows)
    assert np.array_equal(rows.image(), np.asarray(image))


def test_bands_are_short() -> None:
    rows, pipe = Collected(), tiny_sd()
    run(pipe, height=520, width=64, rows=rows)
    assert len(rows.bands) > 1 and max(map(len, rows.bands)) <= 256


def test_a_vae_that_must_be_upcast() -> None:
    rows, pipe = Collected(), tiny_sdxl().to(torch.float16)
    assert pipe.vae.config.force_upcast
    (image,) = run(pipe).images
    run(pipe, rows=rows)
    assert np.array_equal(rows.image(), np.asarray(image))
    assert pipe.vae.dtype == torch.float16


def test_large_images_are_the_same_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit, rows come from the banded decoder: exact to 1e-5, so one level of 255 at a rounding's edge."""
    rows, pipe = Collected(), tiny_sd()
    (image,) = run(pipe).images
    monkeypatch.setattr("tiledcore.call.EXACT_DECODE_PIXELS", 0)
    run(pipe, rows=rows)
    difference = rows.image().astype(int) - np.asarray(image).astype(int)
    assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.01


def test_rows_are_decoded_in_the_room_that_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[Any] = []
    own = tiledcore.call.exact_bands
    monkeypatch.setattr(tiledcore.call, "exact_bands", lambda *args: rooms.append(args[3]) or own(*args))
    monkeypatch.setattr("tiledcore.call.EXACT_DECODE_PIXELS", 0)
    pipe = tiny_sd()
    whole = Planner(Predictor(architecture(pipe), "cpu"), 2**30).plan((200, 128))
    decode = next(phase.peak for phase in whole.phases if phase.name == "decode")
    pipe.set_progress_bar_config(disable=True)
    wrapped = TiledPipeline.from_pipe(pipe, tiling=RAMP, memory_budget=int(decode))
    wrapped("a cat", **SD, rows=Collected())
    assert wrapped.report is not None and rooms == [wrapped.report.plan.vae_room] and rooms[0] is not None


def test_what_is_not_exact_says_so(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Collected()
    monkeypatch.setattr("tiledcore.call.EXACT_DECODE_PIXELS", 0)
    monkeypatch.setattr("tiledcore.vae.exact.CPU_EXACT_PIXELS", 0)
    run(tiny_sd(), rows=rows)
    assert "in diffusers' tiles, which is approximate: its attention" in caplog.text
    assert rows.image().shape == (128, 200, 3)


@pytest.mark.parametrize("name", ["safety_checker", "watermark"])
def test_pipelines_that_look_at_the_whole_image(name: str) -> None:
    pipe = tiny_sd()
    setattr(pipe, name, object())
    with pytest.raises(ValueError, match=f"rows: the pipeline's {name} needs the whole image"):
        run(pipe, rows=Collected())


def test_refused_calls_leave_the_vae_as_it_was() -> None:
    def failing(bands: Iterator[NDArray[np.uint8]]) -> None:
        raise OSError("disk")

    pipe = tiny_sd()
    for kwargs, error in (
        ({"rows": Collected(), "num_images_per_prompt": 2}, "one image at a time, not 2"),
        ({"rows": Collected(), "output_type": "latent"}, "decoded nothing"),
        ({"rows": failing}, "disk"),
    ):
        with pytest.raises((ValueError, OSError), match=error):
            run(pipe, **kwargs)
        assert "decode" not in vars(pipe.vae)

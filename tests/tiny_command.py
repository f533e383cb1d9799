"""The command, run in process on a tiny model that is saved for it, and what it leaves behind."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler
from PIL import Image
from tiny import tiny_sd

from tiledcore.cli.main import main
from tiledcore.io import images
from tiledcore.tiles.denoiser import TileDenoiser

FAST = ["--steps", "2", "--size", "192x160", "--seed", "5", "--device", "cpu", "--dtype", "fp32"]
SCENE = '[[region]]\nprompt = "ice"\nbox = [0, 0, 96, 160]\nfeather = 16\nseed = 4\n'


def saved_model(folder: Path) -> str:
    """Stable Diffusion with the conventions of the embedded model."""
    pipe = tiny_sd()
    pipe.scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    pipe.save_pretrained(folder)
    return str(folder)


@contextmanager
def verbosity_put_back() -> Iterator[None]:
    """Around calls of `main`, which sets the verbosity of its process."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(lib, lib.get_verbosity()) for lib in (diffusers_logging, transformers_logging)]
    try:
        yield
    finally:
        for lib, level in levels:
            lib.set_verbosity(level)
            lib.enable_progress_bar()


def generate(model: str, *args: str, out: str = "a.png") -> int:
    return main(["generate", "a coast", "--model", model, "--out", out, *FAST, *args])


def stored(path: str = "a.png") -> dict[str, Any]:
    metadata = images.read_metadata(Path(path))
    assert metadata is not None
    return metadata


def pixels(path: str = "a.png") -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr, but for those that say what is going on."""
    out, err = capsys.readouterr()
    *before, last = err.splitlines()
    assert out == ""
    assert all(re.match(r"loading|planning|stage|denoising|decoding|\s*\d+%|$", line) for line in before)
    assert last.startswith("tiledcore: error: ")
    return last


def spied_denoiser(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Call ``action`` from the second step on."""
    call, count = TileDenoiser.evaluate, iter(range(100))

    def spy(self: TileDenoiser, *args: Any, **kwargs: Any) -> Any:
        if next(count) >= 1:
            action()
        return call(self, *args, **kwargs)

    monkeypatch.setattr(TileDenoiser, "evaluate", spy)


def fail(error: BaseException) -> Any:
    def raising(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raising

"""Previews against the pipelines' own decode and the noise levels that schedulers document."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image
from tilings import MOVING, RAMP, still
from tiny import tiny_sd, tiny_sdxl
from tiny_transformers import (
    NATIVE,
    build,
    call,
    side,
    tiles,
    tiny_flux,
    tiny_pixart_sigma,
    tiny_qwen,
    tiny_sana,
    tiny_sd3,
    tiny_z_image,
)

from tiledcore import Preview, TiledPipeline
from tiledcore.cli.main import main
from tiledcore.io import preview
from tiledcore.io.preview import Previewing
from tiledcore.schedulers.pull import noise_level

TRANSFORMERS = [tiny_sd3, tiny_flux, tiny_pixart_sigma, tiny_sana, tiny_z_image, tiny_qwen]


def tiny(make: Callable[[], Any] = tiny_sd, **kwargs: Any) -> TiledPipeline:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    return TiledPipeline.from_pipe(pipe, **{"tiling": RAMP, **kwargs})


def run(pipe: TiledPipeline, height: int = 256, width: int = 384, steps: int = 4, **kwargs: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe("a coast", height=height, width=width, num_inference_steps=steps, generator=generator, **kwargs)


def pixels(picture: Any) -> np.ndarray:
    with Image.open(picture) if isinstance(picture, Path) else picture as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A copy of every preview, in the order in which they were written, under the number of its evaluation."""
    copies: list[Path] = []
    own = Previewing.after_step

    def after_step(self: Previewing, index: int, *args: Any) -> None:
        self.preview.path.unlink(missing_ok=True)
        own(self, index, *args)
        if self.preview.path.exists():
            copy = tmp_path / f"{index}.png"
            shutil.copy(self.preview.path, copy)
            copies.append(copy)

    monkeypatch.setattr(Previewing, "after_step", after_step)
    return copies


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


# ----------------------------------------------------------------------------- what it shows


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_of_a_native_image_the_last_preview_is_the_image(make: Any, tmp_path: Path) -> None:
    image = run(tiny(make), 128, 128, preview=tmp_path / "a.png").images[0]
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(image))


@pytest.mark.parametrize("make", TRANSFORMERS)
def test_the_last_preview_of_every_family(make: Any, tmp_path: Path) -> None:
    """Whatever the pipeline does to its latents before it decodes them: packed, shifted, normalised, with frames."""
    pipe = TiledPipeline.from_pipe(build(make), tiling=tiles(make))
    if make is tiny_pixart_sigma:
        pipe.vae.register_to_config(shift_factor=None)  # this pipeline passes over it, and its autoencoder has none
    size = (side(make), side(make))
    image = call(pipe, make, size, output_type="pil", preview=tmp_path / "a.png")[0]
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(image))


@pytest.mark.parametrize("make", [tiny_flux, tiny_qwen])
def test_packed_canvases_are_averaged_as_images(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averaged: list[torch.Tensor] = []
    own = Previewing.estimate
    monkeypatch.setattr(Previewing, "estimate", lambda *args: averaged.append(own(*args)) or averaged[-1])
    pipe = TiledPipeline.from_pipe(build(make), tiling=tiles(make))
    latents = call(pipe, make, (NATIVE, 2 * NATIVE), preview=tmp_path / "a.png")
    unpacked = pipe._unpack_latents(latents, 8 * NATIVE, 16 * NATIVE, pipe.vae_scale_factor)
    latents = unpacked.reshape(1, -1, NATIVE, 2 * NATIVE)  # Qwen-Image's has frames
    assert torch.allclose(averaged[-1], F.avg_pool2d(latents, 2), atol=1e-6)


@torch.no_grad()
def test_a_larger_canvas_is_averaged_to_the_native_size(tmp_path: Path) -> None:
    pipe = tiny()
    latents = run(pipe, output_type="latent", preview=tmp_path / "a.png").images
    # 32x48 latent pixels, of which 16 are native: a third of each side.
    pooled = F.adaptive_avg_pool2d(latents, (11, 16)) / pipe.vae.config.scaling_factor
    expected = ((pipe.vae.decode(pooled).sample[0] / 2 + 0.5).clamp(0, 1) * 255).round()
    assert abs(pixels(tmp_path / "a.png") - expected.movedim(0, -1).numpy()).max() <= 1


def test_every_few_steps_and_the_last(shown: list[Path], tmp_path: Path) -> None:
    run(tiny(), 128, 192, steps=8, preview=Preview(tmp_path / "a.png", every=3))
    assert names(shown) == ["3", "6", "8"]
    assert not list(tmp_path.glob(".tiledcore*"))


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_the_pipelines_own_loop_shows_the_same(scheduler: Any, shown: list[Path], tmp_path: Path) -> None:
    seen = []
    for fused in (True, False):
        pipe = tiny(fused=fused)
        if scheduler is not None:
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        run(pipe, 128, 192, steps=3, preview=Preview(tmp_path / "a.png", every=1))
        assert pipe.report is not None and pipe.report.fused == fused
        seen.append({path.stem: pixels(path) for path in shown})
        shown.clear()
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) >= 3
    for step, image in seen[0].items():
        assert abs(image - seen[1][step]).max() <= 2, step


@pytest.mark.parametrize("make", [tiny_flux, tiny_qwen])
def test_nothing_of_the_image_changes(make: Any, tmp_path: Path) -> None:
    plain, watched = (
        call(TiledPipeline.from_pipe(build(make), tiling=tiles(make)), make, (NATIVE, 24), preview=target)
        for target in (None, Preview(tmp_path / "a.png", every=1))
    )
    assert torch.equal(plain, watched)


def test_a_half_precision_autoencoder_is_as_it_was(tmp_path: Path) -> None:
    pipe = tiny()
    pipe.vae.to(torch.float16).register_to_config(force_upcast=True)
    weights = [weight.clone() for weight in pipe.vae.parameters()]
    seen: list[torch.dtype] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    run(pipe, 128, 128, output_type="latent", preview=tmp_path / "a.png")
    assert seen == [torch.float32] and pipe.vae.dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(weights, pipe.vae.parameters(), strict=True))


# ----------------------------------------------------------------------------- noise


def test_noise_levels_are_those_of_the_schedulers() -> None:
    ddim = DDIMScheduler()
    ddim.set_timesteps(10)
    alpha = ddim.alphas_cumprod[400].double()
    assert noise_level(ddim, torch.tensor(400)) == pytest.approx((float(alpha.sqrt()), float((1 - alpha).sqrt())))
    euler = EulerDiscreteScheduler()
    euler.set_timesteps(10)
    assert noise_level(euler, euler.timesteps[3]) == pytest.approx((1.0, float(euler.sigmas[3])))
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(10)
    sigma = float(flow.sigmas[3])
    assert noise_level(flow, flow.timesteps[3]) == pytest.approx((1 - sigma, sigma))


@pytest.mark.parametrize("level", [(0.6, 0.8), (1.0, 5.0), (0.05, 0.95), (1.0, 0.0)])
def test_the_estimate_is_the_best_one_of_its_kind(level: tuple[float, float], tmp_path: Path) -> None:
    """Of smooth clean latents of variance 1: any other gain is further from them."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(1, 400, 16, 16, generator=generator)
    clean = F.interpolate(small, (64, 64), mode="nearest")
    canvas = level[0] * clean + level[1] * torch.randn(clean.shape, generator=generator)
    shown = Previewing(Preview(tmp_path / "a.png"), tiny(), (16, 16), 1)
    estimate = shown.estimate(canvas, level)
    errors = [float(((gain * estimate - small) ** 2).mean()) for gain in (0.9, 1.0, 1.1)]
    assert errors[1] < min(errors[0], errors[2])


# ----------------------------------------------------------------------------- with the rest


def test_stages_one_after_the_other(shown: list[Path], tmp_path: Path) -> None:
    pipe = tiny(stages="auto", tiling=MOVING)
    run(pipe, 256, 256, steps=4, preview=Preview(tmp_path / "a.png", every=2))
    assert names(shown) == ["2", "4", "2"]  # the second stage starts from strength 0.6: two of the steps


def test_a_resumed_run_shows_what_is_left(shown: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Preview(tmp_path / "a.png", every=1)
    pipe, folder = tiny(), tmp_path / "run"
    whole = run(tiny(), output_type="latent").images
    own, own_after = Previewing._decoded, Previewing._decoded

    def broken(self: Previewing, latents: torch.Tensor) -> Any:
        if len(shown) == 2:
            raise KeyboardInterrupt
        return own(self, latents)

    monkeypatch.setattr(Previewing, "_decoded", broken)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, checkpoint=folder, preview=target)
    assert names(shown) == ["1", "2"]
    monkeypatch.setattr(Previewing, "_decoded", own_after)
    latents = run(pipe, output_type="latent", checkpoint=folder, preview=target).images
    assert names(shown) == ["1", "2", "4"]
    assert torch.equal(latents, whole)


def test_wrapped_and_streamed(tmp_path: Path) -> None:
    """Rows and wrapping replace the autoencoder's decode; a preview must reach neither."""
    pipe = tiny(tiling=still(overlap=4, wrap=(False, True)))
    plain: list[np.ndarray] = []
    watched: list[np.ndarray] = []
    run(pipe, rows=plain.extend)
    run(pipe, rows=watched.extend, preview=Preview(tmp_path / "a.png", every=2))
    assert np.concatenate(plain).shape == (256, 384, 3)
    assert np.array_equal(np.concatenate(watched), np.concatenate(plain))
    assert pixels(tmp_path / "a.png").shape == (88, 128, 3)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp", "a.tif"])
def test_the_extension_decides_the_format(name: str, tmp_path: Path) -> None:
    run(tiny(), 128, 128, steps=1, preview=tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.format == {"png": "PNG", "webp": "WEBP", "tif": "TIFF"}.get(name[2:], "JPEG")
        assert image.size == (128, 128)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("too much")])
def test_a_run_survives_its_preview(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, tries = tmp_path / "a.png", []
    path.write_bytes(b"before")

    def failing(*args: Any, **kwargs: Any) -> Any:
        tries.append(1)
        raise error

    if isinstance(error, OSError):
        monkeypatch.setattr(preview, "write_rows", failing)
    else:
        monkeypatch.setattr(Previewing, "_decoded", failing)
    with caplog.at_level(logging.WARNING):
        image = run(tiny(), 128, 128, preview=Preview(path, every=1)).images[0]
    assert image.size == (128, 128) and len(tries) == 1
    assert [record.message for record in caplog.records if "previews" in record.message] == [
        f"no more previews: {path}: {error}"
    ]
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["a.png"]


# ----------------------------------------------------------------------------- bad input


def test_bad_arguments(tmp_path: Path) -> None:
    for path, every, message in (
        ("a.gif", 5, r"preview: a.gif: the extension must be one of .png, .jpg, .jpeg, .webp, .tif"),
        ("a", 5, "the extension must be one of"),
        ("none/a.png", 5, "preview: none/a.png: there is no folder none"),
        ("a.png", 0, "preview: every=0 must be an int of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Preview(Path(path), every)
    pipe = tiny(memory_budget="8GiB")
    with pytest.raises(ValueError, match="preview: its decode is not counted by the memory_budget"):
        run(pipe, preview=tmp_path / "a.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preview", "p.gif"], "preview: p.gif: the extension must be one of .png, .jpg, .jpeg, .webp"),
        (["--preview", "none/p.png"], "preview: none/p.png: there is no folder none"),
        (["--preview", "a.png"], "--preview a.png: is --out; give it another name"),
        (["--preview-every", "2"], "--preview-every: only used with --preview"),
        (["--preview", "p.png", "--preview-every", "0"], "argument --preview-every: '0' is not an integer from 1"),
    ],
)
def test_one_line_before_the_model_is_opened(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tiledcore.cli.generate.open_pipeline", lambda *args: pytest.fail("the model was opened"))
    assert main(["generate", "ice", "--out", "a.png", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tiledcore: error: {message}")
    assert not list(tmp_path.iterdir())
    Image.new("RGB", (64, 64)).save("i.png")
    assert main(["generate", "ice", "--out", "a.png", "--init-image", "i.png", "--preview", "i.png"]) == 2
    assert "--preview i.png: is --init-image" in capsys.readouterr().err


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = tmp_path / "model"
    tiny_sd().save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    written: list[str] = []
    own = preview.write_rows
    monkeypatch.setattr(preview, "write_rows", lambda path, *args: written.append(path.name) or own(path, *args))
    options = ["--size", "192x160", "--steps", "3", "--seed", "5", "--device", "cpu", "--tile", "16"]
    for extra in ([], ["--preview", "p.jpg", "--preview-every", "2"]):
        out = "b.png" if extra else "a.png"
        assert main(["generate", "a coast", "--model", str(model), "--out", out, *options, *extra]) == 0
    assert written == ["p.jpg", "p.jpg"]
    with Image.open("p.jpg") as image:
        assert image.size == (128, 104)
    assert np.array_equal(pixels(Path("a.png")), pixels(Path("b.png")))

"""The command where it does what it is told: images and their settings."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tilings import still
from tiny import tiny_sdxl
from tiny_command import FAST, SCENE, generate, pixels, spied_denoiser, stored

from tiledcore import Motion, TiledPipeline, TilingConfig, __version__
from tiledcore.cli import generate as command
from tiledcore.cli.main import main
from tiledcore.io.writers import write_rows
from tiledcore.models import EMBEDDED

OWN_MOTION = {"blend_first": 2, "blend_last": 1, "fade": None, "seed": 5}
"""How tiles move with ``--motion moving`` and the seed of ``FAST``."""


pytestmark = pytest.mark.usefixtures("here")


# ----------------------------------------------------------------------------- what it writes


def test_an_image_with_its_settings(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--negative-prompt", "ice", "--tile", "16", "--overlap", "4") == 0
    with Image.open("a.png") as image:
        assert (image.size, image.mode, image.format) == ((192, 160), "RGB", "PNG")
        assert image.info["Description"] == "a coast"
        assert json.loads(image.info["tiledcore"]) == stored()
    assert stored() == {
        "prompt": "a coast",
        "negative_prompt": "ice",
        "seed": 5,
        "model": model,
        "size": [192, 160],
        "steps": 2,
        "guidance": 7.5,  # the pipeline's own default
        "scheduler": "ddim",
        "device": "cpu",
        "dtype": "fp32",
        "version": __version__,
        "tiling": {
            "mode": "tiles",
            "tile": [16, 16],
            "overlap": [4, 4],
            "halo": None,
            "window": "ramp",
            "ramp": 4,
            "motion": "still",
            "wrap": [False, False],
            "tiles": 4,
            "area_factor": round(4 * 16 * 16 / (24 * 20), 4),
            "lines_y": [8 * y for y in (4, 10, 16)],
            "lines_x": [8 * x for x in (8, 12, 16)],
            "period": 8,
        },
    }
    assert os.listdir() == ["a.png"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "decoding" in err.splitlines()
    assert re.fullmatch(r"a\.png: 192x160, seed 5, area factor 2\.13, \d+\.\d s", err.splitlines()[-2])
    assert err.splitlines()[-1] == "next: tiledcore view a.png"
    assert "denoising 192x160 px: 4 tiles of 16x16 latent pixels, 2 steps, seed 5" in err.splitlines()


def test_the_image_is_the_librarys(model: str) -> None:
    assert generate(model, "--overlap", "4", "--window", "gaussian", "--wrap", "x") == 0
    tiling = TilingConfig(overlap=4, window="gaussian", wrap=(False, True))
    expected = TiledPipeline.from_pretrained(model, tiling=tiling)(
        "a coast",
        width=192,
        height=160,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
    )
    assert pixels() == expected.images[0].tobytes()
    assert stored()["tiling"]["wrap"] == [False, True]
    assert stored()["tiling"]["ramp"] is None


def test_a_seed_means_one_image(model: str) -> None:
    for out, seed in (("a.png", "5"), ("b.png", "5"), ("c.png", "6")):
        assert generate(model, "--seed", seed, out=out) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert pixels("a.png") != pixels("c.png")


def test_a_random_seed_is_printed_and_makes_the_image_again(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "a coast", "--model", model, "--steps", "2", "--size", "136x64"]
    assert main([*args, "--out", "a.png"]) == 0
    seed = stored()["seed"]
    assert f"a.png: 136x64, seed {seed}, " in capsys.readouterr().err
    assert main([*args, "--out", "b.png", "--seed", str(seed)]) == 0
    assert pixels("a.png") == pixels("b.png")
    assert main([*args, "--out", "c.png"]) == 0
    assert stored("c.png")["seed"] != seed


def test_canvas_mode(model: str) -> None:
    assert generate(model, "--mode", "canvas", "--tile", "8", "--halo", "4") == 0
    tiling = stored()["tiling"]
    assert (tiling["mode"], tiling["halo"], tiling["area_factor"]) == ("canvas", [4, 4], 1.0)
    assert tiling["lines_y"] == [64, 128] and tiling["lines_x"] == [64, 128]


def test_a_halo_is_of_canvas_mode(model: str) -> None:
    assert generate(model, "--halo", "4") == 2


def test_moving_tiles_of_which_three_steps_are_blended(model: str) -> None:
    assert generate(model, "--tile", "8", "--motion", "moving", "--overlap", "2", "--steps", "4") == 0
    tiling = stored()["tiling"]
    grid = still(tile=8, overlap=2).grid(20, 24, 16)
    assert tiling["motion"] == OWN_MOTION
    assert (tiling["window"], tiling["ramp"]) == ("ramp", 2)
    assert tiling["lines_y"] == [8 * y for y in grid.lines[0]]
    assert tiling["area_factor"] == pytest.approx((1 + 3 * grid.area_factor) / 4, abs=1e-4)  # of four steps


def test_moving_tiles(model: str) -> None:
    assert generate(model, "--motion", "moving", "--tile", "8x16", "--tile-batch", "2") == 0
    tiling = stored()["tiling"]
    assert (tiling["motion"], tiling["overlap"], tiling["tile"]) == (OWN_MOTION, [1, 2], [8, 16])
    assert (tiling["tiles"], tiling["window"], tiling["ramp"]) == (3 * 2, "ramp", 1)
    grid = still(tile=(8, 16), overlap=(1, 2)).grid(20, 24, 16)
    assert tiling["area_factor"] == round(grid.area_factor, 4)  # both steps are blended
    assert tiling["lines_y"] == [8 * y for y in grid.lines[0]]


def test_regions_of_a_scene_file(model: str, here: Path) -> None:
    (here / "scene.toml").write_text(SCENE)
    assert generate(model) == 0
    plain = pixels()
    assert generate(model, "--regions", "scene.toml", "--tile", "16") == 0
    assert pixels() != plain
    region = {"prompt": "ice", "box": [0, 0, 96, 160], "weight": 1.0, "feather": 16, "seed": 4}
    assert stored()["regions"] == [region]


def test_the_settings_say_where_a_mask_lies(model: str, here: Path) -> None:
    mask = Image.new("L", (192, 160))
    mask.paste(255, (30, 40, 90, 100))
    mask.save("lake.png")
    (here / "scene.toml").write_text('[[region]]\nprompt = "ice"\nmask = "lake.png"\nfeather = 16\n')
    assert generate(model, "--regions", "scene.toml", "--tile", "16") == 0
    (region,) = stored()["regions"]
    assert (region["mask"], region["bounds"]) == ("lake.png", [30, 40, 90, 100])


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "webp", "PNG", "tif"])
def test_formats(model: str, extension: str) -> None:
    out = f"a.{extension}"
    assert generate(model, out=out) == 0
    with Image.open(out) as image:
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "PNG": "PNG", "tif": "TIFF"}[extension]
        assert (image.format, image.size) == (kind, (192, 160))
    assert main(["info", out]) == (0 if extension in ("PNG", "tif") else 2)


def test_an_existing_image_is_replaced_with_ordinary_permissions(model: str) -> None:
    Path("a.png").write_text("old")
    assert generate(model) == 0
    umask = os.umask(0)
    os.umask(umask)
    assert Path("a.png").stat().st_mode & 0o777 == 0o666 & ~umask
    assert stored()["seed"] == 5


def test_from_an_image(model: str) -> None:
    Image.effect_noise((205, 131), 60).save("start.png")
    args = ["generate", "a coast", "--model", model, "--steps", "4", "--seed", "1"]
    start = ["--init-image", "start.png"]
    assert main([*args, *start, "--out", "a.png"]) == 0
    assert stored()["size"] == [200, 128]
    assert (stored()["init_image"], stored()["strength"]) == ("start.png", command.STRENGTH)
    for out, more in (("b.png", ["--strength", "0.3"]), ("c.png", ["--size", "136x264"])):
        assert main([*args, *start, *more, "--out", out]) == 0
    assert stored("b.png")["strength"] == 0.3
    assert pixels("b.png") != pixels("a.png")
    assert stored("c.png")["size"] == [136, 264]
    assert main([*args, "--size", "200x128", "--out", "d.png"]) == 0
    assert "strength" not in stored("d.png")


def test_stages(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--stages", "auto", "--size", "256x256", "--steps", "4", "--strength", "0.5", "--motion", "moving"]
    assert generate(model, *args) == 0
    err = capsys.readouterr().err
    assert "stage 1: 128x128, 4 steps, 1 tiles\nstage 2: 256x256, 2 steps from strength 0.5, 9 tiles" in err
    assert stored()["stages"] == ["128x128, 4 steps, 1 tiles", "256x256, 2 steps from strength 0.5, 9 tiles"]
    expected = TiledPipeline.from_pretrained(model, tiling=TilingConfig(motion=Motion(seed=5)), stages="auto")(
        "a coast",
        width=256,
        height=256,
        num_inference_steps=4,
        strength=0.5,
        generator=torch.Generator().manual_seed(5),
    )
    assert pixels() == expected.images[0].tobytes()
    assert generate(model, *args[2:6], "--stages", "4", "--size", "512x512", out="b.png") == 0
    assert [line.split(",")[0] for line in stored("b.png")["stages"]] == ["128x128", "512x512"]


def test_an_image_four_times_as_large_in_its_colours(model: str) -> None:
    Image.new("RGB", (61, 40), (200, 100, 50)).save("start.png")
    start = ["generate", "a coast", "--model", model, "--steps", "2", "--init-image", "start.png", "--size", "4x"]
    assert main([*start, "--keep-colour", "--stages", "auto", "--out", "a.png"]) == 0
    assert main([*start, "--keep-colour", "--out", "b.png"]) == 0
    for path in ("a.png", "b.png"):
        assert stored(path)["size"] == [240, 160]
        with Image.open(path) as image:
            mean = image.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
            assert mean == pytest.approx((200, 100, 50), abs=4)


def test_a_mask(model: str) -> None:
    start = Image.effect_noise((192, 160), 60).convert("RGB")
    start.save("start.png")
    mask = Image.new("L", (192, 160))
    mask.paste(255, (96, 0, 192, 160))
    mask.save("mask.png")
    assert generate(model, "--init-image", "start.png", "--mask", "mask.png", "--strength", "1") == 0
    with Image.open("a.png") as image:
        left = image.crop((0, 0, 96, 160))
        assert left.tobytes() == start.crop((0, 0, 96, 160)).tobytes()
        assert image.crop((96, 0, 192, 160)).tobytes() != start.crop((96, 0, 192, 160)).tobytes()


def test_sdxl(tmp_path: Path) -> None:
    tiny_sdxl().save_pretrained(tmp_path / "xl")
    assert generate("xl", "--scheduler", "unipc") == 0
    assert (stored()["guidance"], stored()["scheduler"]) == (5.0, "unipc")
    Image.effect_noise((192, 160), 60).save("start.png")
    assert generate("xl", "--init-image", "start.png", "--strength", "1", out="b.png") == 0
    assert pixels("a.png") != pixels("b.png")


def test_the_embedded_model_has_its_own_defaults(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMBEDDED, "earth", Path(model))
    monkeypatch.setattr("tiledcore.pipeline.EARTH", Path(model))
    args = ["generate", "a coast", "--size", "64x64", "--out", "a.png"]
    assert main(args) == 0
    assert stored()["model"] == "earth"
    assert stored()["steps"] == 12
    assert stored()["guidance"] == 3.0
    assert main([*args, "--steps", "3", "--guidance", "0"]) == 0
    assert (stored()["steps"], stored()["guidance"]) == (3, 0)


@pytest.mark.parametrize("name", command.SCHEDULERS)
def test_a_scheduler_keeps_the_models_conventions(
    model: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    spied_denoiser(monkeypatch, lambda: None)
    run = TiledPipeline.__call__

    def spy(self: TiledPipeline, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.scheduler)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(TiledPipeline, "__call__", spy)
    assert generate(model, "--scheduler", name, "--size", "64x64", "--steps", "4") == 0
    assert stored()["scheduler"] == name
    (scheduler,) = seen
    assert type(scheduler) is getattr(diffusers, command.SCHEDULERS[name])
    assert scheduler.config.prediction_type == "v_prediction"
    err = capsys.readouterr().err
    for key, value in (("timestep_spacing", "trailing"), ("rescale_betas_zero_snr", True)):
        assert scheduler.config[key] == value
        native = key in getattr(diffusers, command.SCHEDULERS[name])().config
        assert native != (f"{key}={value}" in err)


def test_a_prompt_that_is_cut_off_is_reported(
    model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    args = ["--model", model, "--out", "a.png", *FAST]
    assert main(["generate", "a very long prompt " * 5, *args]) == 0
    assert "truncated because CLIP can only handle sequences up to 40 tokens" in caplog.text


def test_how_tiles_meet_is_the_models_own_unless_said(model: str) -> None:
    def meet() -> tuple[Any, ...]:
        return tuple(stored()["tiling"][name] for name in ("tile", "overlap", "motion", "mode"))

    assert generate(model, "--tile", "16") == 0
    assert meet() == ([16, 16], [2, 2], OWN_MOTION, "tiles")
    assert generate(model, "--tile", "16", "--overlap", "4") == 0
    assert meet() == ([16, 16], [4, 4], "still", "tiles")
    assert generate(model, "--tile", "16", "--window", "mean") == 0
    assert meet() == ([16, 16], [2, 2], "still", "tiles")
    assert generate(model, "--tile", "16", "--mode", "canvas") == 0
    assert meet() == ([16, 16], [0, 0], "still", "canvas")


# ----------------------------------------------------------------------------- info


def test_info(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--tile", "16x8", "--wrap", "xy") == 0
    capsys.readouterr()
    assert main(["info", "a.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == stored()
    assert main(["info", "a.png"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert rows["prompt"] == "a coast"
    assert rows["negative prompt"] == "-"
    assert (rows["size"], rows["tile"], rows["wrap"]) == ("192x160", "16x8", "xy")
    assert all(name.replace("_", " ") in rows["motion"] for name in OWN_MOTION) and "{" not in rows["motion"]
    assert rows["lines x"] == " ".join(map(str, stored()["tiling"]["lines_x"]))


def test_info_shows_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"prompt": "a\x1b[31m\ncoast é"}
    write_rows(Path("a.png"), (8, 8), [np.zeros((8, 8, 3), np.uint8)], metadata)
    assert stored() == metadata
    assert main(["info", "a.png"]) == 0
    assert capsys.readouterr().out == f"{'prompt':<18}a [31m coast é\n"

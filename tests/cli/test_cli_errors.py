"""The command where it refuses, fails or is interrupted: one line says why, and nothing half done is left behind."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_command import SCENE, error, fail, generate, spied_denoiser

from tiledcore import TiledPipeline
from tiledcore.cli import generate as command
from tiledcore.cli.main import main
from tiledcore.io import images

pytestmark = pytest.mark.usefixtures("here")


# ----------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "1000x1001"], "multiple of 8 px, such as 1000x1000 or 1000x1008"),
        (["--size", "4x8"], "multiple of 8 px, such as 8x8 or 8x8"),
        (["--size", "1024"], "'1024' is not WIDTHxHEIGHT"),
        (["--size", "0x64"], "'0x64' is not WIDTHxHEIGHT"),
        (["--init-image", "whole.png", "--size", "1024x"], "'1024x' is not WIDTHxHEIGHT"),
        (["--tile", "16", "--overlap", "16"], "at most 15 along y"),
        (["--tile", "0"], "tile=(0, 0) must be an int of at least 1"),
        (["--tile", "axb"], "'axb' is not N or HxW"),
        (["--motion", "drifting"], "--motion: invalid choice"),
        (["--motion", "moving", "--mode", "canvas"], "mode='canvas' has neither overlap=None nor motion='moving'"),
        (["--seed", "-1"], "--seed: '-1' is not an integer from 0"),
        (["--seed", str(2**64)], "is not an integer from 0 to 18446744073709551615"),
        (["--steps", "0"], "--steps: '0'"),
        (["--guidance", "nan"], "--guidance: 'nan'"),
        (["--tile-batch", "0"], "--tile-batch: '0'"),
        (["--ramp", "0"], "--ramp: '0'"),
        (["--window", "hann"], "window='hann' must be one of mean, gaussian, ramp, core"),
        (["--wrap", "z"], "--wrap: invalid choice"),
        (["--dtype", "fp8"], "--dtype: invalid choice"),
        (["--scheduler", "best"], "'dpm++2m'"),
        (["--strength", "0.5"], "--strength: only used with --init-image or --stages"),
        (["--mask", "whole.png"], "--mask: only used with --init-image"),
        (["--keep-colour"], "--keep-colour: only used with --init-image"),
        (["--init-image", "whole.png", "--mask", "none.png"], "none.png: cannot be read: No such file"),
        (["--init-image", "whole.png", "--mask", "small.png"], "small.png: is 32x64 px, --init-image 64x64 px"),
        (["--init-image", "whole.png", "--mask", "black.png"], "black.png: nothing in it is white"),
        (["--init-image", "whole.png", "--mask", "hole.png"], "hole.png: has transparent pixels; make it white where"),
        (["--stages", "1"], "--stages: '1' is not auto or a number above 1 up to 4"),
        (["--stages", "all"], "--stages: 'all' is not auto"),
        (["--size", "4x"], "--size 4x: only used with --init-image"),
        (["--init-image", "none.png"], "none.png: cannot be read: No such file"),
        (["--init-image", "text.png"], "text.png: cannot be read: not an image"),
        (["--init-image", "cut.png"], "cut.png: cannot be read: not an image"),
        (["--init-image", "."], ".: cannot be read: Is a directory"),
        (["--init-image", "whole.png", "--strength", "0"], "'0' is not a number above 0"),
        (["--init-image", "whole.png", "--strength", "1.1"], "'1.1' is not a number above 0"),
        (["--out", "a.gif"], "must be one of .png, .jpg, .jpeg, .webp, .tif, .tiff"),
        (["--out", "a.jpg", "--size", "16384x8192"], "JPEG is only for up to 8192x8192 px"),
        (["--checkpoint", "none/run"], "checkpoint: there is no folder none"),
        (["--out", "none/a.png"], "there is no folder none"),
        (["--out", "folder.png"], "cannot be written"),
        (["--out", "a.webp", "--size", "16384x64"], "WEBP holds at most 16383 px"),
        (["--model", "./none"], "no such folder"),
        (["--device", "toaster"], "--device: 'toaster' must be cpu, cuda or cuda:N"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_refused_before_anything_is_loaded(
    model: str,
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("text.png").write_text("text")
    Image.effect_noise((64, 64), 60).save("whole.png")
    Image.new("L", (64, 64)).save("black.png")
    Image.new("L", (32, 64), 255).save("small.png")
    Image.new("LA", (64, 64), (255, 0)).save("hole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:2000])
    Path("folder.png").mkdir()
    before = sorted(os.listdir())
    monkeypatch.setattr(TiledPipeline, "from_pretrained", fail(AssertionError("loaded")))
    assert generate(model, *args) == 2
    assert message in error(capsys)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (None, "scene.toml: No such file or directory"),
        (SCENE.replace("96", "960"), "region 1: box=(0, 0, 960, 160): does not lie inside the canvas of 192x160 px"),
        (SCENE.replace("box", "boks"), "region 1: unknown key 'boks'"),
        (SCENE.replace("box = [0, 0, 96, 160]", 'mask = "empty.png"'), "region 1: mask: is empty"),
        (SCENE.replace("16\n", '"16"\n'), "region 1: feather='16' must be an int"),
    ],
)
def test_a_bad_scene_is_refused_before_the_model_is_opened(
    model: str, here: Path, scene: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (192, 160)).save("empty.png")
    if scene is not None:
        (here / "scene.toml").write_text(scene)
    assert generate(model, "--regions", "scene.toml") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not Path("a.png").exists()


def test_a_protected_folder(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)  # root, who may run this, has access anywhere
    assert generate(model) == 2
    assert "its folder is protected" in error(capsys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--overlap", "16"], "at most 15 along y"),
        (["--init-image", "start.png", "--strength", "0.1"], "strength=0.1: leaves none of num_inference_steps=2"),
        (["--init-image", "start.png", "--mask", "start.png", "--stages", "auto"], "mask_image: not with stages"),
        (["--stages", "auto", "--checkpoint", "run"], "checkpoint: not with stages or keep_colour"),
        (["--budget", "24GiB", "--preview", "b.png"], "preview: its decode is not counted by the memory_budget"),
        (["--tile", "3"], "--tile 3x3: each side must be at least a quarter of the model's own 16x16 latent pixels"),
        (["--tile", "16x3"], "--tile 16x3: each side must be at least a quarter"),
        (["--model", "."], "--model .: cannot be opened: OSError: Error no file named model_index.json"),
        (["--regions", "seed.toml", "--init-image", "start.png"], "image: a region's seed needs initial noise"),
    ],
)
def test_refused_once_the_model_is_known(
    model: str, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((192, 160), 60).save("start.png")
    Path("seed.toml").write_text(SCENE)
    assert generate(model, *args) == 2
    assert message in error(capsys)
    assert sorted(os.listdir()) == ["seed.toml", "start.png"]


def test_a_model_that_is_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("nobody/nothing") == 2
    message = error(capsys)
    assert "--model nobody/nothing: no such folder" in message
    assert "HF_HUB_OFFLINE" in message
    assert os.listdir() == []


def test_a_model_that_is_damaged(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(model, "damaged")
    Path("damaged/unet/diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    assert generate("damaged") == 2
    error(capsys)
    assert os.listdir() == ["damaged"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--device", "cuda:0") == 2
    assert "use --device cpu" in error(capsys)


@pytest.mark.parametrize("content", ["nothing", "not json", "[1]"])
def test_info_of_anything_else(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if content != "nothing":
        chunks.add_text(images.CHUNK, content)
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=chunks)
    assert main(["info", "a.png"]) == 2
    assert "a.png: holds no tiledcore settings" in error(capsys)
    Path("b.png").write_bytes(b"nothing")
    assert main(["info", "b.png"]) == 2
    assert "b.png: cannot be read: not an image" in error(capsys)
    assert main(["info", "c.png"]) == 2
    assert "c.png: cannot be read: No such file" in error(capsys)


# ----------------------------------------------------------------------------- what may go wrong


def test_ctrl_c_leaves_nothing(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # A shell starts background jobs with SIGINT ignored; then Python does not install its own handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    spied_denoiser(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert generate(model) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "tiledcore: interrupted, nothing was written"
    assert os.listdir() == []


def test_ctrl_c_while_writing_leaves_the_old_image(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.png").write_text("old")
    monkeypatch.setattr(os, "fsync", fail(KeyboardInterrupt()))
    assert generate(model) == 130
    assert os.listdir() == ["a.png"]
    assert Path("a.png").read_text() == "old"


def test_a_full_disk(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", fail(full))
    assert generate(model) == 2
    assert error(capsys) == "tiledcore: error: a.png was not written: No space left on device"
    assert os.listdir() == []


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        MemoryError(),
    ],
)
def test_out_of_memory(
    model: str,
    problem: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spied_denoiser(monkeypatch, fail(problem))
    assert generate(model) == 2
    message = error(capsys)
    assert all(option in message for option in ("--tile-batch", "--dtype fp16", "--size"))
    assert os.listdir() == []


def test_a_bug_is_one_line_unless_asked(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "write_rows", fail(KeyError("two\nlines")))
    assert generate(model) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == r"tiledcore: error: KeyError: 'two\nlines' (TILEDCORE_DEBUG=1 shows where)"
    monkeypatch.setenv("TILEDCORE_DEBUG", "1")
    assert generate(model) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err

"""What a run must not lose or leave behind: its image, log levels, a lock."""

import fcntl
import io
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_command import error, generate

from tiledcore.cli.main import main


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_reader_that_is_gone_does_not_cost_the_image(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``tiledcore generate ... 2>&1 | head -1``."""
    for name in ("stdout", "stderr"):
        reading, writing = os.pipe()
        os.close(reading)
        stream = io.TextIOWrapper(os.fdopen(writing, "wb"), line_buffering=True)
        monkeypatch.setattr(sys, name, stream)
    assert generate(model) == 0
    with Image.open("a.png") as image:
        assert image.size == (192, 160)
    assert main(["info", "a.png"]) == 0
    for stream in (sys.stdout, sys.stderr):
        stream.close()  # nothing is left in it that could not be written
    monkeypatch.undo()


def test_two_runs_do_not_share_a_checkpoint(model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run").mkdir()
    (here / "run" / "other").write_text("")  # so that the folder stays
    folder = os.open("run", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert generate(model, "--checkpoint", "run") == 2
    assert "checkpoint: run: another process uses it; wait for it, or give another folder" in error(capsys)
    assert os.listdir("run") == ["other"] and not Path("a.png").exists()
    os.close(folder)
    assert generate(model, "--checkpoint", "run") == 0
    assert os.listdir("run") == ["other"]
    assert generate(model, "--checkpoint", "new", "--overlap", "16") == 2
    assert not Path("new").exists()


def test_generate_within_a_budget(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--budget", "2GiB") == 0
    err = capsys.readouterr().err
    found = re.search(
        r"memory: ([\d.]+) MiB of tensors at the peak, ([\d.]+) MiB predicted, 2\.00 GiB allowed; "
        "this counts tensors, not the whole process\n",
        err,
    )
    assert found is not None, err
    assert 0 < float(found[1]) <= float(found[2]) < 2048
    assert generate(model, "--budget", "1MiB", out="b.png") == 2
    assert "does not fit 1.0 MiB" in error(capsys)
    assert not Path("b.png").exists()


def test_a_plan_says_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--size", "256x256", "--budget", "1GiB", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "tensors on the device are counted, not the whole process"
    assert err == "planning earth at 256x256 px: one step is simulated, up to a minute\n"


# ----------------------------------------------------------------------------- weights that are pickles


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


@pytest.mark.parametrize(("part", "file"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_pickle_is_never_advised_to_be_run(
    part: str, file: str, damaged: bool, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, "copy")
    next(Path("copy", part).glob("*.safetensors")).unlink()
    weights = Path("copy", part, f"{file}.bin")
    torch.save({"conv_in.weight": Evil()}, weights)
    if damaged:
        weights.write_bytes(weights.read_bytes()[:100])
    assert generate("copy") == 2
    message = error(capsys)
    assert "is a pickle (.bin)" in message and "save_pretrained(FOLDER, safe_serialization=True)" in message
    assert not any(word in message for word in ("weights_only", "trust_remote_code"))
    assert not Path("evil").exists()


def test_a_pickle_of_tensors_is_opened(model: str, here: Path) -> None:
    shutil.copytree(model, "pickled")
    weights = Path("pickled/unet/diffusion_pytorch_model.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert generate("pickled") == 0 and generate(model, out="b.png") == 0
    with Image.open("a.png") as one, Image.open("b.png") as other:
        assert one.tobytes() == other.tobytes()

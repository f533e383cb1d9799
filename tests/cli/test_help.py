"""What the command says of itself: help, --explain, examples, and nothing of other libraries."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shtab
import torch
from tiny_command import FAST, generate

from tiledcore import __version__
from tiledcore.cli import console, explain
from tiledcore.cli import main as cli
from tiledcore.cli.main import main

pytestmark = pytest.mark.usefixtures("here")


def test_argument_errors_and_help_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from tiledcore.cli.main import main\n"
        "assert main(['generate', 'x', '--out', 'a.gif', '--model', 'a/b']) == 2\n"
        "assert main(['generate', 'x', '--out', 'a.png', '--size', '9x9', '--model', 'a/b']) == 2\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "main(['generate', '--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "WIDTHxHEIGHT" in result.stdout


def test_the_help_is_one_screen_and_the_rest_is_one_option_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            main(["generate", option])
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    common, everything = (set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.M)) for text in shown)
    assert len(shown[0].splitlines()) <= 32 and "latent pixels" not in shown[0]
    assert {"--out", "--size", "--stages", "--explain", "--help-all"} <= common < everything
    assert {"--tile", "--overlap", "--scheduler", "--device", "--preview-every"} <= everything - common


def test_explain_says_what_would_be_done_and_why(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--explain", "--tile", "16", "--motion", "moving") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"size    192x160 px; {model} was trained at 128x128 px"
    assert lines[1] == "tiles   4 of 128x128 px, area factor 2.13"
    assert "tiles lie elsewhere in each step" in lines[2] and lines[2].endswith("asked for by --tile, --motion")
    assert lines[3] == "steps   2 of ddim, guidance 7.5; --steps"
    assert lines[4].startswith("decode  row by row") and re.match(r"memory  [\d.]+ MiB predicted \(", lines[5])
    assert lines[6] == "seed    5" and "--stages auto" in lines[7] and lines[8:] == ["then    tiledcore view a.png"]
    assert "denoising" not in err and os.listdir() == []


def test_a_step_of_too_many_tiles_is_not_simulated(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(explain, "MANY", 3)
    assert generate(model, "--explain", "--tile", "16", "--overlap", "4") == 0
    line = "memory  not predicted: to simulate a step of 4 tiles would take minutes"
    assert line in capsys.readouterr().out.splitlines()


def test_nothing_but_the_commands_own_lines_is_shown(model: str) -> None:
    """With an image processor beside the model, which transformers warns about where torchvision is missing."""
    shutil.copytree(model, "with_processor")
    index = json.loads(Path("with_processor/model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    Path("with_processor/model_index.json").write_text(json.dumps(index))
    Path("with_processor/feature_extractor").mkdir()
    config = {"image_processor_type": "CLIPImageProcessor", "crop_size": 224, "size": 224}
    Path("with_processor/feature_extractor/preprocessor_config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-P",
        "-m",
        "tiledcore",
        "generate",
        "a coast",
        "--model",
        "with_processor",
        "--out",
        "a.png",
    ]
    run = subprocess.run([*command, *FAST], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == ""
    lines = [line for line in re.split(r"[\r\n]+", run.stderr) if line and "it/s]" not in line]
    assert [line.split(" ")[0] for line in lines] == ["loading", "denoising", "decoding", "a.png:", "next:"], run.stderr


def test_the_choices_are_torchs() -> None:
    assert all(hasattr(torch, name) for name in console.DTYPES.values())


def test_without_a_command_there_are_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert err == "" and len(out.splitlines()) == 5
    assert all(line.startswith("tiledcore ") for line in out.splitlines())
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tiledcore {__version__}\n"


def test_a_shell_completes_the_common_options() -> None:
    script = shtab.complete(cli.parser(), "bash")
    assert "--size" in script and "--stages" in script and "--tile-batch" not in script

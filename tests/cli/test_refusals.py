"""Input that cannot work is refused in one line that names it, before a model is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_command import error, fail, generate

from tiledcore import TiledPipeline
from tiledcore.cli.main import main


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no model may be loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TiledPipeline, "from_pretrained", fail(AssertionError("loaded")))
    return tmp_path


TWENTY = "9" * 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--guidance", "1e308"], "--guidance: '1e308' is not a number from 0 to 1000"),
        (["--ramp", TWENTY], f"--ramp: '{TWENTY}' is not an integer from 1 to 1000000"),
        (["--steps", TWENTY], f"--steps: '{TWENTY}' is not an integer from 1 to 1000000"),
        (["--tile-batch", TWENTY], f"--tile-batch: '{TWENTY}' is not"),
        (["--device", "meta"], "--device: 'meta' must be cpu, cuda or cuda:N"),
        (["--device", "mps"], "--device: 'mps' must be cpu, cuda or cuda:N"),
        (["--device", "xla"], "--device: 'xla' must be cpu, cuda or cuda:N"),
        (["--device", "vulkan"], "--device: 'vulkan' must be cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees "),
        (["--budget", "24"], "budget='24': has no unit; write 24GiB, 24MiB or 24B"),
        (["--budget", "9" * 400], f"budget='{'9' * 40}': must be a number of bytes from 1 to 1024TiB"),
        (["--negative-prompt", "ice \udcff"], "--negative-prompt: is not valid UTF-8"),
        (["--init-image", "pipe.png"], "pipe.png: cannot be read: Is a device or a pipe"),
        (["--init-image", "/dev/zero"], "/dev/zero: cannot be read: Is a device or a pipe"),
        (["--init-image", "white.png", "--mask", "pipe.png"], "pipe.png: cannot be read: Is a device or a pipe"),
        (["--regions", "pipe.png"], "pipe.png: Is a device or a pipe"),
        (["--out", "pipe.png"], "pipe.png: cannot be written: it is a folder, a device or a pipe"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_one_line(model: str, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe.png")
    Image.new("RGB", (64, 64), "white").save("white.png")
    assert generate(model, *args) == 2
    assert message in error(capsys)


def test_a_prompt_that_is_no_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a coast \udcff", "--model", model, "--out", "a.png"]) == 2
    assert error(capsys) == "tiledcore: error: PROMPT: is not valid UTF-8"


@pytest.mark.parametrize("budget", ["24", "9" * 400, "9" * 400 + "GiB", "0GiB"])
def test_budgets_of_plan(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--size", "256x256", "--budget", budget]) == 2
    assert "tiledcore: error: budget='" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["pipe.png", "/dev/zero"])
def test_only_ordinary_files_are_shown(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe.png")
    for command in (["info", file], ["view", file, "--no-browser"]):
        assert main(command) == 2
        assert f"{file}: cannot be read: Is a device or a pipe" in capsys.readouterr().err


def test_the_first_message_comes_before_torch(model: str) -> None:
    code = (
        "import sys, tiledcore.cli.generate as g\n"
        "def stop(text): print(text, 'torch' in sys.modules, 'diffusers' in sys.modules); sys.exit()\n"
        "g.say = stop\n"
        "from tiledcore.cli.main import main\n"
        f"main(['generate', 'x', '--model', {model!r}, '--out', 'a.png'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == f"loading {model} False False\n", run.stderr


def test_help_imports_nothing_large() -> None:
    code = (
        "import sys\nfrom tiledcore.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'PIL', 'diffusers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr

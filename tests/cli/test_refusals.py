"""Input that cannot work is refused in one line that names it, before a model is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_command import error, fail, generate

from tiledcore import TiledPipeline
from tiledcore.cli.console import CommandError
from tiledcore.cli.main import main
from tiledcore.cli.model import Model, check_classes


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
        (["--steps", "٣"], "--steps: '٣' is not an integer"),
        (["--seed=--"], "--seed: '--' is no value"),
        (["--size=--"], "--size: '--' is no value"),
        (["--device", "meta"], "--device: 'meta' must be cpu, cuda or cuda:N"),
        (["--device", "mps"], "--device: 'mps' must be cpu, cuda or cuda:N"),
        (["--device", "xla"], "--device: 'xla' must be cpu, cuda or cuda:N"),
        (["--device", "vulkan"], "--device: 'vulkan' must be cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees "),
        (["--budget", "24"], "budget='24': has no unit; write 24GiB, 24MiB or 24B"),
        (["--budget", "9" * 400], f"budget='{'9' * 40}': must be a number of bytes from 1 to 1024TiB"),
        (["--budget", "24GiB", "--preview", "b.png"], "--preview: its decode is not counted by --budget"),
        (["--tile", "3"], "--tile 3x3: at least 4x4 latent pixels, a quarter of the model's own 16x16"),
        (["--tile", "16x3"], "--tile 16x3: at least 4x4"),
        (["--negative-prompt", "ice \udcff"], "--negative-prompt: is not valid UTF-8"),
        (["--model", "earth", "--mask", "white.png", "--init-image", "white.png"], "earth takes 8 channels"),
        (["--mask", "hole.png", "--init-image", "white.png"], "--mask hole.png: has transparent pixels"),
        (["--init-image", "pipe.png"], "pipe.png: cannot be read: Is a device or a pipe"),
        (["--init-image", "/dev/zero"], "/dev/zero: cannot be read: Is a device or a pipe"),
        (["--init-image", "white.png", "--mask", "pipe.png"], "pipe.png: cannot be read: Is a device or a pipe"),
        (["--regions", "pipe.png"], "pipe.png: cannot be read: Is a device or a pipe"),
        (["--out", "pipe.png"], "pipe.png: is a device or a pipe"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_one_line(model: str, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe.png")
    Image.new("RGB", (64, 64), "white").save("white.png")
    Image.new("RGBA", (64, 64), (255, 255, 255, 0)).save("hole.png")
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


# ----------------------------------------------------------------------------- model folders

UNET = {"_class_name": "UNet2DConditionModel", "sample_size": 16, "in_channels": 4}
VAE = {"block_out_channels": [4, 8, 8, 8]}
SD = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "X"],
}


def folder(index: Any, unet: Any = UNET, vae: Any = VAE, role: str = "unet") -> str:
    for name, content in (("model_index.json", index), (f"{role}/config.json", unet), ("vae/config.json", vae)):
        path = Path("broken") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return "broken"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"index": SD | {"_class_name": "NoSuchPipeline"}}, "has no pipeline NoSuchPipeline, which its model_index"),
        ({"index": SD | {"_class_name": "Attention"}}, "has no pipeline Attention"),
        ({"index": SD | {"_class_name": ["own", "Pipe"]}}, "its pipeline is code of its own"),
        ({"index": "[1]"}, "there is no model_index.json"),
        ({"index": {"_class_name": "KandinskyPipeline", "unet": [], "movq": []}}, "no autoencoder (vae)"),
        ({"index": {"_class_name": "IFPipeline", "unet": []}}, "IFPipeline has no autoencoder (vae)"),
        ({"index": {"_class_name": "LDMTextToImagePipeline", "unet": [], "vqvae": []}}, "no autoencoder (vae)"),
        ({"index": SD, "unet": UNET | {"sample_size": None}}, "its UNet names no native size (sample_size)"),
        ({"index": SD, "unet": "{"}, "unet/config.json is not there or not JSON"),
        ({"index": SD, "vae": None}, "vae/config.json is not there or not JSON"),
        ({"index": SD, "unet": UNET | {"sample_size": "16"}}, "its configuration is damaged"),
        ({"index": SD | {"_class_name": "StableDiffusionAdapterPipeline"}}, "starts from an image; give --init-image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_folders_that_are_no_model(parts: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(folder(**parts)) == 2
    found = error(capsys)
    assert found.startswith("tiledcore: error: --model broken: ") and message in found


@pytest.mark.parametrize("option", ["--init-image", "--stages", "--mask"])
def test_a_pipeline_without_a_sibling(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"_class_name": "PixArtSigmaPipeline", "transformer": [], "vae": []}
    network = {"_class_name": "PixArtTransformer2DModel", "sample_size": 16, "patch_size": 2}
    Image.new("RGB", (64, 64), "white").save("white.png")
    start = [] if option == "--stages" else ["--init-image", "white.png"]
    more = ["--mask", "white.png"] if option == "--mask" else ["--stages", "auto"] if option == "--stages" else []
    assert generate(folder(index, network, role="transformer"), *start, *more) == 2
    assert f"{option}: diffusers has no pipeline for it that goes with PixArtSigmaPipeline" in error(capsys)


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


def test_classes_that_only_tile_mode_knows_are_not_refused() -> None:
    for pipeline, network in (
        ("ChromaPipeline", "ChromaTransformer2DModel"),
        ("Flux2Pipeline", "Flux2Transformer2DModel"),
    ):
        check_classes(Model("a", pipeline=pipeline, network=network), {"init_image": None})
    for pipeline in ("StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline"):
        with pytest.raises(CommandError, match="starts from an image; give --init-image"):
            check_classes(Model("a", pipeline=pipeline), {"init_image": None})

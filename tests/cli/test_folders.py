"""Folders that hold no model, or none that can do what was asked: one line says why, and no code of theirs is run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_command import error, generate
from tiny_transformers import build, tiny_pixart_sigma

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "NoSuchPipeline"}, "--model broken: cannot be opened: AttributeError: "),
        ("model_index.json", {"_class_name": "Attention"}, "module diffusers has no attribute Attention"),
        ("model_index.json", {"_class_name": ["own", "Pipe"]}, "needs code of its own, which is not run"),
        ("model_index.json", "[1]", "--model broken: cannot be opened: "),
        ("model_index.json", {"_class_name": "IFPipeline"}, "--model broken: cannot be opened: "),
        ("model_index.json", {"_class_name": "StableDiffusionImg2ImgPipeline"}, "starts from an image; give --init"),
        ("unet/config.json", {"sample_size": None}, "names no native size (sample_size=None): it cannot be tiled"),
        ("unet/config.json", "{", "--model broken: cannot be opened: "),
        ("vae/config.json", "", "--model broken: cannot be opened: "),
    ],
)
def test_folders_that_are_no_model(
    file: str, change: Any, message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, "broken")
    Path("broken/own.py").write_text("raise SystemExit('this code was run')")
    path = Path("broken", file)
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    assert generate("broken") == 2
    assert message in error(capsys)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--init-image", "white.png"], "image"),
        (["--init-image", "white.png", "--mask", "white.png"], "mask_image"),
        (["--stages", "auto"], "stages"),
    ],
)
def test_a_pipeline_without_a_sibling(options: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    build(tiny_pixart_sigma).save_pretrained("model")
    Image.new("RGB", (192, 160), "white").save("white.png")
    assert generate("model", *options) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"tiledcore: error: {name}: ") and "PixArtSigmaPipeline" in last and "diffusers" in last


def test_a_network_that_cannot_be_inpainted(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (256, 256), "white").save("white.png")
    assert generate("earth", "--init-image", "white.png", "--mask", "white.png", "--size", "256x256") == 2
    assert "should have either 4 or 9 input channels, not 16" in error(capsys)

"""The sizes that a model can make: one rule for all commands, checked before anything is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_command import error, fail

from tiledcore import TiledPipeline
from tiledcore.cli.generate import check
from tiledcore.cli.main import main, parser
from tiledcore.cli.model import default_dtype, unit_of
from tiledcore.tiles.families import FAMILIES

# Of each family's published models: the network's and the autoencoder's configuration, and the unit in px.
LEVELS = {"block_out_channels": [128, 256, 512, 512]}
UNITS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "UNet2DConditionModel": ({"sample_size": 64}, LEVELS, 8),
    "SD3Transformer2DModel": ({"patch_size": 2}, LEVELS, 16),
    "FluxTransformer2DModel": ({"patch_size": 1}, LEVELS, 16),
    "PixArtTransformer2DModel": ({"patch_size": 2}, LEVELS, 16),
    "SanaTransformer2DModel": ({"patch_size": 1}, {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}, 32),
    "ZImageTransformer2DModel": ({"all_patch_size": [2]}, LEVELS, 16),
    "QwenImageTransformer2DModel": ({"patch_size": 2}, {"temperal_downsample": [False, True, True]}, 16),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model.__name__)
def test_the_unit_of_every_family(family: Any, tmp_path: Path) -> None:
    config, vae, expected = UNITS[family.model.__name__]
    role = "unet" if "UNet" in family.model.__name__ else "transformer"
    for part, content in ((role, config | {"_class_name": family.model.__name__}), ("vae", vae)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(content))
    assert unit_of(str(tmp_path)) == expected
    factor = 32 if "encoder_block_out_channels" in vae else 8
    assert factor * family.patch(SimpleNamespace(config=SimpleNamespace(**config))) == expected


@pytest.mark.parametrize(
    ("model", "size", "nearest"),
    [
        ("earth-flux", "264x264", "multiple of 16 px, such as 256x256 or 272x272"),
        ("earth-flux", "8x8", "multiple of 16 px, such as 16x16 or 16x16"),
        ("earth-flux", "4096x4104", "multiple of 16 px, such as 4096x4096 or 4096x4112"),
        ("earth", "263x201", "multiple of 8 px, such as 256x200 or 264x208"),
    ],
)
def test_other_sizes_are_refused_with_the_nearest(
    model: str, size: str, nearest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TiledPipeline, "from_pretrained", fail(AssertionError("loaded")))
    for command in (["generate", "x", "--out", "a.png"], ["plan", "--budget", "1GiB"]):
        assert main([*command, "--model", model, "--size", size]) == 2
        message = error(capsys)
        assert f"--size {size}" in message and nearest in message


@pytest.mark.parametrize(("model", "size"), [("flux", "1032x1024"), ("sd3", "1024x1032"), ("sdxl", "1020x1024")])
def test_plan_knows_the_sizes_of_its_own_models(model: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", model, "--budget", "24GiB", "--size", size]) == 2
    assert f"--size {size}: each side must be a multiple of {8 if model == 'sdxl' else 16} px" in error(capsys)


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [("earth-flux", None, (256, 192)), ("earth", None, (256, 200)), ("earth-flux", "4x", (1040, 800))],
)
def test_the_size_of_an_init_image_is_rounded_down(
    model: str, size: str | None, expected: tuple[int, int], tmp_path: Path
) -> None:
    Image.new("RGB", (263, 201)).save(tmp_path / "start.png")
    given = ["generate", "x", "--model", model, "--out", str(tmp_path / "a.png")]
    given += ["--init-image", str(tmp_path / "start.png"), *(["--size", size] if size else [])]
    args = parser().parse_args(given)
    check(args)
    assert args.size == expected


def test_the_units_of_models_that_are_here_and_not() -> None:
    assert [unit_of(name) for name in ("earth", "earth-flux", "nobody/nothing", "./none")] == [8, 16, 8, 8]


@pytest.mark.parametrize(("bf16", "amx"), [(False, False), (True, False), (False, True)])
def test_a_cpu_that_computes_in_bfloat16_runs_in_it(monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert default_dtype("cpu") == ("bf16" if bf16 or amx else "fp32")
    assert default_dtype("cuda") == "fp16"

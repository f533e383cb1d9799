"""What a release holds: the wheel and the source archive, built as where there is no torch."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import tiledcore

ROOT = Path(__file__).resolve().parent.parent
BUILD = "from setuptools import build_meta as b; print(b.build_wheel('dist')); print(b.build_sdist('dist'))"
PARTS = ("tiledcore", "kernels", "csrc", "setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source archive of a copy of the project."""
    folder = tmp_path_factory.mktemp("release")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    (folder / "tests").mkdir()
    (folder / "tests/test_nothing.py").touch()
    env = os.environ | {"TILEDCORE_NO_NATIVE": "1"}
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, env=env, check=True, capture_output=True)
    (wheel,), (source,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, source


@pytest.mark.slow
def test_the_wheel_has_the_models_and_neither_tests_nor_training(archives: tuple[Path, Path]) -> None:
    wheel, _ = archives
    assert wheel.name == f"tiledcore-{tiledcore.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 60e6
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "training" in name or "test" in name or not name.startswith("tiledcore")]
    packages = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "tiledcore").rglob("*.py")}
    missing = packages - {str(Path(name).parent) for name in names} - {"tiledcore/models/training"}
    assert not missing, f"packages in pyproject.toml lacks {missing}"
    for model in ("earth", "earth_flux"):
        files = {p.relative_to(ROOT) for p in (ROOT / "tiledcore/models" / model).rglob("*") if p.is_file()}
        assert {str(path) for path in files} <= set(names)


@pytest.mark.slow
def test_the_source_archive_can_build_the_extension(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= names
    assert "constraints.txt" in names and not [name for name in names if name.startswith("tests")]

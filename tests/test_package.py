"""The installed package: what it is called, what it imports, and what it must not shadow."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import tiledcore

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_version_matches_metadata() -> None:
    assert tiledcore.__version__ == importlib.metadata.version("tiledcore")


def test_kernels_is_not_a_top_level_package(tmp_path: Path) -> None:
    """Hugging Face ships `kernels`; diffusers and transformers would mistake ours for it."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or ROOT not in Path(spec.origin or "").parents
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    assert str(ROOT / "kernels") not in run(code, tmp_path)
    # `python -m bench.NAME` has the root on sys.path until `bench` takes it off
    assert str(ROOT / "kernels") not in run(f"import bench; {code}", ROOT)


def test_kernels_folder_is_tiledcore_kernels(tmp_path: Path) -> None:
    origin = run("import tiledcore.kernels as k; print(k.__file__)", tmp_path)
    assert origin == str(ROOT / "kernels" / "__init__.py")


def test_import_is_light(tmp_path: Path) -> None:
    heavy = ["torch", "torch.utils.cpp_extension", "triton", "diffusers", "transformers"]
    code = f"import sys, tiledcore; print([m for m in {heavy} if m in sys.modules])"
    assert run(code, tmp_path) == "[]"


def test_public_names_resolve() -> None:
    assert set(tiledcore.__all__) <= set(dir(tiledcore))
    for name in tiledcore.__all__:
        assert getattr(tiledcore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tiledcore.nothing  # noqa: B018


def test_demo_command_is_registered() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="tiledcore")
    assert entry.value == "tiledcore.cli.main:main"

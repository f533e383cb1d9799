"""The CUDA source compiles for every supported GPU; nvcc needs none to do so."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_blend_tiles_compiles(tmp_path: Path) -> None:
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 86, 89, 90, 100, 120)]
    command = ["nvcc", "-c", CSRC / "blend_tiles.cu", "-o", tmp_path / "blend_tiles.o", "-O3"]
    flags = ["-std=c++17", "-t", "2", "-Xptxas", "-v", "-Werror", "all-warnings"]
    result = subprocess.run([*command, *flags, *archs], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    usage = [line for line in result.stderr.splitlines() if "bytes spill stores" in line]
    assert usage and all("0 bytes spill stores, 0 bytes spill loads" in line for line in usage)

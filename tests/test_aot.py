"""Every Triton variant that can be launched compiles for every supported GPU, without a GPU here.

Run as a script, this file compiles: pytest does so in a process of its own, because this one has
Triton's interpreter switched on, with which nothing is compiled.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may use


def jobs() -> list[tuple[str, int, int]]:
    """(module, place in its configurations, capability) of all there is to compile."""
    import tiledcore.kernels

    found = []
    for info in pkgutil.iter_modules(tiledcore.kernels.__path__):
        module = importlib.import_module(f"tiledcore.kernels.{info.name}")
        if hasattr(module, "aot_configurations"):
            count = len(list(module.aot_configurations()))
            found += [(info.name, i, cap) for cap in CAPABILITIES for i in range(count)]
    return found


def compile_one(job: tuple[str, int, int]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, i, capability = job
    module = importlib.import_module(f"tiledcore.kernels.{name}")
    kernel, signature, constants, warps = list(module.aot_configurations())[i]
    label = f"{name} sm_{capability} {signature} {constants}"
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    except Exception as error:
        return {"label": label, "error": f"{type(error).__name__}: {error}"}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        dump = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = dict(part.split(":") for part in dump.split() if part.startswith(("REG", "STACK", "LOCAL")))
    usage = {key: int(value) for key, value in usage.items()}
    shared = compiled.metadata.shared / 1024
    return {"label": label, "capability": capability, "shared": shared, "usage": usage}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_configuration_compiles(compiled: list[dict[str, Any]]) -> None:
    assert {job["label"].split()[0] for job in compiled} >= {"gather_tiles", "blend_tiles"}
    assert [job for job in compiled if "error" in job] == []


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    for job in compiled:
        assert job["usage"]["STACK"] == 0 and job["usage"]["LOCAL"] == 0, job


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    for job in compiled:
        assert job["shared"] <= SHARED_LIMIT[job["capability"]], job


if __name__ == "__main__":
    from multiprocessing import Pool

    with Pool(min(4, os.cpu_count() or 1)) as pool:
        print(json.dumps(pool.map(compile_one, jobs(), chunksize=1)))

"""Compile Triton kernels for GPUs that are not here; run by test_aot.py with the interpreter off.

``compile_kernels.py gate`` compiles a few variants that production uses, ``compile_kernels.py all`` everything that
can be launched. Prints one JSON row a variant, as bench/resources.py makes them.
"""

import json
import os
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing import Pool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Job = tuple[str, int, int]  # kernel file, place in its list of configurations, compute capability


def _resources() -> Any:
    """bench/resources.py by its path: the root must not be on sys.path (see tests/conftest.py)."""
    spec = spec_from_file_location("resources", ROOT / "bench" / "resources.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["resources"] = module  # processes of the pool find it there
    spec.loader.exec_module(module)
    return module


def _first(jobs: list[Job], name: str, wanted: dict[str, Any], capability: int, tma: bool = False) -> Job:
    """The first variant of a kernel with these constants on 16-bit elements, with or without tensor descriptors."""
    configurations = list(import_module(f"tiledcore.kernels.{name}").aot_configurations())
    for job in (job for job in jobs if job[0] == name and job[2] == capability):
        _, signature, constants, *_ = configurations[job[1]]
        half = any("16" in kind for kind in signature.values())
        described = any(kind.startswith("tensordesc") for kind in signature.values())
        if half and described == tma and wanted.items() <= constants.items():
            return job
    raise LookupError(f"{name} has no variant with {wanted} for sm_{capability}")


def gate(jobs: list[Job]) -> list[Job]:
    """SDXL's and FLUX's attention on a 4090 and an H100, and one variant of every other kernel."""
    name = "neighbor_attention"
    chosen = [_first(jobs, name, {"D": D}, capability, capability == 90) for D in (64, 128) for capability in (89, 90)]
    others: dict[str, dict[str, Any]] = {"gather_tiles": {}, "blend_tiles": {"WINDOW": "ramp"}}
    others |= {"fused_step": {"WINDOW": "ramp", "S": 2}, "group_norm_silu": {"SILU": True}}
    return chosen + [_first(jobs, other, constants, 90) for other, constants in others.items()]


def main(which: str) -> None:
    resources = _resources()
    jobs = resources.jobs()
    with Pool(min(4, os.cpu_count() or 1)) as pool:
        print(json.dumps(pool.map(resources.compile_one, gate(jobs) if which == "gate" else jobs, chunksize=1)))


if __name__ == "__main__":
    main(sys.argv[1])

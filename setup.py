"""Adds the optional C++ extension to what pyproject.toml describes.

The extension only makes ops faster on a CPU. No torch to compile against, no compiler, or a failing one: the
install succeeds without it. TILEDCORE_NO_NATIVE=1 leaves it out on purpose.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.sdist import sdist

# One binary for every torch from this version on (the stable ABI's parallel_for came with it).
STABLE_ABI = "0x020a000000000000"  # 2.10
OPS = ("gather_tiles", "blend_tiles", "fused_step", "group_norm_silu", "neighbor_attention")


def torch_folder() -> Path | None:
    """The folder of the installed torch, found without the seconds that importing it takes."""
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def extension() -> Extension | None:
    torch = torch_folder()
    if torch is None or sys.platform != "linux" or os.environ.get("TILEDCORE_NO_NATIVE") == "1":
        return None
    return Extension(
        "tiledcore._C",
        sources=[f"csrc/{op}.cpp" for op in OPS],
        depends=["csrc/common.h", "csrc/blend_axis.h", "csrc/neighbor_attention.h"],
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        # No -march: the binary must run elsewhere (see TILEDCORE_CLONES). Without trapping maths, a
        # conversion between dtypes becomes selects, and so vectors.
        extra_compile_args=[
            *("-std=c++17", "-O3", "-g0", "-Wall", "-fvisibility=hidden"),
            *("-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno"),
        ],
        optional=True,
        py_limited_api=True,
    )


class Sources(sdist):
    """The source archive: always with the C++ files, also where no torch is there to compile them, and without tests.

    Half of the tests would not run from it: their helpers and the benchmarks are not packages.
    """

    def make_distribution(self) -> None:
        self.filelist.graft("csrc")
        self.filelist.include("constraints.txt")
        self.filelist.prune("tests")
        super().make_distribution()


native = extension()
setup(ext_modules=[native] if native else [], cmdclass={"sdist": Sources})

"""Adds the optional C++/CUDA extension to what pyproject.toml describes.

The extension only makes ops faster. No torch to compile against, no compiler, or a failing one: the
install succeeds without it. TILEDCORE_NO_NATIVE=1 leaves it out on purpose.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# One binary for every torch from this version on (the stable ABI's parallel_for came with it).
STABLE_ABI = "0x020a000000000000"  # 2.10
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")


def torch_folder() -> Path | None:
    """The folder of the installed torch, found without the seconds that importing it takes."""
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def nvcc() -> Path | None:
    """The CUDA compiler, from CUDA_HOME or PATH."""
    home = os.environ.get("CUDA_HOME")
    found = Path(home) / "bin" / "nvcc" if home else shutil.which("nvcc")
    return Path(found) if found and Path(found).exists() else None


def cuda_home(compiler: Path) -> Path | None:
    """The toolkit's root, as nvcc itself reports it: nvcc on PATH may be a wrapper elsewhere."""
    dry = subprocess.run([compiler, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    match = re.search(r"#\$ TOP=(.+)", dry.stderr)
    return Path(match[1].strip()).resolve() if match else None


class BuildNative(build_ext):
    """build_ext that compiles .cu files with nvcc, and that never fails the install."""

    def build_extension(self, ext: Extension) -> None:
        kernels = [source for source in ext.sources if source.endswith(".cu")]
        ext.sources = [source for source in ext.sources if not source.endswith(".cu")]
        for source in kernels:
            target = Path(self.build_temp) / (source + ".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
            # PTX of the newest as well, for cards that come after this list.
            archs.append(f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
            flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", *archs]
            self.spawn([str(nvcc()), "-c", source, "-o", str(target), *flags])
            ext.extra_objects.append(str(target))
        super().build_extension(ext)


def extension() -> Extension | None:
    torch = torch_folder()
    if torch is None or sys.platform != "linux" or os.environ.get("TILEDCORE_NO_NATIVE") == "1":
        return None
    sources = ["csrc/gather_tiles.cpp", "csrc/blend_tiles.cpp", "csrc/fused_step.cpp", "csrc/neighbor_attention.cpp"]
    sources.append("csrc/group_norm_silu.cpp")
    macros: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", STABLE_ABI)]
    include = [str(torch / "include")]
    libraries, folders = ["torch_cpu"], [str(torch / "lib")]
    compiler = nvcc()
    home = cuda_home(compiler) if compiler else None
    # torch/version.py says `cuda: Optional[str] = '13.0'`, or None in a CPU build.
    has_cuda = re.search(r"^cuda\b.*=\s*'", (torch / "version.py").read_text(), re.MULTILINE)
    if has_cuda and home:
        sources += ["csrc/blend_tiles_cuda.cpp", "csrc/blend_tiles.cu"]
        macros.append(("USE_CUDA", None))  # torch's headers then declare the current stream
        include.append(str(home / "include"))
        libraries += ["torch_cuda", "cudart_static", "dl", "rt", "pthread"]
        folders += [str(home / "lib64"), str(home / "lib")]
    return Extension(
        "tiledcore._C",
        sources=sources,
        depends=["csrc/common.h", "csrc/blend_axis.h", "csrc/blend_tiles.h", "csrc/neighbor_attention.h"],
        include_dirs=include,
        library_dirs=folders,
        libraries=libraries,
        define_macros=macros,
        # No -march: the binary must run elsewhere (see TILEDCORE_CLONES). Without trapping maths, a
        # conversion between dtypes becomes selects, and so vectors.
        extra_compile_args=[
            *("-std=c++17", "-O3", "-g0", "-Wall", "-fvisibility=hidden"),
            *("-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno"),
        ],
        optional=True,
        py_limited_api=True,
    )


native = extension()
setup(ext_modules=[native] if native else [], cmdclass={"build_ext": BuildNative})

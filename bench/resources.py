"""Compile the Triton kernels for GPUs that are not here, and say what the compiled code needs.

    python -m bench.resources                         writes bench/results/kernel_resources.md
    python bench/resources.py gate|production|all     prints JSON, one row a variant

The table has the variants that production launches, by the installed Triton and by the oldest admitted one, which must
be in an ignored folder: ``pip install --no-deps --target .whl/triton-3.6.0 triton==3.6.0``. Variants are compiled in a
process of their own, because Triton's interpreter, which the tests use, must be off. See tests/ops/test_aot.py.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from multiprocessing import Pool
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 86, 89, 90, 100, 120)
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")  # Matrix instructions of sm_80, 86, 89 and 120; of sm_90; of sm_100
ROOT = Path(__file__).resolve().parents[1]
OLDEST = ROOT / ".whl" / "triton-3.6.0"
TABLE = ROOT / "bench" / "results" / "kernel_resources.md"
HEADS = ("40", "64", "80", "128", "160")  # SD 1.5 has 40, 80 and 160; SDXL and SD 3.5 64; FLUX and Qwen-Image 128
ELEMENTS = {"fp16", "bf16", "i16"}
OTHERS = {
    "blend_tiles": {"WINDOW": "ramp"},
    "fused_step": {"WINDOW": "ramp", "G": "2"},
    "group_norm_silu": {"SILU": "True"},
}
ABOUT = """# Compiled code of the production variants

Written by `python -m bench.resources`: compiled by Triton {}, not run. Registers and
spills are a thread's, shared memory is a block's. Instructions are counted in the code, a loop's body once.

"""

Job = tuple[str, int, int]  # kernel file, place in its list of configurations, compute capability
Row = dict[str, Any]


def jobs(which: str) -> list[Job]:
    """``"all"`` variants, those that ``"production"`` launches, or of these a fast test's ``"gate"``."""
    import tiledcore.kernels

    found = []
    for info in pkgutil.iter_modules(tiledcore.kernels.__path__):
        module = importlib.import_module(f"tiledcore.kernels.{info.name}")
        if hasattr(module, "aot_configurations"):
            for i, (_, _, _, _, *options) in enumerate(module.aot_configurations()):
                found += [(info.name, i, cap) for cap in dict(*options).get("capabilities", CAPABILITIES)]
    return [job for job in found if which == "all" or _chosen(described(job)[0], which == "gate")]


def described(job: Job) -> tuple[Row, Any]:
    """What is known of a variant before it is compiled; and its configuration."""
    name, i, capability = job
    configuration = list(importlib.import_module(f"tiledcore.kernels.{name}").aot_configurations())[i]
    _, signature, constants, warps, *rest = configuration
    elements = list(dict.fromkeys(re.sub(r"^\*|^tensordesc<(\w+).*", r"\1", kind) for kind in signature.values()))
    row: Row = {"label": f"{name} sm_{capability} {'/'.join(elements)} {constants}", "kernel": name}
    row |= {"capability": capability, "elements": elements, "warps": warps, "stages": dict(*rest).get("num_stages")}
    row |= {"constants": {key: str(value) for key, value in constants.items()}}
    return row | {"TMA": any(kind.startswith("tensordesc") for kind in signature.values())}, configuration


def _chosen(row: Row, gate: bool) -> bool:
    """Whether a pipeline in half precision launches a variant on contiguous tensors; whether it is in the gate."""
    constants, attention = row["constants"], row["kernel"] == "neighbor_attention"
    if row["elements"][0] not in ELEMENTS or not OTHERS.get(row["kernel"], {}).items() <= constants.items():
        return False
    if not attention:
        return not gate or row["capability"] == 90
    by_descriptors = row["capability"] in (90, 100) and constants["D"] in ("64", "128")
    if constants["D"] not in HEADS or row["TMA"] != by_descriptors:
        return False
    return not gate or (constants["D"] in ("64", "128") and row["capability"] in (89, 90) and "fp16" in row["elements"])


def compile_one(job: Job) -> Row:
    """Compile one variant; say what it uses, or which error there was.

    Registers and spills (what ``cuobjdump`` calls STACK and LOCAL, in bytes) are a thread's, shared memory (KiB) is a
    block's. Instructions are counted in the code, the body of each loop once.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    row, (kernel, signature, constants, warps, *rest) = described(job)
    options: dict[str, Any] = dict(*rest)
    attributes = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in options.get("divisible", ())}
    settings = {"num_warps": warps} | {key: value for key, value in options.items() if key in ("num_stages", "maxnreg")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", job[2], 32), options=settings)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}", "triton": triton.__version__}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    fields = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_.]+)", sass, re.MULTILINE)
    row |= {"registers": fields["REG"], "spills": fields["STACK"] + fields["LOCAL"]}
    row |= {"shared": compiled.metadata.shared / 1024, "triton": triton.__version__, "instructions": len(operations)}
    row |= {"TMA loads": sum(o.startswith("UTMALDG") for o in operations)}
    return row | {"matrix": sum(o.startswith(MATRIX) for o in operations)}


def rows_of(which: str, triton: Path | None = None) -> list[Row]:
    """Variants compiled in a process of its own, by the installed Triton or by the one in a folder.

    Raises:
        RuntimeError: that process failed.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(triton), environment.get("PYTHONPATH")]))
    command = [sys.executable, __file__, which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    rows: list[Row] = json.loads(done.stdout)
    return rows


def table(rows: list[Row]) -> str:
    """Rows as Markdown. Two versions' figures are ``old / new`` where they differ; equal lines are one."""
    from bench.measure import markdown  # as a script, this file finds no package

    variants: dict[tuple[str, ...], list[list[str]]] = {}
    name: tuple[str, ...]
    for row in sorted(rows, key=lambda row: (row["kernel"], row["capability"], row["triton"])):
        name = (row["kernel"], _variant(row), row["elements"][0], str(row["capability"]))
        variants.setdefault(name, []).append(figures(row))
    lines: list[tuple[str, ...]] = []
    for name, versions in variants.items():
        lines.append((*name, *(" / ".join(dict.fromkeys(column)) for column in zip(*versions, strict=True))))
    for column in (2, 3):  # lines that differ only in their elements become one, then those that differ in sm
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for line in lines:
            groups.setdefault((line[:column], line[column + 1 :]), []).append(line[column])
        lines = [(*before, ", ".join(values), *after) for (before, after), values in groups.items()]
    head = ["kernel", "variant", "elements", "sm", "registers", "shared, KiB", "spills, B", "instructions", "matrix"]
    return ABOUT.format(" / ".join(sorted({row["triton"] for row in rows}))) + (
        markdown([*head, "TMA loads", "instructions per matrix instruction"], lines) + "\n"
    )


def figures(row: Row) -> list[str]:
    """What the compiled code needs."""
    counts = [f"{row[name]:.0f}" for name in ("registers", "shared", "spills", "instructions", "matrix", "TMA loads")]
    return [*counts, f"{row['instructions'] / row['matrix']:.1f}" if row["matrix"] else "–"]


def _variant(row: Row) -> str:
    """Constants and options, in short: ``D=64 QY=8``. Constants that follow from others are left out."""
    shown = ("D", "QY", "QX", "KY", "KX", "S", "G", "WINDOW", "SILU", "BLOCK", "BLOCK_H", "BLOCK_W", "PLANES")
    constants = [f"{key}={row['constants'][key]}" for key in shown if key in row["constants"]]
    stages = [f"{row['stages']} stages"] if row["stages"] else []
    return " ".join([*constants, f"{row['warps']} warps", *stages])


def main() -> None:
    if len(sys.argv) > 1:
        os.environ.pop("TRITON_INTERPRET", None)
        with Pool(min(4, os.cpu_count() or 1)) as pool:
            print(json.dumps(pool.map(compile_one, jobs(sys.argv[1]), chunksize=1)))
        return
    if not OLDEST.exists():
        raise SystemExit(f"{OLDEST}: must hold Triton 3.6.0; see the head of this file")
    TABLE.write_text(table(rows_of("production", OLDEST) + rows_of("production")))


if __name__ == "__main__":
    main()

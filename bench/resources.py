"""What every Triton variant that can be launched costs on every supported GPU, found without a GPU.

``python -m bench.resources --out FILE.md`` compiles the ahead-of-time table of every kernel, and
writes registers, shared memory, spills and the mix of machine instructions. Spills are what
``cuobjdump`` calls STACK and LOCAL, in bytes a thread; shared memory is a block's. tests/test_aot.py
runs this file with ``--json`` and holds the numbers against what each GPU has.

Run as a script of its own: Triton's interpreter must be off, and it is on in the tests' process.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

CAPABILITIES = (80, 86, 89, 90, 100, 120)

# Instructions by what they keep busy. Static counts: a loop's body counts once.
MIX = {
    "matrix": ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "OMMA", "QMMA"),
    "TMA": ("UTMALDG",),
    "async copy": ("LDGSTS",),
    "load": ("LDG",),
    "shared": ("LDS", "LDSM", "STS", "STSM", "LDTM", "STTM", "LDT", "STT"),
    "MUFU": ("MUFU",),
    "FP32": ("FFMA", "FMUL", "FADD", "FMNMX", "FMNMX3", "FSEL", "FSETP", "FFMA2", "FMUL2", "FADD2"),
    "convert": ("F2FP", "I2F", "I2FP", "F2I", "F2F"),
}
Job = tuple[str, int, int]


def jobs(only: str = "") -> list[Job]:
    """(module, place in its configurations, capability) of all there is to compile."""
    import tiledcore.kernels

    found = []
    for info in pkgutil.iter_modules(tiledcore.kernels.__path__):
        if only not in info.name:
            continue
        module = importlib.import_module(f"tiledcore.kernels.{info.name}")
        if hasattr(module, "aot_configurations"):
            for i, (*_, options) in enumerate(map(_full, module.aot_configurations())):
                found += [(info.name, i, cap) for cap in options.get("capabilities", CAPABILITIES)]
    return found


def _full(configuration: tuple[Any, ...]) -> tuple[Any, ...]:
    """(kernel, signature, constants, warps, options); the options may be left out."""
    return configuration if len(configuration) == 5 else (*configuration, {})


def compile_one(job: Job, sass: bool = False) -> dict[str, Any]:
    """Compile one variant; say what it uses, or which error there was."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, i, capability = job
    module = importlib.import_module(f"tiledcore.kernels.{name}")
    kernel, signature, constants, warps, options = _full(list(module.aot_configurations())[i])
    elements = dict.fromkeys(re.sub(r"^\*|^tensordesc<(\w+).*", r"\1", kind) for kind in signature.values())
    label = f"{name} sm_{capability} {'/'.join(elements)} {constants}"
    row = {"label": label, "kernel": kernel.__name__, "capability": capability, "warps": warps}
    row |= {"elements": list(elements), "constants": {key: str(value) for key, value in constants.items()}}
    row |= {
        "stages": options.get("num_stages"),
        "TMA": any(kind.startswith("tensordesc") for kind in signature.values()),
    }
    attributes = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in options.get("divisible", ())}
    settings = {"num_warps": warps} | {key: value for key, value in options.items() if key in ("num_stages", "maxnreg")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _dump(tool, "--dump-resource-usage", cubin)
        code = _dump(tool, "-sass", cubin) if sass else ""
    fields = dict(part.split(":") for part in usage.split() if part.startswith(("REG", "STACK", "LOCAL")))
    row |= {"usage": {key: int(value) for key, value in fields.items()}, "shared": compiled.metadata.shared / 1024}
    return row | {"mix": _mix(code)}


def _dump(tool: Path, option: str, cubin: Path) -> str:
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _mix(code: str) -> dict[str, int]:
    names = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", code, re.MULTILINE))
    return {kind: sum(names[name] for name in group) for kind, group in MIX.items()} | {"all": sum(names.values())}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, one a variant and GPU."""
    import triton

    columns = ["registers", "shared KiB", "spills B", *MIX, "all"]
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Written by `python -m bench.resources`, Triton {triton.__version__}; compiled, not run. Registers and spills",
        "are a thread's, shared memory is a block's; instructions are counted in the code, each loop's body once.",
        "",
        f"| kernel | variant | warps, stages | sm | {' | '.join(columns)} |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for row in sorted(rows, key=lambda row: (row["kernel"], row["capability"])):
        start = f"| {row['kernel']} | {_variant(row)} | {row['warps']}, {row['stages'] or '–'} | {row['capability']} "
        if "error" in row:
            lines.append(f"{start}| {row['error'].splitlines()[0]} |")
            continue
        usage, mix = row["usage"], row["mix"]
        cells = [usage["REG"], f"{row['shared']:.0f}", usage["STACK"] + usage["LOCAL"]]
        lines.append(f"{start}| {' | '.join(str(cell) for cell in [*cells, *(mix[key] for key in [*MIX, 'all'])])} |")
    return "\n".join(lines) + "\n"


def _variant(row: dict[str, Any]) -> str:
    """Element type and constants, in short: ``fp16 D=64 Q 8×16 K 8×8``."""
    constants = dict(row["constants"])
    words = [e for e in row["elements"] if e in ("fp16", "bf16", "fp32", "fp64", "i8", "i16", "i64")][:1]
    for name, keys in {"Q": ("QY", "QX"), "K": ("KY", "KX")}.items():
        if keys[0] in constants:
            constants[name] = "×".join(constants.pop(key) for key in keys)
    # What follows from the others, and what every variant of a kernel has alike.
    hidden = ("D0", "D1", "K0", "K1", "VECTOR", "COMPUTE", "PRECISION", "k_patches", "v_patches", "SCAN")
    words += [f"{key}={value}" for key, value in constants.items() if key not in hidden]
    return " ".join([*words, *(["TMA"] if row["TMA"] else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, without the instruction mix")
    parser.add_argument("--only", default="", help="only kernels in files whose name contains this")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    run = partial(compile_one, sass=not arguments.json)
    with Pool(arguments.processes) as pool:
        rows = pool.map(run, jobs(arguments.only), chunksize=1)
    if arguments.json:
        print(json.dumps(rows))
        return
    if arguments.out:
        arguments.out.write_text(table(rows))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()

"""Compile every Triton kernel for every supported GPU, without a GPU, and list what each variant needs.

    python -m bench.resources --out FILE.md

Registers and spills are for a thread, shared memory is for a block. Spills are what ``cuobjdump`` calls STACK and
LOCAL, in bytes. tests/test_aot.py runs this file with ``--json`` and compares the numbers with the limits of each GPU.

It is a process of its own because Triton's interpreter, which the tests use, must be off.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from multiprocessing import Pool
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

CAPABILITIES = (80, 86, 89, 90, 100, 120)

MATRIX = ("HMMA", "HGMMA", "UTCHMMA")  # Matrix instructions of sm_80, 86, 89 and 120; of sm_90; of sm_100

Job = tuple[str, int, int]


def jobs() -> list[Job]:
    """(module, place in its configurations, capability) of all there is to compile."""
    import tiledcore.kernels

    found = []
    for info in pkgutil.iter_modules(tiledcore.kernels.__path__):
        module = importlib.import_module(f"tiledcore.kernels.{info.name}")
        if hasattr(module, "aot_configurations"):
            for i, (_, _, _, _, *options) in enumerate(module.aot_configurations()):
                found += [(info.name, i, cap) for cap in dict(*options).get("capabilities", CAPABILITIES)]
    return found


def compile_one(job: Job) -> dict[str, Any]:
    """Compile one variant; say what it uses, or which error there was."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, i, capability = job
    module = importlib.import_module(f"tiledcore.kernels.{name}")
    kernel, signature, constants, warps, *rest = list(module.aot_configurations())[i]
    options: dict[str, Any] = dict(*rest)
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
        usage, sass = (
            subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    fields = dict(part.split(":") for part in usage.split() if part.startswith(("REG", "STACK", "LOCAL")))
    usage_of = {key: int(value) for key, value in fields.items()}
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_.]+)", sass, re.MULTILINE)
    row |= {"instructions": len(operations), "matrix": sum(o.startswith(MATRIX) for o in operations)}
    row |= {"TMA loads": sum(o.startswith("UTMALDG") for o in operations), "triton": triton.__version__}
    return row | {"usage": usage_of, "shared": compiled.metadata.shared / 1024}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, one for each variant and GPU."""
    import triton

    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Written by `python -m bench.resources`, Triton {triton.__version__}; compiled, not run.",
        "",
        "| kernel | variant | warps, stages | sm | registers | shared KiB | spills B | instructions | matrix | TMA |",
        "|---" * 10 + "|",
    ]
    for row in sorted(rows, key=lambda row: (row["kernel"], row["capability"])):
        cells = [row["kernel"], _variant(row), f"{row['warps']}, {row['stages'] or '–'}", row["capability"]]
        if "error" in row:
            cells.append(row["error"].splitlines()[0])
        else:
            usage = row["usage"]
            cells += [usage["REG"], f"{row['shared']:.0f}", usage["STACK"] + usage["LOCAL"]]
            cells += [row["instructions"], row["matrix"], row["TMA loads"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _variant(row: dict[str, Any]) -> str:
    """Element type and constants, in short: ``fp16 D=64 QY=8``. Constants that follow from others are left out."""
    hidden = ("D0", "D1", "K0", "K1", "VECTOR", "COMPUTE", "PRECISION", "k_patches", "v_patches", "SCAN")
    constants = [f"{key}={value}" for key, value in row["constants"].items() if key not in hidden]
    return " ".join([*row["elements"][:1], *constants, *(["TMA"] if row["TMA"] else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args()
    with Pool(min(4, os.cpu_count() or 1)) as pool:
        rows = pool.map(compile_one, jobs(), chunksize=1)
    if arguments.json:
        print(json.dumps(rows))
        return
    if arguments.out:
        arguments.out.write_text(table(rows))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()

"""All that needs a GPU, in one call of less than ten minutes: python -m bench.gpu_suite FOLDER [--dry-run].

Each part (bench/gpu_parts.py) runs in a process of its own, which is killed at its limit. It appends its rows to
gpu_suite.jsonl as they come, so a killed part leaves what it has measured. At the end the table is written to
gpu_suite.md and printed; what the parts print is in gpu_suite.log. No network is needed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark.utils.common import select_unit

from bench.measure import markdown

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"start": 40, "ops": 90, "attention": 100, "blend": 50, "graph": 70, "sdxl": 170, "vae": 50}
"""Part -> seconds. 570 in all; the rest of ten minutes is for starting and copying."""
PREDICTED = {
    ("neighbor_attention: SDXL, first level with attention", "triton"): "7–9 ms",
    ("neighbor_attention: FLUX", "triton"): "11–13 ms",
    ("blend_tiles: 25 tiles of 128x128x4 on 512x512", "triton"): "20–30 µs",
    ("fused_step: DPM++ 2M, 25 tiles of 128x128x4, guidance, on 512x512", "ramp"): "20–30 µs",
    ("SDXL 4096²", "tiles"): "1 s a step of 25 tiles",
}
"""(start of the case, way) -> what was calculated for an H100, fp16, before anything had run (docs/gpu.md)."""

Row = dict[str, Any]


def run_part(name: str, command: list[str], limit: float, rows: Path, log: Path) -> Row:
    """Run one part until it ends or its limit, in seconds, is over. The row about it is also appended to ``rows``."""
    begin = time.monotonic()
    with log.open("a") as target:
        target.write(f"\n=== {name}\n")
        target.flush()
        group = {"stdout": target, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, **group)  # type: ignore[call-overload]
        try:
            status = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "killed at its limit"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with those that it started, which have its group
            process.wait()
    row = {"part": name, "status": status, "took": round(time.monotonic() - begin, 1), "limit": limit}
    with rows.open("a") as target:
        target.write(f"\n{json.dumps(row)}\n")  # a killed part may have left half a line
    return row


def read(path: Path) -> list[Row]:
    """The rows; the last line of a killed part may be incomplete."""
    found = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def predicted(row: Row) -> str:
    known = (text for (case, way), text in PREDICTED.items() if row["case"].startswith(case) and row["name"] == way)
    return next(known, "–") if row.get("dtype") != "bfloat16" else "–"


def cells(row: Row) -> Iterator[str]:
    """Case, way, dtype, figure, prediction, error, share of the ceiling, memory."""
    yield from (row["case"], row["name"], row.get("dtype", ""))
    if "seconds" in row:
        unit, scale = select_unit(row["seconds"])
        yield f"{row['seconds'] / scale:.4g} {unit.replace('us', 'µs')}"
    else:
        yield f"**wrong**: {row['wrong']}" if "wrong" in row else row.get("text") or f"not run: {row.get('not_run')}"
    yield predicted(row)
    yield f"{row['error']:.1e}" if "error" in row else "–"
    yield f"{row['of_ceiling']:.0%}" if row.get("of_ceiling") else "–"
    yield row.get("memory") or (f"+{row['peak_bytes'] / 2**20:.0f} MiB" if row.get("peak_bytes") else "–")


def page(rows: list[Row], dry: bool) -> str:
    """The page: first how the parts ended, then their rows."""
    parts, figures = [row for row in rows if "status" in row], [row for row in rows if "case" in row]
    wrong = sum("wrong" in row for row in figures)
    lines = ["# GPU suite", ""]
    lines += ["**Dry run on a CPU: the parts run, but no figure here is of a GPU.**", ""] * dry
    lines += [f"{len(figures)} rows, **{wrong} wrong**. Predictions: for an H100, from before anything had run.", ""]
    head = ["part", "status", "s", "limit"]
    lines += [markdown(head, ([row["part"], row["status"], f"{row['took']}", f"{row['limit']}"] for row in parts))]
    head = ["case", "way", "dtype", "figure", "predicted", "error", "of the ceiling", "memory"]
    for part in dict.fromkeys(row["part"] for row in figures):
        lines += ["", f"## {part}", "", markdown(head, (cells(row) for row in figures if row["part"] == part))]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for gpu_suite.jsonl, gpu_suite.md and gpu_suite.log")
    parser.add_argument("--dry-run", action="store_true", help="the same code on small shapes on a CPU")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), help="default: all")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: only --dry-run works here")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows, log = out / "gpu_suite.jsonl", out / "gpu_suite.log"
    for path in (rows, log):
        path.write_text("")
    for name in args.parts:
        command = ["-m", "bench.gpu_parts", name, str(rows), *["--dry-run"] * args.dry_run]
        row = run_part(name, command, LIMITS[name], rows, log)
        print(f"{name}: {row['status']} in {row['took']} s", flush=True)
        found = read(rows)
        (out / "gpu_suite.md").write_text(page(found, args.dry_run))
    print((out / "gpu_suite.md").read_text())
    return int(any(row.get("status") == "failed" or "wrong" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())

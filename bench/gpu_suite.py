"""All that needs a GPU, with a limit of time for each step: tests of the kernels first, then all timings.

Run by bench/gpu_suite.sh. A step that fails or runs out of time does not stop the others, and results are written after
each step, because a GPU may be at hand only once and for a short time. The page says first whether the tests passed.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import suite

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 520.0
"""Seconds for all steps together: under 9 minutes."""
SHORTEST = 5.0
"""Seconds. With less time left a step is not started."""
DRY_LIMIT = 600.0
"""Seconds for each step of a dry run."""
TESTS = ("gather_tiles", "blend_tiles", "fused_step", "neighbor_attention", "neighbor_attention_triton", "graph")


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    """After the interpreter."""
    limit: float
    """Seconds."""
    result: str | None = None
    """File that it writes into the folder."""


def steps(out: Path, dry: bool) -> list[Step]:
    """The real steps, or small ones of the same kind for a CPU."""
    tests = ["-P", "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    tests += [str(path) for name in TESTS for path in sorted((ROOT / "tests").rglob(f"test_{name}.py"))]

    def module(name: str, *options: str, result: str) -> list[str]:
        return ["-m", f"bench{name}", *options, "--json", str(out / result)]

    if dry:
        run = ["run", "gather_tiles", "--quick", "--rounds", "2", "--device", "cpu"]
        tests.append("--collect-only")
    else:
        run = ["run", "--dtype", "float16", "--seconds", "2"]
    found = [
        Step("tests", tests, 200),
        Step("suite", module("", *run, result="suite.json"), 200, "suite.json"),
    ]
    if not dry:
        brief = ["run", "--quick", "--dtype", "bfloat16"]
        found.insert(2, Step("suite_bf16", module("", *brief, result="suite_bf16.json"), 60, "suite_bf16.json"))
    return found


def run(step: Step, remaining: float, out: Path) -> dict[str, Any]:
    """Run it. Gives its status (``passed``, ``failed`` or ``out of time``), seconds, and the end of its output."""
    limit, begin = min(step.limit, remaining), time.monotonic()
    about = {"name": step.name, "command": ["python", *step.command]}
    if limit < SHORTEST:
        return about | {"status": "out of time", "seconds": 0.0, "tail": "not started"}
    log = out / f"{step.name}.log"
    with log.open("w") as target:
        command, to = [sys.executable, *step.command], {"stdout": target, "stderr": subprocess.STDOUT}
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=limit, **to)  # type: ignore[call-overload]
            status = "passed" if done.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    result = about | {"status": status, "seconds": round(time.monotonic() - begin, 1), "tail": tail}
    path = out / step.result if step.result else None
    return result | ({"data": json.loads(path.read_text())} if path and path.exists() else {})


def markdown(done: list[dict[str, Any]], dry: bool) -> str:
    tests = next(step for step in done if step["name"] == "tests")
    lines = ["# GPU suite", ""]
    if dry:
        lines += ["**Dry run on a CPU: the steps run, but no figure here is of a GPU.**", ""]
    lines += [f"Tests of the kernels: **{tests['status']}**.", "", "| step | status | s |", "|---|---|---|"]
    lines += [f"| {step['name']} | {step['status']} | {step['seconds']} |" for step in done]
    for step in done:
        data = step.get("data")
        if step["status"] != "passed":
            lines += ["", f"## {step['name']}: {step['status']}", "", "```", step["tail"], "```"]
        if data is None:
            continue
        lines += ["", f"## {step['name']}", ""]
        lines.append(suite.markdown(data))
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_suite.sh", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for gpu_suite.json and gpu_suite.md")
    parser.add_argument("--dry-run", action="store_true", help="small steps on a CPU, to see that all of them run")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: only --dry-run works here")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    begin, done = time.monotonic(), []
    for step in steps(out, args.dry_run):
        if step.result:
            (out / step.result).unlink(missing_ok=True)  # of an earlier run
        remaining = DRY_LIMIT if args.dry_run else LIMIT - (time.monotonic() - begin)
        done.append(run(replace(step, limit=DRY_LIMIT) if args.dry_run else step, remaining, out))
        print(f"{step.name}: {done[-1]['status']} in {done[-1]['seconds']} s", flush=True)
        whole = {"dry_run": args.dry_run, "seconds": round(time.monotonic() - begin, 1), "steps": done}
        (out / "gpu_suite.json").write_text(json.dumps(whole, indent=1) + "\n")
        (out / "gpu_suite.md").write_text(markdown(done, args.dry_run))
    return int(any(step["status"] != "passed" for step in done))


if __name__ == "__main__":
    sys.exit(main())

"""What bench/gpu_suite.sh runs: tests of the kernels on the GPU, then every timing, each with a limit of its own.

A step that fails or runs out of time is told and the rest goes on, because a GPU may be at hand only once; the suite
itself times nothing whose result is wrong. The page says at its head whether the tests passed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import peers_table, scaling, suite

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 520.0
"""Seconds for all steps, so that 9 minutes hold."""
DRY_LIMIT = 600.0
"""For each step of a dry run."""
TESTS = (
    "test_gather_tiles",
    "test_blend_tiles",
    "test_fused_step",
    "test_neighbor_attention",
    "test_neighbor_attention_triton",
    "test_csrc_cuda",
    "test_graph",
)


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
    """The real ones, or small ones of the same kind that a CPU can do."""
    tests = ["-P", "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    tests += [str(path) for name in TESTS if (path := ROOT / "tests" / f"{name}.py").exists()]
    device = ["--device", "cpu" if dry else "cuda"]

    def module(name: str, *options: str, result: str) -> list[str]:
        return ["-m", f"bench{name}", *options, *device, "--json", str(out / result)]

    run = ["run", "gather_tiles", "--quick", "--rounds", "2"] if dry else ["run", "--dtype", "float16", "--budget", "4"]
    found = [
        Step("tests", [*tests, "--collect-only"] if dry else tests, 200),
        Step("suite", module("", *run, result="suite.json"), 130, "suite.json"),
    ]
    if not dry:
        brief = ["run", "--quick", "--rounds", "20", "--dtype", "bfloat16"]
        found.append(Step("suite in bfloat16", module("", *brief, result="suite_bf16.json"), 60, "suite_bf16.json"))
        graph = ["-m", "bench.bench_graph", "--rounds", "2", "--json", str(out / "graph.json")]
        found.append(Step("graph", graph, 100, "graph.json"))
    sizes = ["128", "256"] if dry else ["512", "1024", "2048", "4096"]
    work = ["--work", str(out / "work")]
    found.append(
        Step(
            "scaling",
            module(".scaling", "--sizes", *sizes, "--steps", "1" if dry else "4", *work, result="scaling.json"),
            90,
            "scaling.json",
        )
    )
    only = ["--only", "tiledcore, shift", "SpotDiffusion"] if dry else []
    size = ["--size", "512", "--steps", "1"] if dry else ["--size", "1024", "--steps", "8"]
    found.append(Step("peers", module(".peers_table", *size, *only, *work, result="peers.json"), 180, "peers.json"))
    return found


def run(step: Step, remaining: float, out: Path) -> dict[str, Any]:
    """Run it; status ``passed``, ``failed`` or ``out of time``, seconds, and the end of what it said."""
    limit, begin = min(step.limit, remaining), time.monotonic()
    about = {"name": step.name, "command": ["python", *step.command]}
    if limit < 5:
        return about | {"status": "out of time", "seconds": 0.0, "tail": "not started"}
    log = out / f"{step.name}.log"
    with log.open("w") as target:
        try:
            done = subprocess.run(
                [sys.executable, *step.command], cwd=ROOT, stdout=target, stderr=subprocess.STDOUT, timeout=limit
            )
            status = "passed" if done.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    result = about | {"status": status, "seconds": round(time.monotonic() - begin, 1), "tail": tail}
    path = out / step.result if step.result else None
    if path is not None and path.exists():
        result["data"] = json.loads(path.read_text())
    return result


def markdown(steps_done: list[dict[str, Any]], dry: bool) -> str:
    tests = next(step for step in steps_done if step["name"] == "tests")
    lines = ["# GPU suite", ""]
    if dry:
        lines += ["**Dry run on a CPU: the steps go through, and no figure here is of a GPU.**", ""]
    lines += [f"Tests of the kernels: **{tests['status']}**.", "", "| step | status | s |", "|---|---|---|"]
    lines += [f"| {step['name']} | {step['status']} | {step['seconds']} |" for step in steps_done]
    for step in steps_done:
        data = step.get("data")
        if step["status"] != "passed":
            lines += ["", f"## {step['name']}: {step['status']}", "", "```", step["tail"], "```"]
        if data is None:
            continue
        lines += ["", f"## {step['name']}", ""]
        if step["name"].startswith("suite"):
            lines.append(suite.markdown(data))
        elif step["name"] == "scaling":
            powers = data["about"]["fitted_powers_of_the_area"]
            lines += [scaling.table(data["rows"]), "", f"Fitted powers of the area: {powers}"]
        elif step["name"] == "peers":
            lines += [peers_table.table(data["rows"]), "", *(f"- {line}" for line in data["verdict"])]
        elif step["name"] == "graph":
            lines += ["| UNet | tile | steps | eager s | graph s | speed-up |", "|---|---|---|---|---|---|"]
            lines += [
                f"| {row['unet']} | {row['tile']} | {row['steps']} | {row['eager']:.3f} | {row['graph']:.3f} "
                f"| {row['speedup']:.2f}× |"
                for row in data["results"]
            ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_suite.sh", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for gpu_suite.json and gpu_suite.md")
    parser.add_argument("--dry-run", action="store_true", help="small steps on a CPU, to see that all go through")
    args = parser.parse_args(argv)
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: only --dry-run works here")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    begin, done = time.monotonic(), []
    for step in steps(out, args.dry_run):
        if step.result:
            (out / step.result).unlink(missing_ok=True)  # not what an earlier run left
        # A dry run's machine may be slow: there the limits are no promise.
        remaining = DRY_LIMIT if args.dry_run else LIMIT - (time.monotonic() - begin)
        done.append(run(replace(step, limit=DRY_LIMIT) if args.dry_run else step, remaining, out))
        print(f"{step.name}: {done[-1]['status']} in {done[-1]['seconds']} s", flush=True)
        # Written after each step: a machine that is taken away leaves what there is.
        whole = {"dry_run": args.dry_run, "seconds": round(time.monotonic() - begin, 1), "steps": done}
        (out / "gpu_suite.json").write_text(json.dumps(whole, indent=1) + "\n")
        (out / "gpu_suite.md").write_text(markdown(done, args.dry_run))
    return int(any(step["status"] != "passed" for step in done))


if __name__ == "__main__":
    sys.exit(main())

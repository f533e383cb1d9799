"""All cases, and the run over them: correct first, then timed, beside what the device can do at most."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench import bench_blend_tiles, bench_fused_step, bench_gather_tiles, bench_neighbor_attention, timing
from bench.case import Case, Ready

MODULES = (bench_gather_tiles, bench_blend_tiles, bench_neighbor_attention, bench_fused_step)
"""Each has ``cases()``."""

Results = dict[str, Any]
ULPS = 100
"""Allowed relative error of a result, in units of its dtype's epsilon."""


def all_cases() -> list[Case]:
    return [case for module in MODULES for case in module.cases()]


def chosen(names: Iterable[str], quick: bool, cases: list[Case] | None = None) -> list[Case]:
    """Cases whose name contains one of ``names``, or all; with ``quick`` only those that are.

    Raises:
        ValueError: a name is part of no case's.
    """
    found, names = all_cases() if cases is None else cases, list(names)
    for name in names:
        if not any(name in case.name for case in found):
            raise ValueError(f"case={name!r}: in no name of {', '.join(dict.fromkeys(case.op for case in found))}")
    found = [case for case in found if not names or any(name in case.name for name in names)]
    return [case for case in found if case.quick] if quick and not names else found


def run_case(case: Case, device: torch.device, dtype: torch.dtype, rounds: int, budget: float) -> list[dict[str, Any]]:
    """One row for each provider.

    Args:
        case: what to run.
        device: where.
        dtype: of the data.
        rounds: samples of each provider, 5 at least; fewer where they would take more than ``budget`` seconds.
        budget: seconds for the samples of all providers.

    Returns:
        Rows with ``seconds`` (median), ``low`` and ``high`` (quartiles), ``samples``, ``bytes``, ``flops``, ``error``;
        ``wrong`` where the error is above rounding, and then no time; ``not_run`` with the reason.
    """
    about = {"case": case.name, "op": case.op, "shapes": case.shapes}
    with torch.inference_mode():
        first = case.prepare(device, dtype)
        errors = first.errors()
        wrong = {name: error for name, error in errors.items() if not error <= ULPS * torch.finfo(dtype).eps}
        rows: list[dict[str, Any]] = [
            about | {"name": name, "error": error, "wrong": f"differs by {error:.2g} from {case.oracle}"}
            for name, error in wrong.items()
        ]
        bad = {provider for names in wrong for provider in names.split(", ")}
        runs, missing = {}, dict(first.not_run)
        for name in (name for name in first.runs if name not in bad):
            try:
                first.runs[name]()
            except Exception as error:  # a provider that does not run here is no reason to lose the others
                missing[name] = _reason(error)
            else:
                runs[name] = first.runs[name]
        rotated, calls, how = _rotate(case, first, runs, device, dtype)
        once = timing.samples(rotated, device, 1, calls)
        cost = sum(values[0] * 2 * calls[name] for name, values in once.items())
        rounds = max(5, min(rounds, int(budget / max(cost, 1e-9))))
        taken = timing.samples(rotated, device, rounds, calls)
    for name, values in taken.items():
        low, median, high = statistics.quantiles(values, n=4)
        row = {
            "name": name,
            "seconds": median,
            "low": low,
            "high": high,
            "samples": [float(f"{v:.4g}") for v in values],
            "timed": how[name],
        }
        row |= {"bytes": first.bytes.get(name, 0), "flops": 0 if name == "copy" else first.flops}
        found = next((e for names, e in errors.items() if name in names.split(", ")), None)
        rows.append(about | row | ({} if found is None else {"error": found}))
    timed: list[dict[str, Any]] = [row for row in rows if "seconds" in row]
    for base in (row for row in timed if row["name"] == first.baseline):
        for row in timed:
            row["speedup"] = base["seconds"] / row["seconds"]
    return rows + [about | {"name": name, "not_run": reason} for name, reason in missing.items()]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _rotate(
    case: Case, first: Ready, runs: dict[str, Callable[[], Any]], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Any]], dict[str, int], dict[str, str]]:
    """The candidates as they are timed, how many calls each stands for, and whether as a graph."""
    if device.type != "cuda":
        return runs, {name: timing.repeats(run) for name, run in runs.items()}, dict.fromkeys(runs, "eager")
    moved = max(first.bytes.values(), default=1)
    others = [case.prepare(device, dtype) for _ in range(timing.copies(moved, device) - 1)]
    rotated, how = {}, {}
    for name, run in runs.items():
        rotated[name], how[name] = timing.rotation([run, *(other.runs[name] for other in others)], device)
    return rotated, dict.fromkeys(runs, 1 + len(others)), how


def run(
    cases: list[Case],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    budget: float,
    say: Callable[[str], None] = print,
) -> Results:
    """All rows, the ceilings, and what a reader must know to compare them."""
    begin = time.perf_counter()
    ceiling = timing.ceilings(device, dtype)
    before = timing.clocks(device)
    say(f"{timing.machine(device)} {dtype}, copy {ceiling['copy_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"matmul {ceiling['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for case in cases:
        try:
            found = run_case(case, device, dtype, rounds, budget)
        except Exception as error:  # nor is a case that cannot be prepared or checked; but the run has failed
            reason = f"could not be run: {_reason(error)}"
            found = [{"case": case.name, "op": case.op, "shapes": case.shapes, "name": "all", "wrong": reason}]
        for row in found:
            row["of_ceiling"] = of_ceiling(row, ceiling)
        rows += found
        say(text(case, found))
    machine: dict[str, Any] = {**timing.machine(device), "clocks": before, "clocks_after": timing.clocks(device)}
    machine["load"] = [round(x, 2) for x in os.getloadavg()]
    took = round(time.perf_counter() - begin, 1)
    return {"machine": machine, "dtype": str(dtype), "ceilings": ceiling, "took_seconds": took, "results": rows}


def of_ceiling(row: dict[str, Any], ceiling: dict[str, float]) -> float | None:
    """The share of the time that the copy of the bytes, or the product of as many FLOPs, would have taken."""
    if "seconds" not in row:
        return None
    memory = row["bytes"] / ceiling["copy_bytes_per_second"]
    return max(memory, row["flops"] / ceiling["matmul_flops_per_second"]) / row["seconds"]


def text(case: Case, rows: list[dict[str, Any]]) -> str:
    lines = [f"\n{case.name}", f"{'':14}{'median ms':>10}{'quartiles':>19}{'speed-up':>9}{'ceiling':>8}{'error':>9}"]
    for row in rows:
        if "seconds" not in row:
            lines.append(
                f"{row['name']:14}{'WRONG: ' + row['wrong'] if 'wrong' in row else 'not run: ' + row['not_run']}"
            )
            continue
        spread = f"{row['low'] * 1e3:.3f} to {row['high'] * 1e3:.3f}"
        speed = f"{row['speedup']:.2f}" if "speedup" in row else "–"
        error = f"{row['error']:.1e}" if "error" in row else "–"
        lines.append(
            f"{row['name']:14}{row['seconds'] * 1e3:10.3f}{spread:>19}{speed:>9}{row['of_ceiling']:8.0%}{error:>9}"
        )
    return "\n".join(lines)


def dumps(results: Results) -> str:
    """JSON with a line for each row, so that a file of a thousand samples can be read and compared."""
    head = json.dumps({key: value for key, value in results.items() if key != "results"}, indent=1)
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in results["results"])
    return head.removesuffix("\n}") + f',\n "results": [\n  {rows}\n ]\n}}\n'


def markdown(results: Results) -> str:
    """The rows as a table of Markdown."""
    machine, ceiling = results["machine"], results["ceilings"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, {results['dtype'].removeprefix('torch.')}; copy "
        f"{ceiling['copy_bytes_per_second'] / 1e9:.1f} GB/s, matrix product "
        f"{ceiling['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s",
        "",
        "| case | way | median ms | quartiles | speed-up | of the ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["results"]:
        start = f"| {row['case']} | {row['name']} "
        if "seconds" not in row:
            lines.append(
                f"{start}| {'wrong: ' + row['wrong'] if 'wrong' in row else 'not run: ' + row['not_run']} | | | |"
            )
            continue
        speed = f"{row['speedup']:.2f}×" if "speedup" in row else "–"
        spread = f"{row['low'] * 1e3:.3g}–{row['high'] * 1e3:.3g}"
        lines.append(f"{start}| {row['seconds'] * 1e3:.3g} | {spread} | {speed} | {row['of_ceiling']:.0%} |")
    return "\n".join(lines)

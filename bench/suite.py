"""The suite: all cases. Each provider is checked against the oracle first; what is wrong is not timed."""

import importlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import measure
from bench.case import Case, Ready, relative_error

OPS = ("gather_tiles", "blend_tiles", "fused_step", "group_norm_silu", "neighbor_attention", "vae")
MODULES = [importlib.import_module(f"bench.bench_{op}") for op in OPS]  # each has ``cases()``

Row = dict[str, Any]
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-5, torch.float64: 1e-12}
"""Allowed error of a result relative to the expected one, in the norm."""


def all_cases() -> list[Case]:
    return [case for module in MODULES for case in module.cases()]


def chosen(names: Iterable[str], quick: bool) -> list[Case]:
    """Cases whose name contains one of ``names``, or all; with ``quick`` the small ones of these.

    Raises:
        ValueError: a name is part of no case's name.
    """
    cases, names = all_cases(), list(names)
    for name in names:
        if not any(name in case.name for case in cases):
            raise ValueError(f"case={name!r}: in no name of {', '.join(dict.fromkeys(case.op for case in cases))}")
    named = [case for case in cases if not names or any(name in case.name for name in names)]
    return [case for case in named if case.quick or not quick]


def run_case(
    case: Case, device: torch.device, dtype: torch.dtype, seconds: float, rounds: int, ceiling: dict[str, float]
) -> list[Row]:
    """One row for each provider.

    Returns:
        Rows with ``seconds`` (median), ``low`` and ``high`` (quartiles), ``samples`` (one a round), ``bytes``,
        ``flops``, ``peak_bytes``, ``error`` and ``of_ceiling``: the time that a copy of the bytes or a product of as
        many FLOPs takes at best, over the time taken. A provider with too large an error has ``wrong`` and no time;
        one that cannot run has ``not_run``. A broken case must not lose the others: it gives one row, which is wrong.
    """
    about = {"case": case.name, "op": case.op, "shapes": case.shapes}
    try:
        with torch.inference_mode():
            ready = case.prepare(device, dtype)
            errors, missing = checked(ready)
            good = {n: run for n, run in ready.runs.items() if n not in missing and errors.get(n, 0.0) <= LIMITS[dtype]}
            peaks = {name: measure.peak_growth(run, device)[0] for name, run in good.items()}
            found = measure.interleaved(good, device, seconds, rounds)
    except Exception as error:
        return [about | {"name": "all", "wrong": f"could not be run: {reason(error)}"}]
    rows: list[Row] = []
    for name, samples in found.items():
        low, middle, high = np.percentile(samples, (25, 50, 75)).tolist()
        row: Row = {"name": name, "seconds": middle, "low": low, "high": high, "peak_bytes": peaks[name]}
        row |= {"samples": [float(f"{value:.4g}") for value in samples]}
        row |= {"bytes": ready.bytes.get(name, 0), "flops": 0 if name == "copy" else ready.flops}
        memory = row["bytes"] / ceiling["copy_bytes_per_second"]
        row["of_ceiling"] = max(memory, row["flops"] / ceiling["matmul_flops_per_second"]) / middle
        if ready.baseline in found:
            row["speedup"] = float(np.median(found[ready.baseline])) / middle
        rows.append(row | ({"error": errors[name]} if name in errors else {}))
    for name, apart in errors.items():
        if name not in found:
            rows.append({"name": name, "error": apart, "wrong": f"differs by {apart:.2g} from {case.oracle}"})
    return [about | row for row in (*rows, *({"name": name, "not_run": why} for name, why in missing.items()))]


def checked(ready: Ready) -> tuple[dict[str, float], dict[str, str]]:
    """The error of each provider except ``copy``, and why some do not run."""
    expected = ready.expected()
    errors, missing = {}, dict(ready.not_run)
    for name, run in ready.runs.items():
        wanted = ready.others[name]() if name in ready.others else expected
        # What a provider leaves unwritten is NaN: in its buffers, and in freed memory of the result's size.
        for buffer in ready.buffers:
            buffer.fill_(torch.nan)
        for dtype in LIMITS:
            torch.full_like(wanted, torch.nan, dtype=dtype)
        try:
            result = run()
        except Exception as error:  # one provider that fails must not stop the others
            missing[name] = reason(error)
            continue
        if name != "copy":
            errors[name] = relative_error(ready.shown.get(name, lambda tensor: tensor)(result), wanted)
    return errors, missing


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def run(cases: list[Case], device: torch.device, dtype: torch.dtype, seconds: float, rounds: int) -> dict[str, Any]:
    """All rows, the ceilings and the machine. ``seconds`` and ``rounds`` are for each case."""
    begin, ceiling = time.perf_counter(), measure.ceilings(device, dtype)
    rows: list[Row] = []
    results: dict[str, Any] = {"machine": measure.machine(device), "dtype": str(dtype), "ceilings": ceiling}
    about = results["machine"]
    print(f"{about['device']}, torch {about['torch']}, {results['dtype'].removeprefix('torch.')}; {best(ceiling)}")
    for case in cases:
        rows += (found := run_case(case, device, dtype, seconds, rounds, ceiling))
        print(f"\n{case.name}", *map(text, found), sep="\n", flush=True)
    about["load"] = [round(x, 2) for x in os.getloadavg()]
    return results | {"took_seconds": round(time.perf_counter() - begin, 1), "results": rows}


def best(ceiling: dict[str, float]) -> str:
    copy, product = ceiling["copy_bytes_per_second"] / 1e9, ceiling["matmul_flops_per_second"] / 1e12
    return f"copy {copy:.1f} GB/s, matrix product {product:.3g} TFLOP/s"


def text(row: Row) -> str:
    """One row for the terminal: median, quartiles, speed-up, share of the ceiling, memory, error; or why not."""
    if "seconds" not in row:
        why = f"wrong: {row['wrong']}" if "wrong" in row else f"not run: {row['not_run']}"
        return f"  {row['name']:16}{why}"
    spread = f"{row['low'] * 1e3:.3g}–{row['high'] * 1e3:.3g}"
    speed = f"{row['speedup']:.2f}×" if "speedup" in row else "–"
    share = f"{row['of_ceiling']:.0%}" if row["of_ceiling"] else "–"
    error = f"error {row['error']:.1e}" if "error" in row else ""
    peak = f"+{row['peak_bytes'] / 2**20:.0f} MiB"
    return f"  {row['name']:16}{row['seconds'] * 1e3:>8.3g} ms {spread:>15} {speed:>8} {share:>6} {peak:>10}  {error}"


def dumps(results: dict[str, Any]) -> str:
    """JSON with one line for each row, so that two files can be compared line by line."""
    start = json.dumps({key: value for key, value in results.items() if key != "results"}, indent=1)
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in results["results"])
    return start.removesuffix("\n}") + f',\n "results": [\n  {rows}\n ]\n}}\n'


def load(path: Path) -> dict[tuple[str, str], list[float]]:
    """(case, provider) -> its samples, of a file of ``python -m bench run --json``; ValueError if it is another one."""
    data = json.loads(path.read_text())
    rows = data.get("results", ()) if isinstance(data, dict) else ()
    if not any("samples" in row for row in rows):
        raise ValueError(f"{path}: not written by `python -m bench run --json`")
    return {(row["case"], row["name"]): row["samples"] for row in rows if row.get("samples")}


def verdict(before: list[float], after: list[float]) -> tuple[str, str]:
    """``slower`` or ``faster`` by more than 5 % and the noise, otherwise ``same``; and the figures as text.

    The noise is half the distance of the quartiles, relative to the median, both runs added.
    """
    (low, a, high), (low_after, b, high_after) = (np.percentile(samples, (25, 50, 75)) for samples in (before, after))
    noise = (high - low) / 2 / a + (high_after - low_after) / 2 / b
    limit = 1 + max(0.05, noise)
    told = "slower" if b / a > limit else "faster" if b / a < 1 / limit else "same"
    return told, f"{a * 1e3:10.3f}{b * 1e3:10.3f}{b / a:7.2f}{noise:7.0%}  {told:7}"


def compare(before: Path, after: Path) -> bool:
    """Print a line for each provider of a case. Returns whether one became slower."""
    one, two = load(before), load(after)
    both = {key: verdict(one[key], two[key]) for key in sorted(one.keys() & two.keys())}
    print(f"{'before ms':>10}{'after ms':>10}{'ratio':>7}{'noise':>7}  verdict")
    for (case, name), (_, line) in both.items():
        print(f"{line} {name} of {case}")
    for key in sorted(one.keys() ^ two.keys()):
        print(f"only in {'first' if key in one else 'second'}: {', '.join(key)}")
    return any(told == "slower" for told, _ in both.values())

"""Write the tables of docs/benchmarks.md from bench/results: ``python -m bench tables``."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import modes, oracle

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs" / "benchmarks.md",)
RESULTS = ROOT / "bench" / "results"

NOT_SHOWN = ("75 % overlap", "canvas mode: core 16 sees 8", "coarse pass, then shifted tiles, pull and match")
"""Beginnings of the oracle's rows that say little more than their neighbours: a page's table has at most 15 rows."""

Data = dict[str, Any]


def _machine(data: Data) -> str:
    return f"{data['machine']['device']}, torch {data['machine']['torch']}"


def _pairs(data: Data, op: str, baseline: str, own: str) -> list[tuple[Data, Data, str]]:
    """The rows of the baseline and of ours for each case of an op, and the start of a row that has both times."""
    timed = {(row["shapes"], row["name"]): row for row in data["results"] if row["op"] == op and "seconds" in row}
    found = [(timed[shapes, baseline], timed[shapes, own]) for shapes, name in timed if name == own]
    return [
        (a, b, f"| {b['shapes']} | {a['seconds'] * 1e3:.2f} ms | {b['seconds'] * 1e3:.2f} ms | {b['speedup']:.1f}× |")
        for a, b in found
    ]


def _blend(data: Data) -> str:
    lines = ["| `blend_tiles`, ramp | Python loop | native | | of the ceiling |", "|---" * 5 + "|"]
    pairs = _pairs(data, "blend_tiles", "python loop", "native")
    return "\n".join([*lines, *(f"{start} {own['of_ceiling']:.0%} |" for _, own, start in pairs)])


def _step(data: Data) -> str:
    lines = ["| a step outside the network | loop | fused, ramp | | MB moved, fused of loop |", "|---" * 5 + "|"]
    for loop, own, start in _pairs(data, "fused_step", "loop", "ramp"):
        lines.append(f"{start} {own['bytes'] / 1e6:.0f} of {loop['bytes'] / 1e6:.0f} |")
    return "\n".join(lines)


def _modes(data: Data) -> str:
    about = data["about"]
    images = f"{len(about['prompts'])} prompts x {about['seeds']} seeds"
    head = f"{_machine(data)}, {about['dtype']}; {about['model']}, {about['size']}², {about['steps']} steps, {images}"
    return "\n".join([head, "", modes.table(data["rows"]), "", *modes.verdict(data["rows"])])


def _oracle(data: Data) -> str:
    about = data["about"]
    head = f"{about['seeds']} times {about['fields']} fields of {about['side']}², {about['steps']} steps"
    shown = [row for row in data["rows"] if not row["name"].startswith(NOT_SHOWN)]
    return "\n".join([head, "", oracle.table(shown)])


def _ranks(data: Data) -> str:
    about, rows = data["about"], data["rows"]
    links = ", ".join(f"{link} {speed / 1e9:.0f} GB/s" for link, speed in about["links"].items())
    head = f"{about['flops'] / 1e12:.0f} TFLOP/s, of which {about['reached']:.0%} are reached; {links}"
    counts = sorted({row["gpus"] for row in rows} - {1})
    columns = " | ".join(f"{count} GPUs" for count in counts)
    lines = [head, "", f"| a step of | one GPU | received | {columns} |", "|---" * (3 + len(counts)) + "|"]
    for one in (row for row in rows if row["gpus"] == 1):
        more = [r for r in rows if (r["model"], r["size"]) == (one["model"], one["size"]) and r["gpus"] > 1]
        start = f"| {one['model']} {one['size']}² | {one['NVLink']:.2f} s | {more[-1]['received'] / 2**20:.1f} MiB |"
        cells = [f"{r['NVLink x']:.1f} / {r['PCIe 5 x']:.1f}" for r in more]
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[Data], str]]] = {
    "oracle": ("oracle.json", _oracle),
    "ranks": ("ranks_simulated.json", _ranks),
    "blend": ("cpu_suite.json", _blend),
    "step": ("cpu_suite.json", _step),
    "modes-earth-1024": ("modes_earth_1024.json", _modes),
    "modes-flux-1024": ("modes_flux_1024.json", _modes),
    "modes-flux-2048": ("modes_flux_2048.json", _modes),
}
"""Marker -> its file in bench/results, and how the table is written."""


def filled(text: str, results: Path = RESULTS) -> str:
    """The page with new tables between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``.

    Without a result file the page says that nothing was measured.

    Raises:
        ValueError: a marker is of no table, or is not closed.
    """

    def replace(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise ValueError(f"bench:{name}: must be one of {', '.join(TABLES)}")
        file, write = TABLES[name]
        path = results / file
        table = write(json.loads(path.read_text())) if path.exists() else f"Not measured yet (bench/results/{file})."
        return f"<!-- bench:{name} -->\n{table}\n<!-- /bench:{name} -->"

    opened = re.findall(r"<!-- bench:([\w-]+) -->", text)
    pattern = r"<!-- bench:(?P<name>[\w-]+) -->\n.*?<!-- /bench:(?P=name) -->"
    result, count = re.subn(pattern, replace, text, flags=re.DOTALL)
    if count != len(opened):
        raise ValueError(f"{len(opened)} markers bench:… are opened and {count} are closed")
    return result


def main(check: bool = False, pages: Sequence[Path] = PAGES, results: Path = RESULTS) -> int:
    """Write the pages. With ``check`` write nothing, and return 1 if a page would change."""
    changed = 0
    for page in pages:
        old = page.read_text()
        new = filled(old, results)
        changed |= new != old
        if not check and new != old:
            page.write_text(new)
    return int(check and changed)

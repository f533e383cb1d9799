"""Write the tables of docs/benchmarks.md from bench/results: ``python -m bench tables``."""

import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import measure, modes, oracle

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "bench" / "results"

Data = dict[str, Any]


def _times(data: Data, op: str, baseline: str, own: str, head: list[str], last: Callable[[Data, Data], str]) -> str:
    """A table of an op's cases: the baseline's time, ours, how many times as fast, and what ``last`` says of both."""
    timed = {(row["shapes"], row["name"]): row for row in data["results"] if row["op"] == op and "seconds" in row}
    pairs = [(timed[shapes, baseline], row) for (shapes, name), row in timed.items() if name == own]
    ms = ([f"{row['seconds'] * 1e3:.2f} ms" for row in pair] for pair in pairs)
    rows = ([b["shapes"], *times, f"{b['speedup']:.1f}×", last(a, b)] for (a, b), times in zip(pairs, ms, strict=True))
    return measure.markdown(head, rows)


def _blend(data: Data) -> str:
    head = ["`blend_tiles`, ramp", "Python loop", "native", "", "of the ceiling"]
    return _times(data, "blend_tiles", "python loop", "native", head, lambda _, own: f"{own['of_ceiling']:.0%}")


def _step(data: Data) -> str:
    def moved(loop: Data, own: Data) -> str:
        return f"{own['bytes'] / 1e6:.0f} of {loop['bytes'] / 1e6:.0f}"

    head = ["a step outside the network", "loop", "fused, ramp", "", "MB moved, fused of loop"]
    return _times(data, "fused_step", "loop", "ramp", head, moved)


def _modes(data: Data) -> str:
    about, machine = data["about"], data["machine"]
    head = f"{machine['device']}, torch {machine['torch']}, {about['dtype']}; {about['model']}, {about['size']}², "
    head += f"{about['steps']} steps, {len(about['prompts'])} prompts x {about['seeds']} seeds"
    return "\n".join([head, "", modes.table(data["rows"]), "", *modes.verdict(data["rows"])])


def _oracle(data: Data) -> str:
    about = data["about"]
    head = f"{about['seeds']} times {about['fields']} fields of {about['side']}², {about['steps']} steps"
    return "\n".join([head, "", oracle.table(data["rows"])])


def _ranks(data: Data) -> str:
    about, rows = data["about"], data["rows"]
    links = ", ".join(f"{link} {speed / 1e9:.0f} GB/s" for link, speed in about["links"].items())
    head = f"{about['flops'] / 1e12:.0f} TFLOP/s, of which {about['reached']:.0%} are reached; {links}"
    columns = [f"{count} GPUs" for count in sorted({row["gpus"] for row in rows} - {1})]
    cells = []
    for _, group in groupby(rows, lambda row: (row["model"], row["size"])):
        one, *more = group
        start = [f"{one['model']} {one['size']}²", f"{one['NVLink']:.2f} s", f"{more[-1]['received'] / 2**20:.1f} MiB"]
        cells.append([*start, *(f"{row['NVLink x']:.1f} / {row['PCIe 5 x']:.1f}" for row in more)])
    return "\n".join([head, "", measure.markdown(["a step of", "one GPU", "received", *columns], cells)])


TABLES: dict[str, tuple[str, Callable[[Data], str]]] = {
    "oracle": ("oracle.json", _oracle),
    "ranks": ("ranks_simulated.json", _ranks),
    "blend": ("cpu_suite.json", _blend),
    "step": ("cpu_suite.json", _step),
    "modes-earth-1024": ("modes_earth_1024.json", _modes),
    "modes-earth-2048": ("modes_earth_2048.json", _modes),
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


def main(check: bool = False, page: Path = PAGE, results: Path = RESULTS) -> int:
    """Write the page. With ``check`` write nothing, and return 1 if it would change."""
    old = page.read_text()
    new = filled(old, results)
    if not check:
        page.write_text(new)
    return int(check and new != old)

"""The tables of docs/benchmarks.md and README.md, written between their markers: `python -m bench tables`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import modes, oracle, peers_table, regions, restyle, scaling, stages, suite, worlds

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
RESULTS = ROOT / "bench" / "results"


def _about(data: dict[str, Any]) -> str:
    machine = data["machine"]
    return f"{machine['device']}, torch {machine['torch']}"


def _ops(data: dict[str, Any]) -> str:
    cases = len({row["case"] for row in data["results"]})
    return suite.markdown(data).replace("\n", f"; {cases} cases in {data['took_seconds']:.0f} s\n", 1)


def _ways(data: dict[str, Any], op: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Shapes of an op -> way -> row, of what was timed."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in data["results"]:
        if row["op"] == op and "seconds" in row:
            found.setdefault(row["shapes"], {})[row["name"]] = row
    return found


def _blend(data: dict[str, Any]) -> str:
    lines = ["| `blend_tiles`, ramp | Python loop | native | | of the ceiling |", "|---" * 5 + "|"]
    for shapes, ways in _ways(data, "blend_tiles").items():
        if "native" in ways:
            loop, own = ways["python loop"], ways["native"]
            lines.append(
                f"| {shapes} | {loop['seconds'] * 1e3:.2f} ms | {own['seconds'] * 1e3:.2f} ms "
                f"| {own['speedup']:.1f}× | {own['of_ceiling']:.0%} |"
            )
    return "\n".join(lines)


def _step(data: dict[str, Any]) -> str:
    lines = ["| a step outside the network | loop | fused, ramp | | MB moved, fused of loop |", "|---" * 5 + "|"]
    for shapes, ways in _ways(data, "fused_step").items():
        loop, own = ways["loop"], ways["ramp"]
        lines.append(
            f"| {shapes} | {loop['seconds'] * 1e3:.2f} ms | {own['seconds'] * 1e3:.2f} ms | {own['speedup']:.1f}× "
            f"| {own['bytes'] / 1e6:.0f} of {loop['bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def _modes(data: dict[str, Any]) -> str:
    about = data["about"]
    head = f"{_about(data)}; {about['model']}, {about['size']}², {about['call']['num_inference_steps']} steps"
    return "\n".join([head, "", modes.table(data["rows"])])


def _against(data: dict[str, Any]) -> str:
    images = max(row.get("images", 0) for row in data["rows"])
    head = f"{_about(data)}; {data['about']['model']}, {data['about']['size']}², at most {images} images"
    return "\n".join([head, "", *modes.verdict(data["rows"])])


def _peers(data: dict[str, Any]) -> str:
    about = data["about"]
    head = f"{_about(data)}; {about['size']}², {about['call']['num_inference_steps']} steps, {about['seeds']} seed(s)"
    return "\n".join([head, "", peers_table.table(data["rows"]), "", *(f"- {line}" for line in data["verdict"])])


def _scaling(data: dict[str, Any]) -> str:
    powers = ", ".join(f"{k} {v:.2f}" for k, v in data["about"]["fitted_powers_of_the_area"].items())
    head = f"{_about(data)}; {data['about']['way']}, {data['about']['steps']} steps"
    return "\n".join([head, "", scaling.table(data["rows"]), "", f"Fitted powers of the area: {powers}."])


def _oracle(data: dict[str, Any]) -> str:
    about = data["about"]
    head = f"{about['seeds']} times {about['fields']} fields of {about['side']}², {about['steps']} steps"
    return "\n".join([head, "", oracle.table(data["rows"])])


def _stages(data: dict[str, Any]) -> str:
    about = data["about"]
    images = len(about["prompts"]) * about["seeds"]
    steps = about["call"]["num_inference_steps"]
    count = about["blend_steps"]
    blended = "default tiling" if count is None else f"the last {count} blended" if count else "none blended"
    head = f"{_about(data)}; earth-flux, {about['size']}², {steps} steps, {blended}, {images} images a way"
    return "\n".join([head, "", stages.table(data["rows"])])


def _regions(data: dict[str, Any]) -> str:
    about = data["about"]
    head = f"{_about(data)}; {about['model']}, {about['size']}², feather {about['feather']} px, {about['seeds']} scenes"
    return "\n".join([head, "", regions.table(data)])


def _worlds(data: dict[str, Any]) -> str:
    about = data["about"]
    head = f"{_about(data)}; {about['model']}, {about['size']}, {about['call']['num_inference_steps']} steps"
    return "\n".join([head, "", worlds.table(data["rows"])])


def _restyle(data: dict[str, Any]) -> str:
    about = data["about"]
    head = f"{_about(data)}; earth-flux, {about['size']}², {about['call']['num_inference_steps']} steps"
    return "\n".join([head, "", restyle.table(data["rows"])])


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "oracle": ("oracle.json", _oracle),
    "ops": ("cpu_suite.json", _ops),
    "blend": ("cpu_suite.json", _blend),
    "step": ("cpu_suite.json", _step),
    "modes-earth": ("modes_earth.json", _modes),
    "modes-flux": ("modes_flux.json", _modes),
    "against-earth": ("modes_earth.json", _against),
    "against-flux": ("modes_flux.json", _against),
    "against-earth-1024": ("modes_earth_1024.json", _against),
    "against-flux-1024": ("modes_flux_1024.json", _against),
    "peers": ("peers_earth.json", _peers),
    "scaling": ("scaling_earth.json", _scaling),
    "stages": ("stages_flux.json", _stages),
    "stages-1024": ("stages_flux_1024.json", _stages),
    "regions": ("regions_earth.json", _regions),
    "worlds": ("worlds_earth.json", _worlds),
    "worlds-map": ("worlds_map_4096.json", _worlds),
    "restyle": ("restyle_flux.json", _restyle),
}
"""Marker -> its file in bench/results, and how that is written."""


def filled(text: str, results: Path = RESULTS) -> str:
    """The page with what is between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->`` made anew.

    Where there are no results yet, the page says so and nothing else.

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
    """Write the pages, or with ``check`` tell by 1 that one would change. A page without markers stays as it is."""
    changed = 0
    for page in pages:
        old = page.read_text()
        new = filled(old, results)
        changed |= new != old
        if not check and new != old:
            page.write_text(new)
    return int(check and changed)

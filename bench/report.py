"""A run of the suite as one page that needs nothing else, and its plots as PNG files."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bench import peers_table, scaling, suite

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-size:13px}"
    "td,th{border-bottom:1px solid #ddd;padding:.2rem .6rem;text-align:left}"
    "img{max-width:100%}pre{overflow:auto}"
)


def roofline(run: dict[str, Any]) -> Figure:
    """Useful FLOP/s against useful FLOP per byte, under what copy and matrix product reached in the same run."""
    rate, bandwidth = (run["ceilings"][k] for k in ("matmul_flops_per_second", "copy_bytes_per_second"))
    figure, axes = plt.subplots(figsize=(8, 5))
    rows = [r for r in run["results"] if "seconds" in r and r["flops"] and r["bytes"]]
    for provider in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == provider]
        intensity = [row["flops"] / row["bytes"] for row in mine]
        axes.scatter(intensity, [row["flops"] / row["seconds"] / 1e9 for row in mine], label=provider, s=28)
    found = [row["flops"] / row["bytes"] for row in rows] or [1.0]
    span = [min(found) / 3, max([*found, rate / bandwidth]) * 3]
    line = [span[0], rate / bandwidth, span[1]]
    axes.plot(line, [min(rate, x * bandwidth) / 1e9 for x in line], color="black", lw=1, label="ceiling, measured")
    axes.set(xscale="log", yscale="log", xlabel="useful FLOP per byte", ylabel="useful GFLOP/s", title="Roofline")
    axes.legend(fontsize=8)
    return figure


def ceilings(run: dict[str, Any]) -> Figure:
    """For each case the share of its ceiling that each provider reaches."""
    rows = [row for row in run["results"] if "seconds" in row and row["name"] != "copy"]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.24 * len(rows)))
    axes.barh([f"{row['shapes'][:60]} · {row['op']} · {row['name']}" for row in rows],
              [100 * row["of_ceiling"] for row in rows])  # fmt: skip
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="% of the ceiling (copy of its bytes or product of its FLOPs)", title="How far from necessary")
    return figure


def areas(data: dict[str, Any]) -> Figure:
    """Time and memory of a generation against the canvas' area, doubly logarithmic."""
    rows = [row for row in data["rows"] if "seconds" in row]
    figure, pair = plt.subplots(1, 2, figsize=(10, 4))
    x = [row["size"] ** 2 / 1e6 for row in rows]
    powers = data["about"]["fitted_powers_of_the_area"]
    for axes, key, unit, label in zip(pair, ("seconds", "growth_bytes"), (1, 1e6), ("s", "MB"), strict=True):
        axes.plot(x, [row[key] / unit for row in rows], marker="o")
        title = f"area to the power {powers[key]:.2f}" if key in powers else ""
        axes.set(xscale="log", yscale="log", xlabel="megapixels", ylabel=label, title=title)
    return figure


def peers(data: dict[str, Any]) -> Figure:
    """Time against seam ratio, one point for each way."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for row in (row for row in data["rows"] if "seconds" in row):
        own = row["name"].startswith("tiledcore")
        axes.scatter(row["seconds"], row["seam_mean"], color="tab:red" if own else "tab:blue")
        axes.annotate(row["name"], (row["seconds"], row["seam_mean"]), fontsize=7, xytext=(4, 3),
                      textcoords="offset points")  # fmt: skip
    axes.set(xscale="log", xlabel="s of denoising", ylabel="seam ratio, mean (1 is an ordinary line)", title="Peers")
    return figure


def write(run_file: Path, scaling_file: Path | None, peers_file: Path | None, out: Path) -> Path:
    """``index.html`` with all plots and tables inside, and each plot as a PNG beside it; the page's path.

    Raises:
        OSError: a file cannot be read, or the folder not be made.
    """
    run = json.loads(run_file.read_text())
    parts = [("roofline", roofline(run)), ("ceilings", ceilings(run))]
    tables = [suite.markdown(run)]
    for path, name, plot in ((scaling_file, "area", areas), (peers_file, "peers", peers)):
        if path is not None:
            data = json.loads(path.read_text())
            parts.append((name, plot(data)))
            tables.append(scaling.table(data["rows"]) if name == "area" else peers_table.table(data["rows"]))
    out.mkdir(parents=True, exist_ok=True)
    body = [f"<pre>{html.escape(json.dumps(run['machine'], indent=1, ensure_ascii=False))}</pre>"]
    for name, figure in parts:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
        plt.close(figure)
        (out / f"{name}.png").write_bytes(buffer.getvalue())
        inside = base64.b64encode(buffer.getvalue()).decode()
        body.append(f'<img alt="{name}" src="data:image/png;base64,{inside}">')
    body += [table_html(table) for table in tables]
    page = out / "index.html"
    head = f'<!doctype html><meta charset="utf-8"><title>tiledcore benchmarks</title><style>{STYLE}</style>'
    page.write_text("\n".join([head, "<h1>tiledcore benchmarks</h1>", *body]) + "\n")
    return page


def table_html(markdown: str) -> str:
    """A table of Markdown, and any lines before it as a paragraph."""
    lines = markdown.splitlines()
    plain = [html.escape(line) for line in lines if line and not line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    text = [f"<p>{'<br>'.join(plain)}</p>"] if plain else []
    for index, row in enumerate(rows):
        tag = "th" if index == 0 else "td"
        if index != 1:  # the line of dashes
            text.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return "\n".join([*text[: bool(plain)], "<table>", *text[bool(plain) :], "</table>"])
